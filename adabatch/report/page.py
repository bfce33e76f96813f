"""The report of runs as one self-contained HTML page: its numbers as JSON, and the script that draws them.

The page loads nothing. Its own script of about 20 kB draws SVG. (The bundle of plotly alone has 4.5 MB.) So a page is
not much larger than its numbers, prints as vectors, and follows the colour scheme of the reader's system.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from adabatch.batch.control import Reason
from adabatch.report.charts import AXES, charts_of, heat_chart
from adabatch.report.evaluations import EvaluationMetric, Floats, extremes
from adabatch.report.heat import layer_bins
from adabatch.report.reason_colors import ASSETS, REASON_VARIABLES
from adabatch.report.steps import RunSteps
from adabatch.report.summary import (
    BatchChange,
    Flag,
    RunSettings,
    Summary,
    betas_of,
    changes,
    differing_settings,
    flags,
    largest_allowed,
    noise_band,
    report_settings,
    rule_of,
    smooth_loss,
    summarize,
    time_before,
    time_constant,
    total_seconds,
)
from adabatch.report.what_if import (
    ASSUMPTIONS,
    Choice,
    Outcome,
    constant_at_equal_examples,
    recorded,
    segments,
    what_if,
)

MOST_POINTS = 12_000
"""Points of all runs on one page, at most 1,200 per run. The page then stays below 3 MB."""

MOST_EVALUATIONS = 300
MOST_SEGMENTS = 400
MOST_CHANGES = 300
MOST_CELLS = 16_000
DEFAULT_ETAS = (0.3, 0.5, 0.7, 0.8, 0.9)

REASON_KINDS: Mapping[str, str] = MappingProxyType(
    {
        Reason.GROW: "moved up",
        Reason.SHRINK: "moved down",
        Reason.SCHEDULED: "scheduled",
        Reason.AGREES: "in place",
        Reason.HYSTERESIS: "in place",
        Reason.NOT_SIGNIFICANT: "uncertain",
        Reason.NO_SIGNAL: "uncertain",
        Reason.NO_NOISE: "uncertain",
        Reason.MONOTONE: "waits",
        Reason.HOLD: "waits",
        Reason.WARM_UP: "waits",
        Reason.PACE: "waits",
        Reason.AT_LIMIT: "at a limit",
        Reason.NOT_PROBED: "not asked",
        Reason.NOT_FINITE: "failed",
        Reason.WEIGHS_NOTHING: "failed",
        Reason.NOT_COMMITTED: "failed",
    }
)
"""The reasons of the journal, grouped into a few kinds that can be distinguished by colour."""


class Reported(NamedTuple):
    """A run and its analysis.

    Args:
        run: its steps.
        config: its config with dotted names; empty if none was found.
        settings: the settings that a report reads from the config.
        summary: its totals.
        flags: flags for the reader.
        changes: the changes of the batch size.
        outcomes: what other choices would have cost, the run itself first; empty if the run has no noise scale.
        results: the run's own numbers from a file beside the journal, such as the loss on a test set.
    """

    run: RunSteps
    config: Mapping[str, Any]
    settings: RunSettings
    summary: Summary
    flags: tuple[Flag, ...]
    changes: tuple[BatchChange, ...]
    outcomes: tuple[Outcome, ...]
    results: Mapping[str, float]


def report_on(
    run: RunSteps,
    config: Mapping[str, Any] = MappingProxyType({}),
    *,
    choices: Sequence[Choice] = (),
    price: float = 0.0,
    results: Mapping[str, float] = MappingProxyType({}),
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Reported:
    """Analyses a run.

    Args:
        run: its steps.
        config: its config with dotted names (``summary.flat``).
        choices: choices to compare it with, in addition to those of every report.
        price: the price of a step, in examples; 0 for none.
        results: numbers from a file beside the journal.
        overrides: fields of ``RunSettings`` that replace those of the config.
    """
    settings = report_settings(config)._replace(**overrides)
    return Reported(
        run,
        config,
        settings,
        summarize(run),
        tuple(flags(run, settings)),
        tuple(changes(run)),
        tuple(_outcomes(run, settings, choices, price)),
        results,
    )


def _outcomes(run: RunSteps, settings: RunSettings, choices: Sequence[Choice], price: float) -> list[Outcome]:
    try:
        # raises if the run has no noise scale, before anything is made of it
        found = [recorded(run, price=price)]
        equal = constant_at_equal_examples(run)
    except ValueError:  # there is no noise scale, and a flag tells the reader
        # whoever asks for a choice has to learn that it cannot be answered
        if choices:
            raise
        return []
    usual = [Choice("eta", eta) for eta in DEFAULT_ETAS]
    sizes = sorted({float(run.batch.min()), float(run.batch.max())})
    usual += [Choice("constant", size) for size in sizes]
    usual += [Choice("step_price", price)] if price else []
    limits = settings.limits[0], settings.limits[1]
    found += [what_if(run, choice, limits=limits, price=price) for choice in [*usual, *choices]]
    if equal is not None:
        # without the limits, which could move it to a batch that takes another number of examples
        same = what_if(run, equal, price=price)
        found.append(same._replace(name=f"{same.name}, chosen for as many examples"))
    return found


def numbers(reports: Sequence[Reported]) -> dict[str, Any]:
    """The contents of the reports, ready for JSON; numbers that are not finite become None."""
    said: dict[str, Any] = json_ready(
        {
            "runs": [
                {
                    "name": each.run.name,
                    "summary": each.summary._asdict(),
                    "results": dict(each.results),
                    "evaluations": {metric.name: extremes(metric)._asdict() for metric in each.run.metrics},
                    "rule": rule_of(each.run, each.settings),
                    "flags": [flag._asdict() for flag in each.flags],
                    "reasons": reason_shares(each.run),
                    "changes": [change._asdict() for change in each.changes],
                    "what_if": [outcome._asdict() for outcome in each.outcomes],
                }
                for each in reports
            ],
            "differences": differing_settings([each.config for each in reports])
            if all(e.config for e in reports)
            else {},
            "assumptions": list(ASSUMPTIONS),
        }
    )
    return said


def reason_shares(run: RunSteps) -> dict[str, float]:
    """The share of the steps whose plan for the next step had each reason, the most frequent first."""
    words, counts = np.unique(run.reason, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(words[index]): float(counts[index] / run.num_steps) for index in order}


def page(reports: Sequence[Reported], *, title: str = "") -> str:
    """The whole page.

    Raises:
        ValueError: if there are no reports.
    """
    if not reports:
        raise ValueError("a report needs at least one run, got none")
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    name = title or ", ".join(each.run.name for each in reports)
    # Inside a script element only "</script" and "<!--" have a meaning, and neither is left after this.
    data = json.dumps(drawn(reports), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    # The empty icon keeps browsers from asking for one.
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(name)} - adabatch report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<noscript>This page draws its charts by a script: allow it, or read `adabatch report --json`.</noscript>\n"
        f'<main id="page"></main>\n<script type="application/json" id="numbers">{data}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def drawn(reports: Sequence[Reported]) -> dict[str, Any]:
    """The numbers of the reports with what their charts show, ready for JSON; a bound that is not there is -1."""
    # however many runs there are, each keeps enough points to be a curve
    most = max(60, min(1200, MOST_POINTS // len(reports)))
    every = numbers(reports)
    for run, each in zip(every["runs"], reports, strict=True):
        kept = max(1, MOST_CHANGES // len(reports))
        run["changes_left_out"] = max(0, len(each.changes) - kept)
        run["changes"] = run["changes"][:kept]
        run |= json_ready(_series(each, most, MOST_CELLS // len(reports)), digits=6)
        run["heat_chart"] = heat_chart(run, many=len(reports) > 1)._asdict() if run["heat"] else None
    charts = {name: chart._asdict() for name, chart in charts_of(every["runs"]).items()}
    reasons = {"reason_kinds": dict(REASON_KINDS), "reason_colors": dict(REASON_VARIABLES)}
    return {**every, "axes": dict(AXES), "charts": charts, **reasons}


def _series(report: Reported, most: int, cells: int) -> dict[str, Any]:
    """The data of a run's charts, at no more than ``most`` of its steps."""
    run, settings = report.run, report.settings
    at = thinned(run, most)
    scale = run.noise_scale
    band = noise_band(run)
    tau, betas, seconds = time_constant(run, settings), betas_of(run, settings), time_before(run)
    smallest, largest = settings.limits[0], largest_allowed(run, settings)
    end = run.end
    series: dict[str, Any] = {
        "x": {
            "examples": run.examples[at],
            "steps": run.step[at],
            "tokens": None if not settings.tokens_per_example else run.examples[at] * settings.tokens_per_example,
            "time": None if seconds is None else seconds[at],
        },
        "end": {
            "examples": end,
            # a step is drawn from its beginning to its end, the last one too
            "steps": float(run.step[-1]) + 1,
            "tokens": end * (settings.tokens_per_example or 0.0),
            "time": report.summary.seconds,
        },
        "limits": [smallest, largest],
        "batch": run.batch[at],
        "wanted": run.wanted[at],
        "low": run.low[at],
        "high": _open_ended(run.high)[at],
        "reason": [run.reason[index] for index in at],
        "noise_scale": scale[at],
        "noise_low": None if band is None else band[0][at],
        "noise_high": None if band is None else _open_ended(band[1])[at],
        "measured": run.measured[at],
        "freedom": _any(run.freedom[at]),
        "base_lr": run.base_lr[at],
        "shape": run.shape[at],
        "factor": run.factor[at],
        "applied_lr": [run.applied_lr[at, group] for group in range(run.applied_lr.shape[1])],
        "tau": None if tau is None else _any(tau[at]),
        "betas": None if betas is None else [betas[at, index] for index in range(betas.shape[1])],
        "loss": run.loss[at],
        "smooth_loss": smooth_loss(run)[at],
        "efficiency": run.efficiency[at],
        "metrics": [_metric(metric, run, settings.tokens_per_example, seconds) for metric in run.metrics],
        "heat": None,
        "segments": None,
    }
    if run.layers:
        series["heat"] = heat = layer_bins(run, cells)
        edges = heat["edges"][:-1]
        heat["x"] = {
            "examples": [*run.examples[edges], end],
            "steps": [*run.step[edges], series["end"]["steps"]],
            "tokens": [settings.tokens_per_example * x for x in (*run.examples[edges], end)]
            if settings.tokens_per_example
            else None,
            "time": None if seconds is None else [*seconds[edges], report.summary.seconds],
        }
    if report.outcomes:
        pieces = segments(run, at_most=MOST_SEGMENTS)
        series["segments"] = {name: values for name, values in pieces._asdict().items()}
    return series


def _metric(
    metric: EvaluationMetric, run: RunSteps, tokens_per_example: float | None, seconds: Floats | None
) -> dict[str, Any]:
    """The evaluations of a metric, at most ``MOST_EVALUATIONS`` of them."""
    at = np.unique(np.linspace(0, len(metric.values) - 1, MOST_EVALUATIONS).astype(int))
    examples = metric.examples[at]
    return {
        "name": metric.name,
        "x": {
            "examples": examples,
            "steps": metric.step[at],
            "tokens": None if not tokens_per_example else examples * tokens_per_example,
            # Steps were timed, evaluations not: this is the time of training before each.
            "time": None
            if seconds is None
            else np.interp(examples, np.append(run.examples, run.end), np.append(seconds, total_seconds(run))),
        },
        "y": metric.values[at],
    }


def _any(values: Floats) -> Floats | None:
    """The values; None if none is finite."""
    return values if np.isfinite(values).any() else None


def _open_ended(high: Floats) -> Floats:
    # JSON has no infinity, and no bound is negative
    return np.where(np.isinf(high), -1.0, high)


def thinned(run: RunSteps, most: int) -> list[int]:
    """The steps to show: evenly spaced over the examples, and those at which the batch changed as long as there is
    room."""
    if run.num_steps <= most:
        return list(range(run.num_steps))
    # the last third is for the changes, which would fall between evenly spaced steps
    even = np.searchsorted(run.examples, np.linspace(run.examples[0], run.examples[-1], 2 * most // 3))
    jumps = np.flatnonzero(np.diff(run.batch) != 0)
    # both sides of a change, or a step of the batch would be drawn as a slope
    corners = np.unique(np.concatenate([jumps, jumps + 1])) if len(jumps) else jumps
    room = most - len(even)
    if len(corners) > room:
        corners = corners[np.linspace(0, len(corners) - 1, room).astype(int)]
    kept = np.unique(np.concatenate([[0], even, corners, [run.num_steps - 1]]))
    return [int(index) for index in kept]


def json_ready(value: Any, *, digits: int | None = None) -> Any:
    """Arrays and numbers ready for JSON, rounded to ``digits``; numbers that are not finite become None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        # shorter in the page; up to here every whole number is exact in float64
        if value.is_integer() and abs(value) < 1e15:
            return int(value)
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, digits=digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item, digits=digits) for item in value]
    return value
