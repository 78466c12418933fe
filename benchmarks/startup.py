"""How long a user waits for the first token: `openbook run MODEL PROMPT` against a bare `import torch`.

Both sides are fresh processes, started in turn and timed from outside, up to the first byte that they write.

    python benchmarks/startup.py [--model nano] [--repeats 9] [--write]
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from performance_page import machine, write_section

TARGET = 1.6
PROMPT = "Find the Greatest Common Divisor (GCD) of these numbers: 48, 36. Give only the GCD as your final answer."
IMPORT_TORCH = [sys.executable, "-c", "import torch; print('imported', flush=True)"]


def first_byte_s(command: Sequence[str]) -> float:
    """Seconds from the start of `command` to its first output, on stdout or stderr.

    Raises:
        SystemExit: it failed; its output is printed.
    """
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    select.select([process.stdout], [], [])
    seconds = time.perf_counter() - began_s
    output = process.stdout.read().decode(errors="replace")
    if process.wait() != 0 or not output:
        raise SystemExit(f"{' '.join(command)} failed: {output.strip() or 'no output'}")
    return seconds


def main() -> None:
    """Measure, print the ratio, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", help="bundled name or folder (default: nano)")
    parser.add_argument("--repeats", type=int, default=9, help="processes of each kind (default: 9)")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    script = Path(sys.executable).with_name("openbook")
    run = [str(script), "run", arguments.model, PROMPT, "--max-tokens", "1"]
    first_byte_s(IMPORT_TORCH), first_byte_s(run)  # once each to fill the file cache
    times: dict[str, list[float]] = {"torch": [], "openbook": []}
    for _ in range(arguments.repeats):
        times["torch"].append(first_byte_s(IMPORT_TORCH))
        times["openbook"].append(first_byte_s(run))
    torch_s, openbook_s = (statistics.median(times[side]) for side in ("torch", "openbook"))
    ratio = openbook_s / torch_s
    if arguments.json:
        print(
            json.dumps({"torch_s": torch_s, "openbook_s": openbook_s, "ratio": ratio, "target": TARGET, "times": times})
        )
    else:
        print(
            f"import torch            {torch_s:.2f} s  (median of {arguments.repeats}, best {min(times['torch']):.2f})"
        )
        print(f"openbook, first token   {openbook_s:.2f} s  (best {min(times['openbook']):.2f})")
        print(f"ratio                   {ratio:.2f}  (target: below {TARGET})")
    if arguments.write:
        body = f"""From process start to first output, median of {arguments.repeats} processes a side, started in turn
(`python benchmarks/startup.py --write`; {machine()}).

| process | seconds |
| --- | --- |
| `python -c "import torch"` | {torch_s:.2f} |
| `openbook run {arguments.model} PROMPT`, to the first token | {openbook_s:.2f} |
| ratio (target: below {TARGET}) | {ratio:.2f} |"""
        write_section("Startup", body)


if __name__ == "__main__":
    main()
