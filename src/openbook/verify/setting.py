"""Where and how a release was trained, and whether this machine can do it again."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from openbook.core.config import convert
from openbook.core.errors import CheckError
from openbook.core.files import read_json
from openbook.ops.native_module import require_native
from openbook.release.assemble import machine
from openbook.release.build import Run, has_compiler
from openbook.release.manifest import ENVIRONMENT_PATH
from openbook.train.ledger import Entry
from openbook.train.loop import Layout
from openbook.train.recipe import Recipe
from openbook.verify.difference import Difference
from openbook.verify.integrity import Integrity
from openbook.verify.ledger import NO_STATES, has_states


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What training again needs.

    run: the record of the build. layout: for training here. unlike: facts of the build that are otherwise here, in
    words; where the profile is not exact they can change bits. isa: instruction set here, of the exact profile.
    """

    folder: Path
    recipe: Recipe
    entries: list[Entry]
    run: Run
    layout: Layout
    unlike: list[str]
    isa: str

    @property
    def is_exact(self) -> bool:
        """Whether the recipe's numerics give the same bits on every machine."""
        return self.recipe.profile == "exact"

    @property
    def note(self) -> str:
        """What equal bits mean here, in one line."""
        if self.is_exact:
            there, here = _speed(self.run.isa, self.run.threads), _speed(self.isa, self.layout.threads)
            return (
                f"profile exact: the bits do not depend on machine, instruction set or threads ({there}; here {here})"
            )
        where = f"otherwise here: {'; '.join(self.unlike)}" if self.unlike else "all of that is the same here"
        return (
            f"precision {self.recipe.precision} is not the exact profile: its bits depend on machine, packages and "
            f"threads ({where})"
        )

    def difference(self, path: str, detail: str) -> Difference:
        """Training that came out otherwise, which proves something only where the bits had to be the same."""
        if self.is_exact or not self.unlike:
            return Difference(path=path, kind="diverged", detail=detail)
        detail += (
            "; this proves nothing, as without the exact profile the bits are those of the build's machine, and "
            f"otherwise here: {'; '.join(self.unlike)}"
        )
        return Difference(path=path, kind="undecided", detail=detail)


def read_setting(folder: Path, integrity: Integrity, threads: int | None, action: str) -> Setting:
    """What training again needs, of a release whose integrity holds.

    Args:
        threads: of the CPU backend; None takes what the build had.
        action: "replay" or "rebuild", for messages.

    Raises:
        CheckError: it cannot be done, in one line that says why.
        UserError: the profile is exact, and this installation has no native core.
    """
    here = version("openbook")
    if integrity.recipe is None:
        raise CheckError(
            f"cannot {action} {folder}: openbook {integrity.manifest.openbook} made it, this is {here}: "
            "install that version"
        )
    if not has_states(integrity.entries):
        raise CheckError(f"cannot {action} {folder}: {NO_STATES}")
    run = convert(read_json(folder / ENVIRONMENT_PATH, "record of the run"), Run, f"the file {ENVIRONMENT_PATH}")
    if run.device != "cpu":
        _require_device(folder, run.device, action)
    if run.is_compiled and not has_compiler():
        raise CheckError(f"cannot {action} {folder}: it was trained through torch.compile: install a C++ compiler")
    isa = require_native().isa() if integrity.recipe.profile == "exact" else ""
    layout = Layout(device=run.device, threads=threads or run.threads, is_compiled=run.is_compiled)
    return Setting(
        folder=folder,
        recipe=integrity.recipe,
        entries=integrity.entries,
        run=run,
        layout=layout,
        unlike=_unlike(run, layout),
        isa=isa,
    )


def _speed(isa: str, threads: int) -> str:
    return f"{isa or 'unknown'}, {threads} thread{'s' if threads > 1 else ''}"


def _unlike(run: Run, layout: Layout) -> list[str]:
    facts = [("machine", run.machine, machine()), ("threads", run.threads, layout.threads)]
    facts.append(("training processes", run.num_trainers, 1))
    facts += [(name, given, _installed(name)) for name, given in run.versions.items()]
    return [f"{name} {there}, here {here}" for name, there, here in facts if there != here]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _require_device(folder: Path, device: str, action: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise CheckError(f"cannot {action} {folder}: it was trained on {device}, and torch sees no such device here")
