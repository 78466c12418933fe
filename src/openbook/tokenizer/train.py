"""Train a byte-level BPE on the fixed words of the tasks, and on nothing else.

A task's question and worked solution are sentences that stay the same around values that change. The sentences should
cost few tokens; the values (numbers, words to spell, grids) should stay characters, or letter-level tasks suffer. So
the merges are those that make each fixed word one token, chosen so that they seldom touch the changing text.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from openbook.core.config import Config
from openbook.core.errors import UserError
from openbook.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer, assemble, pre_tokenizer

_SPACE = "Ġ"  # how the byte-level alphabet writes a space
_PIECE = re.compile(r"[A-Z]|[^A-Z]+")
_SMALLEST = 256 + len(SPECIAL_TOKENS)
_CONTROL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


class TokenizerConfig(Config, frozen=True, kw_only=True):
    """What decides a tokenizer, beside the texts.

    Attributes:
        vocab_size: upper limit of the number of tokens, bytes and special tokens included.
        samples_per_task: how many documents of each task the fixed words are found in.
        min_document_share: a word is fixed if it stands in at least this share of some task's texts.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens, or a value is out of range.
    """

    vocab_size: int = 1024
    samples_per_task: int = 400
    min_document_share: float = 0.02

    def __post_init__(self) -> None:
        if self.vocab_size < _SMALLEST:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}: "
                f"it must be at least {_SMALLEST} (256 bytes and the special tokens)"
            )
        if self.samples_per_task < 1:
            raise UserError(f"tokenizer.samples_per_task is {self.samples_per_task}: it must be 1 or more")
        if not 0 < self.min_document_share <= 1:
            raise UserError(
                f"tokenizer.min_document_share is {self.min_document_share}: it must be above 0 and at most 1"
            )


def train_tokenizer(texts_by_task: Mapping[str, Sequence[str]], config: TokenizerConfig) -> Tokenizer:
    """Learn the merges that make every fixed word one token, most used words first, as far as `vocab_size` allows.

    Digits and ASCII capitals stay tokens of their own. The result depends on the texts and the configuration alone:
    ties are broken by the words themselves, never by hash order.

    Args:
        texts_by_task: a text is a whole document; control tokens in it (`<|user|>` ...) only separate its parts.
    """
    words, changing = _fixed_words(texts_by_task, config.min_document_share)
    merges = _learn_merges(words, changing, config.vocab_size - _SMALLEST)
    return assemble(merges)


def _fixed_words(texts_by_task: Mapping[str, Sequence[str]], min_share: float) -> tuple[list[str], str]:
    """Fixed words of two characters or more, most used first, and all other pieces, each once, joined by spaces.

    Both are in the byte-level alphabet (one character a byte, no real spaces). Words are split at capitals.
    """
    split = pre_tokenizer()
    use: dict[str, float] = defaultdict(float)  # sum over tasks of the share of texts with the piece
    fixed: set[str] = set()
    for _, texts in sorted(texts_by_task.items()):
        num_texts_with: Counter[str] = Counter()
        for text in texts:
            parts = _CONTROL.split(text)
            num_texts_with.update(
                {piece for part in parts for word, _ in split.pre_tokenize_str(part) for piece in _PIECE.findall(word)}
            )
        for piece, count in num_texts_with.items():
            use[piece] += count / len(texts)
            if len(piece) > 1 and count >= min_share * len(texts):
                fixed.add(piece)
    return sorted(fixed, key=lambda word: (-use[word], word)), " ".join(sorted(use.keys() - fixed))


def _learn_merges(words: Sequence[str], changing: str, limit: int) -> list[tuple[str, str]]:
    """At most `limit` merges, in order of rank. A word that no longer fits is left out whole.

    Letters inside a changing word must stay letters, or tasks on letters suffer. So a word behind a space is merged
    from its left end on: such merges touch other words at their beginning only. A word without a space in front takes
    the merges that occur in no changing piece, commonest first, and stays in parts where there are none.

    Words are finished one after the other, and that keeps the earlier ones whole: BPE applies the lowest rank first,
    and the ranks up to a word's last merge already make it one token, whatever is learned after.
    """
    ranks: dict[tuple[str, str], int] = {}
    all_words = " ".join(words)
    for word in words:
        learned: dict[tuple[str, str], int] = {}
        symbols = _apply_known(list(word), ranks)
        while len(symbols) > 1:
            if word.startswith(_SPACE):
                pair = (symbols[0], symbols[1])
            else:
                harmless = [pair for pair in pairwise(symbols) if pair[0] + pair[1] not in changing]
                if not harmless:
                    break
                pair = min(harmless, key=lambda pair: (-all_words.count(pair[0] + pair[1]), pair))
            learned[pair] = len(ranks) + len(learned)
            symbols = _merge(symbols, pair)
        if len(ranks) + len(learned) <= limit:
            ranks |= learned
    return list(ranks)


def _apply_known(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: apply the lowest rank until none applies."""
    while known := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = _merge(symbols, min(known, key=ranks.__getitem__))
    return symbols


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """`symbols` with each occurrence of `pair`, left to right, made one symbol."""
    merged: list[str] = []
    for symbol in symbols:
        # A symbol just merged is longer than pair[0], so it can not be the left side of this pair again.
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
