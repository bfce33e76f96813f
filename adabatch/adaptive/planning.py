"""``Planner``: what a run remembers and decides between its steps. Plain numbers, equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from adabatch.arguments import require_format, require_state
from adabatch.batch.control import UNLIMITED, Control, ControlState, Decision, Limits, Reason, decide
from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, Duration, PlanGrid, Progress
from adabatch.batch.schedules import Schedule
from adabatch.lr.follow import UpdateRules, UpdateScaling

STATE_FORMAT = 2
"""Format 1 holds averages over all probes, format 2 the last probes one by one. Both can be read."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a run was given. It has been checked, and does not change.

    Args:
        criterion, control, limits: which batch size is asked for, and which is allowed.
        rules: how the learning rate and other settings follow the batch.
        reference_batch_size: the global batch size that the base LR was tuned for; None for the first of the run.
        tokens_per_example: None if tokens are not counted.
        counts_gain: whether the noise is measured, so that gain-steps can be counted.
        layer_weights: weights of the layers in the norm; None for the plain norm.
    """

    criterion: Criterion
    control: Control
    limits: Limits
    rules: UpdateRules
    reference_batch_size: int | None
    tokens_per_example: int | None
    counts_gain: bool
    layer_weights: Mapping[str, float] | None


class Measured(NamedTuple):
    """What is known of a step at its end.

    Args:
        num_examples: number of examples over all ranks.
        moments: of its gradient; None if the step was not probed.
        finite: whether loss and gradient were finite on all ranks, as far as that is known.
        empty: whether all its micro-batches have weight 0, on all ranks.
        loss: mean loss; None if it was not measured.
        timed: a plan and the seconds that a step of it took; None if nothing was timed.
        age: number of steps since the one whose loss and moments these are; 0 if they are of the step itself.
    """

    num_examples: int
    moments: GradientMoments | None
    finite: bool
    empty: bool
    loss: float | None
    timed: tuple[BatchPlan, float] | None
    age: int = 0


class Ended(NamedTuple):
    """What follows from a step that has ended.

    Args:
        decision: the next plan, and the reason for it.
        scaling: what the batch changes about the step's update.
        gain: gain-steps that the update is worth; None if they are not counted.
    """

    decision: Decision
    scaling: UpdateScaling
    gain: float | None


class Planner:
    """The next plan, the progress and the control's averages, and how the learning rate follows from them.

    Attributes:
        policy: what the run was given.
        plan: of the next step.
        progress: what the applied updates consumed so far.
        consumed: what all steps consumed so far.
        state: what the control remembers.
        reference: the global batch size that the base LR was tuned for.
        probe_waits: whether a step was measured whose numbers have not come to ``end_step`` yet.
        hold_until: the batch does not grow before this much of the run is over, unless ``Control(hold_until=)`` is
            given; None for no such wait.

    Args:
        policy: see above.
        grid: the plans that can be run.
    """

    def __init__(self, policy: Policy, grid: PlanGrid) -> None:
        self.policy = policy
        self.progress = Progress(
            tokens=None if policy.tokens_per_example is None else 0, gain_steps=0.0 if policy.counts_gain else None
        )
        self.consumed = self.progress
        self.state = ControlState()
        self.probe_waits = False
        self.hold_until: Duration | None = None
        self._grid = grid
        self.plan = self._first_plan()
        first = self.plan.global_batch_size
        self.reference = first if policy.reference_batch_size is None else policy.reference_batch_size

    def _first_plan(self) -> BatchPlan:
        criterion = self.policy.criterion
        low, high = self.policy.limits.at(self.consumed)
        wanted = criterion.wanted(Observation(None, self.consumed)) if isinstance(criterion, Schedule) else low
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    # --- the next plan ----------------------------------------------------------------------------------------------

    @property
    def measures_next(self) -> bool:
        """Whether the control wants the next step measured."""
        window, control = self.state.window, self.policy.control
        # The control counts from the probe that it knows; one that waits counts too.
        waits = self.probe_waits and control.interval_after(window.num_probes + 1) > 1
        return self.state.until_probe == 0 and not waits

    def end_step(self, measured: Measured) -> Ended:
        """Decides on the next step, at the end of one."""
        policy, num_examples, before = self.policy, measured.num_examples, self.consumed
        moments = measured.moments
        if moments is not None and policy.layer_weights is not None:
            moments = moments.weighted(policy.layer_weights)
        # the control averages in the weighted norm, while the journal keeps the moments as they were measured
        decision = decide(
            policy.criterion,
            moments,
            control=policy.control,
            limits=policy.limits,
            grid=self._grid,
            plan=self.plan,
            # with the gain by the averages before this step, since those with it are what `decide` computes
            progress=self._after(before, num_examples, self._gain_of(num_examples)),
            state=self.state,
            loss=measured.loss,
            timed=measured.timed,
            finite=measured.finite,
            hold_until=self.hold_until,
        )
        if measured.empty:
            decision = decision._replace(reason=Reason.WEIGHS_NOTHING)
        self.state = decision.state
        if moments is not None:  # the interval began at the step that was measured
            self.state = replace(self.state, until_probe=max(0, self.state.until_probe - measured.age))
        step_gain = self._gain_of(num_examples)  # with this step's own measurement in it
        self.consumed = self._after(before, num_examples, step_gain)
        self.plan = decision.plan
        return Ended(decision, self.scaling(num_examples, before), step_gain)

    def applied(self, num_examples: int, gain_steps: float | None) -> None:
        """Counts an update that was applied."""
        self.progress = self._after(self.progress, num_examples, gain_steps)

    def restrict(self, micro_sizes: tuple[int, ...]) -> BatchPlan:
        """Lets plans use only these micro-batch sizes from now on; returns the next plan."""
        self._grid = replace(self._grid, micro_sizes=micro_sizes)
        self.plan = self._runnable(self.plan.global_batch_size)
        return self.plan

    def after_next(self) -> Progress:
        """The progress after the next planned step."""
        size = self.plan.global_batch_size
        return self._after(self.progress, size, self._gain_of(size))

    def largest_known(self) -> int:
        """The largest batch that the limits or the criterion name beforehand; the present one if they name none."""
        criterion, (_, high) = self.policy.criterion, self.policy.limits.at(self.consumed)
        if isinstance(criterion, Schedule) and criterion.fixed_sizes:
            return min(high, max(criterion.fixed_sizes))
        return high if high < UNLIMITED else self.plan.global_batch_size

    @property
    def micro_sizes(self) -> tuple[int, ...]:
        """The micro-batch sizes that plans may use, ascending."""
        return self._grid.micro_sizes

    def held(self) -> object:
        """What must be equal on all ranks before every step."""
        return self.plan, self.progress, self.consumed, self.state

    def given(self) -> dict[str, object]:
        """The settings of the run and its position, by name; they must be equal on all ranks."""
        policy = self.policy
        return {
            "criterion": policy.criterion,
            "limits": policy.limits,
            "micro-batch sizes": self.micro_sizes,
            "control": policy.control,
            "lr_rule": policy.rules.rule,
            "follow": policy.rules.followers,
            "reference batch size": self.reference,
            "tokens_per_example": policy.tokens_per_example,
            "layer_weights": policy.layer_weights,
            "the warm-up that growth waits for": self.hold_until,
            "plan": self.plan,
            "progress": self.progress,
            "consumed": self.consumed,
            "state of the control": self.state,
        }

    def _runnable(self, wanted: float) -> BatchPlan:
        """The plan nearest to a global batch size, among those that limits and grid allow now."""
        low, high = self.policy.limits.runnable(self.consumed, self._grid)
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    # --- what the batch makes of the update -------------------------------------------------------------------------

    def scaling(self, global_batch_size: int, progress: Progress | None = None) -> UpdateScaling:
        """What the batch changes about an update.

        Args:
            global_batch_size: examples of the step.
            progress: what was consumed when the size of the step was chosen; None for now.
        """
        noise, signal = self._known()
        at = self.consumed if progress is None else progress
        return self.policy.rules.at(global_batch_size, at, reference=self.reference, noise=noise, signal=signal)

    @property
    def lr_factor(self) -> float:
        """The batch factor of the next step."""
        return self.scaling(self.plan.global_batch_size).factor

    def _gain_of(self, global_batch_size: int) -> float | None:
        """Gain-steps that a step of this size is worth; None if the noise is not measured."""
        return None if self.progress.gain_steps is None else self.scaling(global_batch_size).gain

    def _known(self) -> tuple[float, float]:
        averages = self.state.averages
        return (averages.noise, averages.signal) if averages.weight > 0 else (math.nan, math.nan)

    def _after(self, progress: Progress, num_examples: int, gain_steps: float | None) -> Progress:
        per_example = self.policy.tokens_per_example
        return progress.after(num_examples, None if per_example is None else num_examples * per_example, gain_steps)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plan, averages and progress as plain numbers."""
        return {
            "format": STATE_FORMAT,
            "plan": asdict(self.plan),
            "control": self.state.state_dict(),
            "progress": asdict(self.progress),
            "consumed": asdict(self.consumed),
            "reference_batch_size": self.reference,
        }

    def load_state_dict(self, state: Mapping[str, Any], micro_sizes: tuple[int, ...]) -> None:
        """Restores a run. If ranks, micro-batches or limits have changed, the nearest possible batch size is used.

        Args:
            state: what was saved.
            micro_sizes: micro-batch sizes that plans may use.

        Raises:
            ValueError: if the state has another reference batch size than this run was given.
        """
        self.check_reference(state["reference_batch_size"])
        self.progress = self._resumed(Progress(**state["progress"]))
        self.consumed = self._resumed(Progress(**state["consumed"]))
        self.state = ControlState.from_state_dict(state["control"])
        self.reference = state["reference_batch_size"]
        self._grid = grid = replace(self._grid, micro_sizes=micro_sizes)
        plan = BatchPlan(**state["plan"])
        low, high = self.policy.limits.runnable(self.consumed, grid)
        runs = plan.dp_size == grid.dp_size and plan.micro_batch_size in grid.micro_sizes
        if not (runs and plan.accumulation_steps >= grid.min_accumulation and low <= plan.global_batch_size <= high):
            plan = self._runnable(plan.global_batch_size)
        # a plan that can still be run is kept as it is: its micro-batch need not be the one that the grid would choose
        self.plan = plan

    def check_reference(self, saved: int) -> None:
        """Checks that a saved run has the reference batch size that this run was given, if it was given one.

        Raises:
            ValueError: if it is another one.
        """
        given = self.policy.reference_batch_size
        # A default follows the saved run: the first batch of a resumed run is seldom that of the original one.
        if given is not None and self.reference != saved:
            raise ValueError(
                f"the run was saved with reference_batch_size={saved}, but this one was built with {self.reference}, "
                f"so its learning rate would jump: resume with {saved} or leave it out, and change the learning rate "
                f"instead"
            )

    def _resumed(self, saved: Progress) -> Progress:
        """Saved progress in the units that this run counts, which may differ from those of the saved run."""
        per_example, tokens, gains = self.policy.tokens_per_example, saved.tokens, saved.gain_steps
        if per_example is None:
            tokens = None
        elif tokens is None:
            # the saved run did not count them, but every example has the same number
            tokens = saved.examples * per_example
        if not self.policy.counts_gain:
            gains = None
        elif gains is None:
            gains = float(saved.steps)  # a step in which nothing was measured counts as one
        return Progress(examples=saved.examples, steps=saved.steps, tokens=tokens, gain_steps=gains)


def check_format(state: Mapping[str, Any]) -> None:
    """Checks that a saved state can be read.

    Raises:
        ValueError: if it has a newer format.
    """
    require_state(
        state, "format", "reference_batch_size", "progress", "consumed", "control", "plan", of="an AdaptiveBatch"
    )
    require_format("the batch state", state["format"], STATE_FORMAT)
