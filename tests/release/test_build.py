"""A build gives the same bytes on every run, however often it was killed; wrong input is one line and costs nothing."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openbook.cli.main import main
from openbook.core.files import sha256_file
from openbook.core.seeding import derive_seed
from openbook.train.ledger import read_ledger

HERE = Path(__file__).parent
MICRO = HERE / "micro.toml"
LAYOUT = ["--no-compile", "--threads", "1", "--workers", "1"]


def _build(recipe: Path, out: Path, *options: str) -> int:
    return main(["build", str(recipe), "--out", str(out), *LAYOUT, *options])


def _digests(build: Path) -> dict[str, str]:
    """Every file that the recipe decides, by path."""
    patterns = (
        "tokenizer/*",
        "data/**/*",
        "train/**/*",
        "trace.jsonl",
        "model/*",
        "release/*.safetensors",
        "release/*.json",
    )
    files = {file for pattern in patterns for file in build.glob(pattern) if file.is_file()}
    return {str(file.relative_to(build)): sha256_file(file) for file in sorted(files)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "build"
    assert _build(MICRO, out) == 0
    return out


def test_a_build_ends_with_a_release_and_a_report(whole: Path) -> None:
    for name in ("model.safetensors", "config.json", "README.md", "LICENSE", "provenance/manifest.json"):
        assert (whole / "release" / name).stat().st_size > 0
    assert "<svg" in (whole / "report.html").read_text()
    entries = read_ledger(whole / "trace.jsonl")
    assert [entry.step for entry in entries] == list(range(20))
    assert [entry.stage for entry in entries] == ["first"] * 12 + ["second"] * 8
    assert entries[11].loss < entries[0].loss
    assert main(["verify", str(whole / "release")]) == 0


def test_the_same_bytes_twice_and_with_two_workers(whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["build", str(MICRO), "--out", str(again), "--no-compile", "--threads", "1", "--workers", "2"]) == 0
    assert _digests(again) == _digests(whole)


def _kill_places() -> list[tuple[str, int]]:
    """One in every step of a build, in order, and random training steps in both stages (new ones with another seed)."""
    draw = random.Random(derive_seed(1, "kill places"))
    step = "openbook.train.loop.train_step"
    return [
        ("openbook.tokenizer.chat.write_text", 1),  # tokenizer written, template not
        ("openbook.data.corpus.write_json", 1),  # data written, manifest not
        (step, draw.randint(1, 5)),
        (step, draw.randint(6, 12)),
        ("openbook.checkpoint.train_state.write_json", 1),  # weights of a state written, position not
        (step, draw.randint(1, 7)),
        ("openbook.core.files._flush", 8),
        ("openbook.data.corpus.write_json", 1),
        (step, draw.randint(1, 4)),
        (step, draw.randint(1, 8)),
        ("openbook.release.training.export_model", 1),
        ("openbook.evals.report.write_report", 1),
        ("openbook.release.assemble.write_manifest", 1),
    ]


def test_kill_9_anywhere_then_resume_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    num_killed = 0
    for place, count in _kill_places():
        command = [sys.executable, str(HERE / "killed_build.py"), place, str(count), str(MICRO), str(out)]
        status = subprocess.run(command, capture_output=True, check=False).returncode
        # A place may lie in a step that is done by now; then the build simply ends.
        assert status in (0, -signal.SIGKILL)
        num_killed += status == -signal.SIGKILL
    assert num_killed >= 10
    assert _build(MICRO, out, "--resume") == 0
    assert _digests(out) == _digests(whole)
    assert not list(out.rglob("*.partial"))


def test_until_stops_and_resume_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    assert _build(MICRO, out, "--until", "tokenizer") == 0
    assert not (out / "data").exists()
    assert _build(MICRO, out, "--resume", "--until", "first") == 0
    assert not (out / "data" / "second").exists()
    assert _build(MICRO, out, "--resume") == 0
    assert _digests(out) == _digests(whole)


def test_a_damaged_state_is_named_and_the_one_before_it_serves(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    for name in ("release", "evals", "model"):
        shutil.rmtree(out / name)
    (out / "report.html").unlink()
    newest = out / "train" / "second" / "step-00000020"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert _build(MICRO, out, "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{weights} is not the file that was saved" in error
    assert f"remove the folder {newest} and resume" in error
    shutil.rmtree(newest)
    assert _build(MICRO, out, "--resume") == 0
    assert _digests(out) == _digests(whole)


def _recipe(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = MICRO.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("row_tokens", "row_token", "unknown key 'row_token': did you mean 'row_tokens'? known keys there: "),
        ("steps = 12", 'steps = "12"', "stages[0].steps: expected `int`, got `str`; correct that value"),
        ("steps = 12", "steps = 0", "stages[0]: steps is 0, expected 1 or more"),
        ("seed = 7\n", "", "the key seed is missing: add it"),
        ('"chain_sum", weight', '"chain_sun", weight', "unknown task 'chain_sun': did you mean 'chain_sum'?"),
        ("hidden_size = 32", "hiden_size = 32", "unknown key 'hiden_size': did you mean 'hidden_size'?"),
        (
            "[model]",
            "[model]\nvocab_size = 9",
            "model.vocab_size is given, expected none: it follows from the tokenizer",
        ),
        (
            "row_tokens = 128",
            "row_tokens = 512",
            "data.row_tokens is 512, expected at most model.max_position_embeddings = 256",
        ),
        (
            "micro_batch_size = 2",
            "micro_batch_size = 3",
            "expected a whole number of micro-steps of rows of 128 tokens",
        ),
        ("max_terms = 3", "max_tems = 3", "max_tems"),
        ('name = "second"', 'name = "first"', "expected different names"),
        ('name = "micro"', 'name = "../micro"', "name is '../micro', expected a file name"),
        ("[data]", "[data", "is not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_leaves_nothing(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _build(_recipe(tmp_path, (old, new)), out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_missing_recipe_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nano.toml").write_text("")
    assert _build(tmp_path / "nan.toml", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"unknown recipe file '{tmp_path}/nan.toml': did you mean '{tmp_path}/nano.toml'?" in error


def test_an_existing_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert _build(MICRO, tmp_path / "out") == 2
    assert "exists already and nothing is overwritten: give a new path" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_resume_goes_on_as_the_build_began(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(MICRO), "--out", str(whole), "--resume", "--threads", "2"]) == 2
    assert "--resume: --threads is 2, the build began with 1" in capsys.readouterr().err
    other = _recipe(tmp_path, ("seed = 7", "seed = 8"))
    assert _build(other, whole, "--resume") == 2
    assert "was built from another recipe than the one given: resume with" in capsys.readouterr().err
    assert _build(MICRO, tmp_path / "nothing", "--resume") == 2
    assert "holds no build: give the --out of the one that was interrupted" in capsys.readouterr().err
    assert _build(MICRO, whole, "--resume", "--until", "secnd") == 2
    assert "unknown step 'secnd': did you mean 'second'?" in capsys.readouterr().err


def test_a_diverging_run_stops_with_step_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path, ("schedule = { lr = 0.01,", "schedule = { lr = 1e30,"))
    assert _build(recipe, tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "training stopped" in error
    assert "step " in error
    assert "try a lower lr" in error


def test_a_full_disk_is_one_line_and_the_build_goes_on_later(whole: Path, tmp_path: Path) -> None:
    """A limit on the size of any file stands for the disk: the system refuses the write in the same way."""
    out = tmp_path / "full"
    assert _build(MICRO, out, "--until", "first") == 0
    before = _digests(out)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "from openbook.cli.main import main\n"
        f"sys.exit(main(['build', {str(MICRO)!r}, '--out', {str(out)!r}, '--resume', *{LAYOUT!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "free some space and run the command again (a build with --resume)" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert {name: digest for name, digest in _digests(out).items() if name in before} == before
    assert _build(MICRO, out, "--resume") == 0
    assert _digests(out) == _digests(whole)
