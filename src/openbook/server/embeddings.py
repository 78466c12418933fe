"""/v1/embeddings: the mean of a text's final hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from openbook.core.errors import UserError
from openbook.server.body import JsonRoute
from openbook.server.errors import ApiError, user_error
from openbook.server.prompts import text_prompt
from openbook.server.schema_common import ERRORS, NO_EFFECT, Strict
from openbook.server.schema_completions import TokenIds
from openbook.server.served_model import ServedModel
from openbook.server.state import Payer, State
from openbook.server.streaming import until_gone

router = APIRouter(route_class=JsonRoute, tags=["embeddings"])

MAX_TEXTS = 2048  # as in the OpenAI API, and so is the next
MAX_TOKENS = 300_000  # of all texts
_ROWS_AT_ONCE = 64  # that are written before another answer has its turn

Texts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS)]
)


class EmbeddingRequest(Strict):
    """Texts to embed."""

    model: str = Field(description="A served model, or `model:adapter`; /v1/models lists them.")
    input: Texts = Field(description="A text, several, token ids, or several lists of them.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Numbers (float, if not given), or little-endian float32 in base64."
    )
    dimensions: int | None = Field(
        None, ge=1, description="The model's own number and no other: no model here was trained to be cut off."
    )
    user: str | None = Field(None, description=NO_EFFECT)


class Embedding(BaseModel):
    """Of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(
        description="The mean over all tokens of the final hidden states, divided by its length (Euclidean norm)."
    )


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Embeddings in the order of the texts."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


@router.post(
    "/v1/embeddings",
    response_class=Response,
    responses={200: {"model": EmbeddingList, "description": "One for each text."}, **ERRORS},
)
async def create_embeddings(body: EmbeddingRequest, request: Request, state: State, account: Payer) -> Response:
    """Embed texts: those with a like meaning lie closer to each other, as far as the model has learned to say so."""
    target = state.models.find(body.model)
    prompts = await _prompts(target.model, body)
    num_tokens = sum(map(len, prompts))
    if num_tokens > MAX_TOKENS:
        raise ApiError(
            400,
            f"the texts have {num_tokens:,} tokens: at most {MAX_TOKENS:,} are taken; send them in parts",
            param="input",
            code="invalid_value",
        )
    if account is not None:
        account.admit_prompt(num_tokens)
    try:
        vectors = await until_gone(request, target.model.engine.embed(prompts, target.adapter))
    except UserError as error:
        raise user_error(error, params={"text": "input", "the adapter": "model"}) from error
    state.metrics.prompt_tokens.labels(target.model.name).inc(num_tokens)
    size = vectors.shape[1]
    if body.dimensions not in (None, size):
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}: embeddings of {target.name} have {size}; leave it out",
            param="dimensions",
            code="invalid_value",
        )
    rows = [row async for row in _encoded(unit_vectors(vectors), body.encoding_format == "base64")]
    value = {
        "object": "list",
        "model": target.name,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Response(msgspec.json.encode(value), media_type="application/json")


def unit_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their lengths, which are rounded once: the same bits on every machine. A row of zeros stays."""
    wide = vectors.astype(np.float64)
    lengths = np.array([math.sqrt(math.fsum(row.tolist())) or 1.0 for row in wide * wide])
    units: NDArray[np.float32] = (wide / lengths[:, None]).astype(np.float32)
    return units


async def _prompts(model: ServedModel, body: EmbeddingRequest) -> list[Sequence[int]]:
    given = body.input
    texts: Sequence[str | list[int]]
    if isinstance(given, str):
        texts = [given]
    else:
        texts = [given] if isinstance(given[0], int) else given
    return [text if isinstance(text, list) else await text_prompt(model, text, "input") for text in texts]


async def _encoded(vectors: NDArray[np.float32], is_base64: bool) -> AsyncIterator[msgspec.Raw]:
    """Each row as JSON."""
    for index, vector in enumerate(vectors):
        if index % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
            await asyncio.sleep(0)
        numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
        yield msgspec.Raw(msgspec.json.encode(numbers))
