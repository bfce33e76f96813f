"""Networks that are hard on a probe: tied, frozen, unused, sparse and recomputed parameters; each with its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loops import network
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Tied(nn.Module):
    """Embedding and output share a weight, as in a language model."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, sparse=sparse)
        self.hidden = nn.Linear(5, 5)
        self.tied = not sparse
        self.output = nn.Linear(5, 11, bias=False)
        if self.tied:
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


def regression_loss(model: nn.Module, size: int, dtype: torch.dtype) -> Tensor:
    x, y = torch.randn(size, 6, dtype=dtype), torch.randn(size, 1, dtype=dtype)
    return functional.mse_loss(model(x).to(dtype), y)


def token_loss(model: nn.Module, size: int, dtype: torch.dtype) -> Tensor:
    return functional.cross_entropy(model(torch.randint(11, (size,))), torch.randint(11, (size,)))


def dense(grad: Tensor) -> Tensor:
    return (grad.to_dense() if grad.is_sparse else grad).to(torch.complex128).flatten()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "network": (network, regression_loss),
    "tied": (Tied, token_loss),
    "sparse": (lambda: Tied(sparse=True), token_loss),
    "unused": (Unused, regression_loss),
    "checkpointed": (Checkpointed, regression_loss),
}
