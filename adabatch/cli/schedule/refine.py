"""``adabatch schedule refine``: the schedule that a finished run's gradient norms ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adabatch.cli.display import Display
from adabatch.cli.picture import draw_picture
from adabatch.cli.runs import journal_in
from adabatch.cli.schedule.compare import BOUND_SOURCE
from adabatch.cli.schedule.recorded import read_run, read_saved, recorded_reference
from adabatch.cli.schedule.shape_text import class_path, config_text
from adabatch.lr.bound import BoundTerms
from adabatch.lr.recorded import Recorded, RecordedUnit
from adabatch.lr.refine import POWERS, OptimizerKind
from adabatch.lr.refine_run import READS, RefinedRun, refine_run, refined_bounds
from adabatch.lr.shapes import FloatArray

LATE = 0.6
"""A peak after this share of the run gives a warning: the published refined schedules peak before it."""

NextRule = Literal["none", "linear", "sqrt", "gain", "sqrt_gain"]

SOURCE = "Defazio et al. 2023, arXiv:2310.07831"


def write_refined(
    *,
    run: Path,
    kind: OptimizerKind,
    lr_rule: NextRule | None,
    smoothing: float,
    length: int,
    clock: RecordedUnit | None,
    out: Path | None,
    display: Display,
) -> None:
    """Writes the refined schedule of a run as a config for the next, with a picture and a summary.

    Args:
        run: folder of the run, or its journal.
        kind: of optimizer.
        lr_rule: how the learning rate of the next run follows the batch; by default as that of this one did.
        smoothing: window of the median filter as a share of the norms.
        length: entries of the table at most.
        clock: what the next run's progress counts; by default what this one's did.
        out: folder for ``refined.yaml`` and ``refined.png``; by default that of the run.
        display: where the summary goes.

    Raises:
        ValueError: if arguments and run do not match.
    """
    recorded, saved = read_run(run), read_saved(run)
    reference = recorded_reference(recorded, saved)
    counted = clock or (saved.clock if saved else "examples")
    edges = recorded.edges(counted, reference)
    factor = recorded.factor if lr_rule is None else recorded.factors(lr_rule, reference)
    made = refine_run(recorded, kind, factor=factor, edges=edges, smoothing=smoothing, length=length)
    if saved is not None and not saved.progress.reached(saved.total):
        done = saved.progress.count(saved.total.unit) / saved.total.count
        display.say(
            f"the run is at {done:.0%} of its {saved.total}: the shape treats these norms as those of a whole run"
        )
    rule = _about_the_batch(recorded, lr_rule, factor, reference)
    say_summary(recorded, kind, made, rule=rule, display=display)
    bounded = refined_bounds(recorded, made, edges)
    if bounded:
        _say_bounds(recorded, bounded, display=display)

    folder = out or journal_in(run).parent
    folder.mkdir(parents=True, exist_ok=True)
    snippet = folder / "refined.yaml"
    base_lrs = _scaled(recorded, bounded)
    head = (
        f"The schedule that the gradient norms of {recorded.source} ask for ({kind}; {SOURCE}).",
        f"  adabatch train --config CONFIG --config {snippet}",
        "Its own warm-up is inside. Tune the base learning rate again"
        + (f": the bound suggests {base_lrs} where {_listed(recorded.base_lrs)} was the best." if base_lrs else "."),
        f"Progress counts {counted.replace('_', '-')}. {rule}",
    )
    # no warm-up: the table has its own, and that of the other config would come on top
    config: dict[str, Any] = {"shape": class_path(made.shape), "warmup": None}
    if lr_rule is not None:
        config |= {"lr_rule": lr_rule, "reference_batch_size": round(reference)}
    # "total" is the default, and counts whatever unit the next run's total has
    if counted == "gain_steps":
        config["clock"] = "gain"
    snippet.write_text(config_text(head, config), encoding="utf-8")
    display.say(f"config: {snippet}")
    draw_picture(lambda draw: _panels(draw, recorded, made, edges, counted), folder / "refined.png", display=display)


def say_summary(recorded: Recorded, kind: OptimizerKind, made: RefinedRun, *, rule: str, display: Display) -> None:
    """Shows a summary of the shape."""
    which, power = READS[kind], POWERS[kind]
    peak = int(np.argmax(made.values))
    header = ("kind", f"{which} norms", "median of", "peak at", "90 % of it from", "mean", "at half-way")
    row = (
        kind,
        f"{made.norms.size:,} of {recorded.num_steps:,} steps",
        f"{made.window:,}",
        f"{made.progress[peak]:.1%}",
        f"{made.progress[np.argmax(made.values >= 0.9)]:.1%}",
        f"{np.diff(made.progress) @ (made.values[1:] + made.values[:-1]) / 2:.3f}",
        f"{made.shape(0.5):.3f}",
    )
    display.table(f"Refined schedule of {recorded.source}", header, [row])
    display.say(
        f"shape_t = w_t / f_t * sum of w_p over p > t, with w = G^-{power}, G the {which} norm, f the batch factor: "
        f"{SOURCE}, {'conversion theorem and Algorithm 1' if power == 2 else 'Algorithm 2'}"
    )
    display.say(rule)
    if made.progress[peak] > LATE:
        display.say(
            f"the peak comes at {made.progress[peak]:.0%} of the run: gradients that vanish towards the end, as of a "
            f"model that fits its data, pull the whole schedule there; smooth more, or keep another shape"
        )


def _about_the_batch(recorded: Recorded, lr_rule: NextRule | None, factor: FloatArray, reference: float) -> str:
    """Which batch rule the shape is made for, in a sentence."""
    low, high = recorded.batch.min(), recorded.batch.max()
    sizes = f"The batch size went from {low:,.0f} to {high:,.0f}"
    if lr_rule is not None:
        return f"{sizes}; the shape is for lr_rule {lr_rule} with the reference batch size {reference:,.0f}."
    if low == high:
        return f"The batch size was {low:,.0f} throughout; the shape is for one that does not change either."
    if np.ptp(factor) == 0:
        return f"{sizes} with no batch factor: its growth is inside the shape, so the next run's lr_rule must be none."
    return (
        f"{sizes}, with batch factors from {factor.min():.3g} to {factor.max():.3g}, which are taken out of the shape: "
        f"the next run needs the same lr_rule."
    )


def _say_bounds(recorded: Recorded, bounded: Mapping[str, BoundTerms], *, display: Display) -> None:
    own = bounded["the run's own"]
    rows = [
        (
            label,
            f"{terms.best_base_lr / own.best_base_lr:.3f}",
            _scaled(recorded, bounded, label),
            f"{terms.best / own.best:.3f}",
        )
        for label, terms in bounded.items()
    ]
    header = ("shape", "best base LR x", "base LR, if the run's was best", "bound x")
    display.table("What the bound expects at these l2 norms", header, rows)
    display.say(f"best base LR sqrt(T1/T2), bound there 2 sqrt(T1 T2), of the last iterate: {BOUND_SOURCE}")


def _scaled(recorded: Recorded, bounded: Mapping[str, BoundTerms], label: str = "refined") -> str:
    """The run's base learning rates times what the bound says; empty where it says nothing."""
    if not bounded or not recorded.base_lrs:
        return ""
    factor = bounded[label].best_base_lr / bounded["the run's own"].best_base_lr
    return _listed([rate * factor for rate in recorded.base_lrs])


def _panels(draw: Any, recorded: Recorded, made: RefinedRun, edges: FloatArray, clock: RecordedUnit) -> list[Any]:
    """Norms, the shape, and the learning rate that both it and the run's own schedule come to."""
    x = edges[:-1]
    grew = np.ptp(made.factor) > 0
    # initial=0, because a journal without a shape has NaN only
    own = recorded.shape / np.nanmax(recorded.shape) if np.nanmax(recorded.shape, initial=0) > 0 else recorded.shape
    shapes = [draw.Line("refined", x, made.values)]
    if np.isfinite(own).all():
        shapes.insert(0, draw.Line("the run's own schedule", x, own, "reference"))
    panels = [
        draw.Panel(
            "gradient norm" + (", at the reference batch size" if grew else ""),
            [
                draw.Line("refined", x[made.steps], made.norms, "dots"),
                draw.Line("refined", x[made.steps], made.smoothed),
            ],
            note=f"dots: measured    line: median of {made.window:,}",
            log="y",
        ),
        draw.Panel("shape", shapes),
    ]
    if grew:
        rates = [line._replace(y=line.y * made.factor / (line.y * made.factor).max()) for line in shapes]
        panels.append(draw.Panel("shape x batch factor", rates, note="each with maximum 1"))
    panels[-1] = panels[-1]._replace(x_title=clock.replace("_", "-"))
    return panels


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in rates)
