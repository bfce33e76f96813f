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
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.engines.backward import PLAIN, Backward
from adabatch.runtime.probes.protocol import Probe, ProbeOptions

GradientSync = Literal["each", "last"]
"""At which micro-batches of a step the ranks reduce their gradients."""


class Engine(ABC):
    """How a model runs on several ranks: who shares it, what is reduced and when, and which probe measures it.

    A new engine says what is ``abstract`` here; what has a body holds for an engine that gives every rank the mean
    gradient of all in the backward of a step's last micro-batch.

    Attributes:
        model: as the loop calls it.
        collectives: the ranks that see different data.
        backward: how the backward of a micro-batch runs, and what it multiplies gradients by.
        shards: whether each rank holds a part of each weight only.
        copies: whether ranks that hold the same weight hold the same bits of it between any two steps.
        runs_alone: whether a rank can run a micro-batch without the others.
        holds_gradients: whether what the backwards of a step left so far lies in the optimizer's parameters, if
            anywhere that a loop can reach.
        reduced: when the mean gradient of a step is there to be measured: after the "backward" of its last micro-batch,
            or not until its "update" begins.
    """

    shards: bool = False
    copies: bool = True
    runs_alone: bool = True
    holds_gradients: bool = True
    reduced: Literal["backward", "update"] = "backward"

    def __init__(self, model: nn.Module, collectives: Collectives, backward: Backward = PLAIN) -> None:
        self.model = model
        self.collectives = collectives
        self.backward = backward

    # --- the model --------------------------------------------------------------------------------------------------

    def inner_model(self) -> nn.Module:
        """The user's own module, inside what was put around it."""
        return uncompiled(self.model)

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        """The model's parameters that the optimizer trains, those among them that require no gradient."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.model.parameters() if id(p) in held]

    # --- a step -----------------------------------------------------------------------------------------------------

    def begin(self, plan: BatchPlan) -> None:  # noqa: B027  (most engines do nothing then)
        """A step of this plan is about to run its first micro-batch."""

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[Any]:
        """A context for every micro-batch of a step but the last."""

    def unreduced(self) -> AbstractContextManager[Any]:
        """A context in which a backward leaves this rank's own gradient."""
        return self.no_sync()

    def switched_off(self, *, last: bool) -> str | None:
        """What keeps the backward to come from reducing, though it has to; None where nothing does.

        Args:
            last: the backward is that of a step's last micro-batch.
        """
        return None

    def alone(self) -> AbstractContextManager[Any]:
        """A context in which this rank runs the model while the others may do something else (``runs_alone``)."""
        return nullcontext()

    def gradient_ready(self, weight: float) -> None:  # noqa: B027  (most engines do nothing then)
        """A step's gradient is complete, and about to be measured.

        Args:
            weight: of this rank's micro-batches: their examples, or what ``steps(weigh=)`` says.
        """

    def steps_alone(self) -> bool:
        """Whether the next step is taken with this rank's gradient, and not with the mean of all."""
        return False

    def left_out(self) -> bool:
        """Where gradients are ``reduced`` in the update: whether it has come and gone without a step."""
        return False

    def stands_at(self, progress: Progress, lr_factor: float) -> None:  # noqa: B027  (most engines do nothing then)
        """Where the run stands, said before each step and after each update."""

    def journal_entry(self) -> dict[str, Any]:
        """What a step's line in the journal says besides."""
        return {}

    # --- probes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """The probe that suits the engine, for these parameters; its hooks are on the model from here on."""

    def fit_probe(self, probe: Probe) -> Probe:
        """A probe of the user's own, made to measure all ranks."""
        return probe

    def measures_next(self) -> bool:
        """Whether the next step's gradient may be measured."""
        return True

    @property
    def num_compared(self) -> int:
        """Ranks whose parts are compared with each other."""
        return self.collectives.size
