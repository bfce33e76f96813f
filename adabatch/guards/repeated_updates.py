"""Updates of another gradient than the step measured: repeated ones, closures, and gradients that are still scaled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType, finalize, ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.guards.loop_mistakes import SAMPLE
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.optimizers.joined import JoinedOptimizers, each_of, kind_of
from adabatch.runtime.optimizers.ownership import called_weakly, remove_all
from adabatch.runtime.optimizers.step_hooks import hook_step
from adabatch.runtime.wrappers.fsdp2 import own_values

_LOOKED_AT, _NUMBERS = 4, 64
"""Scaled gradients that are looked at, and numbers of each."""

_CALLERS = 12
"""Frames above a hook of ``optimizer.step()`` in which the ``step()`` of a scaler is looked for."""


class _Applied(NamedTuple):
    """A gradient as an update left it. The tensor is not kept alive."""

    parameter: Tensor
    grad: ReferenceType[Tensor]
    version: int

    def unchanged(self) -> bool:
        now = self.parameter.grad
        return now is not None and now is self.grad() and now._version == self.version


def _of_lightning(closure: Callable[[], Any]) -> bool:
    """Whether a closure comes from Lightning, which makes one for each ``step()`` of manual optimization, to clip."""
    inner = getattr(closure, "func", closure)  # of a partial
    return str(getattr(inner, "__module__", "")).partition(".")[0] in ("lightning", "pytorch_lightning")


@torch.no_grad()
def _glance(parameter: Tensor) -> Tensor:
    """The first numbers of this rank's piece of a gradient."""
    assert parameter.grad is not None
    return own_values(parameter.grad).flatten()[:_NUMBERS]


def _held(*optimizers: Optimizer) -> Iterator[Tensor]:
    """The parameters of optimizers that have a gradient."""
    return (p for one in optimizers for group in one.param_groups for p in group["params"] if p.grad is not None)


def _by_scaler() -> bool:
    """Whether an enabled ``GradScaler`` calls the ``step()`` whose hook this is called from."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_CALLERS):
        if frame is None:
            return False
        # By its module: of a scaler that is disabled, step() calls that of the optimizer too.
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            scaler = frame.f_locals.get("self")
            return isinstance(scaler, GradScaler) and scaler.is_enabled()
        frame = frame.f_back
    return False


class RepeatedUpdates:
    """Checks that each update of a step is the first one of its gradient, that no closure computes another, and that
    gradients that are scaled are stepped by their scaler.

    As in ``LoopMistakes``, only the identity of a few gradients and their counts of writes are compared.

    Args:
        engine: how the model runs. DeepSpeed makes an update in several pieces, and is not checked.
        optimizer: whose updates are checked. Hooks are put on it.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self._engine = engine
        self._kind = kind_of(optimizer)
        self._optimizers = each_of(optimizer)
        self._inside = False  # the loop stands in a step
        self._measured = False
        self._scaled: list[tuple[Tensor, Tensor]] = []  # parameters, and some numbers of their scaled gradients
        self._applied: dict[Optimizer, list[_Applied]] = {}
        self._filled: list[Optimizer] = []  # those whose parameters had a gradient when the micro-batches had run
        self._handles: list[RemovableHandle] = hook_step(optimizer, self._begins, self._ended)
        if isinstance(optimizer, JoinedOptimizers):  # it calls the closure itself, before it steps its optimizers
            self._handles.append(optimizer.register_step_pre_hook(called_weakly(self._joined_begins)))
            finalize(self, remove_all, self._handles).atexit = False

    def step_begins(self) -> None:
        """The loop enters a step."""
        self._inside = True
        self._applied.clear()

    def gradient_ready(self, *, measured: bool) -> None:
        """The micro-batches of a step were run.

        Args:
            measured: whether a probe measured their gradient.
        """
        self._measured = measured
        if self._engine.holds_gradients:
            self._filled = [one for one in self._optimizers if next(_held(one), None) is not None]
        if self._engine.backward.scale is not None and self._engine.holds_gradients:
            # Copies of a few numbers, since torch does not count what a scaler writes.
            self._scaled = [(p, _glance(p).clone()) for p in islice(_held(*self._optimizers), _LOOKED_AT)]

    def left_out(self) -> None:
        """The loop leaves the update of the step out, and may clear its gradients."""
        self._filled = []

    def step_over(self) -> None:
        """The loop leaves a step."""
        self._inside = False
        self._filled = []
        self._applied.clear()
        self._scaled.clear()

    def remove(self) -> None:
        """Removes the hooks from the optimizer."""
        remove_all(self._handles)

    def _joined_begins(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_closure(args[1] if len(args) > 1 else kwargs.get("closure"))

    def _begins(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        self._refuse_closure(closure)
        if self._inside:
            self._check_filled(optimizer)
            self._check_scaled(optimizer)
        applied = self._applied.get(optimizer)
        if self._inside and applied and all(each.unchanged() for each in applied):
            raise RuntimeError(
                f"optimizer.step() of the {type(optimizer).__name__} was called a second time in one step and on the "
                f"same gradient, which would move the weights twice for a batch that counts once: call it once, after "
                f"`for batch in step`. (scaler.step(optimizer) and wrappers of frameworks call it too: leave one of "
                f"the calls out)"
            )

    def _ended(self, optimizer: Optimizer) -> None:
        if self._inside and self._engine.holds_gradients:
            # After the update, which may have changed the gradients itself.
            few = islice(_held(optimizer), SAMPLE)
            self._applied[optimizer] = [
                _Applied(p, ref(grad), grad._version) for p in few if (grad := p.grad) is not None
            ]

    def _check_filled(self, optimizer: Optimizer) -> None:
        """Checks that the gradients of the step are still there."""
        # Only before the first update of the step; what the loop does after it is its own affair.
        first = optimizer in self._filled and optimizer not in self._applied
        if first and next(_held(optimizer), None) is None:
            raise RuntimeError(
                f"the gradients of the step were cleared before optimizer.step() of the {type(optimizer).__name__}, "
                f"which would change nothing: call zero_grad() after optimizer.step(). (To leave an update out, call "
                f"leave_out() of the AdaptiveBatch)"
            )

    def _check_scaled(self, optimizer: Optimizer) -> None:
        """Checks that the run was given the scaler that steps the optimizer, and that such a scaler steps it."""
        by_scaler, scale = _by_scaler(), self._engine.backward.scale
        if by_scaler and scale is None and self._measured:
            raise RuntimeError(
                f"a GradScaler steps the {type(optimizer).__name__}, and AdaptiveBatch was not given it: losses and "
                f"gradients would be measured as they are scaled. Give it as engine=EngineOptions(scaler=...), and "
                f"call step.backward(loss) with the loss as it is"
            )
        if by_scaler or scale is None:
            return
        left = [(_glance(p), before) for p, before in self._scaled if p.grad is not None]
        same = all(torch.equal(now, before) for now, before in left)  # host sync, where there is an error to find
        if same and any(now.any() for now, _ in left) and scale(self._engine.collectives.device) != 1:
            raise RuntimeError(
                f"optimizer.step() of the {type(optimizer).__name__} was called while its gradients are still scaled, "
                f"by the GradScaler that AdaptiveBatch was given: call scaler.step(optimizer) and scaler.update()"
            )

    def _refuse_closure(self, closure: Callable[[], Any] | None) -> None:
        if closure is not None and self._inside and not self._engine.gives_closures and not _of_lightning(closure):
            raise RuntimeError(
                f"optimizer.step(closure) of the {self._kind}: a closure computes a gradient of its own, and that of "
                f"the step, which was measured and averaged over its micro-batches, would be lost or counted twice. "
                f"Call optimizer.step() without it; optimizers that cannot do without, such as LBFGS, cannot be used"
            )
