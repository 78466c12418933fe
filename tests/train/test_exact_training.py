"""Training in the exact profile: stored bits on every path, the tree of additions, the optimizer, the recipe."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from nano_steps import GOLDEN, MILESTONES, train_nano, write_rows

from exact_paths import kept_path, native
from openbook.core.errors import UserError
from openbook.train.exact_optim import ExactOptimizer, exact_orthogonalize
from openbook.train.optim import Optimizer, OptimizerConfig, orthogonalize
from openbook.train.parallel import Workers
from openbook.train.recipe import load_recipe
from openbook.train.tree_sum import TreeSum, add_lists

MICRO = Path(__file__).parent.parent / "release" / "micro.toml"
REGENERATE = "python tests/train/nano_steps.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, 384)
    return folder


def _require_golden(rows: Path, isa: str, threads: int, *milestones: int) -> None:
    with kept_path():
        native.set_isa(isa)
        found = train_nano(rows, threads, *milestones)
    golden = json.loads(GOLDEN.read_text())
    expected = {str(step): golden[str(step)] for step in milestones}
    assert found == expected, f"{isa}, {threads} threads: if the arithmetic was changed on purpose, run {REGENERATE}"


def test_200_steps_of_nano_give_the_stored_bits(rows: Path) -> None:
    _require_golden(rows, native.isa(), 1, *MILESTONES)


@pytest.mark.parametrize(("place", "threads", "steps"), [(0, 2, MILESTONES[0]), (1, 3, MILESTONES[1])])
def test_the_first_steps_give_the_stored_bits_on_other_paths(rows: Path, place: int, threads: int, steps: int) -> None:
    """The plain one, which is slow, and the first with vectors."""
    _require_golden(rows, native.available_isas()[place], threads, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "threads"), list(product(native.available_isas(), (1, 2, 3, 8))))
def test_200_steps_of_nano_give_the_stored_bits_on_every_path(rows: Path, isa: str, threads: int) -> None:
    _require_golden(rows, isa, threads, *MILESTONES)


def _sum_of(values: list[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum()
    for value in values:
        tree.add([value])
    return tree.total()[0]


def test_the_tree_adds_left_to_right_over_ranges_of_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    x = list((torch.randn(13, 50, generator=generator) * 10.0 ** torch.arange(13)[:, None]).unbind())
    pairs = [x[i] + x[i + 1] for i in range(0, 12, 2)]
    fours = [pairs[i] + pairs[i + 1] for i in range(0, 6, 2)]
    expected = (fours[0] + fours[1]) + (fours[2] + x[12])
    assert torch.equal(_sum_of(x), expected)
    assert not torch.equal(_sum_of(x), sum(x))  # type: ignore[arg-type]
    assert TreeSum().total() == []


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 5, 6, 7, 8, 13, 16, 17])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_parts_of_the_tree_that_workers_add_up_give_the_same_bits(num_leaves: int, count: int) -> None:
    x = list(torch.randn(num_leaves, 20, generator=torch.Generator().manual_seed(num_leaves)).unbind())
    ranges = [Workers(rank, count).leaves(num_leaves) for rank in range(count)]
    assert [leaf for part in ranges for leaf in part] == list(range(num_leaves))
    sums = [[_sum_of(x[part.start : part.stop])] if part else [] for part in ranges]
    while len(sums) > 1:
        sums = [add_lists(a, b) if b else a for a, b in zip(sums[::2], sums[1::2], strict=True)]
    assert torch.equal(sums[0][0], _sum_of(x))


def _parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed": (12, 8), "up.weight": (16, 8), "down.weight": (8, 16), "up2.weight": (16, 8), "norm": (8,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_exact_optimizer_makes_the_updates_of_the_other_and_goes_on_after_a_restore(kind: str) -> None:
    config = OptimizerConfig(kind=kind, weight_decay=0.1, max_grad_norm=3.0)  # type: ignore[arg-type]
    all_parameters = [_parameters() for _ in range(3)]
    reference = Optimizer(all_parameters[0].items(), config)
    exact, resumed = (ExactOptimizer(parameters.items(), config) for parameters in all_parameters[1:])
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in all_parameters[0].values()]
        if step == 6:
            weights, state = ({name: t.clone() for name, t in ts.items()} for ts in (exact.weights(), exact.state()))
            resumed.restore(weights, state)
        norms = []
        for optimizer in [reference, exact, *([resumed] if step >= 6 else [])]:
            for parameter, grad in zip(optimizer.parameters(), grads, strict=True):
                parameter.grad = grad.clone()
            norms.append(optimizer.clip())
            optimizer.step(0.01)
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for name, weight in reference.weights().items():
        torch.testing.assert_close(exact.weights()[name], weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(exact.weights()[name], resumed.weights()[name])
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in exact.state().items())


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16)])
def test_exact_orthogonalize_is_orthogonalize(shape: tuple[int, int]) -> None:
    matrices = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(matrices)
    found = exact_orthogonalize([matrix.clone() for matrix in matrices])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_exact_asks_for_float32(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MICRO.read_text().replace('precision = "float32"', 'precision = "bfloat16"\nprofile = "exact"'))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(
        f'the recipe {path}: profile is "exact" and precision \'bfloat16\', expected precision "float32": '
        "change one of them"
    )
