"""``adabatch schedule extend``: two ways to make a finished run longer without tuning its learning rate again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adabatch.arguments import require
from adabatch.batch.plan import Duration
from adabatch.checkpointing.files import begin_checkpoint, check_files, finish, place_of
from adabatch.checkpointing.run_state import STATE, write_state
from adabatch.cli.display import Display
from adabatch.cli.picture import draw_picture
from adabatch.cli.runs import CHECKPOINTS, JOURNAL
from adabatch.cli.schedule.compare import BOUND_SOURCE
from adabatch.cli.schedule.recorded import read_checkpoint, read_run, read_saved
from adabatch.cli.schedule.shape_text import class_path, config_text
from adabatch.lr.bound import whole_units
from adabatch.lr.extend import (
    EXTENSIONS,
    ExtendedSchedule,
    FinishedRun,
    SavedSchedule,
    extended_schedules,
    finished_run,
    steps_done,
)
from adabatch.lr.horizon import Horizon, ScheduleBound, schedule_bound
from adabatch.lr.recorded import Recorded

SOURCE = "Schaipp et al. 2025, arXiv:2501.18965"


def extend(
    *,
    run: Path,
    factor: float | None,
    new_total: int | None,
    checkpoint: Path | None,
    out: Path | None,
    display: Display,
) -> None:
    """Both extensions of a run as a table, configs and a picture, and as checkpoints to resume from.

    Args:
        run: its folder.
        factor: the new length over the old; 2 if neither is given.
        new_total: the new length, in the unit of the run's total.
        checkpoint: of the run, from before an extension leaves its schedule: it is copied into a folder for each
            extension that it can begin, under the new schedule.
        out: folder for the configs ``extend_*.yaml`` and ``extend.png``; by default that of the run.
        display: where the table goes.

    Raises:
        ValueError: if arguments and run do not match.
    """
    saved = read_saved(run)
    if saved is None:
        raise ValueError(f"{run} has no {CHECKPOINTS}: give the folder of a run of `adabatch train`")
    finished = finished_run(saved)
    total = _new_total(finished.total, factor, new_total)
    options = extended_schedules(finished, total)
    horizon = Horizon.of_equal_steps(finished.steps_of(total))
    # over equal steps, whatever the batch did: the longer run has no journal yet, and both must be compared alike
    bounded = {
        label: schedule_bound(option.shape, horizon, warmup_steps=finished.warmup_steps)
        for label, option in options.items()
    }
    own = schedule_bound(saved.shape, Horizon.of_equal_steps(finished.num_steps), warmup_steps=finished.warmup_steps)
    tuned = own.terms.best_base_lr
    journal = run / JOURNAL
    recorded = read_run(journal) if journal.is_file() else None

    reference = bounded["unchanged"].terms.at(tuned)
    rows = [
        (
            label,
            f"{option.lr_factor:.4f}",
            f"{option.cooldown:.4f}",
            f"{whole_units(option.resume):,}",
            _steps_text(finished, saved, recorded, option.resume),
            f"{bounded[label].terms.best_base_lr / tuned:.4f}",
            f"{bounded[label].terms.at(tuned) / reference:.4f}",
        )
        for label, option in options.items()
    ]
    unit = finished.total.unit.replace("_", "-")
    header = ("option", "LR factor", "cooldown", f"leaves at ({unit})", "in steps", "best / present LR", "bound x")
    display.table(f"{run}: {finished.total}, {saved.shape}, extended to {total}", header, rows)
    display.say(
        f"LR factor or cooldown for which the base LR ({', '.join(f'{lr:.4g}' for lr in saved.base_lrs)}) is the best "
        f"for the longer run, if it was for this one: {SOURCE}"
    )
    display.say(f"best base LR sqrt(T1/T2), bound T1/lr + lr T2 of the last iterate at the present one: {BOUND_SOURCE}")
    longest = options["longer cooldown"]
    if longest.cooldown >= 1 and bounded["longer cooldown"].terms.best_base_lr < 0.995 * tuned:
        display.say("no cooldown is long enough to keep this base LR the best: lower it, or take the two stages")
    display.say(_where_it_stands(saved, finished, options))

    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    for label in EXTENSIONS:
        path = folder / f"{_file_name(label)}.yaml"
        path.write_text(_config(run, finished, total, label, options[label], path), encoding="utf-8")
        display.say(f"config: {path}")
    if checkpoint is not None:
        _write_checkpoints(checkpoint, saved, total, options, folder, display=display)
    draw_picture(
        lambda draw: _panels(draw, saved, finished, own, options, bounded), folder / "extend.png", display=display
    )


def _new_total(total: Duration, factor: float | None, new_total: int | None) -> Duration:
    if factor is not None and new_total is not None:
        raise ValueError("give --factor or --new_total, not both")
    if new_total is None:
        times = 2.0 if factor is None else factor
        require(1 < times < math.inf, "factor must be above 1", times)
        new_total = round(total.count * times)
    if new_total <= total.count:
        raise ValueError(f"the extended run must be longer than {total}, got {new_total:,} {total.unit}")
    return Duration(new_total, total.unit)


def _steps_text(finished: FinishedRun, saved: SavedSchedule, recorded: Recorded | None, resume: float) -> str:
    """How many of its steps the run had done by then; an estimate if there are only examples and no journal."""
    unit = finished.total.unit
    if unit == "steps":
        return f"{whole_units(resume):,}"
    if recorded is None:
        return f"about {whole_units(resume / finished.total.count * finished.num_steps):,}"
    steps = steps_done(saved, recorded, resume)
    return "not there yet" if steps is None else f"{steps:,}"


def _where_it_stands(saved: SavedSchedule, finished: FinishedRun, options: dict[str, ExtendedSchedule]) -> str:
    done = saved.progress.count(finished.total.unit)
    stands = f"{Path(saved.source).name} is at {done:,} {finished.total.unit} ({saved.progress.steps:,} steps)"
    late = [label for label in EXTENSIONS if done > whole_units(options[label].resume)]
    if not late:
        return (
            f"{stands}, before both options depart from its schedule: --checkpoint {saved.source} copies it for "
            f"each of them"
        )
    which = " and ".join(late)
    return f"{stands}, too late for {which}: give one from before the point in the table with --checkpoint"


def _write_checkpoints(
    checkpoint: Path,
    saved: SavedSchedule,
    total: Duration,
    options: dict[str, ExtendedSchedule],
    folder: Path,
    *,
    display: Display,
) -> None:
    """Writes a checkpoint with the new schedule for each option that can resume from it."""
    there = read_checkpoint(checkpoint)
    # or the new schedule would not be the run's own up to the point where it leaves that
    if (there.shape, there.total, there.base_lrs) != (saved.shape, saved.total, saved.base_lrs):
        raise ValueError(
            f"{checkpoint} is of another run than {saved.source}: it has {there.shape} over {there.total}, "
            f"base LR {', '.join(map(str, there.base_lrs))}"
        )
    done = there.progress.count(total.unit)
    early = [label for label in EXTENSIONS if done <= whole_units(options[label].resume)]
    if not early:
        last = max(whole_units(options[label].resume) for label in EXTENSIONS)
        raise ValueError(
            f"{checkpoint} is at {done:,} {total.unit}, and an extension needs one from {last:,} {total.unit} or "
            f"before, while the learning rate was full"
        )
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    for label in early:
        config, place = folder / f"{_file_name(label)}.yaml", folder / _file_name(label)
        # all else stays: weights, optimizer, place in the data, batch
        schedule = {"shape": options[label].shape.to_dict(), "total": [total.count, str(total.unit)]}
        changed = {**state, "schedule": {**state["schedule"], **schedule}}
        path = _write_again(checkpoint, changed, place / CHECKPOINTS, steps=there.progress.steps)
        display.say(f"checkpoint: {path}; continue with adabatch train --config CONFIG --config {config} --out {place}")


def _write_again(checkpoint: Path, state: dict[str, Any], folder: Path, *, steps: int) -> Path:
    """Writes a copy of a checkpoint with another state into a new folder."""
    # checked first: a copy gets new checksums, which would hide damage
    contents = check_files(checkpoint).contents
    place = place_of(folder, begin_checkpoint(folder, steps), steps)
    return finish(place, contents, write_state(state, place), keep=3)


def _file_name(label: str) -> str:
    return f"extend_{label.replace(' ', '_')}"


def _config(run: Path, finished: FinishedRun, total: Duration, label: str, option: ExtendedSchedule, path: Path) -> str:
    """The longer run as a config, with how it was made at its head."""
    until = f"{whole_units(option.resume):,} {total.unit}"
    lines = [
        f"{run} extended from {finished.total} to {total}, {label} ({SOURCE}).",
        f"  adabatch train --config CONFIG --config {path}",
        f"The base learning rate stays. Up to {until} this is the finished run's schedule:",
        "a checkpoint from before that point can continue under it (adabatch schedule extend --checkpoint).",
    ]
    if option.lr_factor != 1:
        lines.append(f"Then the learning rate falls to {option.lr_factor:.4f} of itself, and cools down at the end.")
    config = {"total": {"count": total.count, "unit": str(total.unit)}, "shape": class_path(option.shape)}
    return config_text(lines, config)


def _panels(
    draw: Any,
    saved: SavedSchedule,
    finished: FinishedRun,
    own: ScheduleBound,
    options: dict[str, ExtendedSchedule],
    bounded: dict[str, ScheduleBound],
) -> list[Any]:
    """Learning rates with the points from which they differ, and the bounds over time."""
    base_lr, tuned = saved.base_lrs[0], own.terms.best_base_lr
    per_step = finished.total.count / finished.num_steps
    runs = {"finished run": own} | bounded
    styles = {"finished run": "reference"}
    rates, bounds, marks = [], [], []
    for label, one in runs.items():
        x = per_step * np.arange(one.horizon.num_steps + 1)
        values = np.append(one.factors, 0.0)
        rates.append(draw.Line(label, x, base_lr * values, styles.get(label, "line")))
        times, bound = one.over_time(tuned)
        bounds.append(draw.Line(label, per_step * times, bound / own.terms.best, styles.get(label, "line")))
    for label in EXTENSIONS:
        marks.append(draw.Mark(label, options[label].resume, base_lr))
    unit = finished.total.unit.replace("_", "-")
    return [
        draw.Panel(
            "learning rate (base LR x shape)", rates, marks, note="dots: where it leaves the finished run's schedule"
        ),
        draw.Panel(
            "bound of the last iterate (1: the finished run)",
            bounds,
            note="if the run ended here",
            log="y",
            top=4.0,
            x_title=unit,
        ),
    ]
