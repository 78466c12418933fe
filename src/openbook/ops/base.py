"""The arithmetic a model is made of, as a protocol that backends implement.

A model receives its `Ops` when it is built and calls nothing else for arithmetic, so that every family gets every
backend. `TorchOps` is the readable reference and the GPU path.

Shapes: B batch, T query tokens, S key tokens, N query heads, K key-value heads, H head_dim, D features, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see, said in structure so that a backend can skip what is hidden.

    Key s is visible to query t of the same row if all of these hold:
      - causal: key_positions[s] <= query_positions[t]
      - documents, if given: key_documents[s] == query_documents[t], and it is not negative (negative: padding)
      - window, if given: query_positions[t] - key_positions[s] < window
    """

    query_positions: Tensor  # int64 [B, T]
    key_positions: Tensor  # int64 [B, S]; a slot that holds no key has a position past every query
    query_documents: Tensor | None = None  # int64 [B, T]
    key_documents: Tensor | None = None  # int64 [B, S]
    window: int | None = None
    is_plain_causal: bool = False  # T == S, positions 0..T-1 in every row, no documents: backends may use a fast path
    prepared: Any = None  # what `Ops.prepare_mask` derived from the fields above; only its backend reads it


class PackedMatrices(Protocol):
    """E matrices [O, I] in a narrow format, expanded as they are used."""

    def pieces(self, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Matrix `index`, from 0, in `dtype`: some of its rows at a time in their order, each [rows, I]."""


# A tensor [E, O, I], or something packed.
Matrices: TypeAlias = "Tensor | PackedMatrices"


class Ops(Protocol):
    """What a backend provides. All float tensors of one call share a dtype unless said otherwise.

    is_exact: the bits are the same on every machine; what computes around the backend keeps to that too.
    """

    name: str
    is_exact: bool

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., D_in] times weight [D_out, D_in] transposed, plus bias [D_out]: [..., D_out]."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of weight [V, D] at ids int64 [...]: [..., D]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32 (arXiv 1910.07467)."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Layer normalisation over the last axis (arXiv 1607.06450)."""

    def rope_tables(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions int64 [...] times frequencies float32 [J], in float32: each [..., J]."""

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [B, T, N, H] by cos, sin [B, T, H/2], halves paired as (i, i + H/2) (arXiv 2104.09864)."""

    def prepare_mask(self, mask: AttentionMask, dtype: torch.dtype) -> AttentionMask:
        """The same mask with `prepared` filled in for q, k, v of `dtype`: done once a forward, not once a layer."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T * scale, masked) v: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] to [B, T, N, Hv].

        K divides N. mask: None if every query sees every key; there are no sinks then. sinks [N]: one more score for
        each head, which takes part in the softmax and has no value.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, elementwise (SwiGLU, arXiv 2002.05202); gate_up [..., 2 D], gate first: [..., D]."""

    def clamped_swiglu(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """g sigmoid(alpha g) (u + 1), elementwise, with g = min(gate, limit) and u = up within -limit and limit.

        (Reference code of gpt-oss, `swiglu`.) gate_up [..., 2 D], gate and up in turn: [..., D].
        """

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), elementwise (arXiv 1606.08415, section 2)."""

    def gelu(self, x: Tensor) -> Tensor:
        """0.5 x (1 + erf(x / sqrt(2))), elementwise (arXiv 1606.08415, section 2)."""

    def gelu_sigmoid(self, x: Tensor) -> Tensor:
        """x sigmoid(1.702 x), elementwise (arXiv 1606.08415, section 2): "quick_gelu" in configuration files."""

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + exp(-x)), elementwise."""

    def softmax(self, x: Tensor) -> Tensor:
        """exp(x) divided by its sum over the last axis; the result is float32, or float64 for float64."""

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of the last axis, largest first, and their int64 places: each [..., k].

        Which of equal values come first is what `torch.topk` does: routers of the reference implementations use it.
        """

    def grouped_linear(self, x: Tensor, weight: Matrices, ends: Tensor) -> Tensor:
        """x [R, D_in] times one matrix [D_out, D_in] a group, transposed: [R, D_out].

        Group e has the rows from ends[e - 1] (0 for the first) to before ends[e]; ends int64 [E], the last is R.
        A matrix without rows is not read; its gradient is 0.
        """

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, N, D_in] times one matrix a head, weight [N, D_out, D_in], transposed: [B, T, N, D_out]."""

    def keep_groups(self, x: Tensor, scores: Tensor, k: int, hidden: float) -> Tensor:
        """x [M, E] with `hidden` in place of all groups of neighbours but the k of highest scores [M, G]; G divides E.

        Equal scores are chosen as `top_k` does.
        """

    def weighted_sum(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [M, k, D] added up over k with weights [M, k]: [M, D]."""

    def shares(self, x: Tensor, tiny: float = 0.0) -> Tensor:
        """x [M, k] divided by the sums of its rows plus `tiny`: [M, k]."""

    def scale_rows(self, x: Tensor, factors: Tensor) -> Tensor:
        """x [M, D] times factors [M, 1]: [M, D]."""

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """The rows of x [M, D] at int64 [R], each at most once: [R, D]."""

    def softmax_cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over rows of -log softmax(logits)[target], float32 scalar.

        logits [M, V], targets int64 [M]; a negative target is ignored.
        """

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """`softmax_cross_entropy` of the logits `linear(x, weight)`: x [M, D], weight [V, D], targets int64 [M]."""
