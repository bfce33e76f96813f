"""``adabatch compare --tune``: a separate learning rate for each run of a comparison, by validation loss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.utils.data import Subset

from adabatch.cli.display import Display
from adabatch.cli.job import Job, run
from adabatch.cli.optimizers import MakeOptimizer, optimizer_class
from adabatch.cli.runs import CHECKPOINTS
from adabatch.cli.text_files import write_atomically
from adabatch.guards.left_out import UpdatesLeftOut
from adabatch.runtime.launch.world import World

FURTHEST = 10
"""Largest number of doublings or halvings of the config's learning rate in the search."""
SHARE = 0.1
"""Share of the training data that is kept for validation."""


class Tuned(NamedTuple):
    """The result of a search.

    Args:
        exponent: the best learning rate is that of the config times 2 to this power.
        losses: validation loss by exponent; infinite if a run diverged.
        at_edge: whether the best one was the last that the search may try.
    """

    exponent: int
    losses: Mapping[int, float]
    at_edge: bool


def search(loss: Callable[[int], float], *, furthest: int = FURTHEST) -> Tuned:
    """The exponent with the lowest loss on a grid that grows until the best lies between two others.

    Args:
        loss: exponent -> validation loss; not finite if the run diverged.
        furthest: exponents are from -furthest to furthest.

    Raises:
        ValueError: if all runs diverged.
    """
    losses: dict[int, float] = {}

    def tried(exponent: int) -> None:
        value = loss(exponent)
        losses[exponent] = value if math.isfinite(value) else math.inf

    # the fewest among which one can lie between two others
    for exponent in (0, -1, 1):
        tried(exponent)
    while True:
        # of equal losses, the smaller learning rate is the safer one
        best = min(losses, key=lambda exponent: (losses[exponent], exponent))
        if best not in (min(losses), max(losses)) and math.isfinite(losses[best]):
            return Tuned(best, dict(sorted(losses.items())), False)
        # if all runs diverged, only a smaller learning rate can help
        upwards = best == max(losses) and math.isfinite(losses[best])
        following = best + 1 if upwards else min(losses) - 1
        if abs(following) > furthest:
            if math.isinf(losses[best]):
                raise ValueError(f"all learning rates diverged, down to 2^{min(losses)} times that of the config")
            return Tuned(best, dict(sorted(losses.items())), True)
        tried(following)


def split_validation(job: Job, *, share: float = SHARE) -> tuple[Job, Job]:
    """The job without a share of its training data, once with its own test data and once tested on that share.

    The share is drawn with the seed of the job.

    Raises:
        ValueError: if there are too few examples.
    """
    length = len(job.train_data)  # type: ignore[arg-type]
    kept = round(share * length)
    if not 0 < kept < length:
        raise ValueError(f"a validation split of {share:.0%} needs more examples than {length}")
    # drawn, since many data sets are sorted by class; by a generator of its own, not that of the training
    order = torch.randperm(length, generator=torch.Generator().manual_seed(job.seed)).tolist()
    train: Subset[Any] = Subset(job.train_data, sorted(order[kept:]))
    validation: Subset[Any] = Subset(job.train_data, sorted(order[:kept]))
    return replace(job, train_data=train), replace(job, train_data=train, test_data=validation)


def with_lr(job: Job, exponent: int) -> Job:
    """The job at another base learning rate: that of its config times 2 to the power of ``exponent``."""
    # through the optimizer and not its config: a user's own function of the parameters has no lr to change
    return replace(job, optimizer=partial(_scaled, optimizer_class(job.optimizer), job.optimizer, 2.0**exponent))


def _scaled(kind: type[Optimizer], make: MakeOptimizer, factor: float, *arguments: Any, **named: Any) -> Any:
    """An optimizer with its learning rates times a factor; its class is the first argument, which identifies it."""
    optimizer: Any = make(*arguments, **named)
    # each group, not the argument lr: groups of a config may have rates of their own
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    return optimizer


def tuned(
    make: Callable[[], Job], world: World, folder: Path, *, label: str, settings: Any, display: Display
) -> Tuned | None:
    """Searches the learning rate of a job; finished trials in the folder are not run again.

    Args:
        make: builds the job, to be tested on the validation split.
        world: rank and world size of this process.
        folder: for the trials of this job.
        label: the job's name in the display.
        settings: plain values; trials with other settings do not count.
        display: shows progress.

    Returns:
        None if a signal ended a trial.

    Raises:
        ValueError: if all learning rates diverged.
    """
    path = folder / "trials.json"
    known = _read(path, settings)

    # `search` knows nothing of signals, and is left by an exception
    class _Stopped(Exception):
        pass

    def loss(exponent: int) -> float:
        if exponent in known:
            return known[exponent]
        place = folder / f"lr_{exponent:+d}"
        job = with_lr(make(), exponent)
        # without trackers, which a search would fill with its trials
        job = replace(job, out=place, checkpoint=replace(job.checkpoint, directory=None, resume=False), trackers=())
        try:
            result = run(job, world, display=display, label=f"{label}, LR x {2.0**exponent:g}")
            if result.preempted:
                raise _Stopped
            value = result.test_loss if math.isfinite(result.test_loss) else math.inf
        except UpdatesLeftOut:
            value = math.inf
        known[exponent] = value
        display.say(f"{label}, LR x {2.0**exponent:g}: validation loss {value:.4f}")
        if world.rank == 0:
            # a trial that has ended is never resumed, and its checkpoints are its largest files
            shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
            _write(path, settings, known)
        return value

    try:
        return search(loss)
    except _Stopped:
        return None


def _read(path: Path, settings: Any) -> dict[int, float]:
    try:
        read = json.loads(path.read_bytes())
        if read["settings"] != settings:
            return {}
        return {int(exponent): math.inf if loss is None else loss for exponent, loss in read["losses"].items()}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _write(path: Path, settings: Any, losses: Mapping[int, float]) -> None:
    plain = {str(exponent): loss if math.isfinite(loss) else None for exponent, loss in losses.items()}
    # atomically: an interrupted write must keep the earlier trials
    write_atomically(path, json.dumps({"settings": settings, "losses": plain}, indent=2) + "\n")
