"""Requests and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from openbook.server.schema_common import (
    MAX_LOGPROBS,
    NO_EFFECT,
    ClientNotes,
    SamplingOptions,
    StreamOptions,
    Strict,
    Usage,
)

MAX_MESSAGES = 10_000
MAX_TOOLS = 128
EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


def require_data_url(url: str) -> str:
    """The URL of an image, which comes with the request."""
    if not url.startswith("data:"):
        raise ValueError(
            f"an image is given as {url.partition('?')[0][:60]}, and nothing is fetched for a request: send it as "
            "a data URL (data:image/png;base64,...)"
        )
    return url


DataUrl = Annotated[
    str,
    AfterValidator(require_data_url),
    Field(
        description="A data URL: data:image/png;base64,... Nothing is fetched.", json_schema_extra={"pattern": "^data:"}
    ),
]


class ImageUrl(Strict):
    """An image."""

    url: DataUrl
    detail: Literal["auto"] | None = Field(None, description="The model's own limits decide: only auto.")


class ImagePart(Strict):
    """An image in a message, for models that see."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FunctionCall(Strict):
    """A function and its arguments, as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that the model asked for in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="As in a stream. " + NO_EFFECT)


class SystemMessage(Strict):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = Field(None, description=NO_EFFECT)


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = Field(None, description=NO_EFFECT)


class AssistantMessage(Strict):
    """What the model said, as an earlier answer gave it."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = Field(None, description="Its thinking; most templates leave it out of the prompt.")
    reasoning: str | None = Field(None, description="The same by its other name.")
    tool_calls: list[ToolCall] | None = None
    name: str | None = Field(None, description=NO_EFFECT)
    refusal: str | None = Field(None, description=NO_EFFECT)
    annotations: list[Any] | None = Field(None, description=NO_EFFECT)
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    """What a tool answered."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """A function that the model may ask for."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(
        None, description="Calls that tool_choice forces always obey the schema; others never by force. " + NO_EFFECT
    )


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingOptions, ClientNotes):
    """A conversation to go on with."""

    model: str = Field(description="A served model, or `model:adapter`; /v1/models lists them.")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = Field(None, description="Send the answer as it comes, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, description="Most tokens to generate, thinking included.")
    max_tokens: int | None = Field(None, ge=1, description="The same by its older name.")
    logprobs: bool | None = Field(
        None, description="Report how likely the answer's tokens were, and in `reasoning` those of the thinking."
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With so many alternatives; needs logprobs."
    )
    reasoning_effort: EffortName | None = Field(
        None,
        description="How much to think; medium if not given. none and minimal are low, xhigh and max are high.",
    )
    thinking_budget: int | None = Field(
        None, ge=0, description="Most tokens of thinking; then it is closed and the answer begins."
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether tools are called: auto if tools are given. With none the model does not see them."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="False: at most one call in an answer. True if not given."
    )
    store: Literal[False] | None = Field(None, description="Nothing is stored here: only false; /v1/responses stores.")
    modalities: list[Literal["text"]] | None = Field(None, description='Only ["text"].')
    verbosity: Literal["medium"] | None = Field(None, description="Only medium: say in a message how long to be.")


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float = Field(description="Natural logarithm of its probability before temperature and filters.")
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token and how likely it was."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Tokens of an answer; those of the marks around thinking and calls are in neither list."""

    content: list[TokenLogprob] | None
    refusal: None
    reasoning: list[TokenLogprob] | None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    receipt: dict[str, Any] | None = None


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
