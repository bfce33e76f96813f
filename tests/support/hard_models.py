"""Networks that are hard on a probe: tied, frozen, unused, sparse and recomputed parameters; each with its loss.

They are small enough that an oracle may compute every part on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from support.loops import network


class Tied(nn.Module):
    """Embedding and output share a weight, as in a language model."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, sparse=sparse)
        self.hidden = nn.Linear(5, 5)
        self.output = nn.Linear(5, 11, bias=False)
        if not sparse:
            self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(x))))


class Unused(nn.Module):
    """One part is frozen, one is never called, one is called for long batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.body = nn.Linear(6, 1)
        self.never = nn.Linear(3, 3)
        self.sometimes = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(torch.tanh(self.frozen(x)))
        return y + self.sometimes(x) if len(x) > 3 else y


class Checkpointed(nn.Module):
    """The same block twice, recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.head(x)


class CheckpointedByReentry(Checkpointed):
    """The same in the older way, whose gradients come in two pieces."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=True)
        return self.head(x)


class Convolved(nn.Module):
    """A convolution, whose weight gradient a probe of single examples may form itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x[:, None])).mean(2))


Batch = tuple[Tensor, Tensor]


def real(size: int, dtype: torch.dtype) -> Batch:
    """Random numbers, and one for each example to be predicted."""
    return torch.randn(size, 6, dtype=dtype), torch.randn(size, 1, dtype=dtype)


def tokens(size: int, dtype: torch.dtype) -> Batch:
    """Random tokens."""
    return torch.randint(11, (size,)), torch.randint(11, (size,))


def squared_errors(model: nn.Module, batch: Batch) -> Tensor:
    """Of each example, shape (num_examples,)."""
    x, y = batch
    return (model(x).to(y.dtype) - y).square().mean(1)


def cross_entropies(model: nn.Module, batch: Batch) -> Tensor:
    """Of each example, shape (num_examples,)."""
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def dense(grad: Tensor) -> Tensor:
    """A gradient as one vector, complex128 so that it takes any."""
    return (grad.to_dense() if grad.is_sparse else grad).to(torch.complex128).flatten()


class Case(NamedTuple):
    """A model, its data, and its losses.

    Args:
        make: the model.
        draw: (size, dtype) -> a micro-batch, from torch's global generator.
        losses: (model, micro-batch) -> the loss of each example.
        units: the parts that FSDP2 shards apart from the rest (7 rows on 2 ranks: uneven).
    """

    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.dtype], Batch] = real
    losses: Callable[[nn.Module, Batch], Tensor] = squared_errors
    units: Sequence[str] = ()

    def loss(self, model: nn.Module, size: int, dtype: torch.dtype) -> Tensor:
        """The mean loss of new examples."""
        return self.losses(model, self.draw(size, dtype)).mean()


CASES = {
    "network": Case(network, units=["0"]),
    "tied": Case(Tied, tokens, cross_entropies, ["hidden"]),
    "unused": Case(Unused, units=["never", "sometimes"]),
    "checkpointed": Case(Checkpointed, units=["head"]),
}
CONVOLVED = Case(Convolved, units=["conv"])
SPARSE = Case(partial(Tied, sparse=True), tokens, cross_entropies)
"""A case for the engines that know sparse gradients; nothing is tied in it."""
