"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from typing import Literal
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from openbook.engine.request import Constraint
from openbook.engine.request import Request as EngineRequest
from openbook.server.body import JsonRoute
from openbook.server.chat_reply import ChatChunks, ChatReply
from openbook.server.errors import ApiError
from openbook.server.generation import Generation
from openbook.server.prompts import chat_prompt, require_chat
from openbook.server.sampling import requested_constraint, sampling_params
from openbook.server.schema_chat import ChatCompletion, ChatRequest, EffortName, NamedTool
from openbook.server.schema_common import ERRORS
from openbook.server.served_model import Target
from openbook.server.state import Payer, State
from openbook.server.streaming import finish, stream
from openbook.server.tools import Choice as ToolChoice
from openbook.server.tools import ToolPlan, plan_tools

router = APIRouter(route_class=JsonRoute, tags=["chat"])

# What clients of other servers say, and what it means here.
EFFORTS: dict[EffortName, Literal["low", "medium", "high"]] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={
        200: {"model": ChatCompletion, "description": "The answer; with stream, events of the same parts."},
        **ERRORS,
    },
)
async def create_chat_completion(body: ChatRequest, request: Request, state: State, account: Payer) -> Response:
    """Go on with a conversation."""
    began_s = time.monotonic()
    target = state.models.find(body.model)
    tools = await _plan_tools(body, target)
    constraint_param, constraint = _constraint(body, tools)
    engine_request = await _request(body, target, tools, constraint)
    generation = Generation(
        target.model,
        [engine_request],
        state.metrics,
        account,
        began_s,
        constraint_param=constraint_param,
        has_receipts=bool(body.receipt),
    )
    reply = ChatReply(body, target, generation, tools.max_calls)
    if body.stream:
        return await stream(request, generation, ChatChunks(reply))
    await finish(request, generation, reply.note)
    return Response(msgspec.json.encode(reply.completion()), media_type="application/json")


async def _plan_tools(body: ChatRequest, target: Target) -> ToolPlan:
    given = body.tool_choice
    name = given.function.name if isinstance(given, NamedTool) else None
    choice: ToolChoice = "required" if isinstance(given, NamedTool) else given or "auto"
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    return await plan_tools(target.model, tools, choice, name, body.parallel_tool_calls is not False)


def _constraint(body: ChatRequest, tools: ToolPlan) -> tuple[str | None, Constraint | None]:
    """What the answer obeys, and the parameter that says so."""
    requested = requested_constraint(body)
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


async def _request(body: ChatRequest, target: Target, tools: ToolPlan, constraint: Constraint | None) -> EngineRequest:
    model = target.model
    require_chat(model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: set logprobs to true", param="top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs does not go with stream: leave one out", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream: set stream to true", param="stream_options")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens"
        )
    params = sampling_params(
        body,
        model.defaults,
        max_tokens=next(iter(limits), None),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        thinking_budget=body.thinking_budget,
    )
    if body.logprobs or body.prompt_logprobs is not None:
        await asyncio.to_thread(lambda: model.token_texts)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    effort = EFFORTS[body.reasoning_effort or "medium"]
    ids, images = await chat_prompt(model, messages, effort, tools.shown)
    return EngineRequest(
        id=f"chatcmpl-{uuid4().hex}",
        prompt_ids=ids,
        images=images,
        params=params,
        num_samples=body.n or 1,
        priority=body.priority or 0,
        adapter=target.adapter,
        tool_names=tools.names,
    )
