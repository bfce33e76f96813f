"""``adabatch compare``: a job beside the same at constant smallest and largest batch size, over the same total."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adabatch.adaptive.options import Measure
from adabatch.batch.schedules import Constant
from adabatch.cli.display import Display
from adabatch.cli.job import Job, Result, run
from adabatch.cli.picture import picture
from adabatch.cli.run_folder import run_folder
from adabatch.cli.runs import COMPARISON
from adabatch.cli.text_files import json_values, write_atomically
from adabatch.cli.tune import SHARE, Tuned, split_validation, tuned, with_lr
from adabatch.runtime.collectives import workers_of
from adabatch.runtime.launch.world import World

HEADER = ("run", "steps", "mean batch", "examples", "test loss", "test accuracy", "wall time")


def compare(
    make: Callable[[], Job], world: World, *, display: Display, tune: bool = False, settings: Any = None
) -> list[Result] | None:
    """Runs the job as it is, then with each limit as a constant batch, all from the same weights and in the same order.

    Without ``tune`` the base LR belongs to the reference batch size of the job in all three, so the constant large
    batch gets the learning rate that the job's rule gives to its size. With ``tune`` each of the three gets the base LR
    that is best for it on a validation split of the training data, on which none of them trains. Journals and
    checkpoints of the baselines go into folders inside that of the job; ``comparison.json`` contains the table. Each
    run starts from the beginning, whatever is in its folder, because times could not be compared otherwise. Finished
    trials of the tuning are kept.

    Args:
        make: builds the job again.
        world: rank and world size of this process.
        display: shows progress and results.
        tune: whether each run gets its own learning rate.
        settings: the job in plain values, by which trials are recognized.

    Returns:
        The three results, or None if a signal ended one of the runs.

    Raises:
        ValueError: if limits are schedules or left out, so that there is no constant to compare with; with ``tune``,
            if there is too little data to split, the job has no folder, or it always diverges.
    """
    job = make()
    limits = job.limits
    if limits is None or not isinstance(limits.min, int) or not isinstance(limits.max, int):
        raise ValueError(
            "compare needs limits with a constant min and max: the job is compared with runs at these two sizes"
        )
    ranks = workers_of(None, device=world.device)
    if tune and job.out is None:
        raise ValueError(
            "--tune keeps its finished trials in the folder of the job, so that it can continue: give one with --out"
        )
    folder = run_folder(None, ranks, resume=False, display=display) if job.out is None else job.out
    reference = job.reference_batch_size or limits.min
    variants: list[tuple[str, int | None, Path]] = [
        ("adaptive", None, folder),
        (f"constant {limits.min}", limits.min, folder / "smallest"),
        (f"constant {limits.max}", limits.max, folder / "largest"),
    ]

    def variant(size: int | None) -> Job:
        made = make()
        if size is not None:
            # in the baseline's own folder, and not over the checkpoints of the adaptive run
            saving = replace(made.checkpoint, directory=None)
            # monitored, so that their steps do the work of the adaptive run's, and their noise can be drawn beside its
            made = replace(made, criterion=Constant(size), measure=Measure(monitor=True), checkpoint=saving)
        # the same in all three: the default is a run's first batch, which would give the large batch the small one's
        # rate
        return replace(made, reference_batch_size=reference)

    def settings_of(size: int | None) -> dict[str, Any] | None:
        """The settings of a variant, which its checkpoints hold, for whoever reports on it."""
        if settings is None:
            return None
        constant = {"class_path": "adabatch.Constant", "init_args": {"global_batch_size": size}}
        return {**settings, "reference_batch_size": reference, **({} if size is None else {"criterion": constant})}

    def validated(size: int | None) -> Job:
        return split_validation(variant(size))[1]

    found: dict[str, Tuned] | None = {}
    if tune:
        trials = {label: partial(validated, size) for label, size, _ in variants}
        found = _tune(trials, world, folder / "tune", settings=settings, display=display)
    if found is None:
        return None
    results = []
    # one after the other, each on all processes: side by side they would disturb each other's times
    for label, size, out in variants:
        job = variant(size)
        if tune:
            # on the data of the search, without the validation share, so that no run is trained on what it was tuned by
            job = with_lr(split_validation(job)[0], found[label].exponent)
        job = replace(job, out=out, checkpoint=replace(job.checkpoint, resume=False))
        results.append(run(job, world, display=display, label=label, config=settings_of(size)))
        if results[-1].preempted:
            display.say(f"{label} was stopped by a signal")
            return None
    display.table(f"At equal {job.total.unit.replace('_', '-')}", *_table(results, found))
    _say_tuning(found, display)
    if world.rank == 0:
        _write(results, found, folder)
        picture({result.label: result.journal for result in results}, folder / "picture.png", display=display)
    display.say(f"journal, checkpoints and table: {folder}")
    return results


def _tune(
    trials: Mapping[str, Callable[[], Job]], world: World, folder: Path, *, settings: Any, display: Display
) -> dict[str, Tuned] | None:
    """The learning rate of each run, by its label; None if a signal ended the search."""
    found: dict[str, Tuned] = {}
    for label, make in trials.items():
        out = folder / label.replace(" ", "_")
        best = tuned(make, world, out, label=label, settings=json_values(settings), display=display)
        if best is None:
            display.say(f"{label} was stopped by a signal while it was tuned; the same command continues")
            return None
        found[label] = best
    return found


def _table(results: Sequence[Result], found: Mapping[str, Tuned]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; with a column for the learning rates, if they were tuned."""
    rows = [result_row(result) for result in results]
    if not found:
        return HEADER, rows
    return (*HEADER, "LR x"), [
        (*cells, f"{2.0**best.exponent:g}") for cells, best in zip(rows, found.values(), strict=True)
    ]


def _say_tuning(found: Mapping[str, Tuned], display: Display) -> None:
    if not found:
        display.say(
            "nothing was tuned: all runs have the config's base LR, and the rule gives each its factor. A constant "
            "batch with a learning rate of its own may do better: --tune finds one for each run"
        )
        return
    trials = sum(len(best.losses) for best in found.values())
    display.say(
        f"each run has its own base LR, the config's times LR x: the best of a grid of 2 by validation loss on "
        f"{SHARE:.0%} of the training data, one seed, {trials} trials. Warm-up and shape are the config's in all"
    )
    for label, best in found.items():
        if best.at_edge:
            display.say(f"{label}: the best LR lies at the edge of what is tried, x {2.0**best.exponent:g}")


def result_row(result: Result) -> tuple[str, ...]:
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


def _write(results: list[Result], found: Mapping[str, Tuned], out: Path) -> None:
    rows: list[dict[str, Any]] = [{**result._asdict(), "journal": str(result.journal)} for result in results]
    for each in rows:
        best = found.get(each["label"])
        each["tuned"] = best is not None
        each["lr_multiplier"] = 1.0 if best is None else 2.0**best.exponent
    write_atomically(out / COMPARISON, json.dumps(rows, indent=2) + "\n")
