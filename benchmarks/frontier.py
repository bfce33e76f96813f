"""Does a batch that follows the noise beat constant batches that were tuned, and by how many steps?

    ADABATCH_DATA=... python benchmarks/frontier.py [--workers 1] [--only mnist14,python-adamw-12288] [--report]

A cell is a workload, an optimizer and a budget of examples. In each, constant batches from 8 to 1,024 get their own
learning rate and their own warm-up: their losses against their steps are the frontier. Beside it stand tables, ramps
and Seesaw, the constants of a person who tunes the smallest batch only, and the batch that follows the noise, which
gets nothing but the learning rate and the warm-up of the constant batch of 16. Everything is chosen by validation loss
on two seeds, and reported as test loss on three others.

Finished runs are kept in ``runs/frontier/runs.jsonl`` (or in the folder that ADABATCH_STUDY names), so the study may
be interrupted at any time and goes on where it stopped. At the end, or with ``--report`` at once, all that is there is
read, and written to ``results/frontier.md``, ``.json`` and ``.png``. All that a report was made of stands in that
``.json`` as well, and is not run again if the other file is lost."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, NamedTuple

import torch
from _frontier.packages import missing
from _frontier.report import (
    Page,
    Row,
    choice_table,
    constants_table,
    draw,
    findings,
    headline_table,
    methods_table,
    record,
    times_tables,
    wait_table,
)
from _frontier.runs import (
    LARGEST,
    TUNING_SEED,
    Batch,
    CriterionName,
    Job,
    Measured,
    NotRunError,
    OptimizerName,
    Outcome,
    Packaged,
    Planned,
    Store,
)
from _frontier.search import Setting, tune
from _frontier.workloads import STUDY, WORKLOADS
from _harness import RESULTS, Machine, publish

QUESTION = (
    "How many steps, and how much modelled time, does the best constant batch that was tuned need for the loss of a "
    "batch that follows the noise, over that batch's own?\n\n![test loss against steps](frontier.png)"
)

COARSE, FINE, ENDS = (16, 64, 256), (32, 128, 512), (1024, 8)  # constant batches in the order of the search
SIZES = (*COARSE, *FINE, *ENDS)
FIRST = 16  # the batch that a person tunes, and that ours begins with
SEEDS, CHOICE_SEEDS = (0, 1, 2), (TUNING_SEED, TUNING_SEED + 1)
CHECK_SEEDS = tuple(range(TUNING_SEED + 100, TUNING_SEED + 103))  # those that chose nothing, and are not reported
FAR_BEHIND = 1.1  # a setting's loss over the best one's, on the same seed, from which on it is not looked at further
STORE, RECORD = STUDY / "runs.jsonl", RESULTS / "frontier.json"
START: Mapping[OptimizerName, float] = {"adamw": 2**-8, "sgd": 2**-6, "adagrad": 2**-5, "adagrad-norm": 2**-1}
RULES: Mapping[OptimizerName, str] = {"adamw": "sqrt", "sgd": "linear", "adagrad": "sqrt", "adagrad-norm": "linear"}


class Cell(NamedTuple):
    """A workload, an optimizer and a budget of examples."""

    workload: str
    optimizer: OptimizerName
    examples: int

    def job(self, batch: Batch, setting: Setting, seed: int, **others: object) -> Job:
        return Job(*self[:3], seed, batch, *setting, **others)  # type: ignore[arg-type]

    @property
    def shorter(self) -> Cell | None:
        """The cell whose settings this one's search starts from."""
        shorter = [budget for budget in WORKLOADS[self.workload].budgets if budget < self.examples]
        return self._replace(examples=max(shorter)) if shorter else None


def cells(only: str = "") -> list[Cell]:
    """In the order of their importance; those whose names begin with one of ``only``, separated by commas."""

    def cell(workload: str, budget: int, optimizer: OptimizerName = "adamw") -> Cell:
        return Cell(workload, optimizer, WORKLOADS[workload].budgets[budget])

    pairs = (("mnist14", "shakespeare"), ("python", "cifar"))
    others: tuple[OptimizerName, ...] = ("sgd", "adagrad", "adagrad-norm")
    every = [
        *(cell(name, budget) for names in pairs for budget in (0, 1) for name in names),
        *(cell("mnist14", 0, optimizer) for optimizer in others),
        cell("mnist14", 1, "sgd"),
        cell("mnist14", 2),
        *(cell("mlp14", budget) for budget in (0, 1)),
        *(cell("mnist28", budget) for budget in (0, 1)),
    ]
    return [one for one in every if "-".join(map(str, one)).startswith(tuple(only.split(",")))]


def tuned(cell: Cell, run: Store, batch: Planned, start: Setting, **others: object) -> Setting:
    """The best learning rate and warm-up of a batch that is planned beforehand.

    What is far behind on the first seed does not run on the others.
    """
    best = [math.inf] * len(CHOICE_SEEDS)

    def loss(setting: Setting) -> float:
        nonlocal best
        seen: list[float] = []
        for seed in CHOICE_SEEDS:
            seen.append(run(cell.job(batch, setting, seed, **others)).validation)
            if seen[0] > FAR_BEHIND * best[0]:
                break
        if len(seen) == len(best) and sum(seen) < sum(best):
            best = seen
        return statistics.fmean(seen)

    return run.search(cell.job(batch, start, CHOICE_SEEDS[0], **others), lambda: tune(loss, start))


def tuned_constant(cell: Cell, run: Store, size: int) -> Setting:
    """The best setting of a constant batch, searched from that of the shorter budget, or of a batch near it."""
    if cell.shorter is not None:
        start = tuned_constant(cell.shorter, run, size)
    elif size == FIRST and cell.workload == "python":  # the model is that of the other text
        start = tuned_constant(cell._replace(workload="shakespeare"), run, FIRST)
    elif size == FIRST:
        start = Setting(START[cell.optimizer], 0.1)
    else:
        near = FIRST if size < FIRST else size // 2 if size in FINE else size // 4
        start = tuned_constant(cell, run, near)
    return tuned(cell, run, Planned((size,)), start)


def outcomes(
    cell: Cell,
    run: Store,
    batch: Batch,
    setting: Setting,
    *,
    seeds: Sequence[int] = SEEDS,
    **others: object,
) -> list[Outcome]:
    """A method on all seeds."""
    return [run(cell.job(batch, setting, seed, **others)) for seed in seeds]


def constants(cell: Cell, run: Store, *, sizes: Sequence[int] = SIZES, seeds: Sequence[int] = SEEDS) -> Iterable[Row]:
    """The frontier: each size with its own settings."""
    for size in sizes:
        setting = tuned_constant(cell, run, size)
        found = outcomes(cell, run, Planned((size,)), setting, seeds=seeds)
        yield Row("constant", str(size), setting, found, tuned=True)


def rules(cell: Cell, run: Store) -> Iterable[Row]:
    """What a person has who tuned the smallest batch only: a larger constant, its learning rate by a rule.

    The warm-up is that of the default, so that nothing but the moving batch is between these rows and it.
    """
    base, rule = tuned_constant(cell, run, FIRST), RULES[cell.optimizer]
    base = base._replace(warmup=max(base.warmup, DEFAULT.warmup))
    for size in (32, 64, 128):
        by_rule = outcomes(cell, run, Planned((size,)), base, rule=rule, reference=FIRST)
        yield Row("rule", f"{size}, {rule}", base, by_rule)
        for follow in dict.fromkeys(("", DEFAULT.following(cell))):
            others = {"rule": "gain", "follow": follow, "reference": FIRST}
            by_gain = outcomes(cell, run, Measured("constant", size, FIRST), base, **others)
            yield Row("rule", f"{size}, gain (AdaScale){', betas follow' if follow else ''}", base, by_gain)


PACKAGES = {
    **{f"{size}, AdaScale of fairscale": Packaged("adascale", size, FIRST) for size in (32, 64, 128)},
    "price 32, Pollux of adaptdl": Packaged("pollux", 32, FIRST),
}


def packages(cell: Cell, run: Store) -> Iterable[Row]:
    """AdaScale and Pollux by their own code, with the smallest batch's settings."""
    base = tuned_constant(cell, run, FIRST)
    for name, batch in PACKAGES.items():
        try:
            yield Row("package", name, base, outcomes(cell, run, batch, base))
        except (ImportError, NotRunError):
            why = missing(batch.rule)
            if not why:
                raise
            yield Row("package", name, base, (), note=why)


def planned(warmup: float) -> dict[str, tuple[Planned, str]]:
    """Tables, ramps and Seesaw: batch sizes, and their rule where it is not the optimizer's."""
    quarters = (0.0, 0.25, 0.5, 0.75)
    cuts = range(7)  # the cosine fell by 2^k at acos(2^(1-k) - 1) / pi of what the warm-up leaves
    shares = tuple(warmup * (k > 0) + (1 - warmup) * math.acos(2 ** (1 - k) - 1) / math.pi for k in cuts)
    return {
        "Seesaw from 16": (Planned(tuple(16 * 2**k for k in cuts), shares), "seesaw"),
        "quarters 16 to 128": (Planned((16, 32, 64, 128), quarters), ""),
        "quarters 32 to 256": (Planned((32, 64, 128, 256), quarters), ""),
        "64, 128, 256 by 2.5, 2.5, 95 %": (Planned((64, 128, 256), (0.0, 0.025, 0.05)), ""),
        "ramp 16 to 256 over a half": (Planned((16, 256), (0.0, 0.5), glide=True), ""),
    }


TUNED_TABLES = ("quarters 16 to 128", "quarters 32 to 256", "ramp 16 to 256 over a half")


def tables(cell: Cell, run: Store) -> Iterable[Row]:
    """With the smallest batch's settings and, some of them, with their own."""
    base = tuned_constant(cell, run, FIRST)
    known = planned(base.warmup)
    for name, (batch, rule) in known.items():
        others = {"rule": rule or RULES[cell.optimizer], "reference": FIRST}
        yield Row("table", name, base, outcomes(cell, run, batch, base, **others))
        if name in TUNED_TABLES:
            setting = tuned(cell, run, batch, base, **others)
            yield Row("table", name, setting, outcomes(cell, run, batch, setting, **others), tuned=True)


class Method(NamedTuple):
    """A batch that follows the noise, the rule of the learning rate, and what follows the batch beside it.

    Args:
        criterion, number: as in ``Measured``.
        warmup: the warm-up is at least so long, as a share of the examples, however long the smallest batch's is.
        hold: the batch stays at its first size for this share of the examples; None is until the warm-up is over.
        bound: whether that share is the least (the batch waits for a longer warm-up), the most (it waits no longer than
            a shorter one), or both.
        first: batch that it begins with; its learning rate is that of the smallest batch, by the rule.
    """

    criterion: CriterionName
    number: float
    rule: str = "gain"
    follow: str = ""
    warmup: float = 0.0
    hold: float | None = None
    bound: Literal[">=", "<=", "="] = ">="
    first: int = FIRST

    @property
    def name(self) -> str:
        words = [f"{self.criterion} {self.number:g}", self.rule]
        words += [f"{self.follow.replace('betas', 'betas follow', 1)}"] if self.follow else []
        words += [f"warm-up >= {100 * self.warmup:g} %"] if self.warmup else []
        words += [] if self.hold is None else [f"held {self.bound} {100 * self.hold:g} %"]
        words += [f"from {self.first}"] if self.first != FIRST else []
        return ", ".join(words)

    def following(self, cell: Cell) -> str:
        """What follows of the settings that the cell's optimizer has."""
        return self.follow if cell.optimizer == "adamw" else ""

    def outcomes(self, cell: Cell, run: Store, base: Setting, seeds: Sequence[int]) -> list[Outcome]:
        """Its runs, with the settings of the smallest batch."""
        setting = base._replace(warmup=max(base.warmup, self.warmup))
        hold = self.hold
        if hold is not None and self.bound == "<=":
            hold = min(hold, setting.warmup)
        elif self.bound == ">=" and hold and hold <= setting.warmup:
            hold = None
        batch = Measured(self.criterion, self.number, self.first, hold)
        others = {"rule": self.rule, "follow": self.following(cell), "reference": FIRST}
        return outcomes(cell, run, batch, setting, seeds=seeds, **others)


DEFAULT = Method("price", 32, follow="betas")
"""What the library does if it is told nothing but the price; it waits for the end of the warm-up."""
HELD = DEFAULT._replace(hold=0.1)
REPORTED = [
    DEFAULT,
    *(DEFAULT._replace(number=number) for number in (8, 128, 512)),
    HELD,
    HELD._replace(bound="<="),
    HELD._replace(follow=""),
    HELD._replace(criterion="price for decay"),
]


def explored() -> list[Method]:
    """What was compared to choose the default, and to look for a better one."""
    short = HELD._replace(bound="=")
    return [
        DEFAULT,
        HELD,
        *(short._replace(hold=hold) for hold in (0.1, 0.05, 0.02)),
        short._replace(first=2 * FIRST),
        *(HELD._replace(rule=rule) for rule in ("sqrt", "linear", "none")),
        *(HELD._replace(number=number) for number in (16, 64, 8)),
        HELD._replace(criterion="price for decay"),
        HELD._replace(follow=""),
        *(HELD._replace(follow=f"betas {floors}") for floors in ("0.7 0.95", "0.5 0.99")),
        *(HELD._replace(hold=None, warmup=0.25, follow=follow) for follow in ("betas", "")),
        Method("norm test", 0.7, follow="betas", hold=0.1),
    ]


def ours(cell: Cell, run: Store, *, chosen: Sequence[Method], seeds: Sequence[int] = SEEDS) -> Iterable[Row]:
    """The batch that follows the noise, with the settings of the smallest constant batch."""
    base = tuned_constant(cell, run, FIRST)
    for method in chosen:
        if not method.follow and DEFAULT.follow != DEFAULT.following(cell):
            continue  # nothing follows in this cell, so this is another method once more
        price = method.number if method.criterion == "price" else 0.0
        yield Row("ours", method.name, base, method.outcomes(cell, run, base, seeds), price=price)


SHORT_WAIT = (DEFAULT, HELD._replace(bound="<="))

PARTS: Mapping[str, Callable[[Cell, Store], Iterable[Row]]] = {
    "coarse": partial(constants, sizes=COARSE),
    "fine": partial(constants, sizes=FINE),
    "ends": partial(constants, sizes=ENDS),
    "explored": partial(ours, chosen=explored(), seeds=CHOICE_SEEDS),
    "ours": partial(ours, chosen=REPORTED[:1]),
    "prices": partial(ours, chosen=REPORTED[1:]),
    "wait": partial(ours, chosen=SHORT_WAIT, seeds=CHECK_SEEDS),
    "rules": rules,
    "packages": packages,
    "tables": tables,
}


def progress() -> Callable[[Job, Outcome], None]:
    """Prints a line per run, with the mean time of those before it."""
    begin, done = time.monotonic(), 0

    def say(job: Job, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        print(
            f"{time.strftime('%H:%M:%S')} {job.workload} {job.optimizer} {job.examples} seed {job.seed} "
            f"batch {batch_in_words(job.batch)}, {job.rule} {job.follow} lr {job.lr:.4g} warm-up {job.warmup:g}: "
            f"{outcome.steps} steps, validation {outcome.validation:.4f}, test {outcome.test:.4f}, "
            f"{outcome.seconds:.1f} s; {done} runs, {(time.monotonic() - begin) / done:.1f} s each",
            flush=True,
        )

    return say


def batch_in_words(batch: Batch) -> str:
    if isinstance(batch, Planned):
        return "-".join(map(str, batch.sizes))
    if isinstance(batch, Packaged):
        return f"{batch.rule} {batch.number}"
    return f"{batch.criterion} {batch.number:g}"


def study(part: str, cell: Cell) -> None:
    """All runs of a part in a cell."""
    torch.set_num_threads(1)
    for _ in PARTS[part](cell, Store(STORE, results=RECORD, say=progress())):
        pass


def kept(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows up to the first that was not run to its end."""
    with suppress(NotRunError):
        yield from rows


def page(cell: Cell, run: Store) -> Page:
    """All methods that ran on all seeds."""
    parts = (
        *(constants(cell, run, sizes=(size,)) for size in SIZES),
        *(ours(cell, run, chosen=(method,)) for method in REPORTED),
        tables(cell, run),
        rules(cell, run),
        packages(cell, run),
    )
    return Page(", ".join(map(str, cell)), [row for part in parts for row in kept(part)], DEFAULT.name)


def choice(cell: Cell, run: Store, chosen: Iterable[Method], seeds: Sequence[int]) -> Page:
    """Settings that are compared, by the loss that a choice may look at: that of validation.

    Constants are those of the reported seeds: on the seeds that tuned them each is the luckiest of some eight.
    """
    parts = (
        *(constants(cell, run, sizes=(size,)) for size in SIZES),
        *(ours(cell, run, chosen=(method,), seeds=seeds) for method in chosen),
    )
    seen = [row for part in parts for row in kept(part)]
    judged = [
        row._replace(outcomes=[outcome._replace(test=outcome.validation) for outcome in row.outcomes]) for row in seen
    ]
    return Page(", ".join(map(str, cell)), judged, DEFAULT.name)


def setting(store: Store, pages: Sequence[Page]) -> list[str]:
    """What must be known to read the tables."""
    minutes = sum(outcome.seconds for outcome in store.outcomes.values()) / 60
    commits = sorted({outcome.commit for each in pages for row in each.of("ours") for outcome in row.outcomes})
    return [
        f"{len(store.outcomes)} runs took {minutes:.0f} minutes of one processor, which other work kept busy. What "
        f"follows the noise ran at commit {', '.join(commit[:7] for commit in commits)}.",
        f"Reported are the seeds {', '.join(map(str, SEEDS))}, whose test loss chose nothing. Constants were tuned on "
        f"{len(CHOICE_SEEDS)} others, by validation loss: a rate may be off by the square root of 2, to the "
        "advantage of whatever is compared with it.",
        "All runs warm up in a straight line and fall to zero by a cosine. A batch that follows the noise starts at "
        f"{FIRST}, in two parts, and ends at {LARGEST} at most. It grows after the warm-up, and after 10 % of "
        "the examples at least (held >= 10 %) or at most (<= 10 %), or after just that share (= 10 %).",
        "AdaScale of fairscale, and the noise scale, the rule of the learning rate and the goodput of adaptdl, run by "
        "those packages' own code. Pollux measures two parts, is asked before each step, and is told what a step costs "
        "as our default is: left alone it would measure times, and decide once per pass over the data set.",
        "Price for decay: larger by the factor by which the cosine fell, so that growth stands in the place of decay.",
    ]


def report(store: Store, cells: Iterable[Cell], *, save: bool) -> None:
    """Everything that the store knows of these cells."""
    known = [cell for cell in cells if len(list(kept(constants(cell, store, sizes=COARSE)))) > 1]
    pages = {cell: page(cell, store) for cell in known}
    choices = [choice(cell, store, explored(), CHOICE_SEEDS) for cell in known]
    checks = [choice(cell, store, SHORT_WAIT, CHECK_SEEDS) for cell in known if cell.optimizer == "adamw"]
    pairs = [(pages[cell.shorter], pages[cell]) for cell in known if cell.shorter in pages]
    every = list(pages.values())
    if save:
        RESULTS.mkdir(exist_ok=True)
        draw(every, RESULTS / "frontier.png")
    publish(
        "frontier",
        question=QUESTION,
        machine=Machine.here(),
        tables=[
            headline_table(every),
            *times_tables(pairs),
            choice_table([each for each in choices if each.of("ours")]),
            wait_table([each for each in checks if each.of("ours")]),
            *(table for each in every for table in (constants_table(each), methods_table(each))),
        ],
        findings=[*findings(every), *setting(store, every)],
        data={**{each.title: record(each) for each in every}, **store.used},
        save=save,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--only", default="", help="how the names of cells may begin, separated by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run, separated by commas")
    parser.add_argument("--report", action="store_true", help="run nothing, report what the store has")
    parser.add_argument("--no-save", action="store_true", help="only print the report")
    options = parser.parse_args()
    chosen = cells(options.only)
    if not options.report:
        work = [(part, cell) for part in options.parts.split(",") for cell in chosen]
        if options.workers == 1:
            for task in work:
                study(*task)
        else:
            with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
                pool.starmap(study, work, chunksize=1)
    report(Store(STORE, results=RECORD, run=False), chosen, save=not options.no_save)


if __name__ == "__main__":
    main()
