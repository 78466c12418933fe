"""/v1/responses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from openbook.engine.request import Constraint, SamplingParams
from openbook.engine.request import Request as EngineRequest
from openbook.server.body import JsonRoute
from openbook.server.chat import EFFORTS
from openbook.server.errors import ApiError
from openbook.server.prompts import chat_prompt, require_chat
from openbook.server.response_items import plain_items, to_messages
from openbook.server.response_keeper import Keeper
from openbook.server.response_reply import RecordedGeneration, ResponseEvents, ResponseReply
from openbook.server.response_store import Turn
from openbook.server.sampling import ANY_OBJECT, requested_constraint, sampling_params
from openbook.server.schema_chat import MAX_MESSAGES
from openbook.server.schema_common import ERRORS, ErrorBody, JsonObjectFormat
from openbook.server.schema_responses import (
    AllowedTools,
    Deleted,
    GetOptions,
    ItemList,
    JsonSchemaFormat,
    ListOptions,
    NamedFunction,
    ResponseObject,
    ResponseRequest,
)
from openbook.server.served_model import Target
from openbook.server.state import Payer, State
from openbook.server.streaming import finish, stream
from openbook.server.tools import Choice as ToolChoice
from openbook.server.tools import ToolPlan, plan_tools

_WANTS_LOGPROBS = "message.output_text.logprobs"
_FULL: dict[int | str, dict[str, Any]] = {507: {"model": ErrorBody, "description": "The store cannot keep anything."}}
_FOUND: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (400, 401, 429, 503)},
    404: {"model": ErrorBody, "description": "There is no such response."},
}

router = APIRouter(tags=["responses"])
creation = APIRouter(route_class=JsonRoute, tags=["responses"])


@creation.post(
    "/v1/responses",
    response_class=Response,
    responses={
        200: {"model": ResponseObject, "description": "The response; with stream, events, the last one with it."},
        **ERRORS,
        **_FULL,
    },
)
async def create_response(body: ResponseRequest, request: Request, state: State, account: Payer) -> Response:
    """Answer, in a conversation that may be kept here."""
    began_s = time.monotonic()
    target = state.models.find(body.model)
    require_chat(target.model)
    _check(body)
    keeper = Keeper(state, request)
    is_stored = await keeper.begin(body.store)
    earlier = await keeper.conversation(body.previous_response_id)
    items = plain_items(body.input)
    tools = await _plan_tools(body, target)
    constraint_param, constraint = _constraint(body, tools)
    params = _params(body, target, constraint)
    engine_request = await _request(body, target, tools, params, [*_all_items(earlier), *items])
    generation = RecordedGeneration(
        target.model,
        [engine_request],
        state.metrics,
        account,
        began_s,
        prompt_param="input",
        constraint_param=constraint_param,
        has_receipts=bool(body.receipt),
    )
    reply = ResponseReply(body, target, generation, params, tools.max_calls, is_stored)

    async def keep() -> None:
        if is_stored:
            turn = Turn(id=reply.id, previous=body.previous_response_id, items=items, response=reply.final)
            await keeper.add(turn)

    generation.on_step, generation.on_end = reply.note, keep
    if body.stream:
        return await stream(request, generation, ResponseEvents(reply))
    await finish(request, generation)
    return _json(reply.final)


@router.get(
    "/v1/responses/{response_id}", response_class=Response, responses={200: {"model": ResponseObject}, **_FOUND}
)
async def get_response(
    response_id: str, request: Request, state: State, options: Annotated[GetOptions, Query()]
) -> Response:
    """A stored response."""
    turns = await Keeper(state, request).find(response_id, most_turns=1)
    return _json(turns[0].response)


@router.delete(
    "/v1/responses/{response_id}", response_class=Response, responses={200: {"model": Deleted}, **_FOUND, **_FULL}
)
async def delete_response(response_id: str, request: Request, state: State) -> Response:
    """Forget a stored response. Those that went on from it stay, and cannot be gone on from any more."""
    await Keeper(state, request).delete(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", response_class=Response, responses=_FOUND)
async def cancel_response(response_id: str, request: Request, state: State) -> Response:
    """Always an error: only responses in the background can be cancelled, and there are none."""
    await Keeper(state, request).find(response_id, most_turns=1)
    raise ApiError(
        400,
        "the response is complete: only one in the background can be cancelled, and none is here; close the connection "
        "to end a response",
        param="response_id",
        code="invalid_value",
    )


@router.get(
    "/v1/responses/{response_id}/input_items", response_class=Response, responses={200: {"model": ItemList}, **_FOUND}
)
async def list_input_items(
    response_id: str, request: Request, state: State, options: Annotated[ListOptions, Query()]
) -> Response:
    """All that a stored response answers: its input, and what earlier responses were asked and said."""
    *earlier, last = await Keeper(state, request).find(response_id)
    items = [*_all_items(earlier), *last.items]
    if options.order == "desc":
        items.reverse()
    if options.after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == options.after]
        if not places:
            raise ApiError(
                400, f"after is {options.after[:80]!r}: there is no such item; take an id of the list", param="after"
            )
        items = items[places[0] + 1 :]
    shown = items[: options.limit]
    return _json(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > len(shown),
        }
    )


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _all_items(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """What was asked and said in some turns."""
    return [item for turn in turns for item in (*turn.items, *turn.response["output"])]


def _check(body: ResponseRequest) -> None:
    if body.top_logprobs is not None and _WANTS_LOGPROBS not in (body.include or ()):
        raise ApiError(
            400, f"top_logprobs is given without {_WANTS_LOGPROBS} in include: add it there", param="top_logprobs"
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream: set stream to true", param="stream_options")


async def _plan_tools(body: ResponseRequest, target: Target) -> ToolPlan:
    given = body.tool_choice
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in body.tools or ()
    ]
    name: str | None = None
    choice: ToolChoice
    if isinstance(given, NamedFunction):
        choice, name = "required", given.name
    elif isinstance(given, AllowedTools):
        choice, tools = given.mode, _allowed(tools, given)
    else:
        choice = given or "auto"
    return await plan_tools(target.model, tools, choice, name, body.parallel_tool_calls is not False)


def _allowed(tools: Sequence[dict[str, Any]], choice: AllowedTools) -> list[dict[str, Any]]:
    names = [tool.name for tool in choice.tools]
    unknown = next((name for name in names if all(name != tool["function"]["name"] for tool in tools)), None)
    if unknown is not None:
        raise ApiError(
            400, f"tool_choice allows {unknown!r}, which is none of the tools: correct the name", param="tool_choice"
        )
    return [tool for tool in tools if tool["function"]["name"] in names]


def _constraint(body: ResponseRequest, tools: ToolPlan) -> tuple[str | None, Constraint | None]:
    """What the answer obeys, and the parameter that says so."""
    requested = requested_constraint(body)
    form = body.text.format if body.text else None
    if isinstance(form, JsonObjectFormat | JsonSchemaFormat):
        if requested:
            raise ApiError(
                400,
                f"text.format and {requested[0]} give more than one form for the answer: give one",
                param="text.format",
            )
        schema = ANY_OBJECT
        if isinstance(form, JsonSchemaFormat):
            schema = Constraint(kind="json_schema", source=json.dumps(form.schema_, ensure_ascii=False))
        requested = "text.format", schema
    if requested and tools.shown:
        raise ApiError(
            400,
            f"{requested[0]} gives the answer's form while tools may be called: leave one out, or set tool_choice to "
            "none",
            param=requested[0],
        )
    if requested:
        return requested
    return ("tools", tools.constraint) if tools.constraint else (None, None)


def _params(body: ResponseRequest, target: Target, constraint: Constraint | None) -> SamplingParams:
    return sampling_params(
        body,
        target.model.defaults,
        max_tokens=body.max_output_tokens,
        num_logprobs=(body.top_logprobs or 0) if _WANTS_LOGPROBS in (body.include or ()) else None,
        constraint=constraint,
        thinking_budget=body.thinking_budget,
    )


async def _request(
    body: ResponseRequest, target: Target, tools: ToolPlan, params: SamplingParams, items: Sequence[dict[str, Any]]
) -> EngineRequest:
    model = target.model
    if params.num_logprobs is not None:
        await asyncio.to_thread(lambda: model.token_texts)
    messages = to_messages(body.instructions, items)
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400,
            f"the conversation has {len(messages):,} messages: at most {MAX_MESSAGES:,} are read; begin a new one",
            param="input",
        )
    effort = EFFORTS[(body.reasoning and body.reasoning.effort) or "medium"]
    try:
        ids, images = await chat_prompt(model, messages, effort, tools.shown)
    except ApiError as error:
        error.param = "input" if error.param == "messages" else error.param
        raise
    return EngineRequest(
        id=f"resp_{uuid4().hex}",
        prompt_ids=ids,
        images=images,
        params=params,
        priority=body.priority or 0,
        adapter=target.adapter,
        tool_names=tools.names,
    )
