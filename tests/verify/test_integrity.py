"""Integrity finds every way in which a release can differ, names the file, and claims no more than it checked."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from forger import edit_json, seal
from openbook.core.errors import UserError
from openbook.core.files import sha256_bytes, sha256_file
from openbook.release.manifest import MANIFEST_PATH
from openbook.verify.verification import Verification, verify

WEIGHTS = "model.safetensors"
LEDGER = "provenance/trace.jsonl"


def found(result: Verification) -> list[tuple[str, str]]:
    return [(difference.kind, difference.path) for difference in result.differences]


def test_a_good_release(made_release: Path) -> None:
    result = verify(made_release)
    assert result.verdict == "INTEGRITY"
    assert found(result) == []
    assert result.num_files == 16
    assert (
        result.num_bytes
        == sum(p.stat().st_size for p in made_release.rglob("*") if p.is_file())
        - (made_release / MANIFEST_PATH).stat().st_size
    )
    assert result.num_parameters == 274 * 32 + 2 * (32 * (32 + 2 * 16 + 32) + 2 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert result.manifest_sha256 == sha256_file(made_release / MANIFEST_PATH)
    assert any("not signed" in item for item in result.not_checked)


@pytest.mark.parametrize("path", ["README.md", WEIGHTS, "tokenizer.json", LEDGER])
def test_one_flipped_bit_is_found_in_the_right_file(release: Path, path: str) -> None:
    data = bytearray((release / path).read_bytes())
    expected = sha256_bytes(bytes(data))
    data[-20] ^= 1
    (release / path).write_bytes(bytes(data))
    difference, *others = verify(release).differences
    assert (difference.kind, difference.path) == ("changed", path)
    assert [(other.path, other.detail) for other in others] == (
        [(path, "line 7: its link does not follow from the lines up to it")] if path == LEDGER else []
    )
    assert difference.detail == f"sha256 expected {expected[:12]}, found {sha256_bytes(bytes(data))[:12]}"


def test_missing_added_and_changed_files(release: Path) -> None:
    (release / "LICENSE").unlink()
    (release / "extra.bin").write_bytes(b"x")
    (release / "README.md").write_bytes(b"short")
    result = verify(release)
    assert result.verdict == "DIFFERS"
    assert found(result) == [("changed", "README.md"), ("missing", "LICENSE"), ("added", "extra.bin")]
    assert "5 found)" in result.differences[0].detail
    assert str(result.differences[2]) == "added    extra.bin: the manifest does not name it"


def test_truncated_weights_are_invalid_even_if_sealed(release: Path) -> None:
    data = (release / WEIGHTS).read_bytes()
    (release / WEIGHTS).write_bytes(data[: len(data) // 2])
    seal(release)
    result = verify(release)
    assert found(result) == [("invalid", WEIGHTS)]
    assert "not a whole safetensors file" in result.differences[0].detail
    assert result.num_parameters == 0


def test_weights_that_do_not_fit_the_configuration(release: Path) -> None:
    edit_json(release / "config.json", intermediate_size=64)
    seal(release)
    result = verify(release)
    assert found(result) == [("invalid", WEIGHTS)] * 6
    assert any(
        "model.layers.0.mlp.down_proj.weight has shape [32, 48], config.json asks for [32, 64]" in difference.detail
        for difference in result.differences
    )


def test_a_tensor_too_few_and_one_too_many(release: Path) -> None:
    data = (release / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b'"model.norm.weight"', b'"model.nose.weight"')
    (release / WEIGHTS).write_bytes(data[:8] + header + data[8 + length :])
    seal(release)
    assert [difference.detail for difference in verify(release).differences] == [
        "model.norm.weight is missing",
        "model.nose.weight belongs to no part of the model",
    ]


def test_a_configuration_of_no_known_family(release: Path) -> None:
    edit_json(release / "config.json", model_type="qwen9")
    seal(release)
    (difference,) = verify(release).differences
    assert (difference.kind, difference.path) == ("invalid", "config.json")
    assert "qwen9" in difference.detail


def test_a_recipe_that_is_not_the_manifests(release: Path) -> None:
    recipe = release / "provenance" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 7", "seed = 8"))
    seal(release)
    (difference,) = verify(release).differences
    assert (difference.kind, difference.path) == ("invalid", "provenance/recipe.toml")
    assert difference.detail.startswith("recipe hash expected ")


def test_comments_in_the_recipe_do_not_count_but_its_bytes_do(release: Path) -> None:
    recipe = release / "provenance" / "recipe.toml"
    recipe.write_text("# a comment\n" + recipe.read_text())
    assert found(verify(release)) == [("changed", "provenance/recipe.toml")]
    seal(release)
    assert verify(release).verdict == "INTEGRITY"


def test_a_broken_recipe_is_invalid(release: Path) -> None:
    (release / "provenance" / "recipe.toml").write_text("stages = 3")
    seal(release)
    assert found(verify(release)) == [("invalid", "provenance/recipe.toml")]


def test_the_recipe_of_another_version_is_said_to_be_unchecked(release: Path) -> None:
    edit_json(release / MANIFEST_PATH, openbook="9.9", recipe_sha256="00" * 32)
    result = verify(release)
    assert result.verdict == "INTEGRITY"
    assert "the hash of the recipe (openbook 9.9 took it)" in result.not_checked


def test_a_folder_that_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a release"):
        verify(tmp_path)
