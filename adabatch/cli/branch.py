"""One branch of ``adabatch cbs``: a given number of examples from a checkpoint on, at a constant batch size."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adabatch.arguments import require
from adabatch.batch.control import Limits
from adabatch.batch.critical import TOLERANCE
from adabatch.batch.plan import Duration
from adabatch.batch.schedules import Constant
from adabatch.cli.display import Display
from adabatch.cli.job import Assembled, Job, assembled, evaluate
from adabatch.guards.left_out import UpdatesLeftOut
from adabatch.runtime.launch.world import World

Judge = Literal["train", "test"]
"""The loss by which branches are compared."""

FACTORS = (1, 2, 4, 8, 16)
LEAST_STEPS = 16
"""Default minimum of steps at the largest batch: fewer hardly change the loss at any learning rate."""


@dataclass(frozen=True, kw_only=True)
class CriticalOptions:
    """Options of ``adabatch cbs`` beside the job.

    Args:
        branch_from: a checkpoint, or a folder whose newest checkpoint is used; by default that of the job.
        factors: sizes of the branches, relative to the smallest.
        smallest: smallest global batch size; by default the one at the checkpoint.
        examples: how many each branch trains on; by default a twentieth of the job, but at least 16 steps of the
            largest batch.
        half_life: of the smoothing, in examples; by default an eighth of ``examples``.
        tolerance: a share of the smallest batch's loss.
        judge: compare the smoothed training loss, or the loss on the test data at the end.
        processes: number of branches that run at the same time, each in its own process.
        max_minutes: after this time, unfinished branches are left out.
    """

    branch_from: Path | None = None
    factors: Sequence[float] = FACTORS
    smallest: int | None = None
    examples: int | None = None
    half_life: float | None = None
    tolerance: float = TOLERANCE
    judge: Judge = "train"
    processes: int = 1
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.factors)) < 2 or not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"factors must be at least two positive numbers, such as 1 2 4 8, got {self.factors}")
        for name in ("smallest", "examples", "half_life", "max_minutes"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be positive", value)
        rule = f"tolerance must be a positive share of the loss, such as {TOLERANCE}"
        require(0 < self.tolerance < math.inf, rule, self.tolerance)
        require(self.processes >= 1, "processes must be at least 1", self.processes)


class BranchPoint(NamedTuple):
    """The state of the run at the checkpoint.

    Args:
        batch: its global batch size.
        steps: of the run so far.
        examples: of the run so far.
        noise_scale: averaged by then, in examples; NaN if it was not measured.
    """

    batch: int
    steps: int
    examples: int
    noise_scale: float


class Branch(NamedTuple):
    """A finished branch.

    Args:
        size: its global batch size.
        losses: of each step, up to the first that is not finite.
        batch_sizes: of each step.
        lr: the learning rate of its first step, in the first parameter group.
        noise_scale: averaged at its end, in examples; NaN if nothing was measured.
        test_loss: at its end; NaN without test data.
        diverged: whether a loss was not finite, or so many updates were left out that it no longer trained.
        seconds: of training.
    """

    size: int
    losses: list[float]
    batch_sizes: list[int]
    lr: float
    noise_scale: float
    test_loss: float
    diverged: bool
    seconds: float


def state_at(job: Job, world: World, checkpoint: Path) -> BranchPoint:
    """The state of the run in a checkpoint.

    Raises:
        ValueError: if the checkpoint belongs to another job or has a learning rate of 0, or for local SGD.
    """
    # The config's rule is meant for the branches, whose batch is constant; with the run's own criterion it may be
    # refused.
    plain_job = replace(job, lr_rule="none", follow=(), measure=replace(job.measure, monitor=True, late=False))
    parts = _loaded(plain_job, world, checkpoint)
    batches = parts.batches
    try:
        if not any(group["lr"] for group in parts.engine.optimizer.param_groups):
            raise ValueError(
                f"the learning rate at {checkpoint} is 0, so that no branch could train: choose an earlier one "
                f"with --branch_from; --checkpoint.every and --checkpoint.keep of `adabatch train` leave more of them"
            )
        # numbers only: each branch builds and loads a model of its own
        return BranchPoint(
            batches.plan.global_batch_size, batches.consumed.steps, batches.consumed.examples, batches.noise_scale
        )
    finally:
        batches.remove()


class BranchStart(NamedTuple):
    """What all branches of a measurement share.

    Args:
        checkpoint: where they begin.
        examples: how many each trains on.
        deadline: when to give up, in seconds of ``time.time``; None for never.
    """

    checkpoint: Path
    examples: int
    deadline: float | None


def run_branch(job: Job, world: World, start: BranchStart, size: int, *, display: Display) -> Branch | None:
    """Trains a branch, with the learning rate's schedule held at its present value.

    Args:
        job: the run of the checkpoint.
        world: rank and world size of this process.
        start: where the branch begins, and how long it is.
        size: global batch size.
        display: shows progress.

    Returns:
        None if the time was over before its end.

    Raises:
        ValueError: if no plan of the job has this size.
    """
    fixed = replace(
        job,
        criterion=Constant(size),
        limits=Limits(size, size),
        measure=replace(job.measure, monitor=True, late=False),
    )
    parts = _loaded(fixed, world, start.checkpoint)
    engine, batches = parts.engine, parts.batches
    # Its rates stay as they are now: along a decay, branches would differ by where on it they spend their examples.
    parts.schedule.give_way()
    losses: list[float] = []
    sizes: list[int] = []
    lr, diverged, late = math.nan, False, False
    began = time.perf_counter()
    before = batches.consumed.examples
    end = Duration(before + start.examples, "examples")
    try:
        with display.progress(f"batch {size:,}", Duration(start.examples, "examples")) as shown:
            for step in batches.steps(parts.order, until=end):
                for batch in step:
                    step.backward(parts.loss_of(batch))
                # before the update: the factor belongs to the batch of this step
                if not losses:
                    lr = float(engine.optimizer.param_groups[0]["lr"]) * batches.lr_factor
                engine.update()
                loss = math.nan if step.loss is None else float(step.loss)
                # the loss is read after the update; it is the same on all ranks, so all of them leave the loop together
                diverged = not math.isfinite(loss)
                if diverged:
                    break
                losses.append(loss)
                sizes.append(step.global_batch_size)
                done = batches.consumed.examples - before
                shown.update(
                    done,
                    examples=batches.consumed.examples,
                    loss=loss,
                    global_batch_size=size,
                    lr=lr,
                    noise_scale=batches.noise_scale,
                )
                # a branch that has just reached its end counts as finished, however late it is
                late = start.deadline is not None and done < start.examples and _any_late(batches, start.deadline)
                if late:
                    break
    except UpdatesLeftOut:
        # the guard found that it no longer trains, which is as much as a loss that is not finite
        diverged = True
    seconds = time.perf_counter() - began
    test_loss = math.nan
    if job.test_data is not None and not late and not diverged:
        test_loss, _ = evaluate(
            engine.model, job.loss, job.test_data, batches.collectives, device=world.device, forward=engine.forward
        )
    noise_scale = batches.noise_scale
    batches.remove()
    return None if late else Branch(size, losses, sizes, lr, noise_scale, test_loss, diverged, seconds)


def _any_late(batches: Any, deadline: float) -> bool:
    """Whether the time is over; the same on all ranks, whose clocks may differ."""
    late = time.time() > deadline
    return bool(batches.collectives.sum_of(late)[0]) if batches.collectives.size > 1 else late


def _loaded(job: Job, world: World, checkpoint: Path) -> Assembled:
    if job.local_sgd is not None:
        raise ValueError(
            "cbs measures runs that average gradients at every step; local_sgd has a period that would have to change "
            "with the batch: leave local_sgd out"
        )
    if job.engine == "deepspeed":
        raise ValueError("cbs runs on the engines ddp and fsdp2, got engine: deepspeed")
    # no journal: a branch is not a part of the run that it leaves
    parts = assembled(job, world, journal=())
    checkpoints = parts.engine.checkpoints(
        # config=None: a branch differs from the run on purpose
        checkpoint, batches=parts.batches, schedule=parts.schedule, order=parts.order, local_sgd=None, config=None,
        background=False,
    )  # fmt: skip
    with checkpoints:
        checkpoints.load(missing_ok=False)
    return parts


def branch_of(read: dict[str, Any]) -> Branch:
    """The branch that was read from JSON, in which NaN is null."""
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in read.items()}
    return Branch(**values)


def options_for_json(options: CriticalOptions) -> dict[str, Any]:
    """The options for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
