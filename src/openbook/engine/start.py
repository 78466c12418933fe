"""From a model's name to a running engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from openbook.checkpoint.locate import locate, model_name
from openbook.core.errors import UserError
from openbook.engine.adapters import ServedAdapters
from openbook.engine.choices import CacheKind, Dtype, Profile
from openbook.engine.drafting import NgramDrafter
from openbook.engine.engine import Drafter, Engine, EngineSettings
from openbook.engine.local_engine import LocalEngine
from openbook.engine.paged import BLOCK_TOKENS, PagedRunner
from openbook.engine.receipt import ReceiptMaker
from openbook.engine.sequence_factory import SequenceFactory
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer, require_match, require_same_ids


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; see `openbook.load`."""

    profile: Profile | None = None
    device: str = "cpu"
    dtype: Dtype | None = None
    cache: CacheKind | None = None


@dataclass(frozen=True)
class StartedEngine:
    """A model that is ready to serve.

    name: what to call it. folder: where its files lie, a folder or a GGUF file. chat: renders conversations; of a base
    model the tokenizer alone. receipts: writes those of its answers.
    """

    name: str
    folder: Path
    chat: Chat | Tokenizer
    profile: Profile
    engine: LocalEngine
    receipts: ReceiptMaker


def start_engine(model: str, options: LoadOptions, settings: EngineSettings) -> StartedEngine:
    """Load a model, by name, path or hub id, into an engine.

    Raises:
        UserError: there is no such model, its files are damaged, there is too little memory, or the draft model speaks
            with other tokens.
    """
    path = locate(model)
    from openbook.checkpoint.model_source import open_model
    from openbook.engine.load import choose_runner

    source = open_model(path)
    chat = source.chat() if source.chat_template() is not None else source.tokenizer()
    runner = choose_runner(source, options.device, options.dtype, options.profile, options.cache)
    tokenizer = chat.tokenizer if isinstance(chat, Chat) else chat
    require_match(tokenizer, runner.vocab_size)
    if not isinstance(runner, PagedRunner):
        raise UserError(f"the model {model} cannot be served: its runner computes whole batches only")
    drafter: Drafter | None = None
    if settings.draft_model is not None:
        drafter, settings = _load_drafter(settings.draft_model, options, settings, runner, tokenizer)
    elif settings.num_draft_tokens:
        drafter = NgramDrafter(settings.num_draft_tokens)
    engine = Engine(runner, SequenceFactory(chat, runner.vocab_size), settings, drafter)
    adapters = ServedAdapters(source.config, runner.adapters)
    name = model_name(model, path)
    receipts = ReceiptMaker(
        path=path,
        model=name,
        profile=runner.profile,
        cache=options.cache,
        dtype=options.dtype,
    )
    return StartedEngine(name, path, chat, runner.profile, LocalEngine(engine, adapters), receipts)


def _load_drafter(
    draft_model: str, options: LoadOptions, settings: EngineSettings, runner: PagedRunner, own: Tokenizer
) -> tuple[Drafter, EngineSettings]:
    """A drafter with that model for the one of `runner`, and settings that leave room for its cache."""
    from openbook.checkpoint.model_source import open_model
    from openbook.engine.draft_model import ModelDrafter
    from openbook.engine.load import choose_runner

    source = open_model(locate(draft_model))
    require_same_ids(source.tokenizer(), own, f"the draft model {draft_model}")
    draft = choose_runner(source, options.device, options.dtype, options.profile, options.cache)
    if not isinstance(draft, PagedRunner):
        raise UserError(f"the draft model {draft_model} cannot be used: its runner computes whole batches only")
    # Both caches hold equally many tokens.
    num_blocks = settings.cache_bytes // (draft.block_bytes + runner.block_bytes)
    longest = min(draft.max_model_len, settings.max_model_len or draft.max_model_len)
    drafter = ModelDrafter(
        draft,
        runner.vocab_size,
        num_draft_tokens=settings.num_draft_tokens,
        num_blocks=min(num_blocks, settings.max_running * -(-longest // BLOCK_TOKENS)),
        max_step_tokens=settings.max_step_tokens,
    )
    return drafter, replace(settings, cache_bytes=num_blocks * runner.block_bytes)
