"""``Planner``: what a run knows and decides between its steps. Plain numbers, equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from adabatch.batch.control import UNLIMITED, Control, ControlState, Decision, Limits, Reason, decide
from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, Duration, PlanGrid, Progress
from adabatch.batch.schedules import Schedule
from adabatch.lr.follow import UpdateRules, UpdateScaling

STATE_FORMAT = 2
"""Format 1 held averages of all probes; 2 holds the last probes one by one. Both are read."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a run was given, checked, and never changes.

    Args:
        criterion, control, limits: which batch size is asked for, and which may be had.
        rules: what else goes with the batch.
        reference_batch_size: the batch that the base LR is meant for; None for the first.
        tokens_per_example: None where tokens are not counted.
        counts_gain: whether the noise is measured, so that gain-steps can be counted.
        layer_weights: of the layers in the norm; None for the plain norm.
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
    """What the end of a step says.

    Args:
        num_examples: examples that it took over all ranks.
        moments: of its gradient; None where it was not probed.
        finite: whether loss and gradient were finite on all ranks, as far as that is known.
        empty: none of its micro-batches weighs anything, on any rank.
        loss: mean loss; None where it was not measured.
        timed: a plan and the seconds of a step of it; None where nothing was timed.
    """

    num_examples: int
    moments: GradientMoments | None
    finite: bool
    empty: bool
    loss: float | None
    timed: tuple[BatchPlan, float] | None


class Ended(NamedTuple):
    """What becomes of a step that has ended.

    Args:
        decision: the next plan, and why.
        scaling: what the batch makes of its update.
        gain: gain-steps that its update is worth; None where they are not counted.
    """

    decision: Decision
    scaling: UpdateScaling
    gain: float | None


class Planner:
    """The next plan, the progress and the control's memory, and what they make of the learning rate.

    Attributes:
        policy: what the run was given.
        plan: of the next step.
        progress: what the applied updates consumed so far.
        consumed: what all steps consumed so far.
        state: what the control remembers.
        reference: the global batch size that the base LR is meant for.
        hold_until: the batch does not grow before so much of the run is over, unless its ``Control`` names a length
            itself; None for no such length.

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
        self.hold_until: Duration | None = None
        self._grid = grid
        self.plan = self._first_plan()
        first = self.plan.global_batch_size
        self.reference = first if policy.reference_batch_size is None else policy.reference_batch_size

    def _first_plan(self) -> BatchPlan:
        criterion = self.policy.criterion
        low, high = self.policy.limits.at(self.consumed)
        wanted = float(low)
        if isinstance(criterion, Schedule):
            wanted = min(max(criterion.wanted(Observation(None, self.consumed)), low), high)
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    # --- the next plan ----------------------------------------------------------------------------------------------

    @property
    def measures_next(self) -> bool:
        """Whether the control wants the next step measured."""
        return self.state.until_probe == 0

    def end_step(self, measured: Measured) -> Ended:
        """A step has ended: decides on the next one."""
        policy, num_examples, before = self.policy, measured.num_examples, self.consumed
        moments = measured.moments
        if moments is not None and policy.layer_weights is not None:
            moments = moments.weighted(policy.layer_weights)
        decision = decide(
            policy.criterion,
            moments,
            control=policy.control,
            limits=policy.limits,
            grid=self._grid,
            plan=self.plan,
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
        step_gain = self._gain_of(num_examples)  # with this step's own measurement in it
        self.consumed = self._after(before, num_examples, step_gain)
        self.plan = decision.plan
        return Ended(decision, self.scaling(num_examples, before), step_gain)

    def applied(self, num_examples: int, gain_steps: float | None) -> None:
        """An update of so many examples, worth so many gain-steps, was applied."""
        self.progress = self._after(self.progress, num_examples, gain_steps)

    def restrict(self, micro_sizes: tuple[int, ...]) -> BatchPlan:
        """From now on plans use these micro-batch sizes only; returns the next plan."""
        self._grid = replace(self._grid, micro_sizes=micro_sizes)
        self.plan = self._runnable(self.plan.global_batch_size)
        return self.plan

    def after_next(self) -> Progress:
        """The progress when the next planned step is applied."""
        size = self.plan.global_batch_size
        return self._after(self.progress, size, self._gain_of(size))

    def largest_known(self) -> int:
        """The largest batch that limits or criterion name beforehand; the present one where they name none."""
        criterion, (_, high) = self.policy.criterion, self.policy.limits.at(self.consumed)
        if isinstance(criterion, Schedule) and criterion.fixed_sizes:
            return min(high, max(criterion.fixed_sizes))
        return high if high < UNLIMITED else self.plan.global_batch_size

    def held(self) -> object:
        """What all ranks must hold alike before any step."""
        return self.plan, self.progress, self.consumed, self.state

    def given(self) -> object:
        """What all ranks must have been given alike."""
        policy = self.policy
        settings = (policy.rules.rule, self.reference, policy.rules.followers, policy.control)
        return self.plan, self.progress, self.consumed, settings

    def _runnable(self, wanted: float) -> BatchPlan:
        """The plan nearest to a global batch size that limits and grid allow now."""
        low, high = self.policy.limits.runnable(self.consumed, self._grid)
        return self._grid.nearest(wanted, min_size=low, max_size=high)

    # --- what the batch makes of the update -------------------------------------------------------------------------

    def scaling(self, global_batch_size: int, progress: Progress | None = None) -> UpdateScaling:
        """What the batch makes of an update of so many examples.

        Args:
            global_batch_size: examples of the step.
            progress: what was consumed when its size was chosen; None for now.
        """
        noise, signal = self._known()
        at = self.consumed if progress is None else progress
        return self.policy.rules.at(global_batch_size, at, reference=self.reference, noise=noise, signal=signal)

    def _gain_of(self, global_batch_size: int) -> float | None:
        """Gain-steps that a step of so many examples is worth; None where nobody measures the noise."""
        return None if self.progress.gain_steps is None else self.scaling(global_batch_size).gain

    def _known(self) -> tuple[float, float]:
        averages = self.state.averages
        return (averages.noise, averages.signal) if averages.weight > 0 else (math.nan, math.nan)

    def _after(self, progress: Progress, num_examples: int, gain_steps: float | None) -> Progress:
        per_example = self.policy.tokens_per_example
        return progress.after(num_examples, None if per_example is None else num_examples * per_example, gain_steps)

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plan, memory and progress as plain numbers."""
        return {
            "format": STATE_FORMAT,
            "plan": asdict(self.plan),
            "control": self.state.state_dict(),
            "progress": asdict(self.progress),
            "consumed": asdict(self.consumed),
            "reference_batch_size": self.reference,
        }

    def load_state_dict(self, state: Mapping[str, Any], micro_sizes: tuple[int, ...]) -> None:
        """Restores a run, also one with other ranks, micro-batches or limits: the batch size stays as near as it can.

        Args:
            state: what was saved.
            micro_sizes: micro-batch sizes that plans may use.

        Raises:
            ValueError: another reference batch size than this run was given.
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
        self.plan = plan

    def check_reference(self, saved: int) -> None:
        """That a run which was given a reference batch size goes on from one with the same.

        Raises:
            ValueError: it is another one.
        """
        given = self.policy.reference_batch_size
        if given is not None and self.reference != saved:
            raise ValueError(
                f"the run was saved with reference_batch_size={saved}, this one was built with {self.reference}: its "
                f"learning rate would jump; resume with {saved} or leave it out, and change the learning rate instead"
            )

    def _resumed(self, saved: Progress) -> Progress:
        """Saved progress in the units that this run counts, which may be others than those of the run that saved it."""
        per_example, tokens, gains = self.policy.tokens_per_example, saved.tokens, saved.gain_steps
        if per_example is None:
            tokens = None
        elif tokens is None:
            tokens = saved.examples * per_example
        if not self.policy.counts_gain:
            gains = None
        elif gains is None:
            gains = float(saved.steps)  # a step in which nothing was measured is worth one, as in any run
        return Progress(examples=saved.examples, steps=saved.steps, tokens=tokens, gain_steps=gains)


def check_format(state: Mapping[str, Any]) -> None:
    """That a saved state can be read.

    Raises:
        ValueError: a state of a newer format.
    """
    if state["format"] > STATE_FORMAT:
        raise ValueError(
            f"the batch state was saved in format {state['format']}, this version reads up to {STATE_FORMAT}: upgrade "
            f"adabatch"
        )
