"""The work of ``adabatch mup``: shows a plan, checks updates and sweeps settings over widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from adabatch.cli.display import Display
from adabatch.cli.mup.imports import imported, method_of
from adabatch.cli.optimizers import observe
from adabatch.cli.picture import draw_picture
from adabatch.optim import mup
from adabatch.optim.mup.methods import CHECKED_METHODS, FIRST_LRS

MOST_LINES = 6
"""Parameters in a picture: those with the steepest slopes."""

HIGHEST = 300
"""Multiple of the best loss above which a sweep's picture is cut off."""

SHOWN = MappingProxyType({"mup": "width plan", "standard": "standard parameterization (control)"})


@dataclass(frozen=True)
class Subject:
    """The object of a check or a sweep, in the user's terms.

    Args:
        model: import path of width -> model.
        data: import path of seed -> batches of inputs and targets.
        loss: import path of (outputs, targets) -> scalar.
        method: a name in ``METHODS``, or an import path.
        widths: to compare.
        base: width at which the settings were tuned.
        steps: of training.
        seeds: number of seeds.
        device: where to train.
    """

    model: str
    data: str
    loss: str
    method: str
    widths: list[int]
    base: int
    steps: int
    seeds: int
    device: str

    def shared(self) -> dict[str, Any]:
        """Arguments that the check and the sweep have in common."""
        return {
            "loss": imported(self.loss),
            "widths": sorted(self.widths),
            "base": self.base,
            "steps": self.steps,
            "seeds": range(self.seeds),
            "device": self.device,
            "observe": observe,
        }


def show_plan(*, model: str, width: int, base: int, out: Path | None, display: Display) -> int:
    """Prints the plan of a model, and writes it as JSON if ``out`` is given."""
    make = imported(model)
    # shapes are enough for a plan, and a wide model may not fit into this machine
    with torch.device("meta"):
        plan = mup.plan(make(width), make(base))
    display.say(f"{model}({width}), settings of {model}({base}):\n{plan}")
    if out is not None:
        out.write_text(plan.to_json())
        display.say(f"plan: {out}")
    return 0


def check_coordinates(
    *, subject: Subject, lr: float | None, damping: float | None, tolerance: float, out: Path, display: Display
) -> int:
    """The coordinate check under the plan, which must pass, and under the standard parameterization, which should fail.

    Returns:
        0 if the plan passes, else 1.
    """
    make, batches = imported(subject.model), imported(subject.data)
    method = method_of(subject.method, CHECKED_METHODS)
    rate = FIRST_LRS.get(subject.method, 0.05) if lr is None else lr
    results = {
        parameterization: mup.coordinate_check(
            make,
            lambda model, plan: method(model, plan, rate, damping),
            # the check looks at one batch only
            lambda seed: next(iter(batches(seed))),
            parameterization=parameterization,
            tolerance=tolerance,
            **subject.shared(),
        )
        for parameterization in ("mup", "standard")
    }
    display.say(
        f"{subject.method}: lr {rate:g}, base width {subject.base}, steps {subject.steps}, seeds {subject.seeds}"
    )
    for name, result in results.items():
        display.table(f"Own updates (RMS), {SHOWN[name]}", *result.table())
    ours, control = results["mup"], results["standard"]
    display.say(f"width plan: {'passed' if ours.passed else 'FAILED'}: own slopes within {tolerance:g}")
    # a check that cannot fail shows nothing, so it is run where it ought to
    if control.passed:
        display.say("the control passed as well, so this check could not have failed: try larger widths or more steps")
    panels = {SHOWN[name]: result for name, result in results.items() if result.steepest(MOST_LINES)}
    if panels:
        draw_picture(lambda draw: [_check_panel(draw, *panel) for panel in panels.items()], out, display=display)
    return 0 if ours.passed else 1


def sweep(
    *,
    subject: Subject,
    lrs: list[float],
    damping: float | None,
    dampings: list[float],
    control: bool,
    out: Path,
    display: Display,
) -> int:
    """Loss over learning rates at every width, then over dampings at the narrowest width's best learning rate."""
    make, batches, method = imported(subject.model), imported(subject.data), method_of(subject.method)

    def run(parameterization: Any, lrs: Sequence[float], dampings: Sequence[float | None]) -> mup.Sweep:
        return mup.transfer_sweep(
            make,
            method,
            batches,
            lrs=lrs,
            dampings=dampings,
            parameterization=parameterization,
            done=lambda run: display.say(f"width {run.width}, {_setting(run)}: loss {_loss(run.loss)}"),
            **subject.shared(),
        )

    found: dict[str, Swept] = {}
    for name in ("mup", "standard") if control else ("mup",):
        over_lrs = run(name, lrs, [damping])
        found[f"learning rate, {SHOWN[name]}"] = Swept(over_lrs, "lr")
        if dampings:
            # of the narrowest width, where tuning is cheap: this is what a transfer would do
            best = over_lrs.best(over_lrs.widths[0]).lr
            found[f"damping at lr {best:g}, {SHOWN[name]}"] = Swept(run(name, [best], dampings), "damping")
    for title, swept in found.items():
        display.table(f"Loss by {title}", *_sweep_table(swept))
    display.say("*: best of its width. Loss: mean of the last tenth of the steps; inf: diverged.")
    drawable = {title: swept for title, swept in found.items() if swept.result.survived}
    if drawable:
        draw_picture(lambda draw: [_sweep_panel(draw, *panel) for panel in drawable.items()], out, display=display)
    return 0


class Swept(NamedTuple):
    """A sweep over one setting.

    Args:
        result: its runs.
        setting: which one.
    """

    result: mup.Sweep
    setting: Literal["lr", "damping"]

    def of(self, run: mup.Run) -> float:
        """The setting of a run."""
        return float(getattr(run, self.setting))


def _check_panel(draw: Any, title: str, result: mup.CoordinateCheck) -> Any:
    steepest = result.steepest(MOST_LINES)
    lines = [draw.Line(each.name, result.widths, each.own) for each in result.coordinates if each in steepest]
    note = f"steepest {len(steepest)} of {len(result.coordinates)}" if len(result.coordinates) > MOST_LINES else ""
    return draw.Panel(f"own update (RMS), {title}", lines, x_title="width", note=note, log="xy", own_x=True)


def _sweep_table(swept: Swept) -> tuple[list[str], list[list[str]]]:
    result, rows = swept.result, []
    for value in sorted({swept.of(run) for run in result.runs}):
        cells = []
        for width in result.widths:
            # exactly one, or the sweep has run something twice
            (run,) = [run for run in result.at(width) if swept.of(run) == value]
            cells.append(_loss(run.loss) + ("*" if run == result.best(width) else " "))
        rows.append([f"{value:.4g}", *cells])
    return [swept.setting, *(f"width {width}" for width in result.widths)], rows


def _sweep_panel(draw: Any, title: str, swept: Swept) -> Any:
    lines, marks = [], []
    for width in swept.result.widths:
        runs, best = swept.result.at(width), swept.result.best(width)
        # a gap in the line, where infinity would set the axis
        losses = [run.loss if math.isfinite(run.loss) else math.nan for run in runs]
        lines.append(draw.Line(f"width {width}", [swept.of(run) for run in runs], losses))
        marks.append(draw.Mark(f"width {width}", swept.of(best), best.loss))
    top = HIGHEST * max(mark.y for mark in marks)
    axis = {"lr": "learning rate", "damping": "damping"}[swept.setting]
    return draw.Panel(f"training loss by {title}", lines, marks, x_title=axis, log="xy", top=top, own_x=True)


def _setting(run: mup.Run) -> str:
    return f"lr {run.lr:g}" + ("" if run.damping is None else f", damping {run.damping:g}")


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "inf"
