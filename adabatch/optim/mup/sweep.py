"""Short training runs that test whether the best learning rate and damping stay the same while the width grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adabatch.arguments import MOST_STEPS, check_fields, checked, require
from adabatch.optim.mup.plans import Plan
from adabatch.optim.mup.trial import Batch, Loss, MakeModel, Observe, Parameterization, Trial, check_widths, seeded

FINAL = 0.1
"""Share of the steps at the end whose mean loss is a run's result."""

DIVERGED = 1e6
"""Multiple of the first loss above which a run is stopped as diverged."""

MakeTuned = Callable[[nn.Module, Plan, float, float | None], Optimizer | Sequence[Optimizer]]
"""A model, its plan, learning rate and damping -> what trains it."""


class Run(NamedTuple):
    """One setting at one width.

    Args:
        width: of the model.
        lr, damping: at the base width.
        loss: mean of the last tenth of the steps, over the seeds; infinite if a run diverged.
    """

    width: int
    lr: float
    damping: float | None
    loss: float


@dataclass(frozen=True)
class Sweep:
    """Runs over widths and settings.

    Args:
        runs: all of them.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths, ascending."""
        return tuple(sorted({run.width for run in self.runs}))

    def at(self, width: int) -> list[Run]:
        """The runs of a width, by learning rate and damping."""
        return sorted((run for run in self.runs if run.width == width), key=lambda run: (run.lr, run.damping or 0.0))

    def best(self, width: int) -> Run:
        """The run of the lowest loss."""
        return min(self.at(width), key=lambda run: run.loss)

    @property
    def survived(self) -> bool:
        """Whether every width has a run that did not diverge."""
        return all(math.isfinite(self.best(width).loss) for width in self.widths)

    def largest_stable(self, width: int) -> Run | None:
        """The run of the largest learning rate, then damping, that did not diverge."""
        stable = [run for run in self.at(width) if math.isfinite(run.loss)]
        # the last of what `at` sorts by rate, then by damping
        return stable[-1] if stable else None


@checked
def transfer_sweep(
    make: MakeModel,
    optimizer: MakeTuned,
    data: Callable[[int], Iterable[Batch]],
    *,
    loss: Loss,
    widths: Sequence[int],
    base: int | Plan,
    lrs: Sequence[float],
    dampings: Sequence[float | None] = (None,),
    steps: int = 200,
    seeds: Sequence[int] = (0,),
    parameterization: Parameterization = "mup",
    observe: Observe | None = None,
    device: torch.device | str = "cpu",
    done: Callable[[Run], object] | None = None,
) -> Sweep:
    """Trains models of several widths with every learning rate and damping; the rates decay linearly to zero.

    Seeds determine the initial model and the data; runs of a seed share both, as far as widths can. With fewer than
    three seeds, a difference of one grid step between the best settings of two widths is not significant.

    Args:
        make: width -> model.
        optimizer: a model, its plan, learning rate and damping -> an optimizer, or several.
        data: seed -> batches, at least ``steps`` of them.
        loss: of outputs and targets.
        widths: to compare.
        base: width at which the settings were tuned; or a plan of any width.
        lrs: learning rates.
        dampings: damping values; None for the optimizer's default.
        steps: of each run.
        seeds: one run of each setting for each.
        parameterization: "mup", or "standard" for the control.
        observe: called for each optimizer with outputs and targets between forward and backward.
        device: where to train.
        done: called after each setting.

    Raises:
        ValueError: if there are fewer than two widths, no seed, step, learning rate or damping, or too little data.
    """
    check_widths(widths, seeds)
    for name, values in (("lrs", lrs), ("dampings", dampings)):
        if len(values) == 0:
            raise ValueError(f"{name} must hold at least one value, got none")
        wrong = [value for value in values if value is not None and not 0 <= value < math.inf]
        require(not wrong, f"{name} must be finite and not negative", wrong)
    require(1 <= steps <= MOST_STEPS, f"steps must be 1 or more, up to {MOST_STEPS}", steps)
    runs = []
    for width in widths:
        for lr in lrs:
            for damping in dampings:
                # the loop's values as defaults: a closure would read those of the last turn
                def made(
                    model: nn.Module, plan: Plan, lr: float = lr, damping: float | None = damping
                ) -> Optimizer | Sequence[Optimizer]:
                    return optimizer(model, plan, lr, damping)

                trial = Trial(make, made, loss, base, parameterization, observe, device)
                losses = [_final_loss(trial, width, seed, data(seed), steps) for seed in seeds]
                runs.append(Run(width, lr, damping, sum(losses) / len(losses)))
                if done is not None:
                    done(runs[-1])
    return Sweep(tuple(runs))


def _final_loss(trial: Trial, width: int, seed: int, batches: Iterable[Batch], steps: int) -> float:
    model, optimizers = trial.start(width, seed)
    # LambdaLR multiplies, so that the groups of a plan keep the ratios of their rates.
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in optimizers]
    losses: list[float] = []
    with seeded(seed):
        for batch in batches:
            losses.append(trial.step(model, optimizers, batch).item())  # host sync
            # written so that NaN counts as diverged too
            if not losses[-1] <= DIVERGED * abs(losses[0]):
                return math.inf
            if len(losses) == steps:
                last = losses[-max(1, round(FINAL * steps)) :]
                return sum(last) / len(last)
            for schedule in schedules:
                schedule.step()
    raise ValueError(f"the data ended after {len(losses)} batches, a run takes {steps}: give more, or fewer steps")
