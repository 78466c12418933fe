"""Which sequences compute how many tokens in the next step, and in which blocks.

Every step has a budget of tokens. Sequences that wait for one token each come first, so that long prompts do not make
them stutter; what is left is shared out evenly among prompts that are being read. If blocks run out, the sequence that
is served last gives its own back and waits; what it had computed is computed again later, unless the prefix cache still
has it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from openbook.engine.block_manager import BlockManager
from openbook.engine.paged import BLOCK_TOKENS
from openbook.engine.sequence import Sequence

# A prompt gets at least this part of what a step has for prompts: smaller pieces use the weights too little.
_LEAST_SHARE = 4


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence; the last `num_drafts` of them are guesses."""

    sequence: Sequence
    count: int
    num_drafts: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether a token can be chosen afterwards."""
        return self.count - self.num_drafts == self.sequence.num_missing


@dataclass
class Plan:
    """A step: its chunks, and the blocks to copy before it, as (source, target)."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Keeps the sequences that wait and that run.

    Args:
        blocks: of the cache.
        max_running: most sequences that hold blocks at a time.
        max_step_tokens: the budget of a step.
    """

    def __init__(self, blocks: BlockManager, max_running: int, max_step_tokens: int) -> None:
        self.blocks, self._max_running, self._max_step_tokens = blocks, max_running, max_step_tokens
        self.waiting: list[Sequence] = []  # both in the order of serving
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self.num_cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        bisect.insort(self.waiting, sequence, key=lambda one: one.order)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on the blocks of `parent`, whose tokens it has; they part when one writes."""
        for block in parent.blocks:
            self.blocks.share(block)
        child.blocks = list(parent.blocks)
        child.num_computed, child.cached_tokens = parent.num_computed, parent.cached_tokens
        bisect.insort(self.running, child, key=lambda one: one.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended or is not wanted any more; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def plan(self) -> Plan:
        """The next step; empty if there is nothing to do."""
        plan = Plan()
        budget = self._max_step_tokens
        for sequence in [one for one in self.running if one.num_missing == 1]:
            if budget and sequence.blocks:
                budget -= self._take(plan, sequence, 1, budget)
        budget -= self._check_drafts(plan, budget)
        # The shortest first: what it leaves of its share is for the others.
        reading = [one for one in self.running if one.num_missing > 1]
        reading.sort(key=lambda one: (one.request.priority, one.num_missing, one.order))
        num_reading = len(reading) + min(len(self.waiting), max(0, self._max_running - len(self.running)))
        for sequence in reading:
            if budget and sequence.blocks:
                wanted = min(sequence.num_missing, _share(budget, num_reading))
                budget -= self._take(plan, sequence, wanted, budget)
                num_reading -= 1
        self._admit(plan, budget, num_reading)
        # What was planned for a sequence that had to give its blocks back is void.
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence not in plan.preempted]
        return plan

    def remember(self, sequence: Sequence) -> None:
        """Let other prompts find the blocks of a sequence that are full and computed."""
        num_full = sequence.num_computed // BLOCK_TOKENS
        if num_full:
            for block, digest in zip(sequence.blocks[:num_full], sequence.full_digests(), strict=False):
                self.blocks.remember(block, digest)

    def _take(self, plan: Plan, sequence: Sequence, wanted: int, budget: int) -> int:
        """Plan up to `wanted` tokens of a running sequence, if need be on blocks of sequences served after it."""
        count = min(wanted, budget)
        while not self._reserve(plan, sequence, sequence.num_computed + count):
            victim = self.running[-1]
            self._preempt(plan, victim)
            if victim is sequence:
                return 0
        plan.chunks.append(Chunk(sequence, count))
        return count

    def _check_drafts(self, plan: Plan, budget: int) -> int:
        """Let chunks of one token check the drafts behind them; the tokens that this takes.

        Drafts take what nobody else needs: no sequence's token or blocks, and at most half of what prompts would get.
        """
        if self.waiting or any(one.num_missing > 1 for one in self.running):
            budget //= 2
        taken = 0
        for number, chunk in enumerate(plan.chunks):
            sequence = chunk.sequence
            room = (len(sequence.blocks) + self.blocks.num_free) * BLOCK_TOKENS - sequence.num_tokens
            share = (budget - taken) // (len(plan.chunks) - number)
            count = min(len(sequence.draft_ids), sequence.max_drafts, room, share)
            if count > 0 and self._reserve(plan, sequence, sequence.num_tokens + count):
                plan.chunks[number] = Chunk(sequence, 1 + count, count)
                taken += count
        return taken

    def _admit(self, plan: Plan, budget: int, num_reading: int) -> None:
        """Let waiting sequences run, as long as there is room; an urgent one takes the place of a less urgent one."""
        while budget and self.waiting and self.waiting[0] not in plan.preempted:
            sequence = self.waiting[0]
            is_full = self.running and len(self.running) + sequence.request.num_samples > self._max_running
            if is_full or not self._find_prefix(sequence):
                if not self.running or self.running[-1].request.priority <= sequence.request.priority:
                    return
                self._preempt(plan, self.running[-1])
                continue
            count = min(sequence.num_missing, _share(budget, num_reading))
            is_there_room = self._reserve(plan, sequence, sequence.num_computed + count)
            assert is_there_room, "the prompt was found to fit"
            self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda one: one.order)
            self.num_cached_tokens += sequence.num_computed
            plan.chunks.append(Chunk(sequence, count))
            budget -= count
            num_reading -= 1

    def _find_prefix(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks that others have computed for it; False if the rest does not fit now."""
        if sequence.request.params.num_prompt_logprobs is None:
            # The last token is always computed: its logits choose the next one.
            num_blocks = (sequence.num_tokens - 1) // BLOCK_TOKENS
            sequence.blocks = self.blocks.find(sequence.full_digests()[:num_blocks])
        needed = -(-(sequence.num_tokens + 1) // BLOCK_TOKENS) - len(sequence.blocks)
        if needed > self.blocks.num_free:
            self._release(sequence)
            return False
        sequence.num_computed = len(sequence.blocks) * BLOCK_TOKENS
        if not sequence.new_ids:
            sequence.cached_tokens = sequence.num_computed
        return True

    def _reserve(self, plan: Plan, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks of its own for what a sequence is to write up to `num_tokens`; False if there are too few."""
        first = sequence.num_computed // BLOCK_TOKENS
        if first < len(sequence.blocks) and self.blocks.is_shared(sequence.blocks[first]):
            own = self.blocks.allocate()
            if own is None:
                return False
            if sequence.num_computed % BLOCK_TOKENS:
                plan.copies.append((sequence.blocks[first], own))
            self.blocks.release(sequence.blocks[first])
            sequence.blocks[first] = own
        while len(sequence.blocks) * BLOCK_TOKENS < num_tokens:
            block = self.blocks.allocate()
            if block is None:
                return False
            sequence.blocks.append(block)
        return True

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        plan.preempted.append(sequence)
        self.running.remove(sequence)
        self._release(sequence)
        sequence.draft_ids = []
        self.add(sequence)
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        # From the end: of a prefix that nobody holds any more, the beginning is the last to be given away.
        for block in reversed(sequence.blocks):
            self.blocks.release(block)
        sequence.blocks, sequence.num_computed = [], 0


def _share(budget: int, num_reading: int) -> int:
    """Tokens for one of `num_reading` prompts that are read at the same time."""
    return -(-budget // min(max(num_reading, 1), _LEAST_SHARE))
