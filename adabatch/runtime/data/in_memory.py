"""Data sets of tensors in memory, whose batches are gathered at once.

With ``collate_fn=collate`` a batch is one ``index_select`` per tensor instead of a Python loop over examples; on other
data sets that function behaves like torch's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from adabatch.arguments import checked, require


class Rows(Sequence[tuple[Tensor, ...]]):
    """Some rows of tensors in memory, not gathered yet: a sequence of examples that ``collate`` makes a batch of.

    Args:
        tensors: each of shape (num_examples, ...).
        indices: the rows, in order.
    """

    def __init__(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.tensors = tensors
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, ...] | Rows:
        if isinstance(index, slice):
            return Rows(self.tensors, self.indices[index])
        row = self.indices[index]
        return tuple(tensor[row] for tensor in self.tensors)

    def gather(self) -> list[Tensor]:
        """The rows of each tensor, shape (len(indices), ...)."""
        index = torch.tensor(self.indices, dtype=torch.int64)
        return [tensor.index_select(0, index) for tensor in self.tensors]


class InMemory(TensorDataset):
    """Torch's ``TensorDataset`` whose batches ``collate`` gathers at once."""

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """The examples of a batch; ``DataLoader`` calls this if a data set has it."""
        return Rows(self.tensors, indices)


@checked
def collate(batch: list[Any] | Rows) -> Any:
    """A batch from the examples that a ``DataLoader`` fetched: ``collate_fn=collate``.

    Same values and types as ``torch.utils.data.default_collate``, but without its loop over examples if they
    are rows of an ``InMemory`` data set or of a ``Subset`` of one.
    """
    if isinstance(batch, Rows):
        return batch.gather()
    require(len(batch) > 0, "batch must hold at least one example", batch)
    try:
        return default_collate(batch)
    except (TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"batch must hold examples of equal form, which torch can put together: {error}") from None
