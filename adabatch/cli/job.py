"""A training job as described by a config file, and the loop that runs it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.options import EngineOptions, Guard, Measure
from adabatch.arguments import require
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration, Progress
from adabatch.checkpointing.checkpoints import Loaded
from adabatch.cli.display import Display
from adabatch.cli.engines import EngineName, JobEngine, job_engine
from adabatch.cli.optimizers import MakeOptimizer, observe
from adabatch.cli.run_folder import mark_finished, run_folder
from adabatch.cli.runs import CHECKPOINTS, JOURNAL
from adabatch.guards.preemption import Preemption
from adabatch.guards.same_settings import check_same_settings
from adabatch.guards.watchdog import Watchdog
from adabatch.integrations.trackers import TrackerName, tracker_of
from adabatch.lr.rules import LRRule, Setting
from adabatch.lr.shapes import Shape, constant
from adabatch.runtime.collectives import Collectives, workers_of
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.data.in_memory import collate
from adabatch.runtime.launch.world import World
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.optimizers.scheduler import ClockKind, ProgressLR

CONFIG_FORMAT = 1
# One size for all runs: what an evaluation takes must not depend on where the training batch stands.
EVALUATION_BATCH = 1024
STOPPED_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Also Ctrl-C: launchers forward it, so that a process may get it twice. Ctrl-\\ (SIGQUIT) ends a run at once."""
LEFT_IN_ROUND = 64
"""Steps that a run which is to stop may still take to the end of a round of local SGD: launchers wait for 30 s only."""
MOST = 2**31 - 1
COUNTS = MappingProxyType(
    {
        "micro_batch_size": MOST,
        "max_micro_batch_size": MOST,
        "reference_batch_size": MOST,
        "tokens_per_example": MOST,
        "num_workers": 1024,
        "control.hold": MOST,
        "checkpoint.keep": MOST,
    }
)
"""Largest values of the counts of a job. A larger value is a mistake, and some, such as a million loading processes,
would bring down the machine before any other check."""


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where and how often a job saves itself; `adabatch train` resumes from the newest checkpoint.

    Args:
        directory: folder of the checkpoints; by default checkpoints in the folder of the job.
        every: length of training from one checkpoint to the next; the end of the run is always saved.
        every_seconds: time from one checkpoint to the next.
        keep: how many checkpoints to keep.
        background: write in a thread while training continues, from a copy in memory.
        resume: resume from the newest checkpoint in the folder, if there is one; false starts from the beginning.
    """

    directory: Path | None = None
    every: Duration | None = None
    every_seconds: float | None = None
    keep: int = 3
    background: bool = True
    resume: bool = True


@dataclass(kw_only=True)
class Job:
    """One training run: model, data, and how the batch size and the learning rate change.

    Args:
        format: version of the config file; this release reads version 1.
        model: the network, a class path with its arguments.
        loss: a module (outputs, targets) -> mean loss over the examples.
        optimizer: an optimizer class path with its arguments, without the parameters (for adabatch.optim.KFAC, without
            the model; it observes the outputs of each micro-batch).
        train_data: map-style data set of (input, target).
        test_data: the same for the evaluation at the end of the run, and in it (evaluate_every); may be left out.
        evaluate_every: length of training from one evaluation on test_data to the next; by default only at the end. It
            changes nothing else in the run. Workers of local_sgd evaluate weights of their own, each on its share.
        criterion: which global batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank.
        limits: smallest and largest global batch size.
        total: length of the run.
        max_micro_batch_size: how far the micro-batch may grow before steps accumulate; if a larger one runs out of
            memory, it does not grow further (not under fsdp2 and deepspeed).
        control: how cautiously the criterion is followed.
        lr_rule: how the learning rate follows the batch; by default "gain" if the batch follows noise, "sqrt" for
            second-order optimizers, else "none".
        follow: what else follows the batch: betas, eps, weight_decay; by default the betas of Adam and AdamW, if
            lr_rule is left out too and the batch follows noise.
        reference_batch_size: global batch size for which the learning rate was tuned; by default the first one.
        shape: learning-rate schedule over the run, from adabatch.lr.
        warmup: linear warm-up of the learning rate before the shape, a duration or a share of the total (0.1).
        clock: what the shape's progress counts: "total" the unit of the total, "gain" gain-steps towards it.
        tokens_per_example: lets durations be given in tokens.
        measure: what is measured beside what the criterion needs: noise (monitor), the l1 norm that `adabatch schedule
            refine --kind adam` reads (l1), layers and their weights.
        local_sgd: adabatch.LocalSGD with its arguments, without model and optimizer, for workers that step on their own
            and average every few steps; by default gradients are averaged at every step.
        engine: what averages gradients over the processes: "ddp", "fsdp2" or "deepspeed".
        engine_config: the JSON file of DeepSpeed.
        engine_options: when gradients are reduced (gradient_sync) and what scales the loss (scaler, such as
            torch.amp.GradScaler, for a model that runs in float16 by itself). Not for deepspeed, which has its own
            config.
        seed: of the weights, the order of the data and everything random.
        num_workers: loading processes per rank.
        out: folder for journal, checkpoints and picture. By default that of the same job's unfinished run, if it is the
            newest in runs, or a new folder runs/<date>-<n>; runs/latest is a link to it.
        checkpoint: where and how often to save, and whether to resume.
        hang_timeout: seconds without progress after which a rank counts as hanging, and all end; null for no watchdog.
        guard: what is checked: updates that are not finite (skip_nonfinite), ranks that drift (check_every).
        trackers: which trackers also get the journal's numbers: tensorboard, wandb, mlflow, trackio.
    """

    format: int = CONFIG_FORMAT
    model: nn.Module
    loss: nn.Module
    optimizer: MakeOptimizer
    train_data: Dataset  # type: ignore[type-arg]  # the parser does not take Dataset[Any] for a class
    test_data: Dataset | None = None  # type: ignore[type-arg]
    evaluate_every: Duration | None = None
    criterion: Criterion
    micro_batch_size: int
    limits: Limits | None = None
    total: Duration
    max_micro_batch_size: int | None = None
    control: Control | None = None
    lr_rule: LRRule | None = None
    follow: tuple[Setting, ...] | None = None
    reference_batch_size: int | None = None
    shape: Shape | None = None
    warmup: Duration | float | None = None
    clock: ClockKind = "total"
    tokens_per_example: int | None = None
    measure: Measure = Measure()
    local_sgd: Callable[[nn.Module, Optimizer], LocalSGD] | None = None
    engine: EngineName = "ddp"
    engine_config: Path | None = None
    engine_options: EngineOptions = EngineOptions()
    seed: int = 0
    num_workers: int = 0
    out: Path | None = None
    checkpoint: Checkpointing = Checkpointing()
    hang_timeout: float | None = 300.0
    guard: Guard = Guard()
    trackers: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        if self.format != CONFIG_FORMAT:
            raise ValueError(
                f"the config has format {self.format}, this release of adabatch reads format {CONFIG_FORMAT}: "
                f"write the config for this release, or use the release that it was written for"
            )
        # The parser makes an object of the base class for a field without a class, whether it has arguments or not.
        bases = {"model": nn.Module, "loss": nn.Module, "train_data": Dataset, "test_data": Dataset}
        for name, base in bases.items():
            if type(getattr(self, name)) is base:
                raise ValueError(f"{name} needs a class_path, such as my_package.my_module.MyClass, and got none")
        for name, most in COUNTS.items():
            # control may be left out
            count = attrgetter(name)(self) if self.control or "control" not in name else None
            if isinstance(count, int) and count > most:
                raise ValueError(f"{name} must be at most {most:,}, got {count:,}")
        # before the training: its end would be late to find out that there is nothing to average over
        test_data: object = self.test_data  # torch's Dataset has no length, though most data sets have one
        if isinstance(test_data, Sized):
            require(len(test_data) > 0, "test_data must hold at least 1 example, or be left out", 0)
        if self.evaluate_every is not None:
            if self.test_data is None:
                raise ValueError("evaluate_every needs test_data, which is evaluated: give it, or leave out both")
            if self.evaluate_every.count < 1:
                raise ValueError(
                    f"evaluate_every must be at least 1 {self.evaluate_every.unit}, or left out for one evaluation at "
                    f"the end, got {self.evaluate_every}"
                )
        if self.hang_timeout is not None and not 0 < self.hang_timeout < math.inf:
            raise ValueError(
                f"hang_timeout must be a positive number of seconds, or null for no watchdog, got {self.hang_timeout}"
            )


class Result(NamedTuple):
    """The result of a run.

    Args:
        label: its name in tables and pictures.
        steps: optimizer steps applied.
        examples: examples consumed over all ranks.
        seconds: wall time of the training loop, without evaluations.
        test_loss: mean loss on the test set; NaN without one.
        accuracy: share of test targets that were predicted; NaN if targets are not classes.
        journal: its journal.
        preempted: whether a signal ended it early; it has then saved itself.
    """

    label: str
    steps: int
    examples: int
    seconds: float
    test_loss: float
    accuracy: float
    journal: Path
    preempted: bool = False

    @property
    def mean_batch(self) -> float:
        """Examples per step, on average."""
        return self.examples / self.steps if self.steps else math.nan


class Assembled(NamedTuple):
    """The parts of a job around its model, ready to train.

    Args:
        engine: holds model and optimizer.
        batches: the batch sizes.
        schedule: of the learning rate.
        order: of the data.
        local: workers that step on their own, if the job has them.
        loss_of: a micro-batch -> its mean loss.
    """

    engine: JobEngine
    batches: AdaptiveBatch
    schedule: ProgressLR
    order: GlobalOrder
    local: LocalSGD | None
    loss_of: Callable[[tuple[Tensor, Tensor]], Tensor]


BATCHING = (
    "micro_batch_size",
    "limits",
    "max_micro_batch_size",
    "control",
    "lr_rule",
    "follow",
    "reference_batch_size",
    "tokens_per_example",
    "measure",
)
"""Fields of a job that are arguments of ``AdaptiveBatch`` under the same name."""


def batching_of(job: Job) -> dict[str, Any]:
    """The arguments of ``AdaptiveBatch`` that a job has as fields, without the criterion and the guard."""
    return {name: getattr(job, name) for name in BATCHING}


def assembled(job: Job, world: World, *, journal: Sequence[Any]) -> Assembled:
    """Builds what a job needs for its loop; writes only into the journal.

    Raises:
        ValueError: if settings do not fit together.
    """
    device = world.device
    # first, since optimizers are made from the parameters that they will update
    model = job.model.to(device)
    engine = job_engine(
        job.engine,
        model,
        job.optimizer,
        world,
        config=job.engine_config,
        options=job.engine_options,
        micro_batch_size=job.micro_batch_size,
        averages=job.local_sgd is None,
    )
    # before the batches, which are told of it; it gives all workers the weights of the first
    local = None if job.local_sgd is None else job.local_sgd(model, engine.optimizer)

    def loss_of(batch: tuple[Tensor, Tensor], *, counts: bool = True) -> Tensor:
        inputs, targets = (part.to(device) for part in batch)
        outputs = engine.forward(inputs)
        if counts:
            observe(engine.optimizer, outputs, targets)
        loss: Tensor = job.loss(outputs, targets)
        return loss

    guard = job.guard
    if guard.trial is None and (job.max_micro_batch_size or 0) > job.micro_batch_size and engine.runs_alone:
        # not counted: K-FAC must not learn from a micro-batch of a trial
        guard = replace(guard, trial=partial(loss_of, counts=False))
    batches = engine.batches(
        job.criterion,
        **batching_of(job),
        guard=guard,
        local_sgd=local,
        journal=list(journal),
    )
    # after the batches, whose progress it reads, and which it tells to wait for the end of the warm-up
    schedule = ProgressLR(
        engine.optimizer, job.shape or constant(), batches, total=job.total, warmup=job.warmup, clock=job.clock
    )
    order = GlobalOrder(job.train_data, seed=job.seed, collate_fn=collate, num_workers=job.num_workers)
    return Assembled(engine, batches, schedule, order, local, loss_of)


def run(job: Job, world: World, *, display: Display, label: str, config: Mapping[str, Any] | None = None) -> Result:
    """Trains, tests and writes journal and checkpoints into the job's folder; resumes from the newest checkpoint there.

    Args:
        job: what to train.
        world: rank and world size of this process.
        display: shows progress and results.
        label: the run's name in the display.
        config: the job in plain values, which is compared with that of the checkpoint.

    Raises:
        ValueError: if settings do not fit together, before anything is trained or written.
        CheckpointError: if a checkpoint could not be written, or all checkpoints are damaged.
    """
    out = job.out
    if out is None:
        ranks = workers_of(None, device=world.device)
        out = run_folder(config, ranks, resume=job.checkpoint.resume, display=display)
    journal = out / JOURNAL
    parts = assembled(job, world, journal=[journal, *(tracker_of(name, out) for name in job.trackers)])
    engine, batches, schedule, local = parts.engine, parts.batches, parts.schedule, parts.local
    saving = job.checkpoint
    checkpoints = engine.checkpoints(
        saving.directory or out / CHECKPOINTS,
        batches=batches,
        schedule=schedule,
        order=parts.order,
        local_sgd=local,
        config=config,
        every=saving.every,
        every_seconds=saving.every_seconds,
        keep=saving.keep,
        background=saving.background,
    )
    # Preemption outermost, so that a second signal does not kill the process while the last checkpoint is written.
    with Preemption(batches, signals=STOPPED_BY) as preemption, checkpoints:
        if not saving.resume:
            checkpoints.start_over()
        elif (loaded := checkpoints.load(missing_ok=True)) is not None:
            _say(loaded, batches, display)
        # after the load, which sets the progress: intervals that the saved run has passed are not evaluated again
        evaluations = _Evaluations(job, parts, world.device)
        left_in_round = LEFT_IN_ROUND
        began = time.perf_counter()
        watch = nullcontext() if job.hang_timeout is None else Watchdog(batches, timeout=job.hang_timeout)
        with display.progress(label, job.total) as shown, watch:
            for step in batches.steps(parts.order, until=job.total):
                for batch in step:
                    step.backward(parts.loss_of(batch))
                engine.update()
                schedule.step()
                shown.update(
                    batches.consumed.count(job.total.unit),
                    examples=batches.consumed.examples,
                    loss=step.loss,
                    global_batch_size=step.global_batch_size,
                    lr=float(schedule.get_last_lr()[0]),
                    noise_scale=batches.noise_scale,
                )
                # before the checkpoint: a run that resumes from it counts this evaluation as done
                if evaluations.due():
                    shown.say(f"evaluated at {batches.consumed.examples:,} examples: {evaluations.run()}")
                checkpoints.step()
                # nobody reads the output any more (| head): end like a signal would, with a checkpoint
                if display.unread:
                    preemption.request()
                if preemption.agreed:
                    # only a checkpoint between two rounds can be gone on from by another number of workers
                    if local is None or local.step_in_round == 0 or left_in_round == 0:
                        break
                    left_in_round -= 1
        # not by whether a signal came, which may have been in the last step
        preempted = not batches.consumed.reached(job.total)
        # the workers become one model, which is then saved and tested
        if local is not None and not preempted:
            local.synchronize()
        seconds = time.perf_counter() - began - evaluations.seconds
        checkpoints.step(now=True)
    # after the last checkpoint: if the test fails, the training is not lost
    last = Evaluated() if job.test_data is None or preempted else evaluations.run()
    # `compare` trains three jobs in one process, and the hooks of one would keep its model in memory
    batches.remove()
    if local is not None:
        local.remove()
    # a folder that the user named is never taken again by itself, and needs no mark
    if world.rank == 0 and not preempted and job.out is None:
        mark_finished(out)
    num_steps, num_examples = batches.progress.steps, batches.consumed.examples
    return Result(label, num_steps, num_examples, seconds, last.loss, last.accuracy, journal, preempted)


def _say(loaded: Loaded, batches: AdaptiveBatch, display: Display) -> None:
    """Shows from where the run resumes, and what differs."""
    display.say(f"resuming from {loaded.path} at {batches.consumed.examples:,} examples")
    for difference in loaded.differences:
        # These differences are reported elsewhere: as settings that were taken over, or in the log as kept.
        if not difference.name.startswith(("config.optimizer.", "config.seed")):
            display.say(f"  {difference}")


class Evaluated(NamedTuple):
    """What an evaluation found.

    Args:
        loss: mean over the examples; NaN if nothing was evaluated.
        accuracy: share of targets that were predicted; NaN if targets are not classes.
    """

    loss: float = math.nan
    accuracy: float = math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """By name, as the journal has them."""
        return {"loss": self.loss, **({} if math.isnan(self.accuracy) else {"accuracy": self.accuracy})}

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}" + ("" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.2%}")


class _Evaluations:
    """The evaluations of a run on its test data.

    Attributes:
        seconds: what those that were due took.

    Raises:
        ValueError: if the ranks would evaluate at other times or on other data; on all ranks.
    """

    def __init__(self, job: Job, parts: Assembled, device: torch.device) -> None:
        self._job = job
        self._parts = parts
        self._device = device
        self._every = job.evaluate_every
        # All ranks evaluate together: one that does not would take part in another reduction.
        size = None if job.test_data is None else len(job.test_data)  # type: ignore[arg-type]
        given = {"evaluate_every": job.evaluate_every, "number of examples in test_data": size}
        check_same_settings(parts.batches.collectives, given)
        self._passed = self._intervals()
        self._kept: tuple[Progress, Evaluated] | None = None
        self.seconds = 0.0

    def due(self) -> bool:
        """Whether the last step completed an interval; the same on all ranks."""
        before, self._passed = self._passed, self._intervals()
        return self._passed > before

    def run(self) -> Evaluated:
        """Evaluates the weights and writes the result into the journal; those of a step only once."""
        now, job = self._parts.batches.consumed, self._job
        if self._kept is not None and self._kept[0] == now:
            return self._kept[1]
        assert job.test_data is not None
        began = time.perf_counter()
        engine, batches = self._parts.engine, self._parts.batches
        found = Evaluated(
            *evaluate(
                engine.model, job.loss, job.test_data, batches.collectives, device=self._device, forward=engine.forward
            )
        )
        batches.record_evaluation(found.metrics)
        # Workers of local SGD are averaged at the end of the run, which changes the weights after its last step.
        self._kept = None if self._parts.local is not None else (now, found)
        self.seconds += time.perf_counter() - began
        return found

    def _intervals(self) -> int:
        every = self._every
        return 0 if every is None else int(self._parts.batches.consumed.count(every.unit) // every.count)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: nn.Module,
    data: Dataset[Any],
    collectives: Collectives,
    *,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Mean loss and accuracy over a data set, each rank on its share; the model in eval mode.

    Accuracy is NaN if the targets are not whole numbers, one per prediction.
    """
    run = model if forward is None else forward
    # by stride: the shares differ by one example at most, and cover the data whatever order it is stored in
    share: Subset[Any] = Subset(data, range(collectives.rank, len(data), collectives.size))  # type: ignore[arg-type]
    total_loss = correct = predictions = 0.0
    num_examples = 0
    modes = [(module, module.training) for module in model.modules()]  # parts of a model may be frozen in eval mode
    model.eval()
    # A loader without a generator of its own would draw from the global one, on which the training depends.
    loader = DataLoader(share, batch_size=EVALUATION_BATCH, collate_fn=collate, generator=torch.Generator())
    batches = iter(loader)
    # All ranks run the model equally often, because a sharded model gathers its weights in each forward: those with
    # fewer batches repeat an example, which does not count.
    for _ in range(-int(collectives.minimum_of(-len(loader))[0])):
        batch = next(batches, None)
        counts = batch is not None
        inputs, targets = (part.to(device) for part in batch or collate([data[0]]))
        outputs = run(inputs)
        if counts:
            total_loss += float(loss(outputs, targets)) * len(inputs)
            num_examples += len(inputs)
            classes = not targets.is_floating_point() and outputs.dim() == targets.dim() + 1
            if classes:
                correct += int((outputs.argmax(-1) == targets).sum())
                predictions += targets.numel()
    for module, training in modes:
        module.training = training
    sums = collectives.sum_of(total_loss, num_examples, correct, predictions)
    accuracy = math.nan
    # no prediction was counted where the targets are not classes
    with suppress(ZeroDivisionError):
        accuracy = sums[2] / sums[3]
    return sums[0] / sums[1], accuracy
