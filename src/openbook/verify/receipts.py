"""Recompute the answer of a receipt and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from openbook.checkpoint.locate import locate
from openbook.core.config import convert
from openbook.core.errors import UserError
from openbook.core.files import read_json
from openbook.engine.engine import EngineSettings
from openbook.engine.receipt import Receipt, receipt_digest, weights_digest
from openbook.engine.request import Request
from openbook.engine.start import LoadOptions, start_engine

if TYPE_CHECKING:
    from openbook.engine.engine import Engine


class ReceiptCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What recomputing an answer came to.

    verdict: "RECOMPUTED exact" if all tokens are the same in the exact profile, "RECOMPUTED" in the profile fast, which
    promises them on one machine only; "DIFFERS", or in the profile fast "UNDECIDED", if not.
    """

    receipt: str
    model: str
    verdict: Literal["RECOMPUTED exact", "RECOMPUTED", "DIFFERS", "UNDECIDED"]
    coverage: str
    difference: str | None = None


def verify_receipt(path: str | Path, model: str | None = None) -> ReceiptCheck:
    """Compute the answer of the receipt in the file `path` again; the file may hold the whole answer with its receipt.

    Args:
        model: the model, by name, path or hub id; None takes the name in the receipt.

    Raises:
        UserError: the file is no receipt, or there is no such model.
    """
    values = read_json(Path(path), "receipt")
    if isinstance(values, dict) and isinstance(values.get("receipt"), dict):
        values = values["receipt"]  # the whole answer was kept
    receipt = convert(values, Receipt, f"the receipt {path}")
    name = model or receipt.model

    def result(verdict: Literal["RECOMPUTED exact", "RECOMPUTED", "DIFFERS", "UNDECIDED"], text: str) -> ReceiptCheck:
        holds = verdict.startswith("RECOMPUTED")
        return ReceiptCheck(
            receipt=str(path),
            model=name,
            verdict=verdict,
            coverage=text if holds else "",
            difference=None if holds else text,
        )

    if receipt_digest(receipt) != receipt.digest:
        return result("DIFFERS", "the receipt was changed: its digest is not that of what stands in it")
    try:
        found = weights_digest(locate(name))
    except UserError as error:
        fix = "" if model else "; give the model with --model"
        raise UserError(f"the receipt {path} is of the model {name}: {error}{fix}") from error
    if found != receipt.weights:
        return result("DIFFERS", f"the model {name} here has the digest {found}, expected {receipt.weights}")
    num_tokens = len(receipt.output_ids)
    recomputed, finish_reason = _recompute(name, receipt)
    pairs = zip(recomputed, receipt.output_ids, strict=False)
    part = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    difference = None
    if part is not None:
        difference = f"token {part + 1} of {num_tokens} is {recomputed[part]}, expected {receipt.output_ids[part]}"
    elif len(recomputed) != num_tokens:
        difference = f"the answer ends after {len(recomputed)} tokens, expected {num_tokens}"
    elif receipt.finish_reason == "stop" != finish_reason:
        difference = f"the answer goes on behind its last token, expected it to end there after {num_tokens}"
    is_exact = receipt.profile == "exact"
    if difference:
        return result("DIFFERS" if is_exact else "UNDECIDED", difference)
    return result(
        "RECOMPUTED exact" if is_exact else "RECOMPUTED",
        f"{name}: {len(receipt.prompt_ids)} tokens of prompt, {num_tokens} of output, all as in the receipt",
    )


def _recompute(name: str, receipt: Receipt) -> tuple[list[int], str | None]:
    """The tokens that follow the prompt, as many as the receipt has, and what ended them."""
    if not receipt.output_ids:
        return [], None
    options = LoadOptions(profile=receipt.profile, cache=receipt.cache, dtype=receipt.dtype)
    started = start_engine(name, options, EngineSettings(max_running=1))
    engine: Engine = started.engine.engine
    request = Request(prompt_ids=receipt.prompt_ids, params=receipt.sampling, id="receipt")
    sequence = engine.prepare(request, receipt.sample, len(receipt.output_ids))
    engine.add(sequence)
    while engine.has_work:
        for event in engine.step():
            if event.error:
                raise UserError(f"the answer cannot be computed again: {event.error}")
    return sequence.new_ids, sequence.finish_reason
