"""Warns of a learning rate schedule that counts steps in a run whose number of steps is not known."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch.optim import Optimizer

from adabatch.batch.plan import Duration
from adabatch.runtime.observers.protocol import StepObserver
from adabatch.runtime.optimizers.joined import each_of, kind_of
from adabatch.runtime.optimizers.ownership import owners_of

FALLS = 3
"""Number of updates in a row after which the rate must have fallen: a schedule that counts epochs lowers it less often,
and a warm-up that counts steps ends at the same rate whatever the batch does."""


class StepSchedules(StepObserver):
    """Watches for a scheduler of torch that lowers the learning rate after every update although the batch changes.

    It was built for a number of steps, and with another batch the same examples take another number.

    Args:
        optimizer: whose rates are watched.
        batch_size: the present global batch size.
    """

    def __init__(self, optimizer: Optimizer, *, batch_size: Callable[[], int]) -> None:
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._first: int | None = None  # batch size of the loop's first step
        self._rates: list[float] = []
        self._falls = 0
        self._watches = False

    def begin_loop(self, until: Duration | None) -> None:
        """``steps()`` is called; a run that ends after a number of steps has one."""
        self._watches = until is None or until.unit != "steps"
        self._first, self._falls = None, 0

    def after(self, step: int) -> None:
        """Warns once, as soon as both rate and batch have changed."""
        if not self._watches or not self._scheduled():
            return
        if self._first is None:
            self._first = self._batch_size()
        before = self._rates
        # rates that are tensors would have to be read from their device
        self._rates = [lr for group in self._optimizer.param_groups if isinstance(lr := group.get("lr"), float)]
        fell = len(before) == len(self._rates) and any(b > a for b, a in zip(before, self._rates, strict=True))
        self._falls = self._falls + 1 if fell else 0
        now = self._batch_size()
        if self._falls >= FALLS and now != self._first:
            self._watches = False
            warnings.warn(
                f"a torch scheduler lowers the learning rate of the {kind_of(self._optimizer)} at each step, but the "
                f"batch has changed from {self._first} to {now} examples, and the run will take another number of "
                f"steps than the scheduler was built for. Use adabatch.ProgressLR, which follows the examples, or end "
                f"the loop with steps(loader, until=adabatch.steps(n))",
                RuntimeWarning,
                stacklevel=2,
            )

    def _scheduled(self) -> bool:
        # torch marks the step() of an optimizer that a scheduler was made for, and so does ProgressLR, its subclass
        optimizers = each_of(self._optimizer)
        marked = any(hasattr(one.step, "_wrapped_by_lr_sched") for one in optimizers)
        return marked and not owners_of(optimizers, kind="ProgressLR")
