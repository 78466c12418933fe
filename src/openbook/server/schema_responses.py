"""Requests and answers of /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from openbook.server.schema_chat import MAX_MESSAGES, MAX_TOOLS, DataUrl, EffortName
from openbook.server.schema_common import (
    MAX_LOGPROBS,
    NO_EFFECT,
    ClientNotes,
    JsonObjectFormat,
    SamplingOptions,
    Strict,
    TextFormat,
)

FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


def _refused(fix: str) -> BeforeValidator:
    """For what may not be given: says what to do instead."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise ValueError(f"{fix}; leave it out")

    return BeforeValidator(refuse)


def _only(allowed: Any, fix: str) -> BeforeValidator:
    """For a parameter that has one value here."""

    def refuse(value: Any) -> Any:
        if value is not None and value != allowed:
            raise ValueError(f"{fix}; leave it out")
        return value

    return BeforeValidator(refuse)


class InputText(Strict):
    """Text."""

    type: Literal["input_text"]
    text: str


class InputImage(Strict):
    """An image, for models that see."""

    type: Literal["input_image"]
    image_url: DataUrl
    detail: Annotated[
        Literal["auto"] | None, _only("auto", "the model's own limits decide how much of an image it sees")
    ] = Field(None, description="The model's own limits decide: only auto.")
    file_id: Annotated[None, _refused("no files are kept here: send the image as a data URL in image_url")] = None


class OutputText(Strict):
    """Text of the model."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, description=NO_EFFECT)
    logprobs: list[Any] | None = Field(None, description="How likely its tokens were, if asked for. As input: none.")


class Refusal(Strict):
    """What the model did not want to do, in its words."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(Strict):
    """Thinking."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Strict):
    """A summary of thinking."""

    type: Literal["summary_text"]
    text: str


class MessageItem(Strict):
    """What somebody says: the model, as assistant, or those who ask it."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | InputImage | OutputText | Refusal, Field(discriminator="type")]]
    id: str | None = None
    status: Status | None = Field(None, description="As input: no effect.")
    phase: Literal["commentary", "final_answer"] | None = Field(None, description=NO_EFFECT)


class ReasoningItem(Strict):
    """What the model thought; as input it goes into the prompt where the model's template wants it."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryText] = Field([], description="Empty here; as input it is read where content is missing.")
    content: list[ReasoningText] | None = None
    encrypted_content: Annotated[None, _refused("thinking is not encrypted here: send it as content")] = None
    status: Status | None = Field(None, description="As input: no effect.")


class FunctionCallItem(Strict):
    """A call that the model asks for."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, description="What its output is known by.")
    name: str
    arguments: str = Field(description="The text of a JSON object.")
    id: str | None = None
    status: Status | None = Field(None, description="As input: no effect.")


class FunctionOutputItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, description="Of the call.")
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = Field(None, description="As input: no effect.")


def _plain_item(item: Any) -> Any:
    """A message may come without its type, and clients write out as null what an item does not have."""
    if not isinstance(item, Mapping):
        return item
    given = {name: value for name, value in item.items() if value is not None}
    return {"type": "message", **given} if "role" in given else given


OutputItem = Annotated[MessageItem | ReasoningItem | FunctionCallItem, Field(discriminator="type")]
Item = Annotated[
    Annotated[MessageItem | ReasoningItem | FunctionCallItem | FunctionOutputItem, Field(discriminator="type")],
    BeforeValidator(_plain_item),
]


def _require_function(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(
            f"the tool {kind[:40]!r} runs on OpenAI's servers: expected tools of type function, which you run"
        )
    return tool


class FunctionTool(Strict):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(
        None, description="Calls that tool_choice forces always obey the schema; others never by force. " + NO_EFFECT
    )


class NamedFunction(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Some of the tools; the model is told of no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)


class JsonSchemaFormat(Strict):
    """JSON that obeys a schema."""

    type: Literal["json_schema"]
    name: str = Field(max_length=64, description="Of the schema. " + NO_EFFECT)
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer obeys.")
    description: str | None = Field(None, description=NO_EFFECT)
    strict: bool | None = Field(None, description="The schema is always obeyed to the letter: " + NO_EFFECT)


class TextOptions(Strict):
    """The form of the answer."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Literal["medium"] | None, _only("medium", "say in a message how long to be")] = Field(
        None, description="Only medium."
    )


_NoSummary = Annotated[
    Literal["auto"] | None,
    _only("auto", "nothing sums up the thinking here: all of it is in the content of the reasoning item"),
]


class Reasoning(Strict):
    """How much to think."""

    effort: EffortName | None = Field(
        None, description="Medium if not given. none and minimal are low, xhigh and max are high."
    )
    summary: _NoSummary = Field(
        None, description="There are no summaries: the thinking itself is in the reasoning item. auto has no effect."
    )
    generate_summary: _NoSummary = Field(None, description="The same by its older name.")
    context: Annotated[
        Literal["auto"] | None, _only("auto", "the model's template decides what it is shown of earlier thinking")
    ] = None
    mode: Annotated[Literal["standard"] | None, _only("standard", "there is one mode")] = None


class ResponseStreamOptions(Strict):
    """How to stream."""

    include_obfuscation: Literal[False] | None = Field(None, description="There is none: only false.")


class ResponseRequest(SamplingOptions, ClientNotes):
    """Something to answer."""

    model: str = Field(description="A served model, or `model:adapter`; /v1/models lists them.")
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = Field(
        None,
        description="A system message before everything else; of this request alone, not of those that go on from it.",
    )
    previous_response_id: str | None = Field(None, description="The stored response to go on from.")
    store: bool | None = Field(
        None,
        description="Keep the response, so that others may go on from it: true if not given, where there is a store. "
        "A response is kept when it is complete; one that failed, or whose client left, is not.",
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16, description="Kept with the response."
    )
    stream: bool | None = Field(None, description="Send the response as it comes, as server-sent events.")
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens to generate, thinking included.")
    reasoning: Reasoning | None = None
    thinking_budget: int | None = Field(
        None, ge=0, description="Most tokens of thinking; then it is closed and the answer begins."
    )
    text: TextOptions | None = None
    tools: (
        Annotated[list[Annotated[FunctionTool, BeforeValidator(_require_function)]], Field(max_length=MAX_TOOLS)] | None
    ) = Field(None, description="Functions that you run.")
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedTools, Field(discriminator="type")]
        | None
    ) = Field(None, description="Whether tools are called: auto if tools are given. With none the model sees none.")
    parallel_tool_calls: bool | None = Field(
        None, description="False: at most one call in an answer. True if not given."
    )
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None,
        description="message.output_text.logprobs: report how likely the answer's tokens were. "
        "reasoning.encrypted_content: accepted, without any effect, as thinking is sent in the open.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="With so many alternatives; needs message.output_text.logprobs in include.",
    )
    truncation: Annotated[
        Literal["disabled"] | None, _only("disabled", "nothing is cut off a conversation: what is too long is refused")
    ] = Field(None, description="Only disabled: a conversation that is too long is refused.")
    background: Annotated[
        Literal[False] | None, _only(False, "nothing is answered in the background: use stream, or wait for the answer")
    ] = Field(None, description="Only false.")
    conversation: Annotated[None, _refused("there are no conversation objects here: use previous_response_id")] = None
    prompt: Annotated[None, _refused("no prompts are kept here: send the text as input and instructions")] = None
    context_management: Annotated[None, _refused("nothing is cut off a conversation: what is too long is refused")] = (
        None
    )
    max_tool_calls: Annotated[None, _refused("it limits tools that a server runs, and there are none here")] = None
    n: Annotated[Literal[1] | None, _only(1, "a response has one answer: ask again for another")] = Field(
        None, description="Only 1."
    )
    prompt_logprobs: Annotated[None, _refused("/v1/completions reports the logprobs of a prompt")] = None
    response_format: Annotated[None, _refused("the form of a response is given in text.format")] = None


class QueryOptions(Strict):
    """What stands behind the ? of an address, where everything is text."""

    model_config = ConfigDict(extra="forbid", strict=False)

    include: list[str] | None = Field(None, description="All that there is, is shown. " + NO_EFFECT)
    include_list: list[str] | None = Field(None, alias="include[]", description="As some clients write it.")


class GetOptions(QueryOptions):
    """How to show a response."""

    include_obfuscation: bool | None = Field(None, description="There is none. " + NO_EFFECT)
    stream: Annotated[
        Literal["false"] | None, _only("false", "what is stored is complete and is not sent in pieces")
    ] = Field(None, description="Only false.")


class ListOptions(QueryOptions):
    """Which items to show."""

    limit: int = Field(20, ge=1, le=100, description="How many at most.")
    order: Literal["asc", "desc"] = Field("desc", description="The latest first, or the first.")
    after: str | None = Field(None, description="Show those behind the item with this id.")


class InputTokenDetails(BaseModel):
    """Of the prompt."""

    cached_tokens: int = Field(description="Found in the cache.")
    cache_write_tokens: int = Field(description="Computed, and put into the cache.")


class OutputTokenDetails(BaseModel):
    """Of the answer."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of prompt and answer; thinking counts as answer."""

    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer ends before its end."""

    reason: Literal["max_output_tokens"] = Field(description="Its limit, or that of the model's context.")


class ResponseError(BaseModel):
    """Why there is no answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class ResponseObject(BaseModel):
    """What was answered, and how it was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    store: bool
    background: Literal[False]
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    receipt: dict[str, Any] | None = None


class ItemList(BaseModel):
    """Some items."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """What was forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
