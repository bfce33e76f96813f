"""Mistakes of a loop that was ported from another one, said at the first step in which they happen.

Between the first backward of a step and the end of its micro-batches nobody but the backwards may touch a gradient, and
none may be there before. A script that cleared, clipped, switched or stepped by itself does one of these, and trains on
with a wrong gradient. All that is read is which tensor a gradient is, and how often it was written (``_version``): no
operation on a tensor, and no host sync.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.fsdp2 import own_piece

SAMPLE = 16
"""Parameters that are looked at in a step, but for the first: two microseconds each, in every micro-batch."""


class LoopMistakes:
    """Looks at the gradients that a loop leaves before, between and after the backwards of a step.

    What a loop does, it does to all gradients of an optimizer, in each step: so all parameters are looked at in the
    first step, and of each later step some ``SAMPLE``, by turns. Operations on lists of FSDP2's gradients, as
    ``clip_grad_norm_`` makes them, are not counted by torch, and not seen; that they are cleared is.

    Of gradients that are there before the first backward the numbers are looked at, as ``zero_grad(set_to_none=False)``
    leaves zeros: a host sync and a pass over those few, which no other loop pays.

    Args:
        engine: how the model runs, and whether its parameters hold the gradients between micro-batches.
        optimizer: of the parameters whose gradients are looked at.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._left: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient and version after the last backward
        self._first = True
        self._steps = 0  # begun so far

    def step_begins(self) -> None:
        """The micro-batches of a step begin."""
        self._left.clear()
        self._first = True
        if not self._engine.holds_gradients:
            return
        every = [p for group in self._optimizer.param_groups for p in group["params"]]
        stride = max(1, len(every) // SAMPLE) if self._steps else 1
        self._parameters = every[self._steps % stride :: stride]
        self._steps += 1

    def backward_begins(self, *, last: bool) -> None:
        """A backward of the step begins.

        Args:
            last: it is that of the last micro-batch.

        Raises:
            RuntimeError: what the loop did before must not be done there.
        """
        if self._first:
            self._first = False
            self._check_empty()
        else:
            self.check_untouched()
        switch = self._engine.switched_off(last=last)
        if switch is not None:
            raise RuntimeError(
                f"the gradients of the step would not be reduced over the ranks: {switch}. Leave out the loop's own "
                f"no_sync() or switch; `for batch in step` synchronizes at the right micro-batches by itself"
            )

    def backward_ended(self) -> None:
        """A backward of the step is over: what it left must stay as it is."""
        self._left = [(p, grad, grad._version) for p in self._parameters if (grad := p.grad) is not None]

    def check_untouched(self) -> None:
        """That the gradients are those which the last backward left.

        Raises:
            RuntimeError: some are gone, others or changed.
        """
        for parameter, grad, version in self._left:
            if parameter.grad is grad and grad._version == version:
                continue
            name = self._name_of(parameter)
            if parameter.grad is None:
                raise RuntimeError(
                    f"the gradient of {name} was cleared while the step's micro-batches were being run, so only a part "
                    f"of them would count: optimizer.zero_grad() belongs after `for batch in step`, and after "
                    f"optimizer.step()"
                )
            raise RuntimeError(
                f"the gradient of {name} was changed while the step's micro-batches were being run: zero_grad(), "
                f"clipping and scaler.unscale_() belong after `for batch in step`, and another loss must be added to "
                f"the one that step.backward is given"
            )
        self._left.clear()  # a gradient that is cleared later must not live on here

    def forget(self) -> None:
        """The loop was broken off in the middle of a step."""
        self._left.clear()

    def _check_empty(self) -> None:
        """That no gradient is left of anything before, but for zeros."""
        held = [p for p in self._parameters if p.grad is not None]
        if not held:
            return
        found = self._engine.collectives.sum_of(_any_nonzero(held)) if self._engine.shards else [_any_nonzero(held)]
        if any(found):  # a shard may be zero on one rank, and the error belongs to all
            raise RuntimeError(
                f"gradients from before the step are left when its first backward begins, among them that of "
                f"{self._name_of(held[0])}, and would be added to those of the step: call optimizer.zero_grad() after "
                f"optimizer.step(), or before `for batch in step` if another loss (such as the other network of a GAN) "
                f"leaves gradients in between"
            )

    def _name_of(self, parameter: Tensor) -> str:
        named = {id(p): name for name, p in self._engine.model.named_parameters()}
        return named.get(id(parameter), "a parameter")


@torch.no_grad()
def _any_nonzero(parameters: Iterable[Tensor]) -> float:
    """Whether this rank's piece of any gradient is not all zeros, as 1 or 0; NaN counts as such."""
    values = _values_of([p.grad for p in parameters if p.grad is not None])
    if not values:
        return 0.0
    # The largest is exact, where a sum of squares of float16 may be rounded to 0.
    largest = torch.nn.utils.get_total_norm(values, torch.inf)
    return float(largest != 0)  # host sync


def _values_of(grads: Sequence[Tensor]) -> list[Tensor]:
    pieces = [own_piece(grad)[0] for grad in grads]
    values = [piece.coalesce().values() if piece.is_sparse else piece for piece in pieces]
    return [each for each in values if each.numel()]
