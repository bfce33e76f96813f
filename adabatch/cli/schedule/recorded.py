"""The record of a run: the applied steps of its journal as arrays, and the schedule of its checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from adabatch import lr
from adabatch.batch.plan import Duration, Progress
from adabatch.checkpointing.newest import newest_checkpoint
from adabatch.checkpointing.run_state import STATE
from adabatch.cli.runs import CHECKPOINTS, journal_in
from adabatch.journal.parts import lines_of
from adabatch.lr.extend import SavedSchedule
from adabatch.lr.recorded import Recorded, RecordedUnit
from adabatch.lr.shapes import Shape
from adabatch.runtime.collectives import Collectives


def read_run(run: Path) -> Recorded:
    """The applied steps of a run, given its folder or its journal.

    Raises:
        ValueError: if there is no journal, and for the reasons of ``lr.read_recorded``.
    """
    path = journal_in(run)
    return lr.read_recorded(lines_of(path), str(path))


def read_saved(run: Path) -> SavedSchedule | None:
    """The schedule of a run, given its folder; None where that holds no checkpoint, or is a journal.

    Raises:
        ValueError: for the same reasons as ``read_checkpoint``.
        CheckpointError: if all checkpoints are damaged.
    """
    # a single rank, whatever the run had
    found = newest_checkpoint(run / CHECKPOINTS, Collectives())
    return None if found is None else read_checkpoint(found.path)


def read_checkpoint(path: Path) -> SavedSchedule:
    """The schedule in a checkpoint.

    Raises:
        ValueError: if the checkpoint cannot be read, or holds no schedule of ``ProgressLR``.
    """
    if not (path / STATE).is_file():
        raise ValueError(
            f"there is no checkpoint {path}: give a folder such as runs/first/{CHECKPOINTS}/000012-step-3400"
        )
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        schedule, batches = state["schedule"], state["batches"]
        total = Duration(*schedule["total"])
        shape = Shape.from_dict(schedule["shape"])
        base_lrs = tuple(map(float, schedule["base_lrs"]))
        progress, reference = Progress(**batches["progress"]), int(batches["reference_batch_size"])
        gain = schedule.get("clock") == "gain"
        anchor = schedule["anchor"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ValueError(
            f"{path} is not a checkpoint of `adabatch train` ({reason}); a journal may be given alone"
        ) from None
    # the first releases wrote the anchor as a number
    start, changed = (anchor[0], anchor[1] > 0) if isinstance(anchor, list) else (anchor, False)
    # tokens go in proportion to examples, which a journal counts
    clock: RecordedUnit = "steps" if total.unit == "steps" else "examples"
    if gain or total.unit == "gain_steps":
        clock = "gain_steps"
    return SavedSchedule(str(path), shape, base_lrs, total, start, changed, clock, progress, reference)


def recorded_reference(recorded: Recorded, saved: SavedSchedule | None) -> float:
    """The reference batch size of a run; without a checkpoint the size of its first step."""
    return float(recorded.batch[0]) if saved is None else float(saved.reference)
