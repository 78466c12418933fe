"""Where benchmarks write their results: one section each in docs/performance.md."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
_HEAD = "# Performance\n\nEach section is written by the script that it names; run it to have it for your machine.\n"


def machine() -> str:
    """This machine in a few words: processor, cores that may be used, operating system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)):
        cpu = found[1]
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"


def write_section(title: str, body: str) -> None:
    """Put `body` under the heading `title`, in place of what stood there; other sections stay as they are."""
    page = PAGE.read_text() if PAGE.exists() else _HEAD
    section = f"## {title}\n\n{body.strip()}\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
    if old.search(page):
        page = old.sub(lambda _: f"{section}\n", page)
    else:
        page = f"{page.rstrip()}\n\n{section}"
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page.rstrip() + "\n")
