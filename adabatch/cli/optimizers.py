"""The optimizer of a job: what K-FAC and Shampoo take beside parameters, and what K-FAC is shown before a backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.optim import KFAC, Shampoo
from adabatch.runtime.matrix_owners import across_ranks

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer] | Callable[[Iterable[Tensor], nn.Module], KFAC]
"""Parameters, and for K-FAC the model, -> what trains them."""


def optimizer_of(make: MakeOptimizer, model: nn.Module, *, averages: bool = True) -> Optimizer:
    """The optimizer of a model as it is wrapped.

    Args:
        make: a class, or a ``functools.partial`` of one, by which second-order optimizers are known.
        model: as it is called.
        averages: False where each process trains a model of its own (local SGD), with curvature of its own.

    Raises:
        ValueError: what the optimizer refuses.
    """
    arguments: list[Any] = [model.parameters()]
    ranks: dict[str, Any] = {}
    if issubclass(optimizer_class(make), KFAC):
        arguments.append(model)
    if is_second_order(make) and averages:
        ranks = {**across_ranks(model)}
    return cast(Callable[..., Optimizer], make)(*arguments, **ranks)


def is_second_order(make: MakeOptimizer) -> bool:
    """Whether it is K-FAC or Shampoo, which need whole matrices."""
    return issubclass(optimizer_class(make), KFAC | Shampoo)


def observe(optimizer: Optimizer, outputs: Tensor, targets: Tensor) -> None:
    """Shows K-FAC what the model returned; the loss is a mean over its first dimension."""
    if isinstance(optimizer, KFAC):
        optimizer.observe(outputs, targets)


def optimizer_class(make: MakeOptimizer) -> type:
    """The class that a partial makes; the parser's hold the class as an argument of a function of its own."""
    made: Any = make
    while isinstance(made, partial):
        made = next((argument for argument in made.args if isinstance(argument, type)), made.func)
    return made if isinstance(made, type) else Optimizer
