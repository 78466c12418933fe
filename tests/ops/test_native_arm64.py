"""The kernels give the same bits on arm64 as on x86-64: one program compiled for both, arm64's under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parents[2] / "src/openbook/ops/native"
_COMPILER, _EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.arm64


def _build(folder: Path, *options: str) -> Path:
    configure = ["cmake", "-S", _SOURCES, "-B", folder, "-DOPENBOOK_BINDINGS=OFF", *options]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "self_check"


def _digests(*command: str | Path) -> dict[str, dict[str, str]]:
    """By group of kernels: of each instruction set and thread count, what was computed."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in done.stdout.splitlines():
        group, isa, threads, digest = line.split()
        found[group][f"{isa} {threads}"] = digest
    return dict(found)


def test_arm64_gives_the_bits_of_x86(tmp_path: Path) -> None:
    """Every instruction set and thread count of both, group by group."""
    assert platform.machine() == "x86_64", "this check starts from an x86-64 machine"
    for tool, package in ((_COMPILER, "g++-aarch64-linux-gnu"), (_EMULATOR, "qemu-user"), ("cmake", "cmake")):
        assert shutil.which(tool), f"{tool} is missing: arm64 was NOT checked; install Debian's {package}"
    here = _digests(_build(tmp_path / "x86"))
    there = _digests(
        _EMULATOR,
        _build(
            tmp_path / "arm",
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={_COMPILER}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ),
    )
    assert set(here) == set(there) and len(here) >= 9
    for group, digests in here.items():
        assert {"scalar 1", "avx2 3"} <= set(digests)
        assert {"scalar 1", "neon 3", "neondot 1"} <= set(there[group])
        assert len({*digests.values(), *there[group].values()}) == 1, f"{group}: {digests} {there[group]}"
