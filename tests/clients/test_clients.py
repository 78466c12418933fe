"""Programs that others wrote for the OpenAI API, against a server of nano; `make test-clients`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openbook.tasks.registry import get_task
from readme_commands import serving

pytestmark = pytest.mark.clients

QUESTION = "Find the Greatest Common Divisor (GCD) of these numbers: 84, 36. Give only the GCD as your final answer."
LM_EVAL_TASK = """
task: nano_gcd
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 300
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that keeps responses in a folder of the tests."""
    with serving(["serve", "nano", "--response-store", str(tmp_path_factory.mktemp("responses"))]) as (port, _):
        yield f"http://127.0.0.1:{port}"


def run(*command: str, folder: Path) -> str:
    """What a program prints; it finds no network, and must end well."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.filterwarnings("ignore")
def test_langchain(address: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="nano", temperature=0)  # type: ignore[arg-type]
    assert model.invoke(QUESTION).content == "12"
    assert "".join(str(piece.content) for piece in model.stream(QUESTION)) == "12"
    assert [reply.content for reply in model.batch([QUESTION, QUESTION])] == ["12", "12"]
    schema = {
        "title": "gcd",
        "description": "A greatest common divisor.",
        "type": "object",
        "properties": {"gcd": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["gcd"],
        "additionalProperties": False,
    }
    answer = model.with_structured_output(schema, method="json_schema").invoke(QUESTION)
    assert isinstance(answer, dict) and 1 <= answer["gcd"] <= 99


def test_lm_eval(address: str, tmp_path: Path) -> None:
    problems = [get_task("gcd").generate(seed) for seed in range(12)]
    data = tmp_path / "gcd.jsonl"
    rows = [{"question": problem.question, "answer": problem.entry["answer"]} for problem in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "nano_gcd.yaml").write_text(LM_EVAL_TASK.format(file=data))
    run(
        *("lm_eval", "run", "--model", "local-chat-completions", "--apply_chat_template", "--tasks", "nano_gcd"),
        *(
            "--model_args",
            f"model=nano,base_url={address}/v1/chat/completions,num_concurrent=4,tokenized_requests=False",
        ),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
        folder=tmp_path,
    )
    (report,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["nano_gcd"]["exact_match,none"] >= 0.75


def test_schemathesis(address: str, tmp_path: Path) -> None:
    """Requests made from the description of the API, right and wrong ones: never a 5xx."""
    printed = run(
        *("schemathesis.cli", "run", f"{address}/openapi.json", "--checks", "not_a_server_error", "--seed", "1"),
        *("--max-examples", "10", "--phases", "examples,coverage,fuzzing", "--request-timeout", "30"),
        folder=tmp_path,
    )
    found = re.search(r"(\d+) generated", printed)
    assert found and int(found[1]) > 300, printed[-3000:]
