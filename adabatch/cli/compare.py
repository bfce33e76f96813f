"""``adabatch compare``: a job beside the same at constant smallest and largest batch size, over the same total."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adabatch.batch.schedules import Constant
from adabatch.cli.display import Display
from adabatch.cli.job import Job, Result, run
from adabatch.cli.picture import picture
from adabatch.cli.run_folder import run_folder
from adabatch.options import Measure
from adabatch.runtime.collectives import workers_of
from adabatch.runtime.launch.world import World

HEADER = ("run", "steps", "mean batch", "examples", "test loss", "test accuracy", "wall time")


def compare(make: Callable[[], Job], world: World, *, display: Display) -> list[Result] | None:
    """Runs the job as it is, then constant at either limit, each from the same weights and in the same order.

    The base LR belongs to the reference batch size of the job in all three, so the constant large batch gets the
    learning rate that the job's rule gives to its size. Journals and checkpoints of the baselines go into folders
    inside the job's; ``comparison.json`` holds the table. Each run begins anew, whatever is in its folder: times would
    not compare otherwise.

    Returns:
        The three results, or None where a signal ended one of the runs.

    Raises:
        ValueError: limits that are schedules or left out, between which there is no constant to compare with.
    """
    job = make()
    limits = job.limits
    if limits is None or not isinstance(limits.min, int) or not isinstance(limits.max, int):
        raise ValueError("compare needs limits with a constant min and max: they are what the job is compared with")
    ranks = workers_of(None, device=world.device)
    folder = run_folder(None, ranks, resume=False, display=display) if job.out is None else job.out
    reference = job.reference_batch_size or limits.min
    variants: list[tuple[str, int | None, Path]] = [
        ("adaptive", None, folder),
        (f"constant {limits.min}", limits.min, folder / "smallest"),
        (f"constant {limits.max}", limits.max, folder / "largest"),
    ]
    results = []
    for label, size, out in variants:
        saving = replace(job.checkpoint, resume=False)
        if size is not None:
            saving = replace(saving, directory=None)
            job = replace(make(), criterion=Constant(size), measure=Measure(monitor=True))
        job = replace(job, out=out, reference_batch_size=reference, checkpoint=saving)
        results.append(run(job, world, display=display, label=label))
        if results[-1].preempted:
            display.say(f"{label} was stopped by a signal")
            return None
    display.table(f"At equal {job.total.unit.replace('_', '-')}", HEADER, [row(result) for result in results])
    out = variants[0][2]
    if world.rank == 0:
        _write(results, out)
        picture({result.label: result.journal for result in results}, out / "picture.png", display=display)
    display.say(f"journal, checkpoints and table: {out}")
    return results


def row(result: Result) -> tuple[str, ...]:
    """A result as a row under ``HEADER``."""
    accuracy = "-" if math.isnan(result.accuracy) else f"{result.accuracy:.2%}"
    return (
        result.label,
        f"{result.steps:,}",
        f"{result.mean_batch:,.0f}",
        f"{result.examples:,}",
        f"{result.test_loss:.4f}",
        accuracy,
        f"{result.seconds:.1f} s",
    )


def _write(results: list[Result], out: Path) -> None:
    rows = [{**result._asdict(), "journal": str(result.journal)} for result in results]
    (out / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
