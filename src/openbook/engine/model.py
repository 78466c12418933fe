"""`Model`: a loaded model that answers, what `openbook.load` returns."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from openbook.checkpoint.locate import locate, model_name
from openbook.core.errors import UserError
from openbook.engine.choices import CacheKind, Dtype, Profile
from openbook.engine.generate import TokenEvent, generate, pad_right
from openbook.engine.provenance import is_openbook_release, read_tasks
from openbook.engine.receipt import Receipt, ReceiptMaker
from openbook.engine.request import FinishReason, Request, SamplingParams
from openbook.engine.runner import Runner
from openbook.engine.transcript import Piece, Transcript
from openbook.tasks.base import Effort
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer, require_match
from openbook.tokenizer.tools import ToolCall

Message: TypeAlias = Mapping[str, Any]  # as in the OpenAI API: role, content, optional reasoning_content, tool_calls
Tool: TypeAlias = Mapping[str, Any]  # as in the OpenAI API: {"type": "function", "function": {"name": ...}}
Prompt: TypeAlias = str | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one answer; thinking counts as completion."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds since the request began, in a batch since the batch did."""

    first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said."""

    text: str  # the answer, without the thinking before it
    reasoning: str
    token_ids: list[int] = field(repr=False)  # all that was generated: thinking, marks, answer, stop token
    finish_reason: FinishReason | None  # None while the answer is not complete
    usage: Usage
    timings: Timings
    seed: int  # of the random numbers; of no effect at temperature 0
    tool_calls: list[ToolCall] = field(default_factory=list)  # in a stream, each as soon as it is complete
    make_receipt: Callable[[Answer], Receipt | None] = field(default=lambda answer: None, repr=False, compare=False)

    @property
    def receipt(self) -> Receipt | None:
        """What is needed to compute it again, see `openbook.engine.receipt`; the first one hashes the model's files.

        None while it is not complete, for a prompt with images, and for a model that was not loaded from files.

        Raises:
            UserError: a file of the model cannot be read any more.
        """
        return None if self.finish_reason is None else self.make_receipt(self)


class AnswerStream:
    """An answer in the making: iterate over its pieces, then (or meanwhile) read `answer`."""

    def __init__(self, events: Iterator[TokenEvent], recorder: _Recorder) -> None:
        self._events, self._recorder = events, recorder

    def __iter__(self) -> Iterator[Piece]:
        for event in self._events:
            self._recorder.add(event)
            yield from event.pieces

    @property
    def answer(self) -> Answer:
        """What was said so far; its `finish_reason` is None until the last piece."""
        return self._recorder.answer()


class Model:
    """A model, its tokenizer and its chat template.

    Args:
        name: what to call it in reports.
        folder: where its files lie: a folder, or a GGUF file.
        runner: computes the logits.
        chat: renders conversations, and holds the tokenizer; of a base model the tokenizer alone.
        receipts: writes those of its answers.
    """

    def __init__(
        self, name: str, folder: Path, runner: Runner, chat: Chat | Tokenizer, receipts: ReceiptMaker | None = None
    ) -> None:
        self.name, self.folder, self._runner, self._receipts = name, folder, runner, receipts
        self._chat = chat if isinstance(chat, Chat) else None
        self.tokenizer: Tokenizer = chat.tokenizer if isinstance(chat, Chat) else chat

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        profile: Profile | None = None,
        device: str = "cpu",
        dtype: Dtype | None = None,
        cache: CacheKind | None = None,
    ) -> Model:
        """Load a bundled model by name, a release, Hugging Face folder or GGUF file by path, or a hub id.

        Args:
            profile: "exact" (the same bits on every CPU, in any batch) or "fast"; None is exact for dense decoders on a
                CPU with no dtype asked for, else fast.
            device: "cpu", "cuda" or "cuda:N".
            dtype: "float32" (if None) or "bfloat16", of weights and activations in the profile fast. The exact one
                takes weights as they are stored. Logits are float32 always.
            cache: "float32" (if None) or "int8", of keys and values, for dense decoders in the exact profile: int8
                takes a quarter of the memory, is faster, and rounds.

        Raises:
            UserError: there is no such model, device, dtype, profile or cache, two of them exclude each other, or a
                file of the model is missing or damaged.
        """
        path = locate(model)
        with _no_collection():
            from openbook.checkpoint.model_source import open_model
            from openbook.engine.load import choose_runner

            source = open_model(path)
            chat = source.chat() if source.chat_template() is not None else source.tokenizer()
            runner = choose_runner(source, device, dtype, profile, cache)
        name = model_name(model, path)
        receipts = ReceiptMaker(path=path, model=name, profile=runner.profile, cache=cache, dtype=dtype)
        loaded = cls(name, path, runner, chat, receipts)
        require_match(loaded.tokenizer, runner.vocab_size)
        return loaded

    @property
    def profile(self) -> Profile:
        """The numerics profile that it computes in."""
        return self._runner.profile

    @property
    def is_base(self) -> bool:
        """Whether it has no chat template: it continues a text, and holds no conversation."""
        return self._chat is None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it was trained on; [] for a model that is not one of ours.

        Raises:
            UserError: the recipe in the release is damaged.
        """
        return read_tasks(self.folder)

    @property
    def is_openbook(self) -> bool:
        """Whether it is one of ours: a release with its recipe."""
        return is_openbook_release(self.folder)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._runner.max_model_len

    def chat(
        self,
        prompt: Prompt,
        *,
        effort: Effort = "medium",
        seed: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        tools: Sequence[Tool] = (),
    ) -> Answer:
        """Answer a question, or the last message of a conversation.

        Args:
            prompt: a question, or messages as in the OpenAI API; for a model that sees, with images (`image_part`).
            effort: how much to think: "low" not at all, "medium" in steps, "high" in steps with a check.
            seed: of the random numbers; None draws one, and the answer says which.
            temperature, top_p, top_k, min_p, stop, max_tokens: see `SamplingParams`.
            tools: functions that the model may ask for, as in the OpenAI API; the answer's `tool_calls` say which.

        Raises:
            UserError: an empty prompt, one past the context (with both numbers), a value out of range, or tools for a
                model that knows none.
        """
        stream = self.stream(
            prompt,
            effort=effort,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop,
            max_tokens=max_tokens,
            tools=tools,
        )
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        prompt: Prompt,
        *,
        effort: Effort = "medium",
        seed: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        tools: Sequence[Tool] = (),
    ) -> AnswerStream:
        """`chat` piece by piece: `piece.kind` is "reasoning" or "answer"; the pieces of a kind add up to its text."""
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=tuple(stop),
            max_tokens=max_tokens,
            seed=resolve_seed(seed, temperature),
        )
        return self.stream_with(prompt, effort, params, tools)

    def stream_with(
        self, prompt: Prompt, effort: Effort, params: SamplingParams, tools: Sequence[Tool] = ()
    ) -> AnswerStream:
        """`stream` with the sampling parameters in one value; the prompt is checked before this returns."""
        began_s = time.monotonic()
        request = self._request(prompt, effort, params, tools)
        request.num_new_tokens(self.max_model_len)
        transcript = self._transcript(request, tools)
        events = generate(self._runner, [request], [transcript])
        return AnswerStream(events, _Recorder(request, transcript, began_s, self._receipts))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        effort: Effort = "medium",
        params: Sequence[SamplingParams],
        batch_size: int = 64,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer many prompts, `batch_size` at a time, prompts of like length together.

        Args:
            params: one for each prompt.
            on_answer: called with (index of the prompt, its answer) as soon as one is complete.

        Returns:
            the answers in the order of the prompts. Each is the same as if its prompt had been alone.

        Raises:
            UserError: a prompt is empty or past the context, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: expected 1 or more; correct that value")
        requests = [self._request(prompt, effort, row) for prompt, row in zip(prompts, params, strict=True)]
        for request in requests:
            request.num_new_tokens(self.max_model_len)
        answers: dict[int, Answer] = {}
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            began_s = time.monotonic()
            batch = [requests[index] for index in chosen]
            transcripts = [self._transcript(request) for request in batch]
            pairs = zip(batch, transcripts, strict=True)
            recorders = [_Recorder(*pair, began_s, self._receipts) for pair in pairs]
            for event in generate(self._runner, batch, transcripts):
                recorders[event.index].add(event)
                if event.finish_reason:
                    index = chosen[event.index]
                    answers[index] = recorders[event.index].answer()
                    if on_answer:
                        on_answer(index, answers[index])
        return [answers[index] for index in range(len(requests))]

    def prompt_ids(self, prompt: Prompt, *, effort: Effort = "medium", tools: Sequence[Tool] = ()) -> list[int]:
        """The token ids that the model is given for a prompt.

        Raises:
            UserError: there is no message, or the last one is empty.
        """
        return list(self._request(prompt, effort, SamplingParams(), tools).prompt_ids)

    def _request(self, prompt: Prompt, effort: Effort, params: SamplingParams, tools: Sequence[Tool] = ()) -> Request:
        messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        last = messages[-1] if messages else {"content": ""}
        content = last.get("content") if isinstance(last, Mapping) else None
        is_result = isinstance(last, Mapping) and last.get("role") == "tool"  # a tool may have nothing to say
        if isinstance(content, str) and not content.strip() and not is_result:
            raise UserError("the prompt is empty: expected a question; give some text")
        try:
            str(content).encode()
        except UnicodeEncodeError as error:  # how Python passes on bytes of a command line that are not UTF-8
            raise UserError(
                f"the prompt is not valid Unicode text at character {error.start}: remove what stands there"
            ) from error
        if self._chat is None:
            if len(messages) != 1 or not isinstance(content, str) or tools:
                raise UserError(
                    f"the model {self.name} has no chat template: it continues one text, expected a prompt and no "
                    "conversation, image or tool; give that, or a model made for chat"
                )
            return Request(prompt_ids=[*self.tokenizer.start_ids, *self.tokenizer.encode(content)], params=params)
        ids, images = self._chat.encode_prompt(messages, effort, tools)
        return Request(prompt_ids=ids, params=params, images=images)

    def logits(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Logits of the token after each of `token_ids`.

        Args:
            token_ids: B lists of ids; T is the length of the longest.

        Returns:
            float32 [B, T, V]; NaN behind the end of a list that is shorter than T.

        Raises:
            UserError: a list is empty or too long, or an id is not in the vocabulary.
        """
        for row in token_ids:
            if not 0 < len(row) <= self.max_model_len:
                raise UserError(
                    f"a row has {len(row):,} token ids: expected 1 to {self.max_model_len:,} (the model's context); "
                    "cut it"
                )
            if not 0 <= min(row) <= max(row) < self._runner.vocab_size:
                raise UserError(
                    f"token ids range from {min(row)} to {max(row)}: expected 0 to {self._runner.vocab_size - 1}; "
                    "encode the text with this model's tokenizer"
                )
        if not token_ids:
            raise UserError("there are no token ids: expected at least one list; give [[1, 2, 3]] or the like")
        padded, lengths = pad_right(token_ids)
        logits = self._runner.logits(padded)
        logits[np.arange(padded.shape[1]) >= lengths[:, None]] = np.nan
        return logits

    def _transcript(self, request: Request, tools: Sequence[Tool] = ()) -> Transcript:
        return Transcript(
            self.tokenizer,
            request.params.stop,
            chat_format=None if self._chat is None else self._chat.format,
            prompt_ids=request.prompt_ids,
            tool_names=[tool["function"]["name"] for tool in tools],
        )


@dataclass
class _Recorder:
    """Collects one sequence's events into an answer."""

    request: Request
    transcript: Transcript
    began_s: float
    receipts: ReceiptMaker | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: Timings = field(default_factory=lambda: Timings(first_token_s=0.0, total_s=0.0))

    def add(self, event: TokenEvent) -> None:
        now_s = time.monotonic() - self.began_s
        first_s = self.timings.first_token_s if self.token_ids else now_s
        self.token_ids.append(event.token_id)
        self.finish_reason = event.finish_reason
        self.timings = Timings(first_token_s=first_s, total_s=now_s)

    def answer(self) -> Answer:
        return Answer(
            text=self.transcript.text,
            reasoning=self.transcript.reasoning,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(prompt_tokens=len(self.request.prompt_ids), completion_tokens=len(self.token_ids)),
            timings=self.timings,
            seed=self.request.params.seed,
            tool_calls=list(self.transcript.tool_calls),
            make_receipt=self._receipt,
        )

    def _receipt(self, answer: Answer) -> Receipt | None:
        if self.receipts is None or answer.finish_reason is None:
            return None
        return self.receipts.make(self.request, 0, answer.token_ids, answer.finish_reason)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python does not look for garbage: imports and a vocabulary make a million objects, and a sixth of their time goes
    into looking through them in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def resolve_seed(seed: int | None, temperature: float) -> int:
    """The seed that was given, or a fresh one where it matters: at temperature 0 it is 0."""
    if seed is None:
        return secrets.randbits(63) if temperature else 0
    return seed
