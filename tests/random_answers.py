"""Answers of a model that knows nothing: at each step one of the tokens that a guide allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from chat_families import family, speak
from openbook.engine.answer_guide import AnswerGuide
from openbook.engine.request import Constraint
from openbook.engine.structured import GrammarCompiler
from openbook.engine.transcript import Transcript
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

NUM_PADDING = 5  # logits without a token
PROMPTS = {
    "qwen3": "<|im_start|>assistant\n",
    "r1": "<｜Assistant｜><think>\n",
    "r1_distill": "<｜Assistant｜><think>\n",
    "mistral": "[/INST]",
    "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "harmony": "<|start|>assistant",
}


def compiler_of(chat: Chat) -> GrammarCompiler:
    return GrammarCompiler(chat.tokenizer, chat.tokenizer.vocab_size + NUM_PADDING, chat.format)


def answer_at_random(
    name: str,
    constraint: Constraint | None,
    seed: int,
    budget: int | None = None,
    tool_names: Sequence[str] = (),
    likely: str = "",
    max_tokens: int = 3000,
) -> tuple[Transcript, list[int], AnswerGuide]:
    """What a transcript makes of a whole answer, its tokens, and the guide at the end.

    likely: these letters come more often.
    """
    chat = family(name)
    compiler = compiler_of(chat)
    prompt_ids = speak(chat.tokenizer, PROMPTS[name])
    grammar = compiler.compile(constraint) if constraint else None
    guide = AnswerGuide(chat.tokenizer, chat.format, prompt_ids, budget, grammar)
    transcript = Transcript(chat.tokenizer, chat_format=chat.format, prompt_ids=prompt_ids, tool_names=tool_names)
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    bias = np.zeros(compiler.vocab_size, dtype=np.float32)
    bias[chat.tokenizer.encode(likely)] = 2.0
    while not transcript.is_stopped:
        assert len(ids) < max_tokens, "the answer does not end"
        logits = rng.standard_normal(compiler.vocab_size).astype(np.float32) + bias
        chosen = [int(guide.masked(logits).argmax())]
        for token_id in chosen:
            ids.append(token_id)
            transcript.push(token_id)
            chosen += guide.push(token_id)
    return transcript, ids, guide


def merged_tokenizer(words: list[str]) -> Tokenizer:
    """Bytes, and a token for each word: marks that are text are cut anywhere."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        spelled = word.replace("\n", "Ċ")
        for size in range(2, len(spelled) + 1):
            if spelled[:size] not in vocabulary:
                vocabulary[spelled[:size]] = len(vocabulary)
                merges.append((spelled[: size - 1], spelled[size - 1]))
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|end|>"])
    return Tokenizer(model.to_str(), {"eos_token": "<|end|>"})
