"""From a request's parameters to the engine's."""

from __future__ import annotations

import json
from typing import Any

from openbook.core.errors import UserError
from openbook.engine.model import resolve_seed
from openbook.engine.request import MAX_SEED, Constraint, SamplingParams
from openbook.server.errors import ApiError, user_error
from openbook.server.schema_common import JsonObjectFormat, JsonSchemaFormat, SamplingOptions
from openbook.server.served_model import SamplingDefaults

_LEAST_TEMPERATURE = 1e-6  # below, the likeliest token is taken anyhow, and logits divided by it may be no numbers
ANY_OBJECT = Constraint(kind="json_schema", source='{"type":"object"}')


def sampling_params(
    options: SamplingOptions,
    defaults: SamplingDefaults,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    constraint: Constraint | None,
    thinking_budget: int | None = None,
) -> SamplingParams:
    """The parameters of a request; what it leaves out is the model's default.

    Raises:
        ApiError: 400, two exclude each other, or one is out of its range.
    """

    def chosen(name: str) -> Any:
        given = getattr(options, name)
        return getattr(defaults, name) if given is None else given

    temperature = chosen("temperature")
    if temperature < _LEAST_TEMPERATURE:
        temperature = 0.0
    seed = resolve_seed(options.seed, temperature)
    stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
    try:
        return SamplingParams(
            temperature=temperature,
            top_k=max(0, chosen("top_k")),
            top_p=chosen("top_p"),
            min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"),
            presence_penalty=options.presence_penalty or 0.0,
            frequency_penalty=options.frequency_penalty or 0.0,
            logit_bias=tuple((int(index), bias) for index, bias in (options.logit_bias or {}).items()),
            stop=tuple(stop),
            stop_ids=tuple(options.stop_token_ids or ()),
            ignore_eos=bool(options.ignore_eos),
            max_tokens=max_tokens,
            seed=seed % (MAX_SEED + 1),
            num_logprobs=num_logprobs,
            num_prompt_logprobs=options.prompt_logprobs,
            thinking_budget=thinking_budget,
            constraint=constraint,
        )
    except UserError as error:
        raise user_error(error, params={name: name for name in type(options).model_fields}) from error


def requested_constraint(options: SamplingOptions) -> tuple[str, Constraint] | None:
    """What the answer must obey, and the parameter that says so; None where it is free.

    Raises:
        ApiError: 400, several do.
    """
    found: list[tuple[str, Constraint]] = []
    if isinstance(options.response_format, JsonObjectFormat):
        found.append(("response_format", ANY_OBJECT))
    if isinstance(options.response_format, JsonSchemaFormat):
        schema = options.response_format.json_schema.schema_
        found.append(("response_format", _constraint("json_schema", schema)))
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if (value := getattr(options, name)) is not None:
            found.append((name, _constraint(_KINDS[name.removeprefix("guided_")], value)))
    if (outputs := options.structured_outputs) is not None:
        if outputs.json_object:
            found.append(("structured_outputs", ANY_OBJECT))
        for name, value in (
            ("json", outputs.json_),
            ("regex", outputs.regex),
            ("choice", outputs.choice),
            ("grammar", outputs.grammar),
        ):
            if value is not None:
                found.append(("structured_outputs", _constraint(_KINDS[name], value)))
        if not any(name == "structured_outputs" for name, _ in found):
            raise ApiError(
                400,
                "structured_outputs is empty: expected one of json, json_object, regex, choice, grammar",
                param="structured_outputs",
            )
    if len(found) > 1:
        names = " and ".join(dict.fromkeys(name for name, _ in found))
        raise ApiError(400, f"{names} give more than one form for the answer: give one", param=found[-1][0])
    return found[0] if found else None


_KINDS: dict[str, Any] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}


def _constraint(kind: Any, value: Any) -> Constraint:
    return Constraint(kind=kind, source=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
