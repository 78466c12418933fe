"""A build that kills itself with SIGKILL at one exact place: `killed_build.py PLACE COUNT RECIPE OUT`.

PLACE is the dotted name of a function; the process dies when it is called for the COUNT-th time, before
it does anything.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from openbook.cli.main import main


def kill_at(place: str, count: int) -> None:
    """Replace the function by one that ends the process at its `count`-th call."""
    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, deadly)


if __name__ == "__main__":
    place, count, recipe, out = sys.argv[1:]
    kill_at(place, int(count))
    resume = ["--resume"] if os.path.exists(out) else []  # noqa: PTH110
    sys.exit(main(["build", recipe, "--out", out, "--no-compile", "--threads", "1", "--workers", "1", *resume]))
