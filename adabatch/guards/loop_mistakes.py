"""Mistakes of a ported loop, reported at the first step in which they happen.

Between the first backward of a step and the end of its micro-batches only the backwards may change a gradient, and no
gradient may exist before. A loop that still clears, clips, switches synchronization or steps in the wrong place would
train with a wrong gradient, and one that steps its scheduler there with a wrong learning rate. The checks read only the
identity of each gradient tensor and its count of writes (``_version``): they need no operation on a tensor, and no host
sync.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.arguments import level_of_the_user
from adabatch.guards.loss_mistakes import warn_of_loss
from adabatch.guards.same_settings import failing_together
from adabatch.runtime.collectives import digest_of
from adabatch.runtime.engines.copies import fingerprint, shared_parameters
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.optimizers.joined import kind_of
from adabatch.runtime.wrappers.fsdp2 import own_values

_GLANCE = 4096
"""Numbers of a gradient that ranks compare at the end of the first step."""

SAMPLE = 16
"""Parameters that are checked per step after the first one: each takes two microseconds in every micro-batch."""


class LoopMistakes:
    """Checks the gradients before, between and after the backwards of a step.

    A mistake in a loop affects all gradients of an optimizer in each step. All parameters are therefore checked in the
    first step, and ``SAMPLE`` of them in each later step, in turn. Torch does not count operations on lists of FSDP2's
    gradients, such as those of ``clip_grad_norm_``, so they are not noticed; clearing the gradients is.

    If gradients exist before the first backward, their values are read, because ``zero_grad(set_to_none=False)`` leaves
    zeros. This costs a host sync and a pass over those gradients, in such loops only.

    At the end of the first step of a loop, the ranks also compare a sample of their gradients, in 24 bytes: a loop that
    calls the module inside ``DistributedDataParallel`` is not averaged over the ranks, and nothing else would tell.

    Args:
        engine: how the model runs, and whether its parameters hold the gradients between micro-batches.
        optimizer: of the parameters whose gradients are checked.
        compares: whether ranks with copies of the weights must hold the same gradients.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, *, compares: bool) -> None:
        self._engine = engine
        self._compares = compares and not engine.shards and engine.holds_gradients and engine.reduced == "backward"
        self._first_step = False  # of a loop
        self._optimizer = optimizer
        # by now, since FSDP2 shows others while a module runs
        self._names = {id(p): name for name, p in engine.model.named_parameters()}
        self._parameters: list[Tensor] = []
        self._left: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient and version after the last backward
        self._rates: list[object] = []  # of the parameter groups, when the first backward began
        self._first = True
        self._steps = 0  # backwards that have begun
        self._trains: bool | None = None  # whether the model was in training mode in the first step
        self._warned_of_loss = False  # or has seen that there is nothing to warn of

    def begin_loop(self) -> None:
        """``steps()`` is called."""
        self._first_step = True

    def check_reached(self) -> None:
        """Checks, at the end of a step, that its backwards reached a parameter of the optimizer.

        Raises:
            RuntimeError: if they reached none.
        """
        if not self._engine.holds_gradients or self._engine.reduced != "backward":
            return
        if any(p.grad is not None for p in self._parameters):
            return
        if all(p.grad is None for group in self._optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"no parameter of the {kind_of(self._optimizer)} has a gradient after the step's last backward, so "
                f"nothing would train: is the loss computed from the model whose parameters the optimizer holds, and "
                f"not from a copy? Assigning other parameters to the model (load_state_dict(assign=True), a replaced "
                f"layer) needs a new optimizer and a new AdaptiveBatch"
            )

    def check_loss(self, loss: Tensor, num_parts: int) -> None:
        """Checks, in the first step of a loop, that the loop does not scale the loss itself, beside the scaler.

        Warns of a loss that is no mean.

        Args:
            loss: what ``step.backward`` is given.
            num_parts: micro-batches of the step on this rank.

        Raises:
            RuntimeError: if it is scaled.
        """
        if not self._first_step:
            return
        if not self._warned_of_loss:
            warn_of_loss(loss, num_parts)
            self._warned_of_loss = True
        scale = self._engine.backward.scale
        if scale is None:
            return
        by = getattr(loss.grad_fn, "_saved_other", None)  # of a product
        if isinstance(by, Tensor) and by.dim() == 0 and bool(by.detach() == scale(by.device)):  # host sync
            raise RuntimeError(
                "the loss is scaled twice: give step.backward the loss as it is, and not scaler.scale(loss). The "
                "scaler that AdaptiveBatch was given scales it there"
            )

    def check_reduced(self) -> None:
        """Checks, at the end of the first step of a loop, that the ranks hold the same gradients.

        Raises:
            RuntimeError: on all ranks, if they do not.
        """
        first, self._first_step = self._first_step, False
        if not first or not self._compares:
            return
        ranks = self._engine.collectives
        # The end of a loading process may be raised anywhere, also here: the others are told, in place of a wait.
        with failing_together(ranks, "a look at the gradients"):
            glance = _glance(shared_parameters(self._engine.model))
        if not ranks.agree(glance):
            raise RuntimeError(
                f"the ranks hold different gradients after the last backward of the step: they were not averaged, and "
                f"the weights would drift apart. Call the {type(self._engine.model).__name__} that AdaptiveBatch was "
                f"given in the loop, and not the module inside it; wrap the model again if layers were frozen since. "
                f"If ranks may hold different weights, give Guard(check_every=None)"
            )

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

    def check_before_backward(self) -> None:
        """Checks, before each backward, what the loop did since the one before it, or since the last step.

        Raises:
            RuntimeError: if the loop made a mistake.
        """
        if self._first:
            self._first = False
            self._rates = self._rates_now()
            self._warn_of_mode()
            self._check_empty()
        else:
            self.check_untouched()

    def check_switches(self, *, last: bool) -> None:
        """Checks that the loop has not switched off the reduction that the next backward has to make.

        Args:
            last: whether it is the backward of the step's last micro-batch.

        Raises:
            RuntimeError: if it has.
        """
        switch = self._engine.switched_off(last=last)
        if switch is not None:
            raise RuntimeError(
                f"the gradients of the step would not be reduced over the ranks: {switch}. Leave out the loop's own "
                f"no_sync() or switch; `for batch in step` synchronizes at the right micro-batches by itself"
            )

    def backward_ended(self) -> None:
        """A backward of the step is over: its gradients must not change until the next one."""
        self._left = [(p, grad, grad._version) for p in self._parameters if (grad := p.grad) is not None]

    def check_untouched(self) -> None:
        """Checks that the gradients are those of the last backward, and the learning rates those of the first.

        Raises:
            RuntimeError: if some were cleared, replaced or changed.
        """
        if not self._first and self._rates_now() != self._rates:
            raise RuntimeError(
                f"the learning rate of the {kind_of(self._optimizer)} was changed while the step's micro-batches were "
                f"being run: the scheduler's step() belongs after `for batch in step`, once for each step. One that "
                f"counts its calls would count micro-batches"
            )
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
        self._left.clear()  # a reference here would keep the memory of gradients that are cleared later

    def forget(self) -> None:
        """The loop ended in the middle of a step."""
        self._left.clear()

    def _warn_of_mode(self) -> None:
        """Warns, once, if the model has left the training mode since the first step, as an evaluation leaves it."""
        trains = self._engine.inner_model().training
        if self._trains is None:
            self._trains = trains
        elif self._trains and not trains:
            self._trains = False
            warnings.warn(
                "the model is trained in evaluation mode, and was in training mode in the first step, so that dropout "
                "and running statistics are off: call model.train() after an evaluation",
                RuntimeWarning,
                stacklevel=level_of_the_user(),
            )

    def _check_empty(self) -> None:
        """Checks that no gradient is left from before, except for zeros."""
        held = [p for p in self._parameters if p.grad is not None]
        # Each rank looks for itself, also at its shards only: a rank may have left out zero_grad() alone.
        if held and _any_nonzero(held):
            raise RuntimeError(
                f"gradients from before the step are left when its first backward begins, among them that of "
                f"{self._name_of(held[0])}, and would be added to those of the step: call optimizer.zero_grad() after "
                f"optimizer.step(), or before `for batch in step` if another loss (such as the other network of a GAN) "
                f"leaves gradients in between"
            )

    def _rates_now(self) -> list[object]:
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        # A rate on an accelerator is not read: its count of writes tells.
        return [(id(lr), lr._version) if isinstance(lr, Tensor) else lr for lr in rates]

    def _name_of(self, parameter: Tensor) -> str:
        named = self._names | {id(p): name for name, p in self._engine.model.named_parameters()}
        return named.get(id(parameter), "a parameter")


@torch.no_grad()
def _any_nonzero(parameters: Iterable[Tensor]) -> bool:
    """Whether this rank's piece of any gradient is not all zeros; NaN counts as such."""
    values = [own for p in parameters if p.grad is not None and (own := own_values(p.grad)).numel()]
    if not values:
        return False
    # The largest is exact, where a sum of squares of float16 may be rounded to 0.
    largest = torch.nn.utils.get_total_norm(values, torch.inf)
    return bool(largest != 0)  # host sync


def _glance(parameters: Sequence[Tensor]) -> int:
    """A digest of the first numbers of the gradients of some parameters."""
    few = parameters[:: max(1, len(parameters) // SAMPLE)]
    grads = [p.grad if p.grad is not None and p.grad.layout == torch.strided else None for p in few]
    # one fingerprint of all: each draws factors for a whole block, whatever it is of
    numbers = fingerprint([grad.flatten()[:_GLANCE] for grad in grads if grad is not None])
    return digest_of([numbers, *(grad is None for grad in grads)])
