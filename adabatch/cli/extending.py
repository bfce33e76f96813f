"""``adabatch schedule extend``: two ways to make a finished run longer without tuning its learning rate anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import yaml

from adabatch.batch.plan import Duration
from adabatch.cli.comparing import BOUND_SOURCE, Judged, bound_over_time, judge
from adabatch.cli.display import Display
from adabatch.cli.horizon import Horizon
from adabatch.cli.panels import draw_panels
from adabatch.cli.recorded import CHECKPOINT, JOURNAL, Recorded, Saved, read_recorded, read_saved
from adabatch.cli.shape_text import class_path
from adabatch.lr.bound import longer_cooldown, two_stage
from adabatch.lr.shapes import Decay, Shape, tabulated, wsd

SOURCE = "Schaipp et al. 2025, arXiv:2501.18965"

RAMP_SHARE = 0.02
"""Length of the ramp to the second stage over that of the finished run: 1,000 of 50,000 steps in their logged runs."""

TABLE_LENGTH = 401


class Finished(NamedTuple):
    """A run to extend, as if its steps were equal parts of its total.

    Args:
        num_steps: warm-up included.
        warmup_steps: before its shape began.
        cooldown, decay: of its shape.
        total: length of the run.
    """

    num_steps: int
    warmup_steps: int
    cooldown: float
    decay: Decay
    total: Duration

    def in_unit(self, steps: float) -> float:
        """So many steps in the unit of the total."""
        return steps / self.num_steps * self.total.count


class Option(NamedTuple):
    """A way to go on, as a schedule of the whole longer run: up to ``resume`` it is that of the finished one.

    Args:
        shape: over the progress from the warm-up to the new total.
        lr_factor: what the learning rate of the stable part has been multiplied by at its end.
        cooldown: share of that progress that cools down.
        resume: steps after which it leaves the schedule of the finished run.
    """

    shape: Shape
    lr_factor: float
    cooldown: float
    resume: int


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
    return Finished(num_steps, warmup_steps, cast(float, settings["cooldown"]), cast(Decay, settings["decay"]), total)


def options_for(run: Finished, new_steps: int) -> dict[str, Option]:
    """The run's own shape over ``new_steps``, and the two that keep its base learning rate the best one.

    Raises:
        ValueError: as ``lr.two_stage`` does.
    """
    given: dict[str, Any] = {"cooldown": run.cooldown, "decay": run.decay, "warmup_steps": run.warmup_steps}
    sudden = two_stage(run.num_steps, new_steps, **given)
    room = sudden.num_steps - math.ceil(run.cooldown * (new_steps - run.warmup_steps))
    stages = two_stage(
        run.num_steps, new_steps, ramp_steps=max(0, min(round(RAMP_SHARE * run.num_steps), room)), **given
    )
    longer = longer_cooldown(run.num_steps, new_steps, **given)

    # The second stage as a table over the whole run: a resumed run and one from the start read the same schedule.
    step = run.warmup_steps + np.linspace(0, 1, TABLE_LENGTH) * (new_steps - run.warmup_steps)
    after = step - stages.resume_step
    falling = 1 + (stages.lr_factor - 1) * np.clip(after / max(stages.ramp_steps, 1e-9), 0, 1)
    rest = stages.shape((after - stages.ramp_steps) / (stages.num_steps - stages.ramp_steps))
    table = [float(f"{value:.6g}") for value in (falling * rest).tolist()]
    return {
        "unchanged": Option(wsd(cooldown=run.cooldown, decay=run.decay), 1.0, run.cooldown, stages.resume_step),
        "two stages": Option(tabulated(values=table), stages.lr_factor, run.cooldown, stages.resume_step),
        "longer cooldown": Option(
            wsd(cooldown=longer.cooldown, decay=run.decay), 1.0, longer.cooldown, longer.resume_step
        ),
    }


def extend(*, run: Path, factor: float | None, new_total: int | None, out: Path | None, display: Display) -> None:
    """Both extensions of a run as a table, configs and a picture.

    Args:
        run: its folder.
        factor: the new length over the old; 2 where neither is given.
        new_total: the new length, in the unit of the run's total.
        out: folder for the configs ``extend_*.yaml`` and ``extend.png``; by default that of the run.
        display: where the table goes.

    Raises:
        ValueError: whatever does not fit.
    """
    saved = read_saved(run)
    if saved is None:
        raise ValueError(f"{run} holds no {CHECKPOINT}: give the folder of a run of `adabatch train`")
    finished = finished_run(saved)
    total = _new_total(finished.total, factor, new_total)
    new_steps = round(finished.num_steps * total.count / finished.total.count)
    options = options_for(finished, new_steps)
    horizon = Horizon.of_equal_steps(new_steps)
    judged = {
        label: judge(option.shape, horizon, warmup_steps=finished.warmup_steps) for label, option in options.items()
    }
    own = judge(saved.shape, Horizon.of_equal_steps(finished.num_steps), warmup_steps=finished.warmup_steps)
    tuned = own.terms.best_base_lr
    journal = saved.path.with_name(JOURNAL)
    recorded = read_recorded(journal) if journal.is_file() else None

    reference = judged["unchanged"].terms.at(tuned)
    rows = [
        (
            label,
            f"{option.lr_factor:.4f}",
            f"{option.cooldown:.4f}",
            f"{finished.in_unit(option.resume):,.0f}",
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

    folder = out or saved.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for label in ("two stages", "longer cooldown"):
        path = folder / f"extend_{label.replace(' ', '_')}.yaml"
        option = options[label]
        path.write_text(_config(saved, finished, total, label, option, path), encoding="utf-8")
        display.say(f"config: {path}")
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


def _steps_text(finished: Finished, saved: Saved, recorded: Recorded | None, resume: int) -> str:
    """After how many of its steps the run was there; a guess where only the examples are known and no journal is."""
    if finished.total.unit == "steps":
        return f"{resume:,}"
    if recorded is None:
        return f"about {resume:,}"
    done = saved.progress.count(finished.total.unit)
    share = finished.in_unit(resume) / done
    edges = recorded.edges(saved.clock, saved.reference)
    return f"{int(np.searchsorted(edges, share + 1e-12, side='right')) - 1:,}" if share <= 1 else "not there yet"


def _where_it_stands(saved: Saved, finished: Finished, options: dict[str, Option]) -> str:
    done = saved.progress.count(finished.total.unit)
    stands = f"{CHECKPOINT} stands at {done:,} {finished.total.unit} ({saved.progress.steps:,} steps)"
    late = [label for label in ("two stages", "longer cooldown") if done > finished.in_unit(options[label].resume)]
    if not late:
        return f"{stands}: either option can go on from it"
    which = "either option" if len(late) == 2 else late[0]
    return (
        f"{stands}, where the learning rate had left its stable part: {which} needs a checkpoint from before that point"
    )


def _config(saved: Saved, finished: Finished, total: Duration, label: str, option: Option, path: Path) -> str:
    """The longer run as a config, with how it was made at its head."""
    resume = finished.in_unit(option.resume)
    lines = [
        f"{saved.path.parent} extended from {finished.total} to {total}, {label} ({SOURCE}).",
        f"  adabatch train --config CONFIG --config {path}",
        f"The base learning rate stays. Up to {resume:,.0f} {total.unit} the schedule is that of the finished run,",
        "so a checkpoint from before that point can go on under it; docs/schedules.md says how.",
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
    runs = {"finished run": own} | judged
    styles = {"finished run": "reference"}
    rates, bounds, marks = [], [], []
    for label, one in runs.items():
        x = finished.in_unit(1) * np.arange(one.horizon.num_steps + 1)
        values = np.append(one.factors, 0.0)
        rates.append(draw.Line(label, x, base_lr * values, styles.get(label, "line")))
        times, bound = bound_over_time(one, tuned)
        bounds.append(draw.Line(label, finished.in_unit(1) * times, bound / own.terms.best, styles.get(label, "line")))
    for label in ("two stages", "longer cooldown"):
        option = options[label]
        marks.append(draw.Mark(label, finished.in_unit(option.resume), base_lr))
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
