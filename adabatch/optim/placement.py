"""The interface through which second-order optimizers divide work among ranks, and its form for one process."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that see different data, and returns the sum."""


@runtime_checkable
class Owner(Protocol):
    """Decides which rank decomposes the statistics of a layer or matrix, and sends the results to the others."""

    @property
    def rank(self) -> int:
        """The number of this rank among those that see different data."""
        ...

    @property
    def owners_per_layer(self) -> int:
        """The largest number of ranks among which one layer can be divided, if its statistics are separate blocks."""
        ...

    def deal(self, costs: Mapping[str, float]) -> None:
        """Assigns one owner to each layer, replacing earlier assignments.

        Args:
            costs: the cost of each layer, or of each stack of blocks of a divided layer, by its name.
        """
        ...

    def owns(self, layer: str) -> bool:
        """Whether this rank decomposes the statistics of the layer."""
        ...

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        """Overwrites ``roots`` with those of the layer's owner, on all ranks that precondition the layer."""
        ...

    def catch_up(self, layer: str, statistics: Sequence[Tensor]) -> None:
        """Overwrites ``statistics`` with the owner's, on ranks that have not seen the layer's whole gradients."""
        ...

    def gather(self, layer: str, grad: Tensor) -> Tensor | None:
        """The whole gradient on the ranks that precondition it; None on the others."""
        ...

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """This rank's part of the direction, laid out as ``grad`` is."""
        ...


class Alone:
    """One process owns every layer."""

    rank = 0
    owners_per_layer = 1

    def deal(self, costs: Mapping[str, float]) -> None:
        """Nothing to do."""

    def owns(self, layer: str) -> bool:
        """True."""
        return True

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def catch_up(self, layer: str, statistics: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def gather(self, layer: str, grad: Tensor) -> Tensor | None:
        """The gradient itself."""
        return grad

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """The direction itself."""
        assert direction is not None
        return direction


def check_in_place(params: Iterable[Tensor], known: Container[Tensor], method: str) -> None:
    """Raises ``RuntimeError`` if the parameters are not the ones that the optimizer was made for."""
    if any(param not in known for param in params):
        raise RuntimeError(
            f"the optimizer's parameters were replaced by others, in which no layer's matrix can be found. "
            f"DeepSpeed flattens them from ZeRO 1 on: use {method} with DDP or FSDP2"
        )
