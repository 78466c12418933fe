"""Conversations to token ids: one Jinja template for training, for chat, and for Transformers.

No message can steer the model: where a message contains a control token, it is broken with a character that no message
contains; only then is the template rendered. The result is split at the control tokens that are left, which are the
template's own, and the pieces between them, made whole again, are encoded as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openbook.core.errors import UserError, one_line
from openbook.core.files import write_text
from openbook.tokenizer.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATE_FILE = "chat_template.jinja"
# Marks in rendered text: inside a message's control token, and around what the assistant speaks.
_PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF900)))


class Part(NamedTuple):
    """A stretch of a rendered conversation: text, or one control token where `control_id` is not None."""

    text: str
    control_id: int | None
    is_spoken: bool


class Chat:
    """Renders conversations for one model.

    Args:
        tokenizer: the model's tokenizer.
        template: Jinja source, with the variables that Transformers gives (`messages`, `add_generation_prompt`,
            `reasoning_effort`, `enable_thinking`, the special tokens) and its `generation` tag.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._is_ours = template == default_template()
        self._skeletons: dict[tuple[Any, ...], list[Part]] = {}

    @classmethod
    def load(cls, folder: Path | str) -> Chat:
        """Read the tokenizer and chat_template.jinja, or the template in tokenizer_config.json.

        Raises:
            UserError: a file is missing or corrupt, or there is no template.
        """
        folder = Path(folder)
        tokenizer = Tokenizer.load(folder)
        path = folder / _TEMPLATE_FILE
        try:
            return cls(tokenizer, path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            template = tokenizer.config.get("chat_template")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is corrupt (not UTF-8): restore it from its source") from error
        except OSError as error:
            raise one_line(error, f"read the chat template {path}") from error
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise UserError(f"{folder} has no chat template: expected {_TEMPLATE_FILE} beside tokenizer.json")
        return cls(tokenizer, template)

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files and chat_template.jinja."""
        self.tokenizer.save(folder)
        write_text(Path(folder) / _TEMPLATE_FILE, self.template)

    @property
    def think_marks(self) -> tuple[str, str] | None:
        """What stands around the model's thinking, or None where the model has no such tokens."""
        marks = (THINK_OPEN, THINK_CLOSE)
        return marks if all(mark in self.tokenizer.control_tokens for mark in marks) else None

    def encode(
        self, messages: Sequence[Mapping[str, Any]], effort: str = "medium", add_generation_prompt: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and its loss mask: 1 exactly on what the assistant speaks, its end included.

        Args:
            messages: OpenAI messages; `content` is a string or a list of text parts, `reasoning_content` is optional.
            effort: how much the model may think: low, medium or high.
            add_generation_prompt: end with what makes the assistant speak; False for training.

        Raises:
            UserError: no message, an unknown role, content that is no text, or the template refuses the conversation.
        """
        return self.encode_many([(messages, effort)], add_generation_prompt)[0]

    def encode_many(
        self, conversations: Iterable[tuple[Sequence[Mapping[str, Any]], str]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """`encode` of many (messages, effort) pairs, faster than one by one."""
        rendered = [self.render(messages, effort, add_generation_prompt) for messages, effort in conversations]
        texts = dict.fromkeys(part.text for parts in rendered for part in parts if part.control_id is None)
        ids_of = dict(zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True))
        results = []
        for parts in rendered:
            ids: list[int] = []
            loss_mask: list[int] = []
            for text, control_id, is_spoken in parts:
                new = ids_of[text] if control_id is None else (control_id,)
                ids.extend(new)
                loss_mask.extend([int(is_spoken)] * len(new))
            results.append((ids, loss_mask))
        return results

    def render(
        self, messages: Sequence[Mapping[str, Any]], effort: str = "medium", add_generation_prompt: bool = True
    ) -> list[Part]:
        """The conversation as text and control tokens; `encode` documents the arguments and errors."""
        plain = [_plain_message(message) for message in messages]
        if not plain:
            raise UserError("the conversation is empty: give at least one user message")
        if self._is_ours:
            return self._fill_skeleton(plain, effort, add_generation_prompt)
        return self._render_fully(plain, effort, add_generation_prompt)

    def _fill_skeleton(self, plain: list[dict[str, str]], effort: str, add_generation_prompt: bool) -> list[Part]:
        """The same as `_render_fully`, ten times faster, for a template that puts contents in as they are (ours,
        which trims questions).

        The template is rendered once for each shape of conversation, with a slot for each content.
        """
        shape = tuple((message["role"], *message) for message in plain)
        key = (shape, effort, add_generation_prompt)
        if key not in self._skeletons:
            slots = [
                {name: text if name == "role" else f"slot {index} {name}" for name, text in message.items()}
                for index, message in enumerate(plain)
            ]
            self._skeletons[key] = self._render_fully(slots, effort, add_generation_prompt)
        texts = {
            f"slot {index} {name}": text if message["role"] == "assistant" else text.strip()
            for index, message in enumerate(plain)
            for name, text in message.items()
        }
        unknown = [part.text for part in self._skeletons[key] if part.control_id is None and part.text not in texts]
        if unknown:
            raise UserError(
                f"wrong tokenizer: it has no special tokens for {unknown[0]!r}, which the chat template writes: "
                "use the tokenizer.json that came with the model"
            )
        filled = (
            part if part.control_id is not None else part._replace(text=texts[part.text])
            for part in self._skeletons[key]
        )
        return [part for part in filled if part.text]

    def _render_fully(self, plain: list[dict[str, str]], effort: str, add_generation_prompt: bool) -> list[Part]:
        broken, marks = self._break_control_tokens(plain)
        text = self._render_text(broken, effort, add_generation_prompt, marks)
        if not add_generation_prompt and plain[-1]["role"] == "assistant" and marks.begin not in text:
            text = self._mark_last_turn(text, broken, effort, marks)
        parts = list(self._split(text, marks))
        if not parts:
            raise UserError("the chat template writes nothing for this conversation: restore it from its source")
        return parts

    def _break_control_tokens(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], _Marks]:
        """Copies of the messages in which no control token can be matched, and the marks that were used."""
        everything = "".join(value for message in messages for value in message.values())
        free = (c for c in _PRIVATE_USE if c not in everything)
        try:
            marks = _Marks(next(free), next(free), next(free))
        except StopIteration:
            raise UserError("the conversation contains every private-use character: remove some of them") from None
        edges = self._edge_pattern
        if edges is None or not edges.search(everything):
            return messages, marks
        # Broken at its edges, no control token stands in a message, nor is completed by the template's text beside it.
        around = rf"{marks.inside}\g<0>{marks.inside}"
        broken = [
            {key: value if key == "role" else edges.sub(around, value) for key, value in message.items()}
            for message in messages
        ]
        return broken, marks

    @cached_property
    def _edge_pattern(self) -> re.Pattern[str] | None:
        """The characters that a control token begins or ends with."""
        edges = {edge for token in self.tokenizer.control_tokens for edge in (token[0], token[-1])}
        return re.compile(f"[{re.escape(''.join(sorted(edges)))}]") if edges else None

    def _render_text(
        self, messages: list[dict[str, str]], effort: str, add_generation_prompt: bool, marks: _Marks
    ) -> str:
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in self.tokenizer.config.items()
            if key.endswith("_token") and value is not None
        }
        compiled = self._compiled
        try:
            return compiled.render(
                **special,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                reasoning_effort=effort,
                enable_thinking=effort != "low",
                _marks=marks,
            )
        except Exception as error:  # a template is a program: whatever goes wrong in it is its own
            raise UserError(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from error

    def _mark_last_turn(self, text: str, messages: list[dict[str, str]], effort: str, marks: _Marks) -> str:
        """For a template without generation tags: what follows the prompt, up to its last stop token, is spoken."""
        prompt = self._render_text(messages[:-1], effort, True, marks) if len(messages) > 1 else ""
        if not text.startswith(prompt):
            raise UserError("the chat template does not continue its own prompt: put generation tags in the template")
        stops = [token for token, index in self.tokenizer.control_tokens.items() if index in self.tokenizer.stop_ids]
        end = max((text.rfind(stop) + len(stop) for stop in stops if stop in text[len(prompt) :]), default=len(text))
        return f"{text[: len(prompt)]}{marks.begin}{text[len(prompt) : end]}{marks.end}{text[end:]}"

    def _split(self, text: str, marks: _Marks) -> Iterable[Part]:
        control = self.tokenizer.control_tokens
        pattern = self.tokenizer.control_pattern
        is_spoken = False
        for stretch in re.split(f"([{marks.begin}{marks.end}])", text):
            if stretch in marks:
                is_spoken = stretch == marks.begin
                continue
            for index, piece in enumerate(pattern.split(stretch) if pattern else (stretch,)):
                if index % 2:
                    token = piece if piece in control else piece.strip()
                    yield Part(token, control[token], is_spoken)
                elif piece:
                    yield Part(piece.replace(marks.inside, ""), None, is_spoken)

    @cached_property
    def _compiled(self) -> Template:
        return _compile(self.template)

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self.tokenizer, self.template)


class _Marks(NamedTuple):
    inside: str
    begin: str
    end: str


def default_template() -> str:
    """The template of our models."""
    return resources.files("openbook.tokenizer").joinpath(_TEMPLATE_FILE).read_text(encoding="utf-8")


def _plain_message(message: Mapping[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"a message has the role {role!r}: expected one of {', '.join(ROLES)}")
    reasoning = message.get("reasoning_content")
    plain = {"role": role, "content": _text_of(content)}
    return {**plain, "reasoning_content": _text_of(reasoning)} if reasoning else plain


def _text_of(content: Any) -> str:
    """A message's content as one string, from a string, None or a list of text parts."""
    if isinstance(content, str):
        return content
    parts = [] if content is None else content
    is_text = isinstance(parts, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )
    if not is_text:
        raise UserError("a message's content is neither a string nor a list of text parts: send text only")
    return "".join(part["text"] for part in parts)


def _compile(source: str) -> Template:
    """Compile a chat template as Transformers does: sandboxed, with its tags, filters and functions."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Context, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what the assistant speaks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("mark", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def mark(self, context: Context, caller: Macro) -> str:
            marks: _Marks = context["_marks"]
            return f"{marks.begin}{caller()}{marks.end}"

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"the chat template is not valid Jinja: {error}; restore it from its source") from error
