"""`openbook serve`: what it refuses in one line, and a whole life from start to SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from openbook.cli.main import main
from openbook.cli.serve import Size, command
from openbook.server.auth import KeyRing
from openbook.server.response_store import default_folder
from openbook.server.settings import ServerSettings


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBOOK_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 lets others in and there is no API key: give --api-key or OPENBOOK_API_KEY, or "
            "--allow-no-key if everybody who reaches it may use it",
        ),
        (["--api-key", "abc"], "an API key has 3 characters: expected at least 8; take a longer one"),
        (
            ["--requests-per-minute", "5"],
            "requests_per_minute is 5, but limits are kept per key and there is none: give --api-key",
        ),
        (
            ["nano", "smollm2", "--served-name", "x"],
            "--served-name is given with 2 models: it is for one; serve that one alone",
        ),
        (
            ["nano", "smollm2", "--adapter", "a=/"],
            "--adapter is given with 2 models: it is for one; serve that one alone",
        ),
        (
            ["--adapter", "a"],
            "--adapter is 'a': expected NAME=PATH, the name of letters, digits, '.', '_' and '-'",
        ),
        (
            ["--adapter", "a b=/"],
            "--adapter is 'a b=/': expected NAME=PATH, the name of letters, digits, '.', '_' and '-'",
        ),
        (["--adapter", "a=/no"], "--adapter a: there is no folder /no; give one with adapter_config.json"),
        (["--adapter", "a=/", "--adapter", "a=/"], "--adapter names 'a' twice: give each adapter a name of its own"),
        (["--adapter-dir", "/no"], "--adapter-dir /no is no folder: make it, or give another"),
        (["--image", "x"], "--image is for --export k8s and --export compose: leave it out"),
        (
            ["--export", "k8s", "--api-key", "secret-key"],
            "--api-key does not go with --export, whose files take the key from a secret: leave it out",
        ),
        (
            ["--export", "k8s", "--ray"],
            "--ray does not go with --export, whose files run one server with its engines: leave it out",
        ),
        (
            ["--export", "k8s", "--response-store", "here"],
            "--response-store here does not go with --export, whose files keep responses in a volume of their own: "
            "leave it out, or give off",
        ),
        (["--ray-address", "auto"], "--ray-address is given without --ray: give both, or leave it out"),
        (
            ["--cache-memory", "lots"],
            "invalid value for '--cache-memory': 'lots' is no size: expected a number of bytes such as 512M or 2GiB; "
            "see `openbook serve --help`",
        ),
        (
            ["--draft-model", "nano", "--draft-tokens", "0", "--port", "0"],
            "--draft-tokens is 0, and --draft-model is given: leave out one of them",
        ),
        (["no-such-model", "--port", "0"], "unknown model 'no-such-model': "),
        (["--host", "256.0.0.1", "--api-key", "secret-key"], "cannot listen on 256.0.0.1 port 8000: "),
        (["--profile", "exact", "--device", "cuda", "--port", "0"], "the device cuda was asked for together with the"),
    ],
)
def test_what_makes_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"openbook: {message}") and captured.err.count("\n") == 1 and not captured.out


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"openbook: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --host and "
        "--port\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", 512), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2 kb", 2048), ("1T", 1 << 40)],
)
def test_sizes(text: str, expected: int) -> None:
    assert Size().convert(text, None, None) == expected


def test_a_new_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--make-key", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert KeyRing([made["hash"]]).find(made["key"]) == 0
    assert main(["serve", "--make-key"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("sha256$") and "shown this once: ob-" in captured.err


def test_every_setting_has_an_option() -> None:
    context = command.make_context("serve", ["--api-key", "secret-key", "--tokens-per-minute", "7"])
    from openbook.cli.serve import _settings

    settings = _settings(context.params)
    store = default_folder()
    assert settings == ServerSettings(api_keys=("secret-key",), tokens_per_minute=7, response_store=store)


@pytest.mark.parametrize(("given", "store"), [("off", None), ("some/folder", Path("some/folder"))])
def test_where_responses_are_kept(given: str, store: Path | None) -> None:
    from openbook.cli.serve import _settings

    limits = ["--response-store-size", "5M", "--response-store-days", "0.5"]
    settings = _settings(command.make_context("serve", ["--response-store", given, *limits]).params)
    assert settings.response_store == store
    assert (settings.response_store_bytes, settings.response_store_days) == (5 << 20, 0.5)


@pytest.mark.parametrize("kind", ["k8s", "systemd", "compose"])
def test_export_carries_what_was_given(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBOOK_API_KEY", "from-the-environment")
    given = ["--export", kind, "--no-prefix-cache", "--max-running", "9", "--served-name", "a", "--served-name", "b c"]
    assert main(["serve", "nano", *given, "--adapter", f"x={tmp_path}", "--log-level", "info"]) == 0
    text = capsys.readouterr().out
    for part in ("nano", "--no-prefix-cache", "--max-running", "b c", "--adapter", "--log-level", str(tmp_path)):
        assert part in text
    assert "from-the-environment" not in text and "--export" not in text and "--cache-memory" not in text


@contextlib.contextmanager
def served(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A running `openbook serve` and what it said when it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "openbook.cli.main", "serve", *arguments, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_from_start_to_end() -> None:
    with served("nano", "--served-name", "book", "--drain-seconds", "5", OPENBOOK_API_KEY="secret-key") as (
        process,
        said,
    ):
        assert said["models"] == ["book"]
        with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="secret-key", timeout=30) as sdk:
            answer = sdk.chat.completions.create(
                model="book", messages=[{"role": "user", "content": "Spell this word backward: cat"}]
            )
            assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content
        assert httpx2.get(f"{said['url']}/v1/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == ""
    assert err == f"book: {said['url']} (API at {said['url']}/v1, docs at {said['url']}/docs; Ctrl-C stops)\n"


def test_a_client_that_goes_on_is_cut_off_at_the_deadline() -> None:
    with served("--drain-seconds", "0.3") as (process, said):
        body = {"model": "nano", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "n": 100, "stream": True}
        with httpx2.stream("POST", f"{said['url']}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert process.wait(20) == 0
    assert '"code":"shutting_down"' in rest[-2] and rest[-1] == "data: [DONE]"


def test_a_second_interrupt_waits_for_nothing() -> None:
    with served("--drain-seconds", "60") as (process, said):
        body = {"model": "nano", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 128, "stream": True}
        with httpx2.stream("POST", f"{said['url']}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err.count("\n") == 1  # no traceback


def test_an_adapter_that_is_none_ends_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "openbook.cli.main", "serve", "--port", "0", "--adapter", f"x={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and result.stderr.startswith("openbook: ") and result.stderr.count("\n") == 1
    assert "adapter_config.json" in result.stderr


def test_a_dense_model_is_served_without_torch() -> None:
    code = """
import sys
from openbook.cli.serve import command, _start
context = command.make_context("serve", [])
served = _start(("nano",), context.params)
from openbook.server.app import create_app
create_app(served)
print([name for name in ("torch", "llguidance", "openai", "ray", "matplotlib") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "[]\n", result.stderr
