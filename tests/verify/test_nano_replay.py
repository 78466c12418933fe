"""The bundled model's own training: its first segment, again, from nothing."""

from __future__ import annotations

import pytest

import openbook
from openbook.checkpoint.locate import locate
from openbook.train.recipe import load_recipe
from openbook.train.segments import list_segments


@pytest.mark.slow
def test_the_first_segment_of_nano() -> None:
    num_segments = len(list_segments(load_recipe(locate("nano") / "provenance" / "recipe.toml")))
    result = openbook.verify("nano", replay=1, threads=2)
    assert result.differences == ()
    assert [verdict.words for verdict in result.verdicts] == [
        "INTEGRITY",
        "DATA REBUILT",
        f"REPLAYED 1/{num_segments} exact",
    ]
