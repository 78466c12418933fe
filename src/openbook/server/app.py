"""The application: all endpoints over some models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from openbook.server import adapters, chat, completions, docs_page, embeddings, models, responses, status, tokens
from openbook.server.errors import add_error_handlers
from openbook.server.gate import Gate
from openbook.server.page import mount_page
from openbook.server.served_model import ServedModel
from openbook.server.settings import ServerSettings
from openbook.server.state import ServerState

DESCRIPTION = (
    "The OpenAI API over models that run here. An unknown parameter is an error, and so is one that would have no "
    "effect, unless its description says that it has none. Errors are JSON and name the parameter."
)
ROUTERS = (
    chat.router,
    completions.router,
    responses.creation,
    responses.router,
    embeddings.router,
    models.router,
    tokens.router,
    adapters.router,
    status.router,
    docs_page.router,
)
_EXPOSED = [
    "retry-after",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description without FastAPI's own errors for what a request lacks: here they are as all others."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(served: Sequence[ServedModel], settings: ServerSettings | None = None) -> FastAPI:
    """An application that serves models; `app.state.openbook` is its `ServerState`.

    Args:
        served: the models, with their engines, which are closed when the application ends.

    Raises:
        UserError: no model, two of one name, or a key that is none.
    """
    state = ServerState(served, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if not state.is_draining:
            await state.drain(0)
        if state.responses is not None:
            await state.responses.close()

    app = _App(
        title="Openbook",
        version=metadata.version("openbook"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.state.openbook = state
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    mount_page(app)
    app.add_middleware(Gate, state=state)
    if state.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(state.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    return app
