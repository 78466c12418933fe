"""Adapters of a model in torch: several at once, each for its own rows of a forward. For inference.

    adapters = ModelAdapters(model)
    adapters.add(adapter)
    with adapters.placed(["its name", None], sequences=[0, 0, 0, 1]):
        model.hidden_states(ids, context)          # three tokens with the adapter, one without

Shapes: M tokens of a forward, flattened; S sequences; R rows of a product that have the same adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openbook.models.adapter import Adapter, LowRank, require_loaded, require_new, unfitting
from openbook.models.base import CausalModel
from openbook.models.layers.linear import Linear
from openbook.ops.base import Ops


class RowAdapters:
    """Which rows of the present forward have which adapter: one object that all linears of a model look at.

    A forward has as many rows as tokens, and behind the last layer's attention as many as are wanted.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[tuple[str, Tensor]]] = {}

    def set(self, groups: Mapping[int, Sequence[tuple[str, Tensor]]]) -> None:
        """By number of rows: the adapters, and int64 [R], ascending, the rows of each."""
        self._groups = {num_rows: list(group) for num_rows, group in groups.items()}

    def groups(self, num_rows: int) -> Sequence[tuple[str, Tensor]]:
        """The adapters of a product's rows, and int64 [R] where they stand.

        Raises:
            ValueError: adapters are placed for other numbers of rows.
        """
        if not self._groups:
            return ()
        if num_rows not in self._groups:
            raise ValueError(f"a product of {num_rows} rows, adapters are placed for {sorted(self._groups)}")
        return self._groups[num_rows]


class LowRankUpdates:
    """What adapters add to the outputs of one `Linear`."""

    def __init__(self, rows: RowAdapters, ops: Ops) -> None:
        self._rows, self._ops = rows, ops
        self._updates: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, name: str, updates: Sequence[LowRank], like: Tensor) -> None:
        """Those of adapter `name`, in the dtype and on the device of `like`."""
        self._updates[name] = [
            (update.first_row, _tensor(update.a, like), _tensor(update.b, like)) for update in updates
        ]

    def remove(self, name: str) -> None:
        """Forget what adapter `name` adds, if it adds anything."""
        self._updates.pop(name, None)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """out [..., out_features], changed in place, of x [..., in_features]: each row gets b (a x) of its adapter."""
        x_MI, out_MO = x.flatten(0, -2), out.view(-1, out.shape[-1])
        for name, rows_R in self._rows.groups(len(x_MI)):
            if name not in self._updates:
                continue
            x_RI = x_MI.index_select(0, rows_R)
            for first_row, a, b in self._updates[name]:
                update_RO = self._ops.linear(self._ops.linear(x_RI, a), b)
                out_MO[:, first_row : first_row + len(b)].index_add_(0, rows_R, update_RO)
        return out


class ModelAdapters:
    """The adapters that are loaded beside a model. Not to be changed while a forward runs."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._like = next(model.parameters())
        self._rows = RowAdapters()
        self._linears: dict[str, list[Linear]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are loaded."""
        return tuple(self._linears)

    def add(self, adapter: Adapter) -> None:
        """Load an adapter.

        Raises:
            UserError: another one has its name, or it updates a matrix that this model has not.
        """
        require_new(adapter.name, self.names)
        linears = {matrix: self._linear(matrix, updates, adapter) for matrix, updates in adapter.matrices.items()}
        for matrix, linear in linears.items():
            if linear.low_rank is None:
                linear.low_rank = LowRankUpdates(self._rows, linear.ops)
            linear.low_rank.add(adapter.name, adapter.matrices[matrix], self._like)
        self._linears[adapter.name] = list(linears.values())

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UserError: there is none of that name.
        """
        require_loaded(name, self.names)
        for linear in self._linears.pop(name):
            assert linear.low_rank is not None
            linear.low_rank.remove(name)
            if not linear.low_rank:
                linear.low_rank = None

    @contextmanager
    def placed(
        self, adapters: Sequence[str | None], sequences: Sequence[int], wanted: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Forwards inside use these adapters.

        Args:
            adapters: that of each sequence, [S]; None for none. Empty: no sequence has one.
            sequences: [M], the sequence of each of the flattened tokens, padding included (anything there).
            wanted: what `CausalModel.hidden_states` is given, ascending.

        Raises:
            UserError: an adapter is not loaded.
        """
        for name in {name for name in adapters if name is not None}:
            require_loaded(name, self.names)
        if any(name is not None for name in adapters):
            numbers = {name: number for number, name in enumerate(self.names)}
            of_sequence = np.array([-1 if name is None else numbers[name] for name in adapters])
            of_row = of_sequence[np.asarray(sequences)]
            groups = {len(of_row): self._grouped(of_row)}
            if wanted is not None:
                assert np.all(np.diff(wanted) > 0), "wanted rows are to ascend"
                groups[len(wanted)] = self._grouped(of_row[np.asarray(wanted)])
            self._rows.set(groups)
        try:
            yield
        finally:
            self._rows.set({})

    def _grouped(self, of_row: NDArray[np.int64]) -> list[tuple[str, Tensor]]:
        return [
            (name, torch.from_numpy(rows).to(self._like.device))
            for number, name in enumerate(self.names)
            if len(rows := np.flatnonzero(of_row == number))
        ]

    def _linear(self, matrix: str, updates: Sequence[LowRank], adapter: Adapter) -> Linear:
        try:
            linear = self._model.get_submodule(matrix)
        except AttributeError:
            linear = None
        if not isinstance(linear, Linear):
            raise unfitting(adapter.name, matrix)
        outputs, inputs = linear.weight.shape
        for update in updates:
            if update.a.shape[1] != inputs or update.first_row + len(update.b) > outputs:
                raise unfitting(adapter.name, matrix)
        return linear


def _tensor(array: NDArray[np.float32], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, like.dtype, copy=True)
