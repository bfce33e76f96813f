"""Updates of a gradient that the step did not measure: a second one of the same gradient, and one with a closure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple
from weakref import ReferenceType, finalize, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.guards.loop_mistakes import SAMPLE
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.optimizers.joined import JoinedOptimizers, kind_of
from adabatch.runtime.optimizers.ownership import called_weakly, remove_all
from adabatch.runtime.optimizers.step_hooks import hook_step


class _Applied(NamedTuple):
    """A gradient as an update left it. The tensor is not kept alive."""

    parameter: Tensor
    grad: ReferenceType[Tensor]
    version: int

    def unchanged(self) -> bool:
        now = self.parameter.grad
        return now is not None and now is self.grad() and now._version == self.version


def _of_lightning(closure: Callable[[], Any]) -> bool:
    """Whether Lightning made a closure, as it does for each ``step()`` of manual optimization, to clip in it."""
    inner = getattr(closure, "func", closure)  # of a partial
    return str(getattr(inner, "__module__", "")).partition(".")[0] in ("lightning", "pytorch_lightning")


class RepeatedUpdates:
    """Checks that each update of a step is the first one of its gradient, and that no closure computes another.

    As in ``LoopMistakes``, only the identity of a few gradients and their counts of writes are compared.

    Args:
        engine: how the model runs. DeepSpeed makes an update in several pieces, and is not checked.
        optimizer: whose updates are checked. Hooks are put on it.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self._engine = engine
        self._kind = kind_of(optimizer)
        self._inside = False  # the loop stands in a step
        self._applied: dict[Optimizer, list[_Applied]] = {}
        self._handles: list[RemovableHandle] = hook_step(optimizer, self._begins, self._ended)
        if isinstance(optimizer, JoinedOptimizers):  # it calls the closure itself, before it steps its optimizers
            self._handles.append(optimizer.register_step_pre_hook(called_weakly(self._joined_begins)))
            finalize(self, remove_all, self._handles).atexit = False

    def step_begins(self) -> None:
        """The loop enters a step."""
        self._inside = True
        self._applied.clear()

    def step_over(self) -> None:
        """The loop leaves a step."""
        self._inside = False
        self._applied.clear()

    def remove(self) -> None:
        """Removes the hooks from the optimizer."""
        remove_all(self._handles)

    def _joined_begins(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_closure(args[1] if len(args) > 1 else kwargs.get("closure"))

    def _begins(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        self._refuse_closure(closure)
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
            held = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            # After the update, which may have changed the gradients itself.
            self._applied[optimizer] = [_Applied(p, ref(p.grad), p.grad._version) for p in islice(held, SAMPLE)]

    def _refuse_closure(self, closure: Callable[[], Any] | None) -> None:
        if closure is not None and self._inside and not self._engine.gives_closures and not _of_lightning(closure):
            raise RuntimeError(
                f"optimizer.step(closure) of the {self._kind}: a closure computes a gradient of its own, and that of "
                f"the step, which was measured and averaged over its micro-batches, would be lost or counted twice. "
                f"Call optimizer.step() without it; optimizers that cannot do without, such as LBFGS, cannot be used"
            )
