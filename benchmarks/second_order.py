"""Do the settings of K-FAC and Shampoo survive a change of width and of batch, and what does a step cost?

    ADABATCH_DATA=... python benchmarks/second_order.py --part sweeps [--cache FOLDER] [--minutes 60]
    ADABATCH_DATA=... python benchmarks/second_order.py --part race [--cache FOLDER] [--minutes 60]
    ADABATCH_DATA=... python benchmarks/second_order.py --part cost

MNIST, normalized; 784-M-M-10 with ReLU and without biases; cross-entropy. *Sweeps*: 200 steps of 128 examples, the
learning rate falling linearly to 0, at widths 64 (the base), 256 and 1,024; mean training loss of the last 20 steps.
*Race*: width 256, constant learning rate, batches from 128 to 8,192; steps and seconds until the loss, averaged over
the last 4,096 examples or the last step, is at most 0.1. The learning rate of each method is tuned at each batch, with
the first seed, on a grid of factor 2, which begins with three rates and is made longer until the best is not at its
end; the methods then run in turn with each seed. *Cost*: the time of a training step against AdamW's, amortized over
the refreshes. Seconds are those of the processor, of which one thread is used.

Finished runs of sweeps and races are kept in the cache folder by their settings, and are not run again; past
``--minutes`` none is started, and what is there is published: a result of ``--minutes 0`` comes from the cache alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from _harness import RESULTS, Machine, Table, interleave, publish
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from adabatch.optim import KFAC, Shampoo, mup
from adabatch.recipes.data import Mnist

matplotlib.use("agg")
from matplotlib import pyplot as plt

QUESTIONS = {
    "sweeps": "Do the best learning rate and the best damping of K-FAC and Shampoo stay where they are from width 64 "
    "to 1,024, and does the range of stable learning rates shrink?",
    "race": "How many steps and seconds do K-FAC and Shampoo take to a loss at each batch, beside SGD and AdamW?",
    "cost": "What does a step of K-FAC and Shampoo cost, beside one of SGD and AdamW?",
}
NAMES = {"sweeps": "second_order", "race": "second_order_race", "cost": "second_order_cost"}
BASE, WIDTHS, SEEDS = 64, (64, 256, 1024), (0, 1, 2)
STEPS, BATCH, LAST = 200, 128, 20
RATES = {
    "kfac": tuple(2.0**-k for k in (6, 5, 4, 3, 2)),
    "shampoo": tuple(2.0**-k for k in (8, 7, 6, 5, 4)),  # lower, since it has momentum by default
}
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DAMPING_RATE = 2.0**-5
STABLE = 1.0  # a final loss below it
HOPELESS = 1e6  # a loss from which no run came back
BATCHES, TARGET, MOST_STEPS = (128, 512, 2048, 8192), 0.1, {128: 1000, 512: 400, 2048: 250, 8192: 150}


@dataclass(frozen=True)
class Cell:
    """The settings of one run.

    Args:
        method: "kfac", "shampoo", "adamw" or "sgd".
        plan: whether the width plan sets init, learning rate and damping; else torch's standard parameterization.
        damping: K-FAC's damping or Shampoo's epsilon.
        form: of K-FAC's damping.
        batch: constant; with ``target``, the run ends where that loss is reached.
        race: whether it runs in turn with those of other methods.
    """

    method: str
    width: int
    lr: float
    seed: int = 0
    plan: bool = True
    damping: float = 1e-2
    form: str = "trace"
    batch: int = BATCH
    target: float | None = None
    race: bool = False

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, 10, bias=False),
    )


def prepared(cell: Cell) -> tuple[nn.Sequential, Optimizer]:
    """A model, every weight with deviation 1/sqrt(fan_in) or as the plan has it, and its optimizer."""
    torch.manual_seed(cell.seed)
    model = network(cell.width)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
    groups: Any = model.parameters()
    method = cell.method
    damping = {"kfac": "damping", "shampoo": "epsilon"}.get(method)
    options: dict[str, Any] = {} if damping is None else {damping: cell.damping}
    if cell.plan:
        with torch.device("meta"):
            plan = mup.plan(network(4 * BASE), network(BASE)).at(model)
        mup.init_(model, plan)
        groups = plan.groups(model, method, lr=cell.lr, damping=cell.damping if damping else None)
        options = {}
    if method == "kfac":
        form: Any = cell.form
        return model, KFAC(groups, model, lr=cell.lr, damping_form=form, seed=cell.seed, **options)
    if method == "shampoo":
        return model, Shampoo(groups, lr=cell.lr, **options)
    if method == "adamw":
        return model, AdamW(groups, lr=cell.lr, weight_decay=0.0)
    return model, SGD(groups, lr=cell.lr, momentum=0.9)


class Batches:
    """Batches of normalized images in an order of the seed's, without end."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self._images, self._labels, self._batch = images, labels, batch
        self._generator = torch.Generator().manual_seed(10_000 + seed)
        self._left = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor]:
        while len(self._left) < self._batch:
            order = torch.randperm(len(self._labels), generator=self._generator)
            self._left = torch.cat([self._left, order])
        rows, self._left = self._left[: self._batch], self._left[self._batch :]
        return self._images[rows], self._labels[rows]


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    outputs = model(x)
    if isinstance(optimizer, KFAC):
        optimizer.observe(outputs)
    loss = F.cross_entropy(outputs, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def run(cell: Cell, images: Tensor, labels: Tensor, most: float = math.inf) -> dict[str, float]:
    """Final loss, or steps and seconds to the target; infinite where it diverged or did not come there in ``most``."""
    model, optimizer = prepared(cell)
    batches = Batches(images, labels, cell.batch, cell.seed)
    base = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    seconds = 0.0
    for step in range(STEPS if cell.target is None else int(min(MOST_STEPS[cell.batch], most))):
        if cell.target is None:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * (1 - step / STEPS)
        x, y = batches.next()
        start = time.process_time()
        try:
            losses.append(float(train_step(model, optimizer, x, y)))
        except RuntimeError:  # statistics that are not finite
            losses.append(math.nan)
        seconds += time.process_time() - start
        if not losses[-1] < HOPELESS:
            return {"loss": math.inf, "steps": math.inf, "seconds": seconds}
        window = max(1, 4096 // cell.batch)
        if cell.target is not None and len(losses) >= window and statistics.fmean(losses[-window:]) <= cell.target:
            return {"loss": losses[-1], "steps": step + 1, "seconds": seconds}
    return {"loss": statistics.fmean(losses[-LAST:]), "steps": math.inf, "seconds": seconds}


class Lab:
    """Runs cells, keeps what they gave, and starts none after the deadline."""

    def __init__(self, cache: Path, minutes: float) -> None:
        self._cache = cache
        self._deadline = time.monotonic() + 60 * minutes
        self._data: tuple[Tensor, Tensor] | None = None
        cache.mkdir(parents=True, exist_ok=True)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Normalized images, shape (60000, 784), and labels."""
        if self._data is None:
            images, labels = Mnist("train").tensors
            self._data = ((images.flatten(1) - 0.1307) / 0.3081, labels)
        return self._data

    def result(self, cell: Cell, most: float = math.inf) -> dict[str, float] | None:
        path = self._cache / f"{cell.key}.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text())
            return found
        if time.monotonic() > self._deadline:
            return None
        found = run(cell, *self.data, most)
        print(f"{cell} -> {found}", flush=True)
        path.write_text(json.dumps(found))
        return found

    def loss(self, cells: Iterable[Cell]) -> tuple[float, ...] | None:
        """The losses of runs that belong together, as far as there was time for them; None where there was for none."""
        found = [self.result(cell) for cell in cells]
        return tuple(each["loss"] for each in found if each) or None


SWEPT = {
    "K-FAC, plan, trace": Cell("kfac", 0, 0.0),
    "K-FAC, standard, split": Cell("kfac", 0, 0.0, plan=False, form="split"),
    "Shampoo, plan": Cell("shampoo", 0, 0.0),
    "Shampoo, standard": Cell("shampoo", 0, 0.0, plan=False),
}


def shown(losses: Sequence[float] | None) -> str:
    if losses is None:
        return "not run"
    return " / ".join(f"{loss:.3f}" if loss < 100 else "div." for loss in losses)


Curves = dict[str, dict[int, dict[float, tuple[float, ...] | None]]]


def swept(lab: Lab, method: str, what: str, values: Sequence[float]) -> Curves:
    """Losses by form, width and learning rate or damping; width by width, so that a deadline cuts the widest."""
    found: Curves = {name: {} for name, cell in SWEPT.items() if cell.method == method}
    for width in WIDTHS:
        for name in found:
            template = replace(SWEPT[name], width=width, lr=DAMPING_RATE)
            found[name][width] = {
                value: lab.loss([replace(template, **{what: value, "seed": seed}) for seed in SEEDS])
                for value in values
            }
    return found


def sweep_table(title: str, curves: Curves, values: Sequence[float], show: Callable[[float], str]) -> Table:
    rows = [
        [name, str(width), *(shown(cells[value]) for value in values)]
        for name, widths in curves.items()
        for width, cells in widths.items()
    ]
    return Table(title, ["method", "width", *map(show, values)], rows)


def middle(losses: tuple[float, ...] | None) -> float:
    return math.nan if losses is None else statistics.median(losses)


def best(cells: dict[float, tuple[float, ...] | None]) -> float:
    """The value of the lowest loss; not a number where some were not run."""
    if None in cells.values():
        return math.nan
    return min(cells, key=lambda value: middle(cells[value]))


def largest_stable(cells: dict[float, tuple[float, ...] | None]) -> float:
    """The largest value at which, and below which, no seed diverged; not a number where some were not run."""
    stable = math.nan
    if None in cells.values():
        return stable
    for value, losses in sorted(cells.items()):
        if losses is None or max(losses) > STABLE:
            break
        stable = value
    return stable


def collapse(widths: dict[int, dict[float, tuple[float, ...] | None]], upto: float) -> list[float]:
    """Relative difference of the losses of widths 256 and 1,024, value by value, where both are stable."""
    pairs = [(middle(widths[256][value]), middle(widths[1024][value])) for value in widths[256] if value <= upto]
    return [abs(a - b) / ((a + b) / 2) for a, b in pairs if max(a, b) < STABLE]


def sweep_findings(curves: Curves, what: str, show: Callable[[float], str]) -> list[str]:
    findings = []
    for name, widths in curves.items():
        text = (
            f"{name}: best {what} {', '.join(show(best(cells)) for cells in widths.values())} at widths 64, 256, 1,024"
        )
        if what == "learning rate":
            text += f"; largest stable {', '.join(show(largest_stable(cells)) for cells in widths.values())}"
        apart = collapse(widths, math.inf)
        if apart:
            text += f"; 256 and 1,024 apart by {100 * min(apart):.0f} to {100 * max(apart):.0f} % where both are stable"
        findings.append(text + ".")
    return findings


def picture(rates: Curves, dampings: Curves, path: Path) -> None:
    names = list(rates)
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6.5), sharey=True, squeeze=False)
    for row, (curves, label) in enumerate(((rates, "learning rate"), (dampings, "damping"))):
        for axis, name in zip(axes[row], names, strict=True):
            axis.set(title=name, xscale="log", yscale="log", xlabel=label, ylim=(0.05, 3))
            if name not in curves:
                axis.set_axis_off()
                continue
            for shade, (width, cells) in zip((0.75, 0.45, 0.0), curves[name].items(), strict=False):
                points = [(value, middle(losses)) for value, losses in cells.items() if losses is not None]
                axis.plot(*zip(*points, strict=True), marker="o", color=str(shade), label=f"width {width}")
            axis.legend()
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss, last 20 steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


FIRST_RATES = {  # learning rates from which the tuning at each batch begins
    "sgd": {128: 0.04, 512: 0.16, 2048: 0.32, 8192: 0.32},
    "adamw": {128: 0.004, 512: 0.008, 2048: 0.008, 8192: 0.008},
    "kfac": {128: 2.0**-6, 512: 2.0**-4, 2048: 2.0**-3, 8192: 2.0**-2},
    "shampoo": {128: 2.0**-7, 512: 2.0**-6, 2048: 2.0**-4, 8192: 2.0**-4},
}
FARTHEST = 4  # powers of two beyond an end of the grid
SETTLED, ROUND = 40, 40  # steps before the cost is measured, and in one round of it


def to_target(method: str, batch: int, rate: float, seed: int = 0) -> Cell:
    return Cell(method, 256, rate, seed, plan=method != "sgd", batch=batch, target=TARGET)


def tuned(lab: Lab, method: str, batch: int) -> float | None:
    """The learning rate with the fewest steps to the target; None where time ran out."""
    first = FIRST_RATES[method][batch]
    rates = [first, first * 2, first / 2]
    low, high = first / 2**FARTHEST, first * 2**FARTHEST
    runs: dict[float, float] = {}
    while rates:
        for rate in rates:
            # No run goes on once it has lost.
            result = lab.result(to_target(method, batch, rate), most=min(runs.values(), default=math.inf))
            if result is None:
                return None
            runs[rate] = result["steps"]
        chosen = min(runs, key=lambda rate: runs[rate])
        beyond = {min(runs): chosen / 2, max(runs): chosen * 2}.get(chosen, math.nan)
        rates = [beyond] if low <= beyond <= high else []
    return chosen


def raced(lab: Lab, batches: Sequence[int]) -> tuple[Table, list[str], dict[str, Any]]:
    """Steps and seconds to the target at each batch, at the best of the learning rates that were tried."""
    rows, findings, found = [], [], {}
    for batch in batches:
        rates = {method: rate for method in FIRST_RATES if (rate := tuned(lab, method, batch)) is not None}
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in rates}
        for seed in SEEDS:  # in turn, so that what slows a seed slows all methods
            for method, rate in rates.items():
                result = lab.result(replace(to_target(method, batch, rate, seed), race=True))
                runs[method] += [] if result is None else [result]
        if not all(len(of_it) == len(SEEDS) for of_it in runs.values()) or "adamw" not in runs:
            continue
        # A run that did not come to the loss has no time to it.
        seconds = {
            method: [one["seconds"] if math.isfinite(one["steps"]) else math.inf for one in of_it]
            for method, of_it in runs.items()
        }
        medians = {method: statistics.median(of_it) for method, of_it in seconds.items()}
        found[str(batch)] = {method: {"lr": rates[method], "runs": of_it} for method, of_it in runs.items()}
        for method, of_it in runs.items():
            over = [mine / theirs for mine, theirs in zip(seconds[method], seconds["adamw"], strict=True)]
            rows.append(
                [
                    f"{batch:,}",
                    method,
                    f"{rates[method]:.4g}",
                    " / ".join(f"{one['steps']:.0f}" if math.isfinite(one["steps"]) else "none" for one in of_it),
                    f"{medians[method]:.1f}",
                    " / ".join(f"{ratio:.2f}" if math.isfinite(ratio) else "none" for ratio in over),
                ]
            )
        fastest = min(medians, key=lambda method: medians[method])
        findings.append(f"Batch {batch:,}: {fastest} takes the least time to a loss of {TARGET}.")
    columns = ["batch", "method", "best learning rate", "steps", "seconds, median", "seconds over AdamW's"]
    title = f"Steps and processor seconds to a loss of {TARGET} at width 256 (seeds {' / '.join(map(str, SEEDS))})"
    return Table(title, columns, rows), findings, found


def costs() -> tuple[Table, list[str], dict[str, Any]]:
    """A training step of each method against AdamW's; medians over rounds of ``ROUND`` steps."""
    images, labels = Mnist("train").tensors
    images = images.flatten(1)
    rows, found = [], {}
    for width, batch in ((256, 1024), (1024, 1024)):

        def make(width: int = width, batch: int = batch) -> dict[str, Callable[[], None]]:
            return {method: some_steps(method, width, batch, images, labels) for method in FIRST_RATES}

        timings = interleave(make, trials=1, rounds=2, warmup=0, clock=time.process_time)
        ratios = {method: timings.ratio(method, to="adamw") for method in FIRST_RATES}
        found[f"{width} {batch}"] = {method: list(ratio) for method, ratio in ratios.items()}
        rows.append([str(width), f"{batch:,}", *(ratios[method].show() for method in FIRST_RATES)])
    title = f"Time of {ROUND} steps over AdamW's after the first {SETTLED}, refreshes included, one thread"
    wide = found["1024 1024"]
    findings = [
        f"{method}: {wide[method][1]:.2f} times AdamW's step at width 1,024 and batch 1,024."
        for method in ("kfac", "shampoo")
    ]
    return Table(title, ["width", "batch", *FIRST_RATES], rows), findings, found


def some_steps(method: str, width: int, batch: int, images: Tensor, labels: Tensor) -> Callable[[], None]:
    model, optimizer = prepared(Cell(method, width, FIRST_RATES[method][128]))
    batches = Batches(images, labels, batch, 0)
    for _ in range(SETTLED):
        train_step(model, optimizer, *batches.next())

    def steps() -> None:
        for _ in range(ROUND):
            train_step(model, optimizer, *batches.next())

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(QUESTIONS), required=True)
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append", help="of the race; default: all")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "adabatch-second-order")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    lab = Lab(options.cache, options.minutes)
    if options.part == "sweeps":
        power = lambda value: f"2^{math.log2(value):.0f}" if value == value else "unknown"  # noqa: E731
        short = lambda value: f"{value:g}"  # noqa: E731
        # In this order, since a deadline is to cut the widest Shampoo, the slowest runs.
        dampings = swept(lab, "kfac", "damping", DAMPINGS)
        of_kfac, of_shampoo = (swept(lab, method, "lr", values) for method, values in RATES.items())
        rates = of_kfac | of_shampoo
        tables = [
            sweep_table("Learning rates of K-FAC (seeds 0 / 1 / 2), damping 0.01", of_kfac, RATES["kfac"], power),
            sweep_table("Learning rates of Shampoo, epsilon 0.01", of_shampoo, RATES["shampoo"], power),
            sweep_table("Dampings at learning rate 2^-5", dampings, DAMPINGS, short),
        ]
        findings = sweep_findings(rates, "learning rate", power) + sweep_findings(dampings, "damping", short)
        data: dict[str, Any] = {"rates": rates, "dampings": dampings}
        if not options.no_save:
            picture(rates, dampings, RESULTS / "second_order.png")
    elif options.part == "race":
        table, findings, numbers = raced(lab, options.batch or BATCHES)
        tables, data = [table], {"races": numbers}
    else:
        table, findings, numbers = costs()
        tables, data = [table], {"cost": numbers}
    publish(
        NAMES[options.part],
        question=QUESTIONS[options.part],
        machine=machine,
        tables=tables,
        findings=findings,
        data=data,
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
