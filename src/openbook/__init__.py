"""Openbook: a reasoning model that anyone can run, rebuild, measure and check.

    model = openbook.load("nano")
    answer = model.chat("What is the greatest common divisor of 12 and 18?", effort="high")
    answer.text, answer.reasoning

Everything is imported when it is first used: `import openbook` by itself loads neither torch nor reasoning-gym.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openbook.api import evaluate as evaluate
    from openbook.api import load as load
    from openbook.core.errors import UserError as UserError
    from openbook.engine.model import Answer as Answer
    from openbook.engine.model import Model as Model
    from openbook.evals.report import Report as Report
    from openbook.release.build import build as build
    from openbook.tokenizer.images import image_part as image_part
    from openbook.verify.verification import verify as verify

    __version__: str

_HOMES = {
    "load": "openbook.api",
    "evaluate": "openbook.api",
    "build": "openbook.release.build",
    "image_part": "openbook.tokenizer.images",
    "verify": "openbook.verify.verification",
    "Model": "openbook.engine.model",
    "Answer": "openbook.engine.model",
    "Report": "openbook.evals.report",
    "UserError": "openbook.core.errors",
}

__all__ = ["Answer", "Model", "Report", "UserError", "__version__", "build", "evaluate", "image_part", "load", "verify"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("openbook")
    if name not in _HOMES:
        raise AttributeError(f"module 'openbook' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
