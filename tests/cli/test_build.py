"""`openbook build`: what it says at its end, and on Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openbook.cli.main import main
from openbook.train import loop

MICRO = Path(__file__).parent.parent / "release" / "micro.toml"
LAYOUT = ["--no-compile", "--threads", "1", "--workers", "1"]


def test_ctrl_c_says_how_to_go_on_and_that_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "build"
    train_step, num_steps = loop.train_step, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 8:
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert main(["build", str(MICRO), "--out", str(out), *LAYOUT]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    start = "openbook: stopped; what is done is saved: go on with `"
    assert line == f"{start}openbook build {MICRO} --out {out} --resume`"
    assert list(out.glob("train/first/step-*"))
    monkeypatch.undo()

    arguments = line.removeprefix(start).removesuffix("`").split()[1:]
    assert main([*arguments, "--until", "second"]) == 0
    assert capsys.readouterr().out == f"stopped after second; go on with `{line.removeprefix(start)}\n"
    assert not (out / "release").exists()

    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"build": str(out), "release": str(out / "release")}
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"try it   openbook chat {out / 'release'}"
