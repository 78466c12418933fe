"""Builds in the exact profile: the same bytes with any threads, instruction set and number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from exact_paths import kept_path, native
from openbook.cli.main import main
from openbook.core.files import sha256_file

MICRO = Path(__file__).parent / "micro.toml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """micro.toml in the exact profile; a step of the first stage has three micro-batches, one of the second has one."""
    path = tmp_path_factory.mktemp("recipe") / "micro.toml"
    text = MICRO.read_text().replace('precision = "float32"', 'precision = "float32"\nprofile = "exact"')
    path.write_text(text.replace("global_batch_tokens = 512\nmicro_batch_size = 2", THREE_LEAVES))
    return path


THREE_LEAVES = "global_batch_tokens = 768\nmicro_batch_size = 2"


def _build(recipe: Path, out: Path, *options: str) -> int:
    return main(["build", str(recipe), "--out", str(out), "--workers", "1", *options])


def _bytes(out: Path) -> dict[str, str]:
    files = [out / "trace.jsonl", *sorted(out.glob("train/**/*.safetensors"))]
    return {str(file.relative_to(out)): sha256_file(file) for file in files}


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "build"
    with kept_path():
        assert _build(recipe, out, "--threads", "1", "--until", "second") == 0
    return out


def test_a_resumed_build_may_take_other_threads_and_instructions(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "build"
    with kept_path():
        assert _build(recipe, out, "--threads", "1", "--until", "first") == 0
        first = json.loads((out / "run.json").read_text())
        assert (first["profile"], first["isa"], first["is_compiled"]) == ("exact", native.isa(), False)
        native.set_isa("scalar")
        assert _build(recipe, out, "--threads", "3", "--resume", "--until", "second") == 0
    second = json.loads((out / "run.json").read_text())
    assert (second["threads"], second["isa"]) == (3, "scalar")
    assert _bytes(out) == _bytes(whole)


def _processes(recipe: Path, out: Path, count: int, *options: str) -> list[subprocess.CompletedProcess[str]]:
    """The build as torchrun starts it, in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openbook.cli.main", "build", str(recipe), "--out", str(out)]
    command += ["--workers", "1", "--until", "second", *options]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        # Minutes only where the machine is busy with other things; processes that wait for each other never end.
        outputs = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_train_together_give_the_same_bytes(
    recipe: Path, whole: Path, tmp_path: Path, count: int
) -> None:
    first, *others = _processes(recipe, tmp_path / "build", count, "--threads", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("stopped after second")
    assert [(process.returncode, process.stdout, process.stderr) for process in others] == [(0, "", "")] * (count - 1)
    assert _bytes(tmp_path / "build") == _bytes(whole)
    assert json.loads((tmp_path / "build" / "run.json").read_text())["num_trainers"] == count


def _require_one_line(processes: list[subprocess.CompletedProcess[str]], status: int, text: str) -> None:
    first, *others = processes
    assert first.returncode == status
    assert text in first.stderr.splitlines()[-1]
    assert "Traceback" not in first.stderr
    assert all(process.returncode != 0 and (process.stdout, process.stderr) == ("", "") for process in others)


def test_an_error_of_the_first_process_ends_all_with_one_line(tmp_path: Path) -> None:
    line = 'torchrun started 2 processes, but the recipe has profile "fast", which trains in one: '
    _require_one_line(_processes(MICRO, tmp_path / "build", 2), 2, line)
    assert not (tmp_path / "build").exists()


def test_training_that_diverges_ends_all_with_one_line(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.read_text().replace("schedule = { lr = 0.01,", "schedule = { lr = 1e30,", 1))
    _require_one_line(_processes(path, tmp_path / "build", 2), 1, "training stopped")


def test_three_processes_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert _build(recipe, tmp_path / "out") == 2
    line = "openbook: torchrun started 3 processes, expected a power of two: give --nproc-per-node 1, 2, 4 or 8\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        _build(recipe, tmp_path / "out")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "given"), [(["--device", "cuda"], "--device cuda"), (["--compile"], "--compile")])
def test_what_the_exact_profile_cannot_do_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], given: str
) -> None:
    assert _build(recipe, tmp_path / "out", *option) == 2
    line = capsys.readouterr().err
    assert line == (
        f'openbook: {given}: the recipe has profile "exact", which runs its own kernels on the CPU: leave the flag '
        'out, or set profile = "fast"\n'
    )
    assert not (tmp_path / "out").exists()


def test_without_the_native_core_nothing_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("openbook.ops._native")
    monkeypatch.setitem(sys.modules, "openbook.ops._native", None)
    assert _build(recipe, tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert line.startswith("openbook: openbook was installed without a C++ compiler")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
