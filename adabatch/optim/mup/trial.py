"""Common parts of the checks of a width plan: models of several widths, prepared and trained in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.arguments import require, shown
from adabatch.optim.mup.init import init_
from adabatch.optim.mup.planning import plan
from adabatch.optim.mup.plans import Plan

Parameterization = Literal["mup", "standard"]
"""A width plan, or every multiplier one: the control, which should fail."""

MakeModel = Callable[[int], nn.Module]
"""Width -> model, initialized from torch's global generator."""

MakeOptimizers = Callable[[nn.Module, Plan], Optimizer | Sequence[Optimizer]]
"""A model and its plan -> what trains it."""

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets -> a scalar."""

Observe = Callable[[Optimizer, Tensor, Tensor], object]
"""Called for each optimizer with outputs and targets between forward and backward, for methods that need them."""


MOST_WIDTH = 2**20
"""The largest width of a model that is tried here."""


@dataclass(frozen=True)
class Trial:
    """How models of every width are made and trained.

    Args:
        make: width -> model.
        optimizer: a model and its plan -> an optimizer, or several.
        loss: of outputs and targets.
        base: width at which the settings were tuned; or a plan of any width, if roles must be given.
        parameterization: "mup", or "standard", in which every width has the settings of the base.
        observe: see ``Observe``.
        device: where to train.
    """

    make: MakeModel
    optimizer: MakeOptimizers
    loss: Loss
    base: int | Plan
    parameterization: Parameterization = "mup"
    observe: Observe | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        fits = isinstance(self.base, Plan) or 1 <= self.base <= MOST_WIDTH
        require(fits, f"base must be a width from 1 to {MOST_WIDTH}, or a plan", self.base)
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(
                f"device must be one of torch, such as 'cpu' or 'cuda', got {shown(self.device)}"
            ) from None

    def start(self, width: int, seed: int) -> tuple[nn.Module, list[Optimizer]]:
        """A model of this width from a seed, prepared by ``init_``, with its optimizers."""
        with seeded(seed):
            model = self.make(width)
            model_plan = self._plan(model)
            init_(model, model_plan)
            # initialized on the CPU, so that the weights of a seed are the same on every device
            model.to(self.device).train()
            made = self.optimizer(model, model_plan)
        return model, [made] if isinstance(made, Optimizer) else list(made)

    def step(self, model: nn.Module, optimizers: Sequence[Optimizer], batch: Batch) -> Tensor:
        """One step of all optimizers, or none if the loss is not finite; returns the loss before it."""
        inputs, targets = (tensor.to(self.device) for tensor in batch)
        outputs = model(inputs)
        value = self.loss(outputs, targets)
        if not torch.isfinite(value):  # host sync
            return value.detach()
        for optimizer in optimizers:
            optimizer.zero_grad()
            if self.observe is not None:
                self.observe(optimizer, outputs, targets)
        value.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        return value.detach()

    def _plan(self, model: nn.Module) -> Plan:
        """The plan of a model, of any width."""
        if isinstance(self.base, Plan):
            found = self.base.at(model)
        else:
            # From a model of twice the width, because shapes show roles only if widths differ, and this model may be as
            # wide as the base.
            with torch.device("meta"):
                found = plan(self.make(2 * self.base), self.make(self.base)).at(model)
        return found if self.parameterization == "mup" else found.standard()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generators, and restores them afterwards."""
    # All of them by number, as manual_seed() seeds all: torch warns if there are several GPUs and none is named.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else None
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def check_widths(widths: Sequence[int], seeds: Sequence[int]) -> None:
    """Checks that there is something to compare.

    Raises:
        ValueError: if there are fewer than two different widths, or no seed.
    """
    if len(set(widths)) < 2 or len(set(widths)) != len(widths) or min(widths) < 1:
        raise ValueError(f"widths must be two or more different positive numbers, got {list(widths)}")
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    require(min(seeds) >= 0, "seeds must not be negative", list(seeds))
