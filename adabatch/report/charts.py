"""The charts of a report with their titles and axes, for the page and for its pictures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

AXES: Mapping[str, str] = MappingProxyType(
    {"examples": "examples", "steps": "steps", "tokens": "tokens", "time": "seconds"}
)
"""What charts go over, and its unit."""

Run = Mapping[str, Any]
"""The numbers of a run as ``page.drawn`` has them."""


class Chart(NamedTuple):
    """The title of a chart, its note and its axis.

    Args:
        title: what it shows.
        note: how to read it.
        log: base of its axis; 0 for a linear one.
        trim: share of the values at either end that may lie outside of it.
        headroom: factor from the largest value to the end of a log axis; None for the margin below the smallest.
        start: where a linear axis begins, unless there are lower values; None for the lowest value.
        percent: whether its values are shares.
        empty: what it says if there is nothing to draw.
        metric: which metric of the evaluations it shows, beside the training loss or alone.
    """

    title: str
    note: str
    log: int = 0
    trim: float = 0.0
    headroom: float | None = None
    start: float | None = None
    percent: bool = False
    empty: str = "not measured"
    metric: str | None = None


def charts_of(runs: Sequence[Run]) -> dict[str, Chart]:
    """The charts of a report by name, in their order; those for which no run has numbers are not among them."""
    metrics = list(dict.fromkeys(metric["name"] for run in runs for metric in run["metrics"]))
    charts = {
        "batch": Chart(
            "Global batch size (examples)",
            "The strip below tells why the next batch was what it was.",
            log=2,
            headroom=3.0,
        ),
        "loss": _loss(runs, evaluated="loss" in metrics),
    }
    for number, metric in enumerate(name for name in metrics if name != "loss"):
        # numbered, because the name of a chart is that of its file, and a metric may be called anything
        charts[f"metric{number}"] = Chart(f"Evaluation: {metric}", "Measured between steps.", metric=metric)
    noise, unmeasured = "Averaged noise over averaged signal; gaps: no signal was seen.", "the noise was not measured"
    worth = "1 / (1 + batch / noise scale), against one in a small batch."
    parts = "Parts compared with each other, pooled over the probes in the average."
    bases = ", ".join(_short(_last(run["base_lr"])) for run in runs)
    rules = ", ".join(run["rule"] or "unknown" for run in runs)
    # a log axis of zeros only would have no range
    rated = any(rate and rate > 0 for run in runs for group in run["applied_lr"] for rate in group)
    charts |= {
        "noise": Chart("Noise scale (examples)", noise, log=10, trim=0.01, empty=unmeasured),
        "efficiency": Chart("Efficiency: worth of an example", worth, start=0.0, percent=True, empty=unmeasured),
        "lr": Chart(
            "Learning rate applied",
            "Base LR x shape x batch factor; one line per parameter group.",
            log=10 if rated else 0,
            trim=0.01,
        ),
        "shape": Chart("Shape, with warm-up", f"Times the base LR: {bases}.", start=0.0),
        "factor": Chart("Batch factor", f"What the rule makes of the batch: {rules}.", start=0.0),
        "tau": Chart(
            "tau: memory of weight decay, as a share of the run",
            "batch / (learning rate x decay x examples).",
            log=10,
            trim=0.02,
        ),
        "betas": Chart("Betas", "As they were in each step; they may follow the batch down to their floors."),
        "freedom": Chart("Degrees of freedom behind the band", parts, log=10),
    }
    # The other charts stay even without numbers, and say what was not measured.
    missing = [name for name in ("tau", "betas", "freedom") if not any(run[name] for run in runs)]
    return {name: chart for name, chart in charts.items() if name not in missing}


def _loss(runs: Sequence[Run], *, evaluated: bool) -> Chart:
    losses = [value for run in runs for value in run["loss"]]
    losses += [value for run in runs for each in run["metrics"] if each["name"] == "loss" for value in each["y"]]
    return Chart(
        "Loss: training and evaluations" if evaluated else "Training loss",
        "Faint: of single steps. Line: the mean over 2 % of the run."
        + (" Dashed, with dots: evaluations." if evaluated else ""),
        # some losses may be negative, such as log-likelihoods of densities
        log=0 if any(value is not None and value <= 0 for value in losses) else 10,
        trim=0.005,
        metric="loss" if evaluated else None,
    )


def heat_chart(run: Run, *, many: bool) -> Chart:
    """The heat map of a run's layers."""
    left_out = run["heat"]["left_out"]
    rest = f" {left_out} layers with less noise are left out." if left_out else ""
    return Chart(
        f"Noise scale by layer: {run['name']}" if many else "Noise scale by layer",
        f"Mean noise over mean signal in each stretch; %: share of the noise. Grey: no signal was seen.{rest}",
    )


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
