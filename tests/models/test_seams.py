"""AttentionContext survives torch.compile, activation checkpointing and FSDP2."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from tiny_model import make_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from openbook.models.base import CausalModel, trained_positions
from openbook.models.context import AttentionContext, PackedContext


def packed_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, targets, positions, documents: four rows of 96 tokens, documents of 33, 20 and 38 tokens less padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (4, 96), generator=generator)
    targets = ids.roll(-1, dims=1)
    lengths = [33, 20, 25, 18]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(4, -1).contiguous()
    numbers = [number if number < 3 else -1 for number in range(4)]
    documents = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths)).expand(4, -1).contiguous()
    targets[(positions < 5) | (documents < 0)] = -100
    return ids, targets, positions, documents


def gradients(model: CausalModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
    return found


def plain() -> tuple[Tensor, dict[str, Tensor]]:
    model = make_model()
    ids, targets, positions, documents = packed_batch()
    loss = model.loss(ids, targets, PackedContext(positions, documents))
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def check_compiled(backend: str) -> None:
    model = make_model()
    ids, targets, positions, documents = packed_batch()

    def loss_sum(ids: Tensor, targets: Tensor, positions: Tensor, documents: Tensor, trained: Tensor) -> Tensor:
        return model.loss(ids, targets, PackedContext(positions, documents), trained)

    trained = trained_positions(targets)
    torch._dynamo.mark_dynamic(trained, 0)
    compiled = torch.compile(loss_sum, fullgraph=True, backend=backend)
    loss = compiled(ids, targets, positions, documents, trained)
    loss.backward()
    expected_loss, expected = plain()
    torch.testing.assert_close(loss.detach(), expected_loss, atol=1e-3, rtol=1e-5)
    assert_same(gradients(model), expected)
    # Another number of trained tokens runs through the same graph.
    targets[:, :50] = -1
    fewer = trained_positions(targets)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = compiled(ids, targets, positions, documents, fewer)
    expected_loss = model.loss(ids, targets, PackedContext(positions, documents))
    torch.testing.assert_close(loss, expected_loss, atol=1e-3, rtol=1e-5)


def test_only_trained_positions() -> None:
    model = make_model()
    ids, targets, positions, documents = packed_batch()
    context = PackedContext(positions, documents)
    loss = model.loss(ids, targets, context, trained_positions(targets))
    loss.backward()
    expected_loss, expected = plain()
    torch.testing.assert_close(loss.detach(), expected_loss, atol=1e-4, rtol=1e-6)
    assert_same(gradients(model), expected)
    wanted = torch.tensor([90, 3])
    torch.testing.assert_close(
        model.hidden_states(ids, context, wanted), model.hidden_states(ids, context).flatten(0, 1)[wanted]
    )


def test_compile_traces_one_graph() -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the C++ compiler's business, not ours
def test_compile_with_inductor() -> None:
    check_compiled("inductor")


def test_activation_checkpointing() -> None:
    model = make_model()
    num_runs = 0

    def checkpointed(
        self: torch.nn.Module,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        context: AttentionContext,
        wanted: Tensor | None = None,
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            nonlocal num_runs
            num_runs += 1
            return type(self).forward(self, x, rope, context, wanted)

        return checkpoint(run, x, use_reentrant=False)

    for layer in model.model.layers:
        layer.forward = types.MethodType(checkpointed, layer)
    ids, targets, positions, documents = packed_batch()
    loss = model.loss(ids, targets, PackedContext(positions, documents))
    loss.backward()
    expected_loss, expected = plain()
    assert num_runs == 4  # each of two layers ran forward, and again for its gradients
    assert torch.equal(loss.detach(), expected_loss)
    assert_same(gradients(model), expected)


def run_sharded(rank: int, folder: str) -> None:
    """One of two processes: FSDP2 over gloo, half of the rows each."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    ids, targets, positions, documents = (tensor[2 * rank : 2 * rank + 2] for tensor in packed_batch())
    logits = model(ids, PackedContext(positions, documents))
    loss = model.loss(ids, targets, PackedContext(positions, documents))
    (2 * loss).backward()  # FSDP takes the mean over the two ranks, the single process the sum
    assert isinstance(next(model.parameters()), DTensor)
    torch.save((logits.detach(), loss.detach(), gradients(model)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_fsdp2_on_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_sharded, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    expected_loss, expected = plain()
    ids, _, positions, documents = packed_batch()
    logits = make_model()(ids, PackedContext(positions, documents)).detach()
    torch.testing.assert_close(torch.cat([result[0] for result in results]), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1] + results[1][1], expected_loss, atol=1e-3, rtol=1e-5)
    for _, _, found in results:
        assert_same(found, expected)
