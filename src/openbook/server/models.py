"""/v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from openbook.server.schema_common import ERRORS
from openbook.server.served_model import Target
from openbook.server.state import State

router = APIRouter(tags=["models"])


class Model(BaseModel):
    """A model, or a model with an adapter."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "openbook"
    root: str = Field(description="The model's own name.")
    parent: str | None = Field(description="The model that an adapter changes.")
    aliases: list[str] = Field(description="Other names that `model` may have in requests.")
    openbook: dict[str, Any] = Field(description="What it can do, for the page.")


class ModelList(BaseModel):
    """All models."""

    object: str = "list"
    data: list[Model]


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    """All models, each followed by its adapters."""
    return ModelList(data=[_describe(target) for target in state.models.targets()])


@router.get("/v1/models/{name:path}", responses={404: ERRORS[404]})
async def get_model(name: str, state: State) -> Model:
    """One model by its name or alias."""
    return _describe(state.models.find(name))


def _describe(target: Target) -> Model:
    model = target.model
    return Model(
        id=target.name,
        created=model.created_s,
        root=model.name,
        parent=None if target.adapter is None else model.name,
        aliases=[] if target.adapter is not None else list(model.aliases),
        openbook=model.describe(),
    )
