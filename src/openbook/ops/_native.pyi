"""The compiled module, whose docstrings say what its functions take; a checker needs no build."""

from typing import Any

def __getattr__(name: str) -> Any: ...
