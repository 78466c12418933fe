"""What the request models share. Every field's description goes to /docs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_LOGPROBS = 20
NO_EFFECT = "Accepted, without any effect."


class Strict(BaseModel):
    """A part of a request: no unknown parameter, and no value that has to be converted first."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Before everything else, as a misspelt name is the likelier reason for what else is wrong."""
        if isinstance(values, Mapping):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            unknown = next((name for name in values if name not in known), None)
            if unknown is not None:
                nearest = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.6)
                context = {"name": str(unknown), "nearest": nearest[0] if nearest else ""}
                raise PydanticCustomError("unknown_parameter", "unknown parameter", context)
        return values


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = Field(None, description="Send the token counts in a last event.")
    include_obfuscation: Literal[False] | None = Field(None, description="There is none: only false.")


class StructuredOutputs(Strict):
    """What an answer must obey, as vLLM's clients say it; one of these."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="A JSON schema.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="A regular expression.")
    choice: list[str] | None = Field(None, min_length=1, description="Texts of which the answer is one.")
    grammar: str | None = Field(None, description="A grammar in Lark's notation.")


class JsonSchema(Strict):
    """A JSON schema and its name."""

    name: str = Field(max_length=64, description="Of the schema. " + NO_EFFECT)
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer obeys.")
    description: str | None = Field(None, description=NO_EFFECT)
    strict: bool | None = Field(None, description="The schema is always obeyed to the letter: " + NO_EFFECT)


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that obeys a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class SamplingOptions(Strict):
    """How tokens are chosen, and what the answer obeys; what is not given is as the model's authors recommend."""

    temperature: float | None = Field(
        None, ge=0, le=100, description="Logits are divided by it; 0 takes the most likely token."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Keep the fewest most likely tokens whose probabilities reach this sum."
    )
    top_k: int | None = Field(None, ge=-1, description="Keep the k most likely tokens; 0 or -1 keeps all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Keep tokens at least this share as likely as the likeliest."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken off the logits of tokens that the answer has."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken off once for each time that the answer has a token."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Divides the positive logits of tokens in prompt or answer."
    )
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, description="Token id to what is added to its logit.")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="Of the random numbers; without it they differ each time."
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Texts that end the answer; they are not part of it."
    )
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS, description="Tokens that end the answer.")
    ignore_eos: bool | None = Field(None, description="Go on behind the model's own end.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="How many answers to give.")
    priority: int | None = Field(
        None, ge=-(2**31), lt=2**31, description="Lower is served first; equal ones in the order of their coming."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report the prompt's tokens with so many alternatives."
    )
    receipt: bool | None = Field(
        None, description="Send what is needed to compute each answer again, for `openbook verify`."
    )
    response_format: ResponseFormat | None = Field(None, description="What the answer obeys; the thinking is free.")
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = Field(None, description="A JSON schema that the answer obeys.")
    guided_regex: str | None = Field(None, description="A regular expression that the answer matches.")
    guided_choice: list[str] | None = Field(None, min_length=1, description="Texts of which the answer is one.")
    guided_grammar: str | None = Field(None, description="A grammar in Lark's notation that the answer obeys.")


class ClientNotes(Strict):
    """What clients send along for the bookkeeping of others."""

    user: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, str] | None = Field(None, description=NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier. " + NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description="Prefixes are always found in the cache. " + NO_EFFECT)
    prompt_cache_retention: Literal["in_memory"] | None = Field(None, description=NO_EFFECT)


class Usage(BaseModel):
    """Tokens of prompt and answer; thinking counts as answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status from 400 on."""

    error: ErrorDetail


# For every route that takes a request.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Something in the request is wrong."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    403: {"model": ErrorBody, "description": "The server does not allow this."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "The request is no JSON."},
    429: {"model": ErrorBody, "description": "A limit is reached, or the queue is full: see Retry-After."},
    500: {"model": ErrorBody, "description": "A bug."},
    503: {"model": ErrorBody, "description": "The server stops."},
}
