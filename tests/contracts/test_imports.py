"""What a command imports is what it needs: start-up time is a feature."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from openbook.cli.main import COMMANDS
from openbook.ops.native_module import has_native

HEAVY = {"torch", "numpy", "reasoning_gym", "tokenizers", "safetensors", "transformers", "matplotlib", "jinja2", "rich"}


def imported_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has imported after `code`."""
    program = f"{code}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import openbook") & (HEAVY | {"click", "msgspec"})


def test_the_command_line_and_its_help_import_nothing_heavy() -> None:
    code = "from openbook.cli.main import main\nassert main(['--help']) == 0\nassert main(['runn']) == 2"
    loaded = imported_by(code)
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("openbook.cli.")} - {"openbook.cli.main"}


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    code = "".join(f"assert main([{name!r}, '--help']) == 0\n" for name in COMMANDS)
    loaded = imported_by(f"from openbook.cli.main import main\n{code}")
    assert not loaded & HEAVY
    assert {f"openbook.cli.{name}" for name in COMMANDS} <= loaded


def test_one_answer_imports_only_what_it_needs(tiny_folder: Path) -> None:
    arguments = ["run", str(tiny_folder), "Hello", "--max-tokens", "2"]
    loaded = imported_by(f"from openbook.cli.main import main\nassert main({arguments!r}) == 0")
    assert ("torch" in loaded) != has_native()
    # `rich` draws progress bars, which an answer has none of; the compiler is for training.
    assert not loaded & {"reasoning_gym", "transformers", "rich", "matplotlib", "torch._dynamo", "torch._inductor"}
    assert not {name for name in loaded if name.startswith(("openbook.train", "openbook.release", "openbook.data"))}
