"""From a recipe to a release, in steps that are each whole or absent, so that a build can stop and go on anywhere.

DIR/recipe.toml  run.json  tokenizer/  data/<stage>/  train/<stage>/step-NNNNNNNN/  trace.jsonl  model/  evals/
release/
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from openbook.core.config import Config, convert
from openbook.core.errors import CheckError, UserError, unknown_name
from openbook.core.files import (
    PARTIAL_SUFFIX,
    atomic_directory,
    read_bytes,
    read_json,
    require_absent,
    write_bytes,
    write_json,
)
from openbook.core.progress import Progress
from openbook.ops.native_module import require_native
from openbook.train.parallel import LostWorkerError, Workers, joined
from openbook.train.recipe import Recipe, StageConfig, find_recipe, load_recipe, require_problems

if TYPE_CHECKING:
    from openbook.train.loop import Layout

# Packages that can change bits.
_PINNED = ("openbook", "torch", "numpy", "tokenizers", "reasoning-gym", "safetensors")


class Run(Config, frozen=True, kw_only=True):
    """What a build was started with; it goes on with the same. `seconds`: the working time of all its parts.

    In the exact profile a build may go on with other `threads`, another instruction set (`isa`, of the native core) and
    another number of processes that train (`num_trainers`): those of its last part stand here.
    keep_states: whether every saved state is kept and shipped, not only the newest two of each stage.
    """

    recipe: str
    device: str
    threads: int
    is_compiled: bool
    machine: str
    profile: str = "fast"
    isa: str = ""
    num_trainers: int = 1
    versions: dict[str, str]
    seconds: float = 0.0
    keep_states: bool = False


def build(
    recipe: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    until: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    is_compiled: bool | None = None,
    workers: int | None = None,
    keep_states: bool = False,
) -> Path:
    """Make a model from nothing.

    Args:
        recipe: path of the recipe.
        out: the build folder; it must not exist, unless `resume` is set.
        resume: go on with what stands in `out`; the result is the same, byte for byte, as without the interruption.
        until: stop after this step: "tokenizer", the name of a stage, "evals" or "release".
        device: "cpu" or "cuda"; None picks cpu, or on a resumed build what it was started with, as for the next two.
        threads: of the CPU backend; None takes every core this process may use.
        is_compiled: train through torch.compile; None: if there is a C++ compiler. Never in the exact profile.
        workers: processes that generate data; the data do not depend on it. None takes every core.
        keep_states: keep every saved state and ship them in the release, so that any segment of it can be replayed; a
            resumed build does so if it began so.

    Returns:
        the release folder (or where it would be, if `until` stops earlier).

    Raises:
        UserError: the recipe is wrong, `out` exists (or does not, for a resume), a resumed build has another recipe,
            layout or package versions, or the disk is full.
        CheckError: training went wrong; the message says at which step.
    """
    folder = Path(out)
    with joined() as trainers:
        if trainers.rank > 0:
            _follow(trainers)
            return folder / "release"
        path = find_recipe(str(recipe))
        loaded = load_recipe(path)
        steps = step_names(loaded)
        if until is not None and until not in steps:
            raise unknown_name("step", until, steps, f"expected one of {', '.join(steps)}")
        _require_profile(loaded, device, is_compiled, trainers)
        if resume:
            _require_same_recipe(folder, loaded)
        else:
            require_absent(folder)
            require_problems(loaded)
            folder.mkdir(parents=True)
        with _lock(folder):
            if not resume:
                write_bytes(folder / "recipe.toml", read_bytes(path, "recipe"))
            run = _start_run(folder, loaded, device, threads, is_compiled, keep_states, trainers)
            build = _Build(folder, loaded, run, workers or num_cores(), trainers)
            for name, step in build.steps():
                began_s = time.monotonic()
                try:
                    step()
                finally:
                    build.add_time(time.monotonic() - began_s)
                if name == until:
                    break
        trainers.tell(None)
    return folder / "release"


def step_names(recipe: Recipe) -> list[str]:
    """What `until` may be, in the order in which it is done."""
    return ["tokenizer", *(stage.name for stage in recipe.stages), "evals", "release"]


class _Build:
    def __init__(self, folder: Path, recipe: Recipe, run: Run, workers: int, trainers: Workers) -> None:
        self.folder, self.recipe, self.run = folder, recipe, run
        self.workers, self.trainers = workers, trainers

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each step does nothing if its result is there."""
        yield "tokenizer", self._tokenizer
        for index, stage in enumerate(self.recipe.stages):
            yield stage.name, lambda index=index: self._stage(index)  # type: ignore[misc]
        yield "evals", self._evals
        yield "release", self._release

    def add_time(self, seconds: float) -> None:
        """Add to the working time in run.json."""
        self.run = msgspec.structs.replace(self.run, seconds=self.run.seconds + seconds)
        write_json(self.folder / "run.json", self.run)

    def _tokenizer(self) -> None:
        out = self.folder / "tokenizer"
        if out.exists():
            return
        from openbook.release.inputs import make_tokenizer

        make_tokenizer(self.recipe, out)

    def _stage(self, index: int) -> None:
        stage = self.recipe.stages[index]
        self._data(stage)
        self._train(index)

    def _data(self, stage: StageConfig) -> None:
        out = self.folder / "data" / stage.name
        if out.exists():
            return
        from openbook.release.inputs import make_data

        make_data(self.recipe, stage, self.folder / "tokenizer", out, self.workers)

    def _train(self, index: int) -> None:
        from openbook.checkpoint.train_state import latest_train_state, read_position

        stages = self.recipe.stages
        latest = latest_train_state(self._checkpoints(stages[index]))
        if latest is not None and read_position(latest).stage_step == stages[index].steps:
            return
        from openbook.release.training import run_stage

        previous = latest_train_state(self._checkpoints(stages[index - 1])) if index else None
        task: dict[str, Any] = {
            "recipe": self.recipe,
            "index": index,
            "layout": self._layout(),
            "tokenizer": self.folder / "tokenizer",
            "data": self.folder / "data" / stages[index].name,
            "ledger": self.folder / "trace.jsonl",
            "checkpoints": self._checkpoints(stages[index]),
            "start_from": latest or previous,
            "keep_states": self.run.keep_states,
        }
        self.trainers.tell(task)
        run_stage(**task, workers=self.trainers)

    def _evals(self) -> None:
        model_folder = self._model()
        todo = [
            (difficulty, effort, self.folder / "evals" / f"{difficulty}-{effort}")
            for difficulty in self.recipe.eval.difficulties
            for effort in self.recipe.eval.efforts
        ]
        todo = [part for part in todo if not part[2].exists()]
        if not todo:
            return
        from openbook.engine.model import Model
        from openbook.evals.harness import evaluate
        from openbook.evals.report import write_report

        self._use_threads()
        config = self.recipe.eval
        model = Model.load(model_folder, device=self.run.device)
        for difficulty, effort, out in todo:
            with Progress(f"eval {difficulty}", config.samples * len(config.tasks)) as progress:
                report = evaluate(
                    model,
                    config.tasks,
                    seed=config.seed,
                    samples=config.samples,
                    difficulty=difficulty,
                    effort=effort,
                    prompt_style="bare",
                    max_tokens=config.max_tokens,
                    on_item=lambda done, correct, progress=progress, effort=effort: progress.update(  # type: ignore[misc]
                        done, f"{effort}  {correct / done:.1%} correct"
                    ),
                )
            out.parent.mkdir(exist_ok=True)
            write_report(report, out)

    def _release(self) -> None:
        out = self.folder / "release"
        if not out.exists():
            from openbook.release.assemble import assemble_release

            assemble_release(self.folder, out, self._model())
        report = self.folder / "report.html"
        if not report.exists():
            write_bytes(report, read_bytes(out / "provenance" / "report.html", "report"))

    def _model(self) -> Path:
        """The folder of the last stage's weights, with tokenizer and chat template beside them."""
        out = self.folder / "model"
        if not out.exists():
            from openbook.release.training import export_model

            state = self._checkpoints(self.recipe.stages[-1])
            with atomic_directory(out) as partial:
                export_model(self.recipe, state, self.folder / "tokenizer", partial)
        return out

    def _checkpoints(self, stage: StageConfig) -> Path:
        return self.folder / "train" / stage.name

    def _layout(self) -> Layout:
        from openbook.train.loop import Layout

        return Layout(device=self.run.device, threads=self.run.threads, is_compiled=self.run.is_compiled)

    def _use_threads(self) -> None:
        import torch

        torch.set_num_threads(self.run.threads)


def _follow(trainers: Workers) -> None:
    """What all processes under torchrun but the first do: train when it says so, in silence."""
    from openbook.release.training import run_stage

    try:
        while (task := trainers.hear()) is not None:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
                run_stage(**task, workers=trainers)
    except (LostWorkerError, CheckError) as error:  # the first process has the same reason, or says its own
        raise SystemExit(1) from error


def _require_profile(recipe: Recipe, device: str | None, is_compiled: bool | None, trainers: Workers) -> None:
    """See that this machine and these flags can do what the recipe's profile asks for."""
    if recipe.profile == "fast":
        if trainers.count > 1:
            raise UserError(
                f'torchrun started {trainers.count} processes, but the recipe has profile "fast", which trains in one: '
                'start it without torchrun, or set profile = "exact"'
            )
        return
    require_native()
    for flag, is_given in (("--device cuda", device == "cuda"), ("--compile", bool(is_compiled))):
        if is_given:
            raise UserError(
                f'{flag}: the recipe has profile "exact", which runs its own kernels on the CPU: leave the flag out, '
                'or set profile = "fast"'
            )


def _require_same_recipe(folder: Path, recipe: Recipe) -> None:
    stored = folder / "recipe.toml"
    if not stored.is_file():
        raise UserError(f"--resume: {folder} holds no build: give the --out of the one that was interrupted")
    if load_recipe(stored).hash != recipe.hash:
        raise UserError(
            f"--resume: {folder} was built from another recipe than the one given: "
            f"resume with {stored}, or build into a new folder"
        )


def _start_run(
    folder: Path,
    recipe: Recipe,
    device: str | None,
    threads: int | None,
    is_compiled: bool | None,
    keep_states: bool,
    trainers: Workers,
) -> Run:
    """Read or write run.json, and see that a resumed build goes on as it began, where that decides bits."""
    path = folder / "run.json"
    versions = {name: version(name) for name in _PINNED}
    is_exact = recipe.profile == "exact"
    isa = require_native().isa() if is_exact else ""
    if not path.exists():
        if device == "cuda":
            _require_cuda()
        run = Run(
            recipe=recipe.hash,
            profile=recipe.profile,
            device=device or "cpu",
            threads=threads or max(1, num_cores() // trainers.count),
            is_compiled=not is_exact and (has_compiler() if is_compiled is None else is_compiled),
            isa=isa,
            num_trainers=trainers.count,
            machine=_machine(),
            versions=versions,
            keep_states=keep_states,
        )
        write_json(path, run)
        return run
    run = convert(read_json(path, "record of the run"), Run, f"the record of the run {path}")
    if keep_states and not run.keep_states:
        raise UserError(
            "--resume: --keep-states is given, the build began without it and has dropped states by now: "
            "resume without it, or build into a new folder"
        )
    given: dict[str, Any] = {"--device": device, "--compile": is_compiled, "the installed packages": versions}
    began: dict[str, Any] = dict(zip(given, (run.device, run.is_compiled, run.versions), strict=True))
    if not is_exact:
        given, began = {"--threads": threads, **given}, {"--threads": run.threads, **began}
    for name, value in given.items():
        if value is not None and value != began[name]:
            raise UserError(
                f"--resume: {name} is {value}, the build began with {began[name]}, and the weights would not be the "
                "same: resume as it began, or build into a new folder"
            )
    # In the exact profile these decide no bit: the record says with what the build went on.
    return msgspec.structs.replace(run, threads=threads or run.threads, isa=isa, num_trainers=trainers.count)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is being built by another process: wait for it, or give another --out"
            ) from error
        for left_over in folder.rglob(f"*{PARTIAL_SUFFIX}"):
            if left_over.is_dir():
                shutil.rmtree(left_over)
            else:
                left_over.unlink(missing_ok=True)
        yield


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device on this machine; use --device cpu")


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> str:
    from openbook.release.assemble import machine

    return machine()
