"""Does the noise scale say up to which batch size a larger batch costs nothing?

    ADABATCH_DATA=... python benchmarks/critical_batch.py [--no-save]

A small CNN trains on MNIST at a constant batch of 8 with AdamW. At four points of the run, branches take 4,096 examples
each at batch sizes from 8 to 512, from the same weights, optimizer state and data, at learning rates by the gain rule
and by the sqrt rule. The largest batch whose loss is that of a batch of 8, within a tolerance, is the critical batch
(``adabatch.batch.critical_batch``). Beside it stands the noise scale at that point: as the run measured it, and from
4,096 examples at fixed weights. Losses are those on 4,000 examples that are never trained on."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from _harness import RESULTS, Machine, Table, publish
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import adabatch
from adabatch.batch import critical_batch
from adabatch.lr.rules import LRRule, lr_factor
from adabatch.recipes.data import Mnist
from adabatch.recipes.models import MnistCNN

SIZES = (8, 16, 32, 64, 128, 256, 512)
REFERENCE, LR = 8, 1e-3
POINTS = (1_024, 4_096, 12_288, 24_576)  # examples of the run so far
WINDOW = 4_096  # examples of a branch
SEEDS = (0, 1, 2)
RULES: tuple[LRRule, ...] = ("gain", "sqrt")
TOLERANCES = (0.01, 0.05, 0.2)

Pair = tuple[Tensor, Tensor]


class Point(NamedTuple):
    """One point of one run.

    Args:
        seed, examples: which one.
        averaged: the noise scale that the run had measured by then, in examples.
        fixed: that of the weights there, from many examples.
        start: validation loss there.
        losses: rule -> batch size -> validation loss at the end of the branch.
    """

    seed: int
    examples: int
    averaged: float
    fixed: float
    start: float
    losses: dict[str, dict[int, float]]


def data() -> tuple[Pair, Pair]:
    """Examples to train on, in their own order, and to judge by."""
    images, labels = (tensor[:36_768] for tensor in Mnist("train").tensors)
    return (images[4_000:], labels[4_000:]), (images[:4_000], labels[:4_000])


def loss_of(model: torch.nn.Module, pair: Pair) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(pair[0]), pair[1]))


def noise_scale(model: torch.nn.Module, pair: Pair, *, part: int = 16) -> float:
    """Noise over signal at fixed weights, from the gradients of equal parts."""
    parts = []
    for x, y in zip(pair[0].split(part), pair[1].split(part), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        parts.append(torch.cat([grad.flatten() for grad in grads]))
    every = torch.stack(parts)
    noise = part * float(every.var(0, unbiased=True).sum(dtype=torch.float64))
    signal = float(every.mean(0).square().sum(dtype=torch.float64)) - noise / (part * len(parts))
    return noise / signal if signal > 0 else math.inf


def branch(model: Any, optimizer: torch.optim.Optimizer, pair: Pair, size: int, factor: float, judge: Pair) -> float:
    """Trains copies of model and optimizer on all of ``pair``; their loss afterwards."""
    state = optimizer.state_dict()
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    optimizer.load_state_dict(copy.deepcopy(state))
    optimizer.param_groups[0]["lr"] = LR * factor
    for x, y in zip(pair[0].split(size), pair[1].split(size), strict=True):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss_of(model, judge)


def points(seed: int, train: Pair, judge: Pair) -> Iterator[Point]:
    """One run, and its branches."""
    torch.manual_seed(seed)
    order = torch.randperm(len(train[0]))
    images, labels = train[0][order], train[1][order]
    model = MnistCNN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    dataset = torch.utils.data.TensorDataset(images, labels)
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        adabatch.Constant(REFERENCE),
        micro_batch_size=2,
        limits=adabatch.Limits(REFERENCE, REFERENCE),
        lr_rule="none",
        measure=adabatch.Measure(monitor=True),
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    done = 0
    for step in batches.steps(loader, until=adabatch.examples(POINTS[-1])):
        for x, y in step:
            step.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        done += REFERENCE
        if done not in POINTS:
            continue
        averaged = batches.noise_scale
        window = images[done : done + WINDOW], labels[done : done + WINDOW]
        plain = MnistCNN()  # without the hooks of the probe
        plain.load_state_dict(model.state_dict())
        fixed = noise_scale(plain, window)
        known = averaged if 0 < averaged < math.inf else fixed  # the gain needs no more: noise over signal
        losses = {
            rule: {
                size: branch(
                    plain,
                    optimizer,
                    window,
                    size,
                    lr_factor(rule, size, reference=REFERENCE, noise=known, signal=1.0),
                    judge,
                )
                for size in SIZES
            }
            for rule in RULES
        }
        yield Point(seed, done, averaged, fixed, loss_of(plain, judge), losses)
    batches.remove()


class Measured(NamedTuple):
    """All seeds at one point, under one rule.

    Args:
        crossings: where the mean loss of the seeds leaves each tolerance, and whether that is a bound only.
        noise_scale: median of what the runs measured, of those that saw a signal.
        fixed: median at fixed weights.
    """

    crossings: dict[float, tuple[float, bool]]
    noise_scale: float
    fixed: float


def known(values: list[float]) -> list[float]:
    return [value for value in values if 0 < value < math.inf]


def measured(found: list[Point], examples: int, rule: str) -> Measured:
    """The mean over seeds first: losses of single branches differ by some 10 % by chance."""
    here = [point for point in found if point.examples == examples]
    losses = {size: statistics.fmean(point.losses[rule][size] for point in here) for size in SIZES}
    crossings = {}
    for tolerance in TOLERANCES:
        outcome = critical_batch(losses, tolerance=tolerance)
        crossings[tolerance] = (float(outcome.size), True) if outcome.is_bound else (outcome.crossing, False)
    scales, fixed = known([point.averaged for point in here]), known([point.fixed for point in here])
    return Measured(crossings, statistics.median(scales), statistics.median(fixed))


def middle(values: list[float]) -> str:
    """The median of the seeds, and their range; seeds at which no signal was seen are counted."""
    usable = known(values)
    without = len(values) - len(usable)
    text = f"{statistics.median(usable):,.0f} ({min(usable):,.0f} to {max(usable):,.0f})"
    return text + (f", {without} without signal" if without else "")


def critical_table(found: list[Point], rule: str) -> Table:
    """A row for each point: the critical batch at each tolerance, beside the noise scale."""
    rows = []
    for examples in POINTS:
        here = [point for point in found if point.examples == examples]
        outcome = measured(found, examples, rule)
        value, is_bound = outcome.crossings[TOLERANCES[1]]
        rows.append(
            (
                f"{examples:,}",
                f"{statistics.median(point.start for point in here):.3f}",
                middle([point.averaged for point in here]),
                middle([point.fixed for point in here]),
                *(f"{'>= ' if at_end else ''}{size:,.0f}" for size, at_end in outcome.crossings.values()),
                f"{'>= ' if is_bound else ''}{value / outcome.noise_scale:.2g}",
                f"{'>= ' if is_bound else ''}{value / outcome.fixed:.2g}",
            )
        )
    head = ("examples", "loss", "noise scale of the run", "noise scale at the weights")
    over = (f"critical {TOLERANCES[1]:.0%} / run's", f"critical {TOLERANCES[1]:.0%} / weights'")
    columns = (*head, *(f"critical, {share:.0%}" for share in TOLERANCES), *over)
    return Table(f"Rule {rule}: losses are means of {len(SEEDS)} seeds", columns, rows)


def loss_table(found: list[Point], rule: str) -> Table:
    """Losses of all branches, over that of the smallest batch."""
    rows = []
    for examples in POINTS:
        here = [point.losses[rule] for point in found if point.examples == examples]
        excess = [statistics.fmean(losses[size] / losses[SIZES[0]] for losses in here) - 1 for size in SIZES]
        rows.append((f"{examples:,}", *(f"{value:+.1%}" for value in excess)))
    return Table(f"Rule {rule}: loss over that of batch {SIZES[0]}, mean", ("examples", *map(str, SIZES)), rows)


def draw(found: list[Point]) -> None:
    """Measured against predicted, for both rules."""
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(RULES), sharey=True)
    for panel, rule in zip(axes, RULES, strict=True):
        for number, examples in enumerate(POINTS):
            outcome = measured(found, examples, rule)
            value, is_bound = outcome.crossings[TOLERANCES[1]]
            style = {"color": f"C{number}", "marker": "^" if is_bound else "o", "linestyle": "none"}
            panel.loglog([outcome.noise_scale], [value], label=f"{examples:,} examples", **style)
            panel.loglog([outcome.fixed], [value], fillstyle="none", **style)
        panel.plot([8, 2000], [8, 2000], color="#999999", linewidth=1)
        panel.set(xlabel="noise scale (examples)", title=f"rule {rule}")
    axes[0].set(ylabel=f"critical batch at {TOLERANCES[1]:.0%} (examples)")
    axes[0].legend(frameon=False, title="filled: of the run, open: at the weights")
    figure.savefig(RESULTS / "critical_batch.png")


def findings(found: list[Point]) -> list[str]:
    """What is seen, from the numbers."""
    said = []
    for rule in RULES:
        outcomes = [measured(found, examples, rule) for examples in POINTS]
        ratios = [outcome.crossings[TOLERANCES[1]][0] / outcome.noise_scale for outcome in outcomes]
        said.append(
            f"Rule {rule}, tolerance {TOLERANCES[1]:.0%}: the critical batch is {min(ratios):.2g} to {max(ratios):.2g} "
            f"times the noise scale that the runs measured (geometric mean {statistics.geometric_mean(ratios):.2g})."
        )
    return [
        *said,
        "A critical batch belongs to a window, an optimizer, a rule and a tolerance: compare the columns of one row "
        "before you read a ratio as a property of the model.",
        "The learning rate of the smallest batch was not tuned: where it is too small or too large for the window, a "
        "larger batch wins (negative entries of the loss tables), and the critical batch is overestimated.",
    ]


def report(found: list[Point], machine: Machine, *, save: bool) -> None:
    """Tables, numbers and picture of all points."""
    if save:
        draw(found)
    publish(
        "critical_batch",
        question="Does the noise scale say up to which batch size a larger batch costs nothing?\n\n"
        "![critical batch against noise scale](critical_batch.png)",
        machine=machine,
        tables=[table(found, rule) for rule in RULES for table in (critical_table, loss_table)],
        findings=findings(found),
        data={f"seed {point.seed}, {point.examples} examples": plain(point) for point in found},
        save=save,
    )


def plain(point: Point) -> dict[str, Any]:
    """For JSON: a noise scale without a signal is None."""
    averaged = point.averaged if math.isfinite(point.averaged) else None
    return {**point._asdict(), "averaged": averaged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    train, judge = data()
    found = []
    for seed in SEEDS:
        for point in points(seed, train, judge):
            found.append(point)
            print(point, flush=True)
    report(found, machine, save=not options.no_save)


if __name__ == "__main__":
    main()
