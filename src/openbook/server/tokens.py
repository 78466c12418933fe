"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from openbook.core.errors import UserError
from openbook.server.body import JsonRoute
from openbook.server.chat import EFFORTS
from openbook.server.errors import ApiError, user_error
from openbook.server.prompts import chat_prompt, text_prompt
from openbook.server.schema_chat import MAX_MESSAGES, MAX_TOOLS, EffortName, Message, Tool
from openbook.server.schema_common import ERRORS, Strict
from openbook.server.schema_completions import TokenId
from openbook.server.state import State

router = APIRouter(route_class=JsonRoute, tags=["tokens"])


class TokenizeRequest(Strict):
    """A text, or a conversation as the model would be given it."""

    model: str | None = Field(None, description="The first that is served if not given.")
    prompt: str | None = Field(None, description="A text.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="With messages.")
    reasoning_effort: EffortName | None = Field(None, description="With messages; as in chat completions.")
    add_special_tokens: bool = Field(True, description="Begin a text with what the model expects before one.")
    return_token_strs: bool = Field(False, description="Name the tokens too.")


class Tokens(BaseModel):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = Field(None, description="The first that is served if not given.")
    tokens: list[TokenId] = Field(max_length=1 << 20)


class Text(BaseModel):
    """A text."""

    prompt: str


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, state: State) -> Tokens:
    """The token ids of a text or a conversation."""
    target = state.models.find(body.model or state.models.first.name)
    model = target.model
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either prompt or messages: give one of them", param="prompt")
    if body.prompt is not None:
        if body.tools is not None or body.reasoning_effort is not None:
            raise ApiError(400, "tools and reasoning_effort go with messages, not with prompt: leave them out")
        ids = await text_prompt(model, body.prompt)
        ids = ids if body.add_special_tokens else ids[len(model.tokenizer.start_ids) :]
    else:
        messages = [message.model_dump(exclude_none=True) for message in body.messages or []]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        ids, _ = await chat_prompt(model, messages, EFFORTS[body.reasoning_effort or "medium"], tools)
    names = [model.token_texts.text(index) for index in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=model.max_model_len, tokens=ids, token_strs=names)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, state: State) -> Text:
    """The text of token ids, control tokens included."""
    target = state.models.find(body.model or state.models.first.name)
    try:
        return Text(prompt=target.model.tokenizer.decode(body.tokens))
    except UserError as error:
        raise user_error(error, "tokens") from error
