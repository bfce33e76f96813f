"""``Engine``: how a model runs on several ranks; one class per way, in the modules beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.batch.plan import BatchPlan, Progress
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.wrappers.backward import PLAIN, Backward
from adabatch.runtime.wrappers.compiled import uncompiled

GradientSync = Literal["each", "last"]
"""At which micro-batches of a step the ranks reduce their gradients."""


class Engine(ABC):
    """How a model runs on several ranks: who shares it, what is reduced and when, and which probe measures it.

    A new engine implements the abstract methods. The others have the behaviour of an engine that gives every rank the
    mean gradient in the backward of a step's last micro-batch.

    Attributes:
        model: as the loop calls it.
        collectives: the ranks that see different data.
        backward: how the backward of a micro-batch runs, and by which factor it scales the gradients.
        shards: whether each rank holds only a part of each weight.
        copies: whether all copies of a weight have the same bits between any two steps.
        runs_alone: whether a rank can run a micro-batch without the other ranks.
        holds_gradients: whether the gradients that a step has accumulated so far are in the optimizer's parameters, if
            they are anywhere that a loop can reach.
        gives_closures: whether the host calls ``optimizer.step()`` with a closure that leaves the gradient as it is.
        stand_in: what lets the other ranks end a step in which this rank's parameters have changed: gradients of
            "zeros" for all parameters that required one when the model was wrapped; this rank's "backward", as it is;
            or, from the beginning of the step, its old "flags" (``requires_grad``). None if nothing does.
        reduced: when the mean gradient of a step is available: after the "backward" of its last micro-batch, or only
            when its "update" begins.
    """

    shards: bool = False
    copies: bool = True
    runs_alone: bool = True
    holds_gradients: bool = True
    gives_closures: bool = False
    stand_in: Literal["zeros", "backward", "flags"] | None = None
    reduced: Literal["backward", "update"] = "backward"

    def __init__(self, model: nn.Module, collectives: Collectives, backward: Backward = PLAIN) -> None:
        self.model = model
        self.collectives = collectives
        self.backward = backward

    # --- the model --------------------------------------------------------------------------------------------------

    def inner_model(self) -> nn.Module:
        """The user's module, without wrappers."""
        return uncompiled(self.model)

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        """The model's parameters that the optimizer holds, including those that require no gradient."""
        # by id: tensors compare by value
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.model.parameters() if id(p) in held]

    # --- a step -----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:  # noqa: B027  (most engines do nothing then)
        """Called before a step is planned and taken from the data. The host may load another state of the run in it."""

    def begin(self, plan: BatchPlan) -> None:  # noqa: B027  (most engines do nothing then)
        """Called before the first micro-batch of a step with this plan."""

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[Any]:
        """A context for all micro-batches of a step but the last."""

    def unreduced(self) -> AbstractContextManager[Any]:
        """A context in which a backward leaves this rank's own gradient, not reduced."""
        return self.no_sync()

    def switched_off(self, *, last: bool) -> str | None:
        """The switch that keeps the next backward from reducing although it has to; None if there is none.

        Args:
            last: whether the backward is that of a step's last micro-batch.
        """
        return None

    def alone(self) -> AbstractContextManager[Any]:
        """A context in which this rank can run the model without the others (``runs_alone``)."""
        return nullcontext()

    def gradient_ready(self, weight: float) -> None:  # noqa: B027  (most engines do nothing then)
        """Called when a step's gradient is complete, before it is measured.

        Args:
            weight: of this rank's micro-batches: their number of examples, or what ``steps(weigh=)`` returned.
        """

    def commits(self) -> bool:
        """Whether the step counts, asked once its gradient is measured. If not, it is as if it had not been taken."""
        return True

    def inner_loop_ended(self) -> None:  # noqa: B027  (most engines do nothing then)
        """Called after a step's micro-batches, and after its decision if its gradient is reduced by then."""

    def steps_alone(self) -> bool:
        """Whether the next step uses this rank's own gradient instead of the mean over the ranks."""
        return False

    def left_out(self) -> bool:
        """Whether the update was called but did not step the optimizer (if gradients are ``reduced`` in the update)."""
        return False

    def leaves_out(self) -> None:  # noqa: B027  (most engines do nothing then)
        """Called if the loop says that it leaves an update out, before its ``optimizer.step()``, which may not come."""

    def update_missed(self) -> None:  # noqa: B027  (most engines do nothing then)
        """Called at the end of a step whose ``optimizer.step()`` was not called."""

    def stands_at(self, applied: Progress, consumed: Progress, lr_factor: float) -> None:  # noqa: B027
        """Called before each step and after each update, with the progress of the run: what the applied updates
        consumed, and what all steps did."""

    def journal_entry(self) -> dict[str, Any]:
        """What the engine adds to a step's line in the journal."""
        return {}

    # --- probes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """Makes the engine's probe for these parameters. Its hooks are on the model from then on."""

    def fit_probe(self, probe: Probe) -> Probe:
        """Adapts a probe that the user gave, so that it measures all ranks."""
        return probe

    def measures_next(self) -> bool:
        """Whether the next step's gradient may be measured."""
        return True

    @property
    def num_compared(self) -> int:
        """Ranks whose parts are compared with each other."""
        return self.collectives.size
