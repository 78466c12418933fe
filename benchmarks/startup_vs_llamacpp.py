"""How long a user waits for the first token of a GGUF file: `openbook run` against a llama.cpp script.

The file is SmolLM2-135M, in Q8_0 or Q4_0. Both sides are fresh processes, started in turn and timed from outside, up to
the first byte that they write: load the file, render the question with its chat template, compute one token.

    pip install -e '.[peers]'
    python benchmarks/startup_vs_llamacpp.py [--type Q8_0] [--repeats 9] [--folder DIR] [--write]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from performance_page import machine, write_section
from startup import first_byte_s

TARGET = 2.0
TITLE = "First token against llama.cpp"
PROMPT = "Hello, who are you?"  # no near tie: the two round differently
LLAMA_CPP = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]), verbose=False)
messages = [{"role": "user", "content": sys.argv[2]}]
for chunk in model.create_chat_completion(messages, temperature=0.0, max_tokens=1, stream=True):
    print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
"""


def main() -> None:
    """Measure, print the ratio, and with --write put it into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_0"], help="of the weights (default: Q8_0)")
    parser.add_argument("--repeats", type=int, default=9, help="processes of each kind (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp (default: 2); ours chooses itself")
    parser.add_argument("--folder", type=Path, help="keep the file there, and use it if it is there")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = made_elsewhere(arguments.folder or Path(temporary), arguments.type)
        sides = {
            "openbook": [str(Path(sys.executable).with_name("openbook")), "run", path, PROMPT, "--max-tokens", "1"],
            "llama_cpp": [sys.executable, "-c", LLAMA_CPP, path, PROMPT, str(arguments.threads)],
        }
        first_byte_s(sides["openbook"]), first_byte_s(sides["llama_cpp"])  # once each to fill the file cache
        require_same_answer(sides["openbook"], sides["llama_cpp"])
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side, command in sides.items():
                times[side].append(first_byte_s(command))
    ours_s, theirs_s = (statistics.median(times[side]) for side in sides)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*times.values(), strict=True))
    if arguments.json:
        print(json.dumps({"openbook_s": ours_s, "llama_cpp_s": theirs_s, "ratio": ratio, "target": TARGET, **times}))
    else:
        print(f"openbook run  {ours_s:.2f} s  (median of {arguments.repeats}, best {min(times['openbook']):.2f})")
        print(f"llama.cpp     {theirs_s:.2f} s  (best {min(times['llama_cpp']):.2f})")
        print(f"ratio         {ratio:.2f}  (target: at most {TARGET})")
    if arguments.write:
        body = f"""From process start to the first token of SmolLM2-135M ({arguments.type}, in the file cache), median
of {arguments.repeats} processes a side, started in turn (`python benchmarks/startup_vs_llamacpp.py --write`;
{machine()}).

| process | seconds |
| --- | --- |
| `openbook run FILE PROMPT` | {ours_s:.2f} |
| a script of five lines on llama-cpp-python | {theirs_s:.2f} |
| ratio (target: at most {TARGET}) | {ratio:.2f} |"""
        write_section(TITLE, body)


def made_elsewhere(folder: Path, type_name: str) -> str:
    """The model's file, made in a process of its own: this one stays small, as starting others copies what it holds."""
    code = (
        "import sys; from pathlib import Path; from quantised_files import gguf_file; "
        "print(gguf_file(Path(sys.argv[1]), '135M', sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(folder.resolve()), type_name]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def require_same_answer(*commands: list[str]) -> None:
    """Raises SystemExit if two of them do not write the same."""
    texts = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for command in commands]
    if len(set(texts)) > 1:
        raise SystemExit(f"the sides differ in their first token: {texts}")


if __name__ == "__main__":
    main()
