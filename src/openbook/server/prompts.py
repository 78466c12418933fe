"""From what a client sends to token ids; long texts in a thread, so that no other answer waits for them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from openbook.core.errors import UserError
from openbook.server.errors import ApiError, user_error
from openbook.server.served_model import ServedModel
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.images import ImagePatches

# A longer prompt is refused before it is encoded: no text has so many characters a token, and encoding takes seconds.
MAX_CHARACTERS_PER_TOKEN = 64
_SHORT = 4096  # characters that are encoded at once: a millisecond
_ABOUT_TOOLS = re.compile("this model's chat template takes no tools|a tool is |the (name of a )?tool ")
T = TypeVar("T")


async def chat_prompt(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    effort: str = "medium",
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], list[ImagePatches]]:
    """Token ids of a conversation that the model is to go on with, and the images in it; see `Chat.encode_prompt`.

    Raises:
        ApiError: 400, the model holds no conversations, sees no images or knows no tools, or the conversation is too
            long or wrong in itself.
    """
    chat = require_chat(model)
    num_characters, has_images = _measure(messages)
    num_characters += sum(len(str(tool)) for tool in tools)
    require_short(model, num_characters, "messages")

    def encode() -> tuple[list[int], list[ImagePatches]]:
        return chat.encode_prompt(messages, effort, tools)

    try:
        return await _run(encode, num_characters + (_SHORT if has_images else 0))
    except UserError as error:
        is_about_tools = bool(tools) and _ABOUT_TOOLS.match(str(error)) is not None
        raise user_error(error, "tools" if is_about_tools else "messages") from error


async def text_prompt(model: ServedModel, text: str, param: str = "prompt") -> list[int]:
    """Token ids of a text that the model is to continue.

    Raises:
        ApiError: 400, it is too long.
    """
    require_short(model, len(text), param)
    tokenizer = model.tokenizer
    ids = await _run(lambda: tokenizer.encode(text), len(text))
    return [*tokenizer.start_ids, *ids]


def require_chat(model: ServedModel) -> Chat:
    """How a model's conversations are rendered.

    Raises:
        ApiError: 400, it is a base model.
    """
    if model.chat is None:
        raise ApiError(
            400,
            f"the model {model.name} has no chat template: it continues texts; use /v1/completions",
            param="model",
            code="no_chat_template",
        )
    return model.chat


def require_short(model: ServedModel, num_characters: int, param: str) -> None:
    """Refuse a prompt that cannot fit, by its characters.

    Raises:
        ApiError: 400, it is too long.
    """
    limit = model.max_model_len * MAX_CHARACTERS_PER_TOKEN
    if num_characters > limit:
        raise ApiError(
            400,
            f"the prompt has {num_characters:,} characters and the model's context is {model.max_model_len:,} tokens "
            f"(at most {limit:,} characters are read): shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


async def _run(work: Callable[[], T], num_characters: int) -> T:
    return work() if num_characters < _SHORT else await asyncio.to_thread(work)


def _measure(messages: Sequence[Mapping[str, Any]]) -> tuple[int, bool]:
    """Characters of all texts in messages, and whether there are images."""
    count, has_images = 0, False
    for message in messages:
        for value in message.values():
            if isinstance(value, str):
                count += len(value)
            for part in value if isinstance(value, list) else ():
                if isinstance(part, Mapping) and part.get("type") == "image_url":
                    has_images = True
                else:
                    count += len(str(part))
    return count, has_images
