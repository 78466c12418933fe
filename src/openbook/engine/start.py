"""From a model's name to a running engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openbook.checkpoint.locate import locate, model_name
from openbook.core.errors import UserError
from openbook.engine.choices import CacheKind, Dtype, Profile
from openbook.engine.engine import Engine, EngineSettings
from openbook.engine.local_engine import LocalEngine
from openbook.engine.paged import PagedRunner
from openbook.engine.receipt import ReceiptMaker
from openbook.engine.sequence_factory import SequenceFactory
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer, require_match


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
        UserError: there is no such model, its files are damaged, or there is too little memory.
    """
    path = locate(model)
    from openbook.checkpoint.model_source import open_model
    from openbook.engine.load import choose_runner

    source = open_model(path)
    chat = source.chat() if source.chat_template() is not None else source.tokenizer()
    runner = choose_runner(source, options.device, options.dtype, options.profile, options.cache)
    require_match(chat.tokenizer if isinstance(chat, Chat) else chat, runner.vocab_size)
    if not isinstance(runner, PagedRunner):
        raise UserError(f"the model {model} cannot be served: its runner computes whole batches only")
    engine = Engine(runner, SequenceFactory(chat, runner.vocab_size), settings)
    name = model_name(model, path)
    receipts = ReceiptMaker(
        path=path,
        model=name,
        profile=runner.profile,
        cache=options.cache,
        dtype=options.dtype,
    )
    return StartedEngine(name, path, chat, runner.profile, LocalEngine(engine), receipts)
