"""/health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from openbook.server.errors import ApiError
from openbook.server.metrics import CONTENT_TYPE
from openbook.server.schema_common import ERRORS
from openbook.server.state import State

router = APIRouter(tags=["status"])


class Health(BaseModel):
    """That the server takes requests."""

    status: str = "ok"


@router.get("/health", responses={503: ERRORS[503]})
async def health(state: State) -> Health:
    """Whether requests are taken: 503 while the server stops."""
    if state.is_draining:
        raise ApiError(503, "the server stops", code="shutting_down")
    return Health()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
)
async def metrics(state: State) -> Response:
    """Figures for Prometheus."""
    stats = [(model.name, await model.engine.stats()) for model in state.models]
    return Response(state.metrics.text(stats), media_type=CONTENT_TYPE)
