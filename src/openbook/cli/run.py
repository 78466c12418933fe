"""`openbook run`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from openbook.cli.options import (
    cache_option,
    dtype_option,
    effort_option,
    json_option,
    model_argument,
    print_json,
    profile_option,
    seed_option,
)
from openbook.cli.stream_view import StreamView
from openbook.core.errors import UserError

if TYPE_CHECKING:
    from openbook.engine.choices import CacheKind, Dtype, Profile
    from openbook.engine.model import Answer, Model
    from openbook.engine.request import SamplingParams
    from openbook.tasks.base import Effort

# The sampling parameters that the command has options for.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "stop", "max_tokens", "seed")


@click.command("run", short_help="Give one prompt to a model and print its answer.")
@model_argument()
@click.argument("prompt")
@click.option("--image", "images", multiple=True, metavar="FILE", help="Show an image; may be given repeatedly.")
@effort_option()
@seed_option(None, "Random numbers at a temperature above 0; without it they differ on every run.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Keep tokens up to this sum of probabilities."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k most likely tokens; 0 keeps all.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely beside the likeliest."
)
@click.option(
    "--max-tokens", type=int, help="Most tokens to generate, thinking included.  [default: up to the context]"
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given repeatedly.")
@click.option("--show-thinking/--no-thinking", default=True, show_default=True, help="Print the thinking, on stderr.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@profile_option
@cache_option
@dtype_option
@json_option
def command(
    model: str,
    prompt: str,
    images: tuple[str, ...],
    effort: Effort,
    seed: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    max_tokens: int | None,
    stop: tuple[str, ...],
    show_thinking: bool,
    device: str,
    profile: Profile | None,
    cache: CacheKind | None,
    dtype: Dtype | None,
    as_json: bool,
) -> None:
    """Give PROMPT to MODEL and print its answer; a PROMPT of - reads standard input.

    The answer goes to stdout and the thinking to stderr, both as they come.
    """
    from openbook.engine.model import Model, resolve_seed
    from openbook.engine.request import SamplingParams
    from openbook.tokenizer.images import image_part, user_message

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=stop,
        max_tokens=max_tokens,
        seed=resolve_seed(seed, temperature),
    )
    text = _read_stdin() if prompt == "-" else prompt
    messages = [user_message(text, [image_part(path) for path in images])] if images else text
    began_s = time.monotonic()
    loaded = Model.load(model, profile=profile, device=device, dtype=dtype, cache=cache)
    load_s = time.monotonic() - began_s
    if loaded.is_base:
        click.echo(f"({loaded.name} has no chat template: it continues the text)", err=True)
    stream = loaded.stream_with(messages, effort, params)
    if as_json:
        for _ in stream:
            pass
        print_json(_result(loaded, text, images, effort, params, stream.answer, load_s))
        return
    StreamView(show_thinking=show_thinking).show(stream)
    if stream.answer.finish_reason == "length":
        spent = stream.answer.usage.completion_tokens
        click.echo(f"(cut off after {spent:,} tokens by {limit_reached(loaded, stream.answer, max_tokens)})", err=True)


def limit_reached(model: Model, answer: Answer, max_tokens: int | None) -> str:
    """What ended an answer that is not complete, in words."""
    if answer.usage.completion_tokens == max_tokens:
        return "--max-tokens"
    return f"the model's context of {model.max_model_len:,}, prompt included"


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8 text ({error.reason} at byte {error.start}): convert it"
        ) from error


def _result(
    model: Model,
    prompt: str,
    images: Sequence[str],
    effort: Effort,
    params: SamplingParams,
    answer: Answer,
    load_s: float,
) -> dict[str, Any]:
    first_s, total_s = answer.timings.first_token_s, answer.timings.total_s
    num_more, rest_s = answer.usage.completion_tokens - 1, total_s - first_s
    return {
        "model": model.name,
        "prompt": prompt,
        "images": images,
        "effort": effort,
        "reasoning": answer.reasoning,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "token_ids": answer.token_ids,
        "usage": answer.usage,
        "sampling": {name: getattr(params, name) for name in _SAMPLING},
        "timings": {
            "load_s": round(load_s, 4),
            "first_token_s": round(first_s, 4),
            "total_s": round(total_s, 4),
            "tokens_per_s": round(num_more / rest_s, 1) if num_more and rest_s else None,
        },
        "receipt": answer.receipt,
    }
