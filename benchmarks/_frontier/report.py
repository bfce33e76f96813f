"""The page of the study: what each method paid for its loss, against constants that were tuned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from _harness import Table

from _frontier.frontiers import Cost, Point, cost_at, loss_at, pareto, time_to
from _frontier.runs import Outcome
from _frontier.search import Setting

matplotlib.use("agg")
from matplotlib import pyplot as plt

NETWORKS = (1, 8, 64)  # the fixed cost of a step, in examples of one device
DEVICES = (8, 64, 512)


class Row(NamedTuple):
    """Outcomes of one method in a cell, one a seed.

    Args:
        family: "constant", "rule", "package", "table" or "ours".
        outcomes: none if it could not run.
        tuned: whether it got its own learning rate and warm-up.
        price: examples that a step costs as much as, for a row that is told; else 0.
        note: why it could not run.
    """

    family: str
    name: str
    setting: Setting
    outcomes: Sequence[Outcome]
    tuned: bool = False
    price: float = 0.0
    note: str = ""

    @property
    def loss(self) -> float:
        return statistics.fmean(outcome.test for outcome in self.outcomes) if self.outcomes else math.nan

    @property
    def steps(self) -> float:
        return statistics.fmean(outcome.steps for outcome in self.outcomes)

    def time(self, fixed: float, devices: int) -> float:
        return statistics.fmean(outcome.time(fixed, devices) for outcome in self.outcomes)

    @property
    def label(self) -> str:
        return f"{self.name} (tuned)" if self.tuned and self.family != "constant" else self.name


class Page(NamedTuple):
    """What is known of a cell.

    Args:
        title: the cell in words.
        rows: methods that ran on all seeds.
        headline: name of the row of ours that is the default.
    """

    title: str
    rows: Sequence[Row]
    headline: str

    def of(self, family: str) -> list[Row]:
        return [row for row in self.rows if row.family == family]

    @property
    def default(self) -> Row | None:
        return next((row for row in self.of("ours") if row.name == self.headline), None)

    @property
    def frontier(self) -> list[Point]:
        return pareto(Point(row.steps, row.loss) for row in self.of("constant"))

    @property
    def best(self) -> Row:
        return min(self.of("constant"), key=lambda row: row.loss)

    def ratio(self, row: Row) -> Cost:
        """Steps of the tuned constants at the row's loss, over the row's steps."""
        return cost_at(self.frontier, row.loss).over(row.steps)

    def ratios(self, row: Row) -> list[Cost]:
        """The same of each seed."""
        return [cost_at(self.frontier, outcome.test).over(outcome.steps) for outcome in row.outcomes]


def percent(loss: float, than: float) -> str:
    return f"{100 * (loss / than - 1):+.1f} %" if math.isfinite(loss) else "failed"


def shown(row: Row) -> str:
    losses = [outcome.test for outcome in row.outcomes]
    deviation = statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else math.nan
    return f"{row.loss:.4f} ± {deviation:.4f}"


def constants_table(page: Page) -> Table:
    rows = sorted(page.of("constant"), key=lambda row: -row.steps)
    cells = [
        (
            row.name,
            f"{row.setting.lr:.3g}",
            f"{100 * row.setting.warmup:g} %",
            f"{row.steps:.0f}",
            shown(row),
            percent(row.loss, page.best.loss),
        )
        for row in rows
    ]
    return Table(
        f"{page.title}: tuned constants",
        ("batch", "LR", "warm-up", "steps", "test loss", "over the best"),
        cells,
    )


def methods_table(page: Page) -> Table:
    cells = []
    for row in page.rows:
        if row.family == "constant":
            continue
        if not row.outcomes:
            cells.append((row.label, row.note, "", "", "", "", ""))
            continue
        ratio, each = page.ratio(row), sorted(page.ratios(row), key=lambda cost: cost.value)
        cells.append(
            (
                row.label,
                f"{row.setting.lr:.3g}, {100 * row.setting.warmup:g} %",
                f"{row.steps:.0f}",
                shown(row),
                percent(row.loss, page.best.loss),
                percent(row.loss, loss_at(page.frontier, row.steps)),
                f"{ratio.show()} ({each[0].show()} to {each[-1].show()})",
            )
        )
    return Table(
        f"{page.title}: all else. Steps ratio: steps of the tuned constants at equal loss over the method's, with its "
        "range over seeds (>: below every constant's loss; <: above every constant's)",
        (
            "method",
            "LR, warm-up",
            "steps",
            "test loss",
            "over the best constant",
            "over constants at its steps",
            "steps ratio",
        ),
        cells,
    )


def headline_table(pages: Sequence[Page]) -> Table:
    cells = []
    for page in pages:
        row = page.default
        if row is None:
            continue
        ratio, each = page.ratio(row), sorted(page.ratios(row), key=lambda cost: cost.value)
        noises = [outcome.noise for outcome in row.outcomes if outcome.noise is not None]
        cells.append(
            (
                page.title,
                f"{row.steps:.0f}",
                f"{page.best.steps:.0f}",
                percent(row.loss, page.best.loss),
                percent(row.loss, loss_at(page.frontier, row.steps)),
                f"{ratio.show()} ({each[0].show()} to {each[-1].show()})",
                f"{statistics.fmean(noise.scale for noise in noises):.0f}",
                f"{statistics.fmean(noise.efficiency for noise in noises):.2f}",
                f"{statistics.fmean(noise.limit for noise in noises):.2f}",
            )
        )
    return Table(
        "The default, untuned",
        (
            "workload, optimizer, examples",
            "steps",
            "steps of the best constant",
            "loss over the best constant",
            "over constants at its steps",
            "steps ratio (range over seeds)",
            "noise scale B",
            "efficiency",
            "<B> / <sqrt B>^2",
        ),
        cells,
    )


def times_tables(pairs: Iterable[tuple[Page, Page]]) -> list[Table]:
    """Modelled time of the long runs: of the best constant at the same loss, over ours."""
    columns = [(fixed, devices) for devices in DEVICES for fixed in NETWORKS]
    tables = []
    for short, long in pairs:
        ours = long.of("ours")
        if not ours:
            continue
        cells = [(row.name, *(time_ratio(short, long, row, *column) for column in columns)) for row in ours]
        told = [row for row in ours if row.price]
        if told:
            matched = (
                time_ratio(short, long, min(told, key=lambda row: abs(math.log(row.price / (c * n)))), c, n)
                for c, n in columns
            )
            cells.append(("the price nearest to the network's", *matched))
        tables.append(
            Table(
                f"{long.title}: modelled time of the best tuned constant at equal loss, over ours. A step costs "
                "c + ceil(batch / N). Times of constants by a power law through both budgets; -: none gets there "
                "within 1.5 times the long one",
                ("method", *(f"N{devices} c{fixed}" for fixed, devices in columns)),
                cells,
            )
        )
    return tables


def time_ratio(short: Page, long: Page, row: Row, fixed: float, devices: int) -> str:
    before = {constant.name: constant for constant in short.of("constant")}
    times = [
        time_to(
            Point(before[constant.name].time(fixed, devices), before[constant.name].loss),
            Point(constant.time(fixed, devices), constant.loss),
            row.loss,
        )
        for constant in long.of("constant")
        if constant.name in before
    ]
    best = min(times, default=math.inf)
    return f"{best / row.time(fixed, devices):.2f}" if math.isfinite(best) else "-"


STYLES = {"rule": ("s", "C1"), "package": ("D", "C0"), "table": ("^", "C2"), "ours": ("o", "C3")}


def draw(pages: Sequence[Page], path: Path) -> None:
    """Loss against steps: the frontier of tuned constants, and all else."""
    columns = 2 if len(pages) > 1 else 1
    lines = math.ceil(len(pages) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.5 * columns, 4.6 * lines), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(pages) :]:
        ax.remove()
    for ax, page in zip(axes.flat, pages, strict=False):
        constants = sorted((row.steps, row.loss, row.name) for row in page.of("constant"))
        ax.plot([s for s, *_ in constants], [loss for _, loss, _ in constants], "x", color="0.5")
        ax.plot(*zip(*page.frontier, strict=True), "-", color="0.3", label="tuned constants")
        for steps, loss, name in constants:
            ax.annotate(name, (steps, loss), textcoords="offset points", xytext=(3, 4), fontsize=7, color="0.4")
        for family, (marker, color) in STYLES.items():
            rows = [row for row in page.of(family) if math.isfinite(row.loss)]
            xs, ys = [row.steps for row in rows], [row.loss for row in rows]
            ax.plot(xs, ys, marker, color=color, ms=4.5, label=family, ls="none", alpha=0.75)
        if page.default is not None:
            ax.plot(page.default.steps, page.default.loss, "*", color="C3", ms=14, label="default")
        ceiling = 1.25 * max(point.loss for point in page.frontier)
        ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="test loss", title=page.title)
        ax.set_ylim(top=ceiling)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def record(page: Page) -> dict[str, Any]:
    """The numbers behind a page's tables."""
    return {
        "rows": [
            {
                "family": row.family,
                "name": row.name,
                "tuned": row.tuned,
                "lr": row.setting.lr,
                "warmup": row.setting.warmup,
                "steps": [outcome.steps for outcome in row.outcomes],
                "test": [_number(outcome.test) for outcome in row.outcomes],
                "validation": [_number(outcome.validation) for outcome in row.outcomes],
                "path": [list(outcome.path) for outcome in row.outcomes],
                "ratio": None if row.family == "constant" or not row.outcomes else page.ratio(row).show(),
            }
            for row in page.rows
        ]
    }


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def choice_table(pages: Sequence[Page]) -> Table:
    """Steps ratio on validation by method, and its geometric mean over the cells where the method ran."""
    names = dict.fromkeys(row.name for page in pages for row in page.of("ours"))
    cells = []
    for name in names:
        ratios = [next((page.ratio(row) for row in page.of("ours") if row.name == name), None) for page in pages]
        values = [ratio.value for ratio in ratios if ratio is not None]
        mean = statistics.geometric_mean(values)
        cells.append((mean, len(values), name, *("" if ratio is None else ratio.show() for ratio in ratios)))
    cells.sort(key=lambda cell: (-cell[1], -cell[0]))
    return Table(
        "What the default was compared with: steps ratio by validation loss, on seeds that are not reported (bounds "
        "count as they stand in the mean)",
        ("method", *(page.title for page in pages), "geometric mean"),
        [(name, *shown, f"{mean:.2f}") for mean, _, name, *shown in cells],
    )


def wait_table(pages: Sequence[Page]) -> Table:
    """Two waits by validation loss, on seeds that chose neither."""
    cells = [
        (
            page.title,
            row.name,
            f"{100 * row.setting.warmup:g} %",
            f"{row.steps:.0f}",
            shown(row),
            percent(row.loss, page.best.loss),
            page.ratio(row).show(),
        )
        for page in pages
        for row in page.of("ours")
    ]
    return Table(
        "A shorter wait with Adam: validation loss, on seeds that chose neither the default nor it",
        ("cell", "method", "warm-up", "steps", "validation loss", "over the best constant", "steps ratio"),
        cells,
    )


def findings(pages: Sequence[Page]) -> list[str]:
    """What the headline table says of the aims, in sentences."""
    known = [(page, page.default) for page in pages if page.default is not None]
    if not known:
        return ["The default has not been run yet."]
    ratios = {page.title: page.ratio(row) for page, row in known}
    mean = statistics.geometric_mean(ratio.value for ratio in ratios.values())
    below = [title for title, ratio in ratios.items() if ratio.value < 1 or ratio.bound == "<"]
    near = [
        page.title
        for page, row in known
        for first in page.of("constant")
        if first.name == "16" and row.loss <= 1.01 * first.loss and 3 * row.steps <= first.steps
    ]
    return [
        f"Default: {known[0][0].headline}. Geometric mean of its steps ratio over {len(known)} cells: {mean:.2f} (aim: "
        f"1.5), between {min(r.value for r in ratios.values()):.2f} and {max(r.value for r in ratios.values()):.2f}.",
        f"Below 1.0, the aim for every cell: {'; '.join(below) or 'none'}.",
        "Within 1 % of the tuned constant batch of 16 at a third of its steps: "
        f"{'; '.join(near) or 'none'} (of {len(known)}).",
    ]
