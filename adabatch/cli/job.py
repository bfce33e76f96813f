"""A training job as a config file describes it, and the loop that runs it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import Duration
from adabatch.cli.display import Display
from adabatch.journal import Journal
from adabatch.lr.rules import LRRule
from adabatch.lr.shapes import Shape, constant
from adabatch.recipes.data import collate
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.layers import PerLayer
from adabatch.runtime.scheduler import ClockKind, ProgressLR
from adabatch.runtime.world import World

CONFIG_FORMAT = 1
EVALUATION_BATCH = 1024


@dataclass(kw_only=True)
class Job:
    """One training run: what to train, on what, and how the batch size and the learning rate move.

    Args:
        format: version of the config file; this release reads version 1.
        model: the network, a class path with its arguments.
        loss: a module (outputs, targets) -> mean loss over the examples.
        optimizer: an optimizer class path with its arguments, without the parameters.
        train_data: map-style data set of (input, target).
        test_data: the same for the test at the end of the run; may be left out.
        criterion: which global batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank.
        limits: smallest and largest global batch size.
        total: length of the run.
        max_micro_batch_size: how far the micro-batch may grow before steps accumulate.
        control: how cautiously the criterion is followed.
        lr_rule: how the learning rate follows the batch.
        reference_batch_size: global batch size that the learning rate is meant for; by default the first one.
        shape: learning-rate schedule over the run, from adabatch.lr.
        warmup: linear warm-up of the learning rate before the shape.
        clock: what the shape's progress counts: "total" the unit of the total, "gain" gain-steps towards it.
        tokens_per_example: lets durations be given in tokens.
        monitor: measure the noise although nothing needs it.
        record_l1: record the l1 norm of the gradient, which `adabatch schedule refine --kind adam` reads.
        per_layer: write the noise of each layer to the journal: of each module, or of each parameter group.
        seed: of the weights, the order of the data and everything random.
        num_workers: loading processes a rank.
        out: folder for journal, checkpoint and picture.
        save_every: a checkpoint every so much training, beside the one at the end.
        resume: go on from the checkpoint in the folder, where there is one.
    """

    format: int = CONFIG_FORMAT
    model: nn.Module
    loss: nn.Module
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    train_data: Dataset  # type: ignore[type-arg]  # the parser does not take Dataset[Any] for a class
    test_data: Dataset | None = None  # type: ignore[type-arg]
    criterion: Criterion
    micro_batch_size: int
    limits: Limits | None = None
    total: Duration
    max_micro_batch_size: int | None = None
    control: Control | None = None
    lr_rule: LRRule = "none"
    reference_batch_size: int | None = None
    shape: Shape | None = None
    warmup: Duration | None = None
    clock: ClockKind = "total"
    tokens_per_example: int | None = None
    monitor: bool = False
    record_l1: bool = False
    per_layer: PerLayer | None = None
    seed: int = 0
    num_workers: int = 0
    out: Path = Path("runs/latest")
    save_every: Duration | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.format != CONFIG_FORMAT:
            raise ValueError(
                f"the config has format {self.format}, this release of adabatch reads format {CONFIG_FORMAT}: "
                f"write the config for this release, or use the release that it was written for"
            )


class Result(NamedTuple):
    """What came out of a run.

    Args:
        label: its name in tables and pictures.
        steps: optimizer steps applied.
        examples: examples consumed over all ranks.
        seconds: wall time of the training loop.
        test_loss: mean loss on the test set; NaN without one.
        accuracy: share of test targets predicted; NaN where targets are not classes.
        journal: its journal.
    """

    label: str
    steps: int
    examples: int
    seconds: float
    test_loss: float
    accuracy: float
    journal: Path

    @property
    def mean_batch(self) -> float:
        """Examples a step, on average."""
        return self.examples / self.steps if self.steps else math.nan


def run(job: Job, world: World, *, display: Display, label: str) -> Result:
    """Trains, tests and writes journal and checkpoint into ``job.out``.

    Raises:
        ValueError: settings that do not fit together, before anything is trained or written.
    """
    device = world.device
    model = job.model.to(device)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = job.optimizer(wrapped.parameters())
    journal_path, checkpoint = job.out / "journal.jsonl", job.out / "checkpoint.pt"
    resuming = job.resume and checkpoint.exists()
    batches = AdaptiveBatch(
        wrapped,
        optimizer,
        job.criterion,
        micro_batch_size=job.micro_batch_size,
        limits=job.limits,
        max_micro_batch_size=job.max_micro_batch_size,
        control=job.control,
        lr_rule=job.lr_rule,
        reference_batch_size=job.reference_batch_size,
        tokens_per_example=job.tokens_per_example,
        monitor=job.monitor,
        record_l1=job.record_l1,
        per_layer=job.per_layer,
        journal=journal_path,
    )
    schedule = ProgressLR(
        optimizer, job.shape or constant(), batches, total=job.total, warmup=job.warmup, clock=job.clock
    )
    order = GlobalOrder(job.train_data, seed=job.seed, collate_fn=collate, num_workers=job.num_workers)
    parts: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "batches": batches, "schedule": schedule, "order": order
    }  # fmt: skip
    if resuming:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if world.rank == 0:
        Journal.cut(journal_path, batches.consumed.examples)

    saved = batches.consumed
    began = time.perf_counter()
    with display.progress(label, job.total) as shown:
        for step in batches.steps(order, until=job.total):
            for inputs, targets in step:
                step.backward(job.loss(wrapped(inputs.to(device)), targets.to(device)))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            now = batches.consumed
            shown.update(
                now.count(job.total.unit),
                loss=step.loss,
                global_batch_size=step.global_batch_size,
                lr=float(schedule.get_last_lr()[0]),
                noise_scale=batches.noise_scale,
            )
            if job.save_every is not None:
                unit = job.save_every.unit
                if now.count(unit) - saved.count(unit) >= job.save_every.count:
                    saved = now
                    _save(parts, checkpoint, world)
    seconds = time.perf_counter() - began
    _save(parts, checkpoint, world)
    test_loss, accuracy = math.nan, math.nan
    if job.test_data is not None:
        test_loss, accuracy = evaluate(model, job.loss, job.test_data, collectives_of(wrapped), device=device)
    batches.remove()
    return Result(label, batches.progress.steps, batches.consumed.examples, seconds, test_loss, accuracy, journal_path)


def _save(parts: dict[str, Any], path: Path, world: World) -> None:
    """Writes the state of all parts from the first rank, and puts the file in place only once it is whole."""
    if world.rank != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save({name: part.state_dict() for name, part in parts.items()}, unfinished)
    os.replace(unfinished, path)


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: nn.Module, data: Dataset[Any], collectives: Collectives, *, device: torch.device
) -> tuple[float, float]:
    """Mean loss and accuracy over a data set, each rank on its share; the model in eval mode.

    Accuracy is NaN where the targets are not whole numbers, one a prediction.
    """
    share: Subset[Any] = Subset(data, range(collectives.rank, len(data), collectives.size))  # type: ignore[arg-type]
    total_loss = correct = predictions = 0.0
    num_examples = 0
    classes = True
    training = model.training
    model.eval()
    for inputs, targets in DataLoader(share, batch_size=EVALUATION_BATCH, collate_fn=collate):
        inputs, targets = inputs.to(device), targets.to(device)
        outputs = model(inputs)
        total_loss += float(loss(outputs, targets)) * len(inputs)
        num_examples += len(inputs)
        classes = not targets.is_floating_point() and outputs.dim() == targets.dim() + 1
        if classes:
            correct += int((outputs.argmax(-1) == targets).sum())
            predictions += targets.numel()
    model.train(training)
    sums = collectives.sum_of(total_loss, num_examples, correct, predictions)
    accuracy = math.nan
    with suppress(ZeroDivisionError):
        accuracy = sums[2] / sums[3]
    return sums[0] / sums[1], accuracy
