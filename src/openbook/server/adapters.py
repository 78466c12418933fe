"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM names them; off unless an operator names a folder."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel, Field

from openbook.core.errors import UserError
from openbook.server.body import JsonRoute
from openbook.server.errors import ApiError, user_error
from openbook.server.schema_common import ERRORS, Strict
from openbook.server.served_model import ADAPTER_MARK, ServedModel
from openbook.server.state import ServerState, State

router = APIRouter(route_class=JsonRoute, tags=["adapters"])

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class LoadAdapterRequest(Strict):
    """An adapter in PEFT's format."""

    lora_name: str = Field(pattern=NAME_PATTERN, description="What to call it.")
    lora_path: str = Field(min_length=1, max_length=1000, description="Its folder, within the server's --adapter-dir.")
    model: str | None = Field(None, description="The model that it changes; the first that is served if not given.")


class UnloadAdapterRequest(Strict):
    """An adapter that is loaded."""

    lora_name: str = Field(pattern=NAME_PATTERN)
    model: str | None = Field(None, description="The model that it changes; the first that is served if not given.")


class AdapterResult(BaseModel):
    """What was done."""

    id: str = Field(description="The model name for requests that want the adapter.")
    is_loaded: bool


@router.post("/v1/load_lora_adapter", responses=ERRORS)
async def load_adapter(body: LoadAdapterRequest, state: State) -> AdapterResult:
    """Load an adapter; answers go on meanwhile."""
    model = _model(state, body.model)
    path = _path(state, body.lora_path)
    try:
        await model.engine.load_adapter(body.lora_name, str(path))
    except UserError as error:
        raise user_error(error, "lora_name" if body.lora_name in model.engine.adapters else "lora_path") from error
    return AdapterResult(id=f"{model.name}{ADAPTER_MARK}{body.lora_name}", is_loaded=True)


@router.post("/v1/unload_lora_adapter", responses=ERRORS)
async def unload_adapter(body: UnloadAdapterRequest, state: State) -> AdapterResult:
    """Forget an adapter, when the answers that use it have ended."""
    model = _model(state, body.model)
    _folder(state)
    try:
        await model.engine.unload_adapter(body.lora_name)
    except UserError as error:
        raise user_error(error, "lora_name") from error
    return AdapterResult(id=f"{model.name}{ADAPTER_MARK}{body.lora_name}", is_loaded=False)


def _model(state: ServerState, name: str | None) -> ServedModel:
    return state.models.first if name is None else state.models.find(name).model


def _folder(state: ServerState) -> Path:
    if state.settings.adapter_dir is None:
        raise ApiError(
            403, "adapters are not loaded on request here: start the server with --adapter-dir", code="adapters_off"
        )
    return state.settings.adapter_dir.resolve()


def _path(state: ServerState, given: str) -> Path:
    """A folder within the operator's; links are followed first, so that none leads out."""
    folder = _folder(state)
    try:
        path = (folder / given).resolve()
        is_there = path.is_relative_to(folder) and path.is_dir()
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        raise ApiError(
            400,
            f"there is no adapter {given[:200]!r} in the server's folder of adapters: give the name of a folder in it",
            param="lora_path",
        )
    return path
