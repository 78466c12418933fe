"""The public surface: what is exported, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import openbook
from openbook.core.errors import UserError


def modules_after(code: str) -> set[str]:
    """Names of all modules loaded in a fresh interpreter after `code`."""
    program = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import openbook\ndir(openbook)")
    assert not loaded & {"torch", "numpy", "reasoning_gym", "tokenizers", "rich", "click", "jinja2", "msgspec"}


def test_a_chat_loads_nothing_that_it_does_not_need(tiny_folder: Path) -> None:
    code = f"import openbook\nopenbook.load({str(tiny_folder)!r}).chat('Hi', max_tokens=2)"
    loaded = modules_after(code)
    assert "openbook.ops._native" in loaded
    assert not loaded & {"torch", "reasoning_gym", "transformers", "rich", "matplotlib"}


def test_every_exported_name_is_there() -> None:
    assert dir(openbook) == openbook.__all__
    for name in openbook.__all__:
        assert getattr(openbook, name) is not None
    assert openbook.__version__ == "0.1.0"
    assert openbook.UserError is UserError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'openbook' has no attribute 'lod'"):
        _ = openbook.lod  # type: ignore[attr-defined]


def test_load_and_evaluate(tiny_folder: Path) -> None:
    model = openbook.load(tiny_folder)
    report = openbook.evaluate(model, "gcd", seed=7, samples=3, config="easy")
    assert [item.seed for item in report.items] == [7, 8, 9]
    assert report.accuracy == 0.0
    assert report.interval == pytest.approx((0.0, 0.5615), abs=1e-4)


def test_verify_stays_a_function_when_its_package_is_imported(made_release: Path) -> None:
    for _ in range(2):  # the first use imports the package openbook.verify, which then stands under the same name
        assert openbook.verify(str(made_release)).verdict == "INTEGRITY"
    assert openbook.verify(made_release).num_parameters > 0
    with pytest.raises(UserError, match="unknown model 'nanoo'"):
        openbook.verify("nanoo")
