"""Which claims about growing batches hold on the runs of ``frontier.py``? Each ends in one sentence.

    ADABATCH_DATA=... python benchmarks/claims.py [--only mnist14,shakespeare-adamw-12288] [--report]

Runs are kept in the store of ``frontier.py``, whose tuned constants are read from there. Asked are the advantage where
all have the same short warm-up, late against early growth at equal steps, what an example is worth at a larger batch
against ``1 / (1 + b / B)``, which is eta^2 where a norm test rests, and the square-root rule early and deep in
training."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from _frontier.frontiers import Point, time_to
from _frontier.report import Page, Row, shown
from _frontier.runs import Planned, Store
from _frontier.search import Setting, best_rate
from _harness import Machine, Table, publish
from frontier import (
    CHOICE_SEEDS,
    COARSE,
    DEFAULT,
    FIRST,
    RECORD,
    RULES,
    SEEDS,
    START,
    STORE,
    Cell,
    Method,
    cells,
    constants,
    kept,
    outcomes,
    page,
    progress,
    tuned_constant,
)

QUESTION = (
    "Four claims about batches that grow, on the workloads of frontier.py: which are reproduced, refuted or unclear?"
)
SHORT_WARMUP = 0.02
README = Method("norm test", 0.5, "sqrt", hold=0.0)  # what the README showed before there was a price


def equal_warmup(cell: Cell, run: Store) -> Iterable[Row]:
    """Constants whose rate alone is tuned, at a warm-up that is short for all, and ours with the smallest one's."""
    start = Setting(START[cell.optimizer], SHORT_WARMUP)
    for size in COARSE:

        def loss(setting: Setting, batch: Planned) -> float:
            found = outcomes(cell, run, batch, setting, seeds=CHOICE_SEEDS)
            return statistics.fmean(outcome.validation for outcome in found)

        start = best_rate(partial(loss, batch=Planned((size,))), start)
        yield Row("constant", str(size), start, outcomes(cell, run, Planned((size,)), start))
        if size == FIRST:
            base = start
    for method in (DEFAULT, README):
        yield Row("ours", method.name, base, method.outcomes(cell, run, base, SEEDS))


def growth(steps_per_example: float, share: float) -> int:
    """The batch after ``share`` of the examples at ``FIRST``, such that a run takes so many steps per example."""
    return round((1 - share) / (steps_per_example - share / FIRST))


def switches(cell: Cell, run: Store) -> Iterable[Row]:
    """One growth from ``FIRST``, early or late, its size such that all take as many steps as a constant batch of 48."""
    base, others = tuned_constant(cell, run, FIRST), {"rule": RULES[cell.optimizer], "reference": FIRST}
    equal = 3 * FIRST
    batches = {f"always {equal}": Planned((equal,))}
    for share in (0.05, 0.15, 0.25):
        later = growth(1 / equal, share)
        batches[f"{FIRST}, {later} after {share:.0%}"] = Planned((FIRST, later), (0.0, share))
    batches[f"{later}, {FIRST} after {1 - share:.0%}"] = Planned((later, FIRST), (0.0, 1 - share))
    for name, batch in batches.items():
        yield Row("table", name, base, outcomes(cell, run, batch, base, **others))


def rows_table(title: str, rows: Sequence[Row]) -> Table:
    return Table(
        title,
        ("method", "LR, warm-up", "steps", "test loss"),
        [
            (row.name, f"{row.setting.lr:.3g}, {100 * row.setting.warmup:g} %", f"{row.steps:.0f}", shown(row))
            for row in rows
        ],
    )


def told_equal_warmup(full: Page, rows: Sequence[Row]) -> str:
    """Steps ratios against constants with the short warm-up, and against those that were tuned."""
    short = Page("", rows, "")
    parts = [
        f"{row.name}: {short.ratio(row).show()} against constants with {100 * SHORT_WARMUP:g} % of warm-up, "
        f"{full.ratio(row).show()} against constants with their own"
        for row in short.of("ours")
    ]
    shrinks = [short.ratio(row).value > full.ratio(row).value for row in short.of("ours")]
    verdict = "reproduced" if all(shrinks) else "unclear" if any(shrinks) else "refuted"
    claim = "an advantage shrinks where constants have a warm-up of their own"
    return f"{full.title}, {claim}: {verdict} ({'; '.join(parts)})."


def told_switches(full: Page, rows: Sequence[Row]) -> str:
    """Whether the loss falls from early to late growth by more than the seeds differ."""
    _, *growing, shrinking = rows
    early, late = growing[0], growing[-1]
    pairs = [a.test - b.test for a, b in zip(early.outcomes, late.outcomes, strict=True)]
    mean, spread = statistics.fmean(pairs), statistics.stdev(pairs)
    verdict = "unclear" if abs(mean) < 2 * spread / math.sqrt(len(pairs)) else "reproduced" if mean > 0 else "refuted"
    return (
        f"{full.title}, late growth is better than early growth at equal steps: {verdict} (loss {early.loss:.4f} with "
        f"{early.name}, {late.loss:.4f} with {late.name}; {shrinking.loss:.4f} the other way round)."
    )


def told_efficiency(short: Page, long: Page) -> tuple[Table, str]:
    """Examples to a loss between both budgets, by batch size, beside what the default's mean noise scale predicts."""
    before = {row.name: row for row in short.of("constant")}
    pairs = [(before[row.name], row) for row in long.of("constant") if row.name in before]
    first = next(pair for pair in pairs if pair[1].name == str(FIRST))
    assert long.default is not None
    scale = statistics.fmean(outcome.noise.scale for outcome in long.default.outcomes if outcome.noise is not None)

    def examples(pair: tuple[Row, Row], loss: float) -> float:
        before, after = (Point(row.steps * int(row.name), row.loss) for row in pair)
        return time_to(before, after, loss)

    loss = math.sqrt(first[0].loss * first[1].loss)
    cells, errors = [], []
    for pair in sorted(pairs, key=lambda pair: int(pair[1].name)):
        size = int(pair[1].name)
        found = examples(pair, loss) / examples(first, loss)
        expected = (1 + size / scale) / (1 + FIRST / scale)
        if math.isfinite(found) and size != FIRST:
            errors.append(found / expected)
        cells.append((str(size), f"{found:.2f}" if math.isfinite(found) else "-", f"{expected:.2f}"))
    table = Table(
        f"{long.title}: examples to a loss of {loss:.4f}, over those of a batch of {FIRST}",
        ("batch", "measured", f"(1 + b / B) / (1 + {FIRST} / B), B = {scale:.0f}"),
        cells,
    )
    if not errors:
        return table, f"{long.title}, efficiency 1 / (1 + b / B): unclear (no larger batch came to the loss)."
    verdict = "reproduced" if all(1 / 1.5 <= error <= 1.5 for error in errors) else "refuted"
    return table, (
        f"{long.title}, efficiency 1 / (1 + b / B), within 1.5 times: {verdict} (measured over predicted from "
        f"{min(errors):.2f} to {max(errors):.2f})."
    )


def told_rule(pages: Sequence[Page]) -> tuple[Table, str]:
    """The exponent p of ``best LR ~ b^p``, from one batch size to the next."""
    cells, exponents = [], []
    for each in pages:
        rates = {int(row.name): row.setting.lr for row in each.of("constant")}
        between = [
            (a, b, math.log(rates[b] / rates[a]) / math.log(b / a))
            for a, b in itertools.pairwise(COARSE)
            if a in rates and b in rates
        ]
        cells.append((each.title, *(f"{p:.2f}" for *_, p in between), *[""] * (len(COARSE) - 1 - len(between))))
        exponents += [p for a, b, p in between if b <= 64]
    names = [f"{a} to {b}" for a, b in itertools.pairwise(COARSE)]
    title = "The exponent p of best LR ~ b^p (rates lie on a grid of 2, so p on one of 0.5)"
    table = Table(title, ("cell", *names), cells)
    mean, spread = statistics.fmean(exponents), statistics.pstdev(exponents)
    verdict = "unclear" if spread > 0.25 else "reproduced" if abs(mean - 0.5) <= 0.15 else "refuted"
    return table, (
        f"The square-root rule from {COARSE[0]} to {COARSE[1]}: {verdict} (exponents from {min(exponents):.2f} to "
        f"{max(exponents):.2f}, {mean:.2f} in the mean)."
    )


def report(store: Store, chosen: Sequence[Cell], *, save: bool) -> None:
    """Every claim on every cell whose runs are there."""
    known = [cell for cell in chosen if len(list(kept(constants(cell, store, sizes=COARSE)))) == len(COARSE)]
    pages = {cell: page(cell, store) for cell in known}
    tables, findings = [], []
    for cell, full in pages.items():
        equal, switched = list(kept(equal_warmup(cell, store))), list(kept(switches(cell, store)))
        if len(equal) == len(COARSE) + 2:
            tables.append(rows_table(f"{full.title}: {100 * SHORT_WARMUP:g} % of warm-up for all", equal))
            findings.append(told_equal_warmup(full, equal))
        if len(switched) == 5:
            tables.append(rows_table(f"{full.title}: one growth, at equal steps", switched))
            findings.append(told_switches(full, switched))
        if cell.shorter in pages and full.default is not None:
            table, sentence = told_efficiency(pages[cell.shorter], full)
            tables.append(table)
            findings.append(sentence)
    if pages:
        table, sentence = told_rule(list(pages.values()))
        tables.append(table)
        findings.append(sentence)
    publish(
        "claims",
        question=QUESTION,
        machine=Machine.here(),
        tables=tables,
        findings=findings,
        data={table.title: {"columns": table.columns, "rows": table.rows} for table in tables},
        save=save,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "mnist14-adamw-16384,shakespeare-adamw-12288"
    parser.add_argument("--only", default=names, help="how the names of cells to run may begin, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing, report what the store has")
    parser.add_argument("--no-save", action="store_true", help="only print the report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        for cell in cells(options.only):
            run = Store(STORE, results=RECORD, say=progress())
            for _ in (*switches(cell, run), *equal_warmup(cell, run)):
                pass
    report(Store(STORE, results=RECORD, run=False), cells(), save=not options.no_save)


if __name__ == "__main__":
    main()
