"""The few reductions adabatch needs: the only caller of ``torch.distributed`` collectives."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Collectives:
    """Reductions over the ranks that see different data.

    Args:
        group: their process group; None for a single process.
        device: where the group's backend expects its tensors.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device or torch.device("cpu")
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each; ``values`` is left as it is."""
        if self._group is None or self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def sum_of(self, *numbers: float) -> list[float]:
        """Sums over the ranks of a few host numbers."""
        if self.size == 1:
            return [float(number) for number in numbers]
        local = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return [float(number) for number in self.sum(local).tolist()]  # host sync

    def minimum_of(self, *numbers: float) -> list[float]:
        """The least over the ranks of each of a few host numbers."""
        if self._group is None or self.size == 1:
            return [float(number) for number in numbers]
        least = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        return [float(number) for number in least.tolist()]  # host sync

    def agree(self, value: object) -> bool:
        """Whether ``repr(value)`` is the same on all ranks; the answer is. Costs 16 bytes.

        A sum would not do: of ranks that hold 0, 1 and 2 the middle one sees the sum that it expects.
        """
        digest = float(int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6]))  # 48 bits, exact in float64
        least, minus_largest = self.minimum_of(digest, -digest)
        return least == -minus_largest


def collectives_of(model: torch.nn.Module) -> Collectives:
    """The data-parallel ranks of a model, from the way it is wrapped.

    Raises:
        ValueError: several processes run, and nothing says how this model's gradients are reduced over them.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(model, DistributedDataParallel):
        return Collectives(model.process_group, device=device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes are running, but the model is a plain {type(model).__name__} whose "
            f"gradients nobody reduces: wrap it in torch.nn.parallel.DistributedDataParallel before AdaptiveBatch"
        )
    return Collectives(device=device)
