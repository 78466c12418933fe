"""Wrong input, end to end: one line that says what is wrong and what to do, exit status 2, nothing overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openbook.cli.main import main

MICRO = Path(__file__).parent / "release" / "micro.toml"
MANY = "[" * 100_000


def _tree(folder: Path) -> str:
    """One digest of everything below `folder`: names, kinds and bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        digest.update(f"{path.relative_to(folder)} {kind}\n".encode())
        if kind == "file":
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Refuses:
    """Run a command in a folder, see that it is refused in the right way, and give back its line."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *arguments: str | Path) -> str:
        before = _tree(self.folder)
        status = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert (status, out) == (2, ""), (status, out, err)
        assert err.startswith("openbook: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert _tree(self.folder) == before
        return err.removeprefix("openbook: ").rstrip("\n")


@pytest.fixture
def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuses:
    monkeypatch.chdir(tmp_path)
    return Refuses(tmp_path, capsys)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def _recipe(folder: Path, old: str = "", new: str = "") -> Path:
    text = MICRO.read_text()
    assert old in text
    path = folder / "recipe.toml"
    path.write_text(text.replace(old, new, 1))
    return path


# The list.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("row_tokens", "row_token", "unknown key 'row_token': did you mean 'row_tokens'?"),
        ("steps = 12", 'steps = "many"', "stages[0].steps: expected `int`, got `str`; correct that value"),
        ("seed = 7", "seed = 7.5", "seed: expected `int`, got `float`; correct that value"),
        ('"chain_sum", weight', '"chain_sun", weight', "unknown task 'chain_sun': did you mean 'chain_sum'?"),
        ("hidden_size = 32", "hidden_size = -3", "model: hidden_size is -3, expected more than 0"),
        ("hidden_size = 32", "hidden_size = 32\nrope_theta = nan", "model: rope_theta is nan, expected more than 0"),
        ("num_hidden_layers = 2", "num_hidden_layers = 9999999", "num_hidden_layers is 9999999, expected more than 0"),
        ('"qwen3"', '"qwen4"', "unknown model_type 'qwen4': did you mean 'qwen3'?"),
        ("vocab_size = 400", "vocab_size = 3", "tokenizer.vocab_size is 3: it must be at least 266"),
        ("samples_per_task = 20", "samples_per_task = 0", "tokenizer.samples_per_task is 0: it must be 1 or more"),
        ("lr = 0.01", "lr = inf", "stages[0].schedule: lr is inf, expected a number above 0"),
        ("lr = 0.01", "lr = nan", "stages[0].schedule: lr is nan, expected a number above 0"),
        ('"muon"', '"muon"\nweight_decay = nan', "optimizer: weight_decay is nan, expected 0 or more"),
        ("max_word_len = 5", "seed = 5", "params has seed, expected parameters of the task alone"),
        ("weight = 2.0", "weight = inf", "weight is inf, expected more than 0"),
        ("weight = 2.0", "weight = -1.0", "weight is -1.0, expected more than 0"),
        ("samples = 4", "samples = 0", "eval: samples is 0, expected 1 or more"),
        (
            "samples = 4",
            "seed = 1_000_000_000",
            "eval: seed is 1000000000, expected 0 to 999999900: what is above belongs",
        ),
        ("samples = 4", "efforts = []", "eval: efforts is empty, expected at least one"),
        ("seed = 7", f"seed = 7\nx = {MANY}", "is not valid TOML: "),
    ],
)
def test_a_wrong_recipe(refuses: Refuses, old: str, new: str, message: str) -> None:
    recipe = _recipe(refuses.folder, old, new)
    assert message in refuses("build", recipe, "--out", "out")


def test_a_missing_recipe(refuses: Refuses) -> None:
    _recipe(refuses.folder)
    assert refuses("build", "recipes.toml", "--out", "out") == (
        "unknown recipe file 'recipes.toml': did you mean 'recipe.toml'? "
        "give the path of a .toml file such as recipes/nano.toml"
    )


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(refuses: Refuses, folder: Path, prompt: str) -> None:
    assert refuses("run", folder, prompt) == "the prompt is empty: expected a question; give some text"


def test_a_prompt_past_the_context_gives_both_numbers(refuses: Refuses, folder: Path) -> None:
    assert refuses("run", folder, "x" * 200) == (
        "the prompt has 203 tokens and the model's context is 160 (prompt and answer): shorten the prompt"
    )


def _weights(header: Any, tail: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + tail


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:20] + b"\xff" + data[21:],
        lambda data: bytes(range(256)),
        lambda data: struct.pack("<Q", 10 * 2**30) + data[8:],
        lambda data: _weights({"a": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}),
        lambda data: _weights({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        lambda data: _weights({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
    ],
)
def test_corrupt_and_truncated_weights(refuses: Refuses, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for command in (["run", folder, "Hi"], ["eval", folder, "gcd"], ["chat", folder]):
        line = refuses(*command)
        assert line.startswith(f"the weights {path} are not a whole safetensors file (")
        assert line.endswith("): copy or download the file again")


def test_weights_of_another_model(refuses: Refuses, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        _weights({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000")
    )
    assert "weights and config.json do not belong together, fetch both again" in refuses("run", folder, "Hi")


def test_the_tokenizer_of_another_model(refuses: Refuses, folder: Path) -> None:
    from openbook.tokenizer.chat import Chat, default_template
    from openbook.tokenizer.tokenizer import assemble

    other = assemble([(left, right) for left in "abcdefgh" for right in "abcdefgh"])
    Chat(other, default_template()).save(folder)
    line = refuses("run", folder, "Hi")
    assert line == (
        "wrong tokenizer: it has 330 tokens and the model has 274: use the tokenizer.json that came with the model"
    )


def test_a_tokenizer_without_the_control_tokens(refuses: Refuses, folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "added_tokens": []}))
    line = refuses("run", folder, "Hi")
    assert line.startswith("wrong tokenizer: it has no special tokens for '<|user|>")
    assert line.endswith("use the tokenizer.json that came with the model")


def test_an_unknown_task(refuses: Refuses, folder: Path) -> None:
    assert refuses("tasks", "gdc") == "unknown task 'gdc': did you mean 'gcd'? `openbook tasks` lists all"
    assert "'gdc': did you mean 'gcd'?" in refuses("eval", folder, "gdc")
    assert "'gdc': did you mean 'gcd'?" in refuses("eval", folder, "lcm,gdc")


@pytest.mark.parametrize("command", [["run", "nanno", "Hi"], ["chat", "nanno"], ["eval", "nanno", "gcd"]])
def test_an_unknown_model_comes_with_the_nearest_known_one(
    refuses: Refuses, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openbook.checkpoint.locate.bundled_names", lambda: ["mini", "nano"])
    assert refuses(*command) == (
        "unknown model 'nanno': did you mean 'nano'? bundled models: mini, nano, smollm2; or give the path of a model, "
        "or a hub id (owner/name)"
    )


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link to nothing"])
def test_an_out_that_exists(refuses: Refuses, folder: Path, kind: str) -> None:
    out = refuses.folder / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link to nothing":
        out.symlink_to(refuses.folder / "none")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "summary.json").write_text("mine")
    line = "--out out exists already and nothing is overwritten: give a new path, or remove it first"
    assert refuses("build", _recipe(refuses.folder), "--out", "out") == line
    assert refuses("eval", folder, "gcd", "--out", "out", "--samples", "1") == line


# What an adversary tried; most of these ended in a traceback once.


def _replace(path: Path, what: str) -> None:
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a link to itself":
        path.symlink_to(path)
    elif what != "nothing":
        path.write_bytes({"an empty file": b"", "bytes": bytes(range(256)), "brackets": MANY.encode()}[what])


@pytest.mark.parametrize("what", ["nothing", "an empty file", "bytes", "a folder", "a link to itself"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_file_that_is_something_else(refuses: Refuses, folder: Path, name: str, what: str) -> None:
    _replace(folder / name, what)
    if (name, what) == ("chat_template.jinja", "nothing"):  # a base model, which only chat refuses
        assert "has no chat template" in refuses("chat", folder)
        return
    line = refuses("run", folder, "Hi")
    assert str(folder) in line or "template" in line


@pytest.mark.parametrize("what", ["an empty file", "bytes", "a folder", "brackets"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_an_optional_file_that_is_something_else(refuses: Refuses, folder: Path, name: str, what: str) -> None:
    (folder / name).write_text("{}")
    _replace(folder / name, what)
    assert name in refuses("run", folder, "Hi")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"hidden_size": "x"}, "hidden_size: expected `int`, got `str`"),
        ("config.json", {"hidden_size": 10**9}, " GB are free: take a smaller model, or a machine with "),
        ("config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, expected more than 0"),
        ("config.json", {"vocab_size": 10**15}, "vocab_size is 1000000000000000, expected more than 0"),
        ("config.json", {"max_position_embeddings": 0}, "max_position_embeddings is 0, expected more than 0"),
        ("config.json", {"model_type": [1]}, "unknown model_type '[1]'"),
        ("config.json", {"layer_types": 5}, "layer_types is 5, expected a list"),
        ("config.json", {"layer_types": [[]]}, "layer_types is [[]], expected a list of words"),
        ("config.json", {"rope_parameters": 5}, "rope_parameters is 5, expected an object"),
        ("config.json", {"rope_scaling": {"type": "yarn"}}, "rope_parameters: the key factor is missing: add it"),
        ("config.json", {"surprise": 1}, "unknown key 'surprise'"),
        ("tokenizer.json", {"model": None}, "tokenizer.json is corrupt ("),
        ("tokenizer.json", {"added_tokens": 5}, "tokenizer.json is corrupt ("),
        ("tokenizer.json", {"added_tokens": [{}]}, "tokenizer.json is corrupt ("),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, expected a token's text"),
        ("tokenizer_config.json", {"eos_token": {}}, "eos_token is {}, expected a token's text"),
        ("generation_config.json", {"eos_token_id": {}}, "eos_token_id is {}, expected a token id or a list of them"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id is [[1]], expected a token id or a list"),
    ],
)
def test_a_wrong_value_in_a_models_file(
    refuses: Refuses, folder: Path, name: str, change: dict[str, Any], message: str
) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **change}))
    assert message in refuses("run", folder, "Hi")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template is not valid Jinja: "),
        ("{{ 1 / 0 }}", "the chat template refuses this conversation: division by zero"),
        ("{{ raise_exception('no') }}", "the chat template refuses this conversation: no"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template refuses this conversation: maximum rec"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses this conversation: "),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "the chat template does far more than this conversation needs",
        ),
        ("{{ 'x' * 10 ** 11 }}", "the chat template does far more than this conversation needs"),
    ],
)
def test_a_wrong_chat_template(refuses: Refuses, folder: Path, template: str, message: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert message in refuses("run", folder, "Hi")


def test_weights_that_are_all_scalars(refuses: Refuses, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: torch.zeros(()) for name in load_file(path)}, path)
    messages = {"fast": "has shape [], config.json says [", "exact": "have shapes [], which do not fit"}
    for profile, expected in messages.items():
        assert expected in refuses("run", folder, "Hi", "--profile", profile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "MODEL", "Hi", "--seed", "-1"], "invalid value for '--seed': -1 is not in the range"),
        (["run", "MODEL", "Hi", "--effort", "max"], "invalid value for '--effort': 'max' is not one of"),
        (["run", "MODEL", "Hi", "--max-tokens", "0"], "max_tokens is 0: expected 1 or more"),
        (["run", "MODEL", "Hi", "--temperature", "nan"], "temperature is nan: expected "),
        (["run", "MODEL", "Hi", "--top-p", "nan"], "top_p is nan: expected "),
        (["run", "MODEL", "\udcff"], "the prompt is not valid Unicode text at character 0"),
        (["run", "MODEL/config.json", "Hi"], "is a file, but no GGUF file: give one, or a folder with config.json"),
        (["run", "x" * 5000, "Hi"], "File name too long"),
        (["run", ".", "Hi"], "the folder . has no config.json and no GGUF file, so it is no model"),
        (["run", "./some/where", "Hi"], "there is no folder or file ./some/where: check the path"),
        (["eval", "MODEL", "gcd", "--samples", "0"], "invalid value for '--samples': 0 is not in the range"),
        (["eval", "MODEL", "gcd", "--seed", "1000000000"], "invalid value for '--seed'"),
        (["eval", "MODEL", ""], "''"),
        (["eval", "MODEL", "gcd", "--threshold", "nan"], "--threshold is nan: expected a share from 0 to 1"),
        (["tasks", "gcd", "--seed", "-1"], "invalid value for '--seed': -1 is not in the range"),
        (["verify", "MODEL"], "model is not a release: it has no provenance/manifest.json"),
        (["verify", "none"], "unknown model 'none'"),
        (["build", "MODEL", "--out", "out"], "unknown recipe file"),
        (["build", "MODEL/model.safetensors", "--out", "out"], "is not valid TOML: "),
        (["build", "/dev/null", "--out", "out"], ""),
        (["build", str(MICRO), "--out", "MODEL/config.json/out"], "Not a directory"),
        (["build", str(MICRO), "--out", "y" * 300], "File name too long"),
        (["build", str(MICRO), "--out", "out", "--threads", "0"], "invalid value for '--threads'"),
        (["build", str(MICRO), "--out", "MODEL", "--resume"], "--resume: MODEL holds no build"),
        (["build", str(MICRO), "--out", "out", "--until", "frist"], "unknown step 'frist': did you mean 'first'?"),
    ],
)
def test_wrong_arguments(refuses: Refuses, folder: Path, arguments: list[str], message: str) -> None:
    line = refuses(*(argument.replace("MODEL", "model") for argument in arguments))
    assert message.replace("MODEL", "model") in line


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OPENBOOK": f"{sys.executable} -m openbook.cli.main"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)


def test_closed_streams_are_no_tracebacks(folder: Path) -> None:
    gone = _shell("$OPENBOOK tasks gcd | head -c 1; echo ' ' ${PIPESTATUS[0]}")
    assert gone.stderr == ""
    assert gone.stdout.split()[-1] in ("0", "141")
    no_input = _shell(f"$OPENBOOK run {folder} - <&-")
    assert no_input.stderr == "openbook: the prompt is empty: expected a question; give some text\n"
    assert no_input.returncode == 2
    no_output = _shell("$OPENBOOK tasks gcd >&-")
    assert (no_output.returncode, no_output.stderr) == (0, "")
