"""What guessing ahead gains: the engine with and without it, on the same weights and requests.

By n-grams, on nano (worked solutions) and on SmolLM2-135M (a text to be copied with a change, and a list); by a draft
model, SmolLM2 in 4 bits for itself in 16 (a story). Both engines run in one process
and take turns; the answers must be the same. Guessing is also timed by itself.

    python benchmarks/speculative.py [--clients 1 8] [--rounds 5] [--threads N] [--folder DIR] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from pathlib import Path

from performance_page import machine, write_section
from quantised_files import gguf_file

from openbook.checkpoint.locate import locate
from openbook.checkpoint.model_source import ModelSource, open_model
from openbook.engine.draft_model import ModelDrafter
from openbook.engine.drafting import NgramDrafter, StepCost
from openbook.engine.engine import Drafter, Engine, EngineSettings
from openbook.engine.native_load import load_native
from openbook.engine.native_runner import NativeRunner
from openbook.engine.request import Request, SamplingParams
from openbook.engine.sequence import Sequence
from openbook.engine.sequence_factory import SequenceFactory
from openbook.ops import _native
from openbook.tasks.registry import get_task

TEXT = """The lighthouse stood at the end of a long stone pier. Every evening at six the keeper, Mr. Harding, walked out
with a lantern in his left hand and a loaf of bread under his arm. He lit the lamp, wound the clockwork that turned it,
and sat down by the window to watch the ships come in. When the fog rolled over the bay he rang the bell once every
minute until the morning."""
COPY = f"Write this text again word for word, but call the keeper Mr. Morris:\n\n{TEXT}"
LIST = "List the countries of Europe with their capitals, one per line as 'Country: Capital'."
STORY = "Tell a story about a fox that learns to swim."
KINDS = ("nano", "copy", "list", "story")


@dataclass(frozen=True)
class Case:
    """What is asked of which model, and who guesses."""

    name: str
    source: ModelSource
    runner: NativeRunner
    questions: list[str]
    draft: NativeRunner | None = None


class Timed:
    """A drafter whose guessing is timed."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.seconds = drafter, 0.0

    def propose(self, sequences: Tokens[Sequence], cost: StepCost) -> None:
        """See `Drafter.propose`."""
        began_s = time.perf_counter()
        self._drafter.propose(sequences, cost)
        self.seconds += time.perf_counter() - began_s

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter.forget`."""
        self._drafter.forget(sequence)


def make_engine(case: Case, drafter: Drafter | None) -> Engine:
    """An engine with a cache that is large enough, and that finds no prefix again."""
    settings = EngineSettings(max_running=32, has_prefix_cache=False)
    return Engine(case.runner, SequenceFactory(case.source.chat(), case.runner.vocab_size), settings, drafter)


def make_drafter(case: Case, num_draft_tokens: int) -> Timed:
    """Who guesses in a case."""
    if case.draft is None:
        return Timed(NgramDrafter(num_draft_tokens))
    return Timed(
        ModelDrafter(
            case.draft,
            case.runner.vocab_size,
            num_draft_tokens=num_draft_tokens,
            num_blocks=1000,
        )
    )


def answer(engine: Engine, asked: list[Request]) -> tuple[float, dict[str, list[int]]]:
    """Seconds until all requests are answered, and the answers."""
    answers: dict[str, list[int]] = {request.id: [] for request in asked}
    began_s = time.perf_counter()
    for request in asked:
        engine.add(engine.prepare(request))
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id] += event.token_ids
    return time.perf_counter() - began_s, answers


def measure(case: Case, num_clients: int, params: SamplingParams, arguments: argparse.Namespace) -> str:
    """A row of the table."""
    chat = case.source.chat()
    prompts = [chat.encode_prompt([{"role": "user", "content": question}])[0] for question in case.questions]
    asked = [
        Request(prompt_ids=prompts[index % len(prompts)], params=replace(params, seed=index), id=str(index))
        for index in range(num_clients)
    ]
    drafter = make_drafter(case, arguments.num_draft_tokens)
    without, guessing = make_engine(case, None), make_engine(case, drafter)
    ratios = []
    for number in range(arguments.rounds + 1):
        plain_s, expected = answer(without, asked)
        guessing_s, answers = answer(guessing, asked)
        if answers != expected:
            raise SystemExit(f"{case.name}: the answers differ, which must not be")
        if number:  # the first round warms up
            ratios.append(plain_s / guessing_s)
    stats = guessing.stats()
    steps, tokens = stats.num_steps, stats.num_new_tokens
    kept = 100 * stats.num_accepted_tokens / max(1, stats.num_draft_tokens)
    way = "greedy" if params.is_greedy else f"temperature {params.temperature:g}"
    return (
        f"| {case.name} | {way} | {num_clients} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to "
        f"{max(ratios):.2f} | {without.stats().num_steps / steps:.2f} | {stats.num_draft_tokens / tokens:.2f} | "
        f"{kept:.0f}% | {1e6 * drafter.seconds / steps / num_clients:.1f} |"
    )


def case(kind: str, folder: Path) -> Case:
    """One of `KINDS`; its files are made in `folder` if they are not there."""
    if kind == "nano":
        nano = open_model(locate("nano"))
        questions = [get_task(name).generate(seed=1).question for name in ("gcd", "chain_sum", "spell_backward", "lcm")]
        return Case("n-grams, nano, worked solutions", nano, load_native(nano), questions)
    if kind in ("copy", "list"):
        small = open_model(gguf_file(folder, "135M", "Q8_0"))
        return Case(f"n-grams, 135M Q8_0, a {kind}", small, load_native(small), [COPY if kind == "copy" else LIST])
    large, draft = gguf_file(folder, "135M", "BF16"), gguf_file(folder, "135M", "Q4_0")
    source = open_model(large)
    return Case("Q4_0 for BF16, 135M, a story", source, load_native(source), [STORY], load_native(open_model(draft)))


def main() -> None:
    """Measure, print, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="requests at a time (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default: 5)")
    parser.add_argument("--threads", type=int, help="threads (default: one for each core)")
    parser.add_argument("--num-draft-tokens", type=int, default=8, help="most guesses at a time (default: 8)")
    parser.add_argument("--num-tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to measure (default: all)")
    parser.add_argument("--folder", type=Path, help="keep the files there, and use those that are there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    arguments = parser.parse_args()
    if arguments.threads:
        _native.set_num_threads(arguments.threads)
    rows = [
        "| who guesses | sampling | clients | times as fast | lowest to highest | times fewer steps | guesses a token "
        "| right | µs a sequence and step |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(rows), flush=True)
    params = SamplingParams(max_tokens=arguments.num_tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.kinds:
            what = case(kind, arguments.folder or Path(temporary))
            for num_clients in arguments.clients:
                for one in (params, replace(params, temperature=0.7)):
                    rows.append(measure(what, num_clients, one, arguments))
                    print(rows[-1], flush=True)
    if arguments.write:
        most, num_tokens = arguments.num_draft_tokens, arguments.num_tokens
        body = f"""The engine with at most {most} guesses at a time against the engine without, {num_tokens} new
tokens a request, profile exact, the same tokens on both sides; median of {arguments.rounds} turns
(`python benchmarks/speculative.py --write`; {machine()}). How many tokens are guessed follows from how many were right
and from what steps cost. With a draft model the last column is its steps.

"""
        write_section("Speculative decoding", body + "\n".join(rows))


if __name__ == "__main__":
    main()
