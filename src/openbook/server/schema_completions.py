"""Requests and answers of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from openbook.server.schema_common import ClientNotes, SamplingOptions, StreamOptions, Usage

MAX_PROMPTS = 1024
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingOptions, ClientNotes):
    """Texts to go on with."""

    model: str = Field(description="A served model, or `model:adapter`; /v1/models lists them.")
    prompt: Prompts = Field(description="A text, several, token ids, or several lists of them.")
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens to generate; 16 if not given, 0 with echo only."
    )
    echo: bool | None = Field(None, description="Repeat the prompt before what follows it.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Report how likely each token was, and so many alternatives."
    )
    stream: bool | None = Field(None, description="Send the text as it comes, as server-sent events.")
    stream_options: StreamOptions | None = None


class CompletionLogprobs(BaseModel):
    """The tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    receipt: dict[str, Any] | None = None


class Completion(BaseModel):
    """What follows the prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage
