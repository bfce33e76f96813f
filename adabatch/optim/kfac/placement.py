"""What K-FAC asks of the ranks it runs on: nothing, on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that see different data, and returns the sum."""


class Owner(Protocol):
    """Which rank inverts the factors of a layer, and how what it computed reaches the others."""

    def deal(self, costs: Mapping[str, float]) -> None:
        """Gives each layer, by its name, one owner; called once, with what the inverses of each cost."""
        ...

    def owns(self, layer: str) -> bool:
        """Whether this rank inverts the factors of the layer."""
        ...

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        """Overwrites ``roots`` by those of the layer's owner, on the ranks that precondition the layer too."""
        ...

    def gather(self, layer: str, grad: Tensor) -> Tensor | None:
        """The whole gradient on a rank that preconditions it, None elsewhere."""
        ...

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """This rank's part of the direction, laid out as ``grad`` is."""
        ...


class Alone:
    """One process owns every layer."""

    def deal(self, costs: Mapping[str, float]) -> None:
        """Nothing to do."""

    def owns(self, layer: str) -> bool:
        """True."""
        return True

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        """Nothing to do."""

    def gather(self, layer: str, grad: Tensor) -> Tensor | None:
        """The gradient itself."""
        return grad

    def scatter(self, layer: str, direction: Tensor | None, grad: Tensor) -> Tensor:
        """The direction itself."""
        assert direction is not None
        return direction
