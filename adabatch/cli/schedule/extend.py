"""``adabatch schedule extend``: two ways to make a finished run longer without tuning its learning rate anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import yaml

from adabatch.batch.plan import Duration
from adabatch.checkpointing.files import begin, check, finish, place_of
from adabatch.checkpointing.run_state import STATE, write_state
from adabatch.cli.display import Display
from adabatch.cli.picture import draw_panels
from adabatch.cli.schedule.compare import BOUND_SOURCE, Judged, bound_over_time, judge
from adabatch.cli.schedule.horizon import Horizon
from adabatch.cli.schedule.recorded import (
    CHECKPOINTS,
    JOURNAL,
    Recorded,
    Saved,
    read_checkpoint,
    read_recorded,
    read_saved,
)
from adabatch.cli.schedule.shape_text import class_path
from adabatch.lr.bound import longer_cooldown, two_stage
from adabatch.lr.shapes import Decay, Shape, tabulated, wsd

SOURCE = "Schaipp et al. 2025, arXiv:2501.18965"

RAMP_SHARE = 0.02
"""Length of the ramp to the second stage over that of the finished run: 1,000 of 50,000 steps in their logged runs."""

ENTRIES_PER_RUN = 200
"""Entries of a table of the longer run for each length of the finished one: the ramp is four of them."""

EXTENSIONS = ("two stages", "longer cooldown")


class Finished(NamedTuple):
    """A run to extend.

    Args:
        num_steps: its steps, warm-up included, as if all were equal parts of its total; so are those of the warm-up.
        warmup_steps: such steps before its shape began.
        warmup: the same in the unit of the total.
        cooldown, decay: of its shape.
        total: length of the run.
    """

    num_steps: int
    warmup_steps: int
    warmup: float
    cooldown: float
    decay: Decay
    total: Duration

    def steps_of(self, total: Duration) -> int:
        """The same equal steps in a run of another total."""
        return round(self.num_steps * total.count / self.total.count)

    def stable_until(self, total: float, cooldown: float) -> float:
        """Where a cooldown begins in a run of that total, in its unit."""
        return total - cooldown * (total - self.warmup)


class Option(NamedTuple):
    """A way to go on, as a schedule of the whole longer run: up to ``resume`` it is that of the finished one.

    Args:
        shape: over the progress from the warm-up to the new total.
        lr_factor: what the learning rate of the stable part has been multiplied by at its end.
        cooldown: share of that progress that cools down.
        resume: where it leaves the schedule of the finished run, in the unit of the total.
    """

    shape: Shape
    lr_factor: float
    cooldown: float
    resume: float


def finished_run(saved: Saved) -> Finished:
    """The run of a checkpoint.

    Raises:
        ValueError: a shape that cannot be extended, a clock whose future nobody knows, or a run that has not begun.
    """
    shape, total = saved.shape, saved.total
    settings = shape.settings
    if shape.name != "wsd" or not 0 < cast(float, settings["cooldown"]) < 1 or settings["floor"] != 0:
        raise ValueError(
            f"{saved.path}: only a wsd shape with a cooldown between 0 and 1 to zero can be extended, and the run has "
            f"{shape}. Start a longer run with the base learning rate that `adabatch schedule transfer` gives for it"
        )
    if saved.clock == "gain_steps" and total.unit != "gain_steps":
        raise ValueError(f"{saved.path}: the run has the gain clock, whose pace over a longer run nobody knows yet")
    if saved.warmup is None:
        raise ValueError(f"{saved.path}: the run was still warming up, and its shape had not begun: train on first")
    if saved.changed:
        raise ValueError(
            f"{saved.path}: the run changed its total on the way, and its shape is not what it was tuned for"
        )
    done = saved.progress.count(total.unit)
    if done == 0:
        raise ValueError(f"{saved.path}: the run has not begun")
    num_steps = total.count if total.unit == "steps" else max(1, round(saved.progress.steps * total.count / done))
    warmup_steps = round(num_steps * saved.warmup / total.count)
    cooldown, decay = cast(float, settings["cooldown"]), cast(Decay, settings["decay"])
    return Finished(num_steps, warmup_steps, saved.warmup, cooldown, decay, total)


def options_for(run: Finished, total: Duration) -> dict[str, Option]:
    """The run's own shape over a new total, and the two that keep its base learning rate the best one.

    Raises:
        ValueError: as ``lr.two_stage`` does.
    """
    new_steps = run.steps_of(total)
    given: dict[str, Any] = {"cooldown": run.cooldown, "decay": run.decay, "warmup_steps": run.warmup_steps}
    longer = longer_cooldown(run.num_steps, new_steps, **given)
    at_once = two_stage(run.num_steps, new_steps, **given)
    room = math.floor(at_once.num_steps - run.cooldown * (new_steps - run.warmup_steps))
    ramp = max(0, min(round(RAMP_SHARE * run.num_steps), room))
    stages = two_stage(run.num_steps, new_steps, ramp_steps=ramp, **given)

    # The second stage as a table over the whole run: a resumed run and one from the start read the same schedule. It
    # begins at an entry of the table, so that before it the factor is 1 and nothing else.
    until = run.stable_until(run.total.count, run.cooldown)
    progress = np.linspace(0, 1, 1 + math.ceil(ENTRIES_PER_RUN * min(new_steps / run.num_steps, 20)))
    begin = (until - run.warmup) / (total.count - run.warmup)
    ramp_share = ramp / (new_steps - run.warmup_steps)
    after = progress - progress[np.searchsorted(progress, begin)]
    falling = 1 + (stages.lr_factor - 1) * np.clip(after / max(ramp_share, 1e-9), 0, 1)
    rest = stages.shape((progress - begin - ramp_share) / (1 - begin - ramp_share))
    table = [float(f"{value:.6g}") for value in (falling * rest).tolist()]

    longer_until = run.stable_until(total.count, longer.cooldown)
    return {
        "unchanged": Option(wsd(cooldown=run.cooldown, decay=run.decay), 1.0, run.cooldown, until),
        "two stages": Option(tabulated(values=table), stages.lr_factor, run.cooldown, until),
        "longer cooldown": Option(
            wsd(cooldown=longer.cooldown, decay=run.decay), 1.0, longer.cooldown, min(until, longer_until)
        ),
    }


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
        factor: the new length over the old; 2 where neither is given.
        new_total: the new length, in the unit of the run's total.
        checkpoint: of the run, from before an extension leaves its schedule: it is copied into a folder for each
            extension that it can begin, under the new schedule.
        out: folder for the configs ``extend_*.yaml`` and ``extend.png``; by default that of the run.
        display: where the table goes.

    Raises:
        ValueError: whatever does not fit.
    """
    saved = read_saved(run)
    if saved is None:
        raise ValueError(f"{run} has no {CHECKPOINTS}: give the folder of a run of `adabatch train`")
    finished = finished_run(saved)
    total = _new_total(finished.total, factor, new_total)
    options = options_for(finished, total)
    horizon = Horizon.of_equal_steps(finished.steps_of(total))
    judged = {
        label: judge(option.shape, horizon, warmup_steps=finished.warmup_steps) for label, option in options.items()
    }
    own = judge(saved.shape, Horizon.of_equal_steps(finished.num_steps), warmup_steps=finished.warmup_steps)
    tuned = own.terms.best_base_lr
    journal = run / JOURNAL
    recorded = read_recorded(journal) if journal.is_file() else None

    reference = judged["unchanged"].terms.at(tuned)
    rows = [
        (
            label,
            f"{option.lr_factor:.4f}",
            f"{option.cooldown:.4f}",
            f"{_whole(option.resume):,}",
            _steps_text(finished, saved, recorded, option.resume),
            f"{judged[label].terms.best_base_lr / tuned:.4f}",
            f"{judged[label].terms.at(tuned) / reference:.4f}",
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
    if longest.cooldown >= 1 and judged["longer cooldown"].terms.best_base_lr < 0.995 * tuned:
        display.say("no cooldown is long enough to keep this base LR the best: lower it, or take the two stages")
    display.say(_where_it_stands(saved, finished, options))

    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    for label in EXTENSIONS:
        path = folder / f"{_file_name(label)}.yaml"
        path.write_text(_config(run, finished, total, label, options[label], path), encoding="utf-8")
        display.say(f"config: {path}")
    if checkpoint is not None:
        _write_checkpoints(checkpoint, saved, finished, total, options, folder, display=display)
    draw_panels(
        lambda draw: _panels(draw, saved, finished, own, options, judged), folder / "extend.png", display=display
    )


def _new_total(total: Duration, factor: float | None, new_total: int | None) -> Duration:
    if factor is not None and new_total is not None:
        raise ValueError("give --factor or --new_total, not both")
    if new_total is None:
        times = 2.0 if factor is None else factor
        if not 1 < times < math.inf:
            raise ValueError(f"factor must be above 1, got {times}")
        new_total = round(total.count * times)
    if new_total <= total.count:
        raise ValueError(f"the extended run must be longer than {total}, got {new_total:,} {total.unit}")
    return Duration(new_total, total.unit)


def _steps_text(finished: Finished, saved: Saved, recorded: Recorded | None, resume: float) -> str:
    """How many of its steps the run had done by then; a guess where only the examples are known and no journal is."""
    unit = finished.total.unit
    if unit == "steps":
        return f"{_whole(resume):,}"
    if recorded is None:
        return f"about {_whole(resume / finished.total.count * finished.num_steps):,}"
    share = resume / saved.progress.count(unit)
    if share > 1:
        return "not there yet"
    edges = recorded.edges(saved.clock, saved.reference)
    return f"{int(np.searchsorted(edges, (share + 1e-9) * edges[-1], side='right')) - 1:,}"


def _whole(count: float) -> int:
    """Whole units in ``count``, forgiving a rounding error below a whole number."""
    return math.floor(count + 1e-6)


def _where_it_stands(saved: Saved, finished: Finished, options: dict[str, Option]) -> str:
    done = saved.progress.count(finished.total.unit)
    stands = f"{saved.path.name} stands at {done:,} {finished.total.unit} ({saved.progress.steps:,} steps)"
    late = [label for label in EXTENSIONS if done > _whole(options[label].resume)]
    if not late:
        return f"{stands}, before both options leave its schedule: --checkpoint {saved.path} makes it theirs"
    which = " and ".join(late)
    return f"{stands}, too late for {which}: give one from before the point in the table with --checkpoint"


def _write_checkpoints(
    checkpoint: Path,
    saved: Saved,
    finished: Finished,
    total: Duration,
    options: dict[str, Option],
    folder: Path,
    *,
    display: Display,
) -> None:
    """A checkpoint under the new schedule for each option that it can begin."""
    there = read_checkpoint(checkpoint)
    if (there.shape, there.total, there.base_lrs) != (saved.shape, saved.total, saved.base_lrs):
        raise ValueError(
            f"{checkpoint} is of another run than {saved.path}: it has {there.shape} over {there.total}, "
            f"base LR {', '.join(map(str, there.base_lrs))}"
        )
    done = there.progress.count(total.unit)
    early = [label for label in EXTENSIONS if done <= _whole(options[label].resume)]
    if not early:
        last = max(_whole(options[label].resume) for label in EXTENSIONS)
        raise ValueError(
            f"{checkpoint} stands at {done:,} {total.unit}, and an extension needs one from {last:,} {total.unit} or "
            f"before, while the learning rate was full"
        )
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    for label in early:
        config, place = folder / f"{_file_name(label)}.yaml", folder / _file_name(label)
        schedule = {"shape": options[label].shape.to_dict(), "total": [total.count, str(total.unit)]}
        changed = {**state, "schedule": {**state["schedule"], **schedule}}
        path = _write_again(checkpoint, changed, place / CHECKPOINTS, steps=there.progress.steps)
        display.say(f"checkpoint: {path}; go on with adabatch train --config CONFIG --config {config} --out {place}")


def _write_again(checkpoint: Path, state: dict[str, Any], folder: Path, *, steps: int) -> Path:
    """A checkpoint with another state in a folder of its own."""
    contents = check(checkpoint).contents
    place = place_of(folder, begin(folder, steps), steps)
    return finish(place, contents, write_state(state, place), keep=3)


def _file_name(label: str) -> str:
    return f"extend_{label.replace(' ', '_')}"


def _config(run: Path, finished: Finished, total: Duration, label: str, option: Option, path: Path) -> str:
    """The longer run as a config, with how it was made at its head."""
    until = f"{_whole(option.resume):,} {total.unit}"
    lines = [
        f"{run} extended from {finished.total} to {total}, {label} ({SOURCE}).",
        f"  adabatch train --config CONFIG --config {path}",
        f"The base learning rate stays. Up to {until} this is the finished run's schedule:",
        "a checkpoint from before that point can go on under it (adabatch schedule extend --checkpoint).",
    ]
    if option.lr_factor != 1:
        lines.append(f"Then the learning rate falls to {option.lr_factor:.4f} of itself, and cools down at the end.")
    config = {"total": {"count": total.count, "unit": str(total.unit)}, "shape": class_path(option.shape)}
    text = yaml.safe_dump(config, default_flow_style=None, sort_keys=False, width=110)
    return "".join(f"# {line}\n" for line in lines) + text


def _panels(
    draw: Any, saved: Saved, finished: Finished, own: Judged, options: dict[str, Option], judged: dict[str, Judged]
) -> list[Any]:
    """Learning rates with the points where they part, and the bounds on the way."""
    base_lr, tuned = saved.base_lrs[0], own.terms.best_base_lr
    per_step = finished.total.count / finished.num_steps
    runs = {"finished run": own} | judged
    styles = {"finished run": "reference"}
    rates, bounds, marks = [], [], []
    for label, one in runs.items():
        x = per_step * np.arange(one.horizon.num_steps + 1)
        values = np.append(one.factors, 0.0)
        rates.append(draw.Line(label, x, base_lr * values, styles.get(label, "line")))
        times, bound = bound_over_time(one, tuned)
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
