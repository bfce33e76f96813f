"""The optimizer of a job: the additional arguments of K-FAC and Shampoo, and the outputs that K-FAC observes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.optim import KFAC, Shampoo
from adabatch.runtime.optimizers.matrix_owners import across_ranks

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer] | Callable[[Iterable[Tensor], nn.Module], KFAC]
"""Parameters, and for K-FAC the model, -> the optimizer."""


def optimizer_of(make: MakeOptimizer, model: nn.Module, *, averages: bool = True) -> Optimizer:
    """The optimizer of a wrapped model.

    Args:
        make: a class, or a ``functools.partial`` of one, which shows whether the optimizer is of second order.
        model: as it is called.
        averages: False if each process trains its own model (local SGD), with its own curvature.

    Raises:
        ValueError: if the optimizer refuses its arguments.
    """
    arguments: list[Any] = [model.parameters()]
    ranks: dict[str, Any] = {}
    if issubclass(optimizer_class(make), KFAC):
        arguments.append(model)
    # Each worker of local SGD has weights of its own, so curvature that was shared would be that of none of them.
    if is_second_order(make) and averages:
        ranks = {**across_ranks(model)}
    return cast(Callable[..., Optimizer], make)(*arguments, **ranks)


def is_second_order(make: MakeOptimizer) -> bool:
    """Whether it is K-FAC or Shampoo, which need whole matrices."""
    return issubclass(optimizer_class(make), KFAC | Shampoo)


def observe(optimizer: Optimizer, outputs: Tensor, targets: Tensor) -> None:
    """Lets K-FAC observe the outputs of the model; the loss must be a mean over their first dimension."""
    if isinstance(optimizer, KFAC):
        optimizer.observe(outputs, targets)


def optimizer_class(make: MakeOptimizer) -> type:
    """The class that a partial makes; those of the parser hold the class as an argument of the parser's function."""
    made: Any = make
    # nested: the parser's partial may hold one of `compare --tune`, which scales the learning rate
    while isinstance(made, partial):
        made = next((argument for argument in made.args if isinstance(argument, type)), made.func)
    return made if isinstance(made, type) else Optimizer
