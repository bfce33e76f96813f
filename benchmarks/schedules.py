"""Which schedule ends lowest when its learning rate was tuned at a shorter horizon, and whose curve moves least?

    ADABATCH_DATA=... python benchmarks/schedules.py [--cache FOLDER] [--minutes 40]

Two small tasks: MnistCNN under SGD with momentum, and a character transformer on tinyshakespeare under AdamW.
Each schedule gets a base learning rate at the shortest horizon (a grid of factor 2, one seed that serves no
other purpose) and keeps it at two and four times that horizon. "Epoch" is a fixed number of steps here: no run
comes to the end of its data, so no example is seen twice.

The refined schedule comes from the gradient norms that the tuned linear-decay run of the tuning seed had at the
shortest horizon: l2 norms for SGD, l1 norms for AdamW. Longer horizons stretch it in progress. All schedules
have the same few steps of warm-up before them.

The learning-curve difference is that of HyperbolicLR (Kim 2024, arXiv:2407.15200): two horizons' curves of the
validation loss, cut to the epochs that both have, smoothed by a Savitzky-Golay filter of 9 points and degree 2,
then the mean of ``|a - b| / (a + b)``. It is taken seed by seed: runs of a seed share initial weights and order
of examples at all horizons, so the schedule is all that makes them differ. Cut first and smoothed second, a
schedule that knows no horizon scores exactly 0.

Finished runs are kept in the cache folder by the settings that made them, and are not run again. Past
``--minutes`` no run is started, and what is published are the seeds that a task has for every
schedule and horizon."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from _harness import RESULTS, Machine, Spread, Table, publish
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from adabatch import ProgressLR, steps
from adabatch.lr import Shape, cosine, exp_hyperbolic, hyperbolic, linear, refine, wsd
from adabatch.recipes.data import Mnist, Text
from adabatch.recipes.models import MnistCNN, Transformer

matplotlib.use("agg")
from matplotlib import pyplot as plt

QUESTION = (
    "Linear decay, cosine, wsd, hyperbolic, exp-hyperbolic and a refined schedule at horizons x1, x2 and x4, with "
    "the base learning rate tuned once, at x1: which ends on the lowest validation loss, and whose learning curve "
    "depends least on the horizon?"
)
EPOCH, EPOCHS, WARMUP = 10, 12, 10  # steps, epochs of the shortest horizon, steps
HORIZONS = (1, 2, 4)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 1000
UPPER_BOUND, INFIMUM = 5, 1e-4  # the paper's 250 epochs for its shortest of 50; 1e-6 of 1e-2
REFINED, ANCHOR = "refined", "linear"
SCHEDULES: Mapping[str, Callable[[int], Shape]] = {
    ANCHOR: lambda horizon: linear(),
    "cosine": lambda horizon: cosine(),
    "wsd 0.2": lambda horizon: wsd(cooldown=0.2),
    "hyperbolic": lambda horizon: hyperbolic(**published(horizon)),
    "exp-hyperbolic": lambda horizon: exp_hyperbolic(**published(horizon)),
}
NAMES = (*SCHEDULES, REFINED)
MOST_EXTENSIONS = 4

Pair = tuple[Tensor, Tensor]


def published(horizon: int) -> dict[str, float]:
    """The settings of HyperbolicLR for a horizon; its decay runs over what the warm-up leaves."""
    length = num_steps(horizon) - WARMUP
    return {"upper_bound": UPPER_BOUND * num_steps(1), "infimum": INFIMUM, "max_iter": length}


def num_steps(horizon: int) -> int:
    return horizon * EPOCHS * EPOCH


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizer.

    Args:
        train, check, final: inputs and targets to train on, for the learning curve, and for the final loss.
        grid: the learning rates that tuning starts with.
        norm: order of the gradient norm that refining this optimizer's schedule needs.
        about: the task in words, for the table's title.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[Tensor], float], Optimizer]
    kind: Literal["sgd", "adam"]
    norm: float
    batch: int
    grid: tuple[float, ...]
    train: Pair
    check: Pair
    final: Pair


def spread(tensors: Sequence[Tensor], count: int) -> Pair:
    """``count`` examples at equal distances."""
    rows = torch.linspace(0, len(tensors[0]) - 1, count).long()
    return tensors[0][rows], tensors[1][rows]


def tasks() -> list[Task]:
    images, unseen = Mnist("train"), Mnist("test")
    text, rest = Text("train", 64), Text("test", 64)
    return [
        Task(
            name="MNIST CNN",
            about="MnistCNN, SGD with momentum 0.9, batch 16; curve on 250 and final loss on 2,000 test images",
            model=lambda: MnistCNN().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            optimizer=lambda params, lr: SGD(params, lr, momentum=0.9),
            kind="sgd",
            norm=2.0,
            batch=16,
            grid=(0.02, 0.04, 0.08),
            train=(images.tensors[0], images.tensors[1]),
            check=spread(unseen.tensors, 250),
            final=spread(unseen.tensors, 2000),
        ),
        Task(
            name="character transformer",
            about="2 layers of width 64, 4 heads, AdamW (0.9, 0.95, decay 0.1), batch 8 x 64 characters of "
            "tinyshakespeare; curve on 4,096 and final loss on 40,960 test characters",
            model=lambda: Transformer(len(text.vocabulary), 64, width=64, depth=2, num_heads=4),
            optimizer=lambda params, lr: AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
            kind="adam",
            norm=1.0,
            batch=8,
            grid=(0.002, 0.004, 0.008),
            train=(text.tensors[0], text.tensors[1]),
            check=spread(rest.tensors, 64),
            final=spread(rest.tensors, 640),
        ),
    ]


class Job(NamedTuple):
    """One run; ``record`` keeps its gradient norms."""

    task: str
    shape: Shape
    horizon: int
    seed: int
    lr: float
    record: bool = False

    def key(self, task: Task) -> str:
        """Of everything that the run's result depends on."""
        setting = (EPOCH, EPOCHS, WARMUP, task.about, task.batch, {**self._asdict(), "shape": self.shape.to_dict()})
        return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:24]


class Outcome(NamedTuple):
    """Validation loss after each epoch; final loss and share of right answers; gradient norms; wall time."""

    curve: list[float]
    loss: float
    accuracy: float
    norms: list[float]
    seconds: float


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, pair: Pair) -> tuple[float, float]:
    """Mean loss and share of right answers; infinite where the loss is no number."""
    loss, right = 0.0, 0.0
    for x, y in zip(pair[0].split(50), pair[1].split(50), strict=True):
        logits = model(x)
        loss += cross_entropy(logits, y).item() * len(x)
        right += (logits.argmax(-1) == y).float().mean().item() * len(x)
    mean = loss / len(pair[0])
    return mean if math.isfinite(mean) else math.inf, right / len(pair[0])


def train(task: Task, job: Job) -> Outcome:
    begin, total = time.monotonic(), num_steps(job.horizon)
    torch.manual_seed(job.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters(), job.lr)
    schedule = ProgressLR(optimizer, job.shape, total=steps(total), warmup=steps(WARMUP))
    order = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(job.seed))
    curve: list[float] = []
    norms: list[float] = []
    for step, rows in enumerate(order[: total * task.batch].split(task.batch), 1):
        optimizer.zero_grad()
        cross_entropy(model(task.train[0][rows]), task.train[1][rows]).backward()
        if job.record:
            gradients = [param.grad for param in model.parameters() if param.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients, norm_type=task.norm)))
        optimizer.step()
        schedule.step()
        if step % EPOCH == 0:
            curve.append(evaluate(model, task.check)[0])
    return Outcome(curve, *evaluate(model, task.final), norms, time.monotonic() - begin)


class OutOfTimeError(Exception):
    """No further run may start."""


class Runner:
    """Runs jobs, unless the cache folder has their outcomes; ``seconds`` is what all of them took."""

    def __init__(self, cache: Path, deadline: float) -> None:
        self.cache = cache
        self.deadline = deadline
        self.seconds = 0.0
        cache.mkdir(parents=True, exist_ok=True)

    def __call__(self, task: Task, job: Job) -> Outcome:
        file = self.cache / f"{job.key(task)}.json"
        if file.exists():
            outcome = Outcome(**json.loads(file.read_text()))
            self.seconds += outcome.seconds
            return outcome
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        outcome = train(task, job)
        self.seconds += outcome.seconds
        part = file.with_suffix(".part")
        part.write_text(json.dumps(outcome._asdict()))
        part.replace(file)
        return outcome


class Tuned(NamedTuple):
    """A schedule with the base learning rate that was best at the shortest horizon, and all that were tried."""

    lr: float
    tried: dict[float, float]
    best: Outcome


def tune(run: Runner, task: Task, shape: Shape, *, record: bool = False) -> Tuned:
    """The best of a grid, which grows by a factor of 2 as long as an end of it is the best."""

    def attempt(lr: float) -> Outcome:
        return run(task, Job(task.name, shape, 1, TUNING_SEED, lr, record))

    tried = {lr: attempt(lr) for lr in task.grid}
    for _ in range(MOST_EXTENSIONS):
        best = min(tried, key=lambda lr: tried[lr].loss)
        if min(tried) < best < max(tried):
            break
        new = best / 2 if best == min(tried) else best * 2
        tried[new] = attempt(new)
    best = min(tried, key=lambda lr: tried[lr].loss)
    return Tuned(best, {lr: tried[lr].loss for lr in sorted(tried)}, tried[best])


@dataclass(frozen=True)
class Study:
    """All that is known of a task.

    Args:
        tuned: of each schedule.
        shapes: by schedule and horizon.
        norms: of the gradients that the refined schedule was made from.
        runs: outcomes by schedule, horizon and seed.
    """

    task: Task
    tuned: dict[str, Tuned]
    shapes: dict[tuple[str, int], Shape]
    norms: list[float]
    runs: dict[tuple[str, int, int], Outcome]

    @property
    def seeds(self) -> list[int]:
        """Those that every schedule has at every horizon."""
        return [seed for seed in SEEDS if all((*cell, seed) in self.runs for cell in self.shapes)]

    def of(self, name: str, horizon: int) -> list[Outcome]:
        """One outcome a complete seed."""
        return [self.runs[name, horizon, seed] for seed in self.seeds]


def prepare(run: Runner, task: Task) -> Study:
    """Tunes every schedule at the shortest horizon; the refined one is made on the way."""
    tuned = {ANCHOR: tune(run, task, SCHEDULES[ANCHOR](1), record=True)}
    norms = tuned[ANCHOR].best.norms
    refined = refine(norms[WARMUP:], task.kind)
    shapes = {(name, horizon): make(horizon) for name, make in SCHEDULES.items() for horizon in HORIZONS}
    shapes |= {(REFINED, horizon): refined for horizon in HORIZONS}
    for name in NAMES:
        if name != ANCHOR:
            tuned[name] = tune(run, task, shapes[name, 1])
        print(f"{task.name}: {name} at {tuned[name].lr:g}, {tuned[name].best.loss:.4f}", flush=True)
    return Study(task, tuned, shapes, norms, {})


def measure(run: Runner, studies: Sequence[Study]) -> None:
    """Runs everything, seed by seed, as far as time allows."""
    try:
        for seed in SEEDS:
            begin = time.monotonic()
            for study in studies:
                for (name, horizon), shape in study.shapes.items():
                    job = Job(study.task.name, shape, horizon, seed, study.tuned[name].lr)
                    study.runs[name, horizon, seed] = run(study.task, job)
            print(f"seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)
    except OutOfTimeError:
        print("out of time", flush=True)


def savitzky_golay(values: ArrayLike, window: int = 9, degree: int = 2) -> NDArray[np.float64]:
    """Each value replaced by that of a polynomial fitted to the window around it; the first and the last half
    window are read off the first and the last fit."""
    series = np.asarray(values, dtype=np.float64)
    half = window // 2
    places = np.vander(np.arange(window), degree + 1)
    hat = places @ np.linalg.pinv(places)  # values of a window -> the fit's values there, (window, window)
    windows = np.lib.stride_tricks.sliding_window_view(series, window)
    return np.concatenate([hat[:half] @ windows[0], windows @ hat[half], hat[half + 1 :] @ windows[-1]])


def curve_difference(a: Sequence[float], b: Sequence[float], *, smooth: bool = True) -> float:
    """Mean of ``|a - b| / (a + b)`` over the epochs that both curves have."""
    shared = min(len(a), len(b))
    first, second = (savitzky_golay(c[:shared]) if smooth else np.asarray(c[:shared]) for c in (a, b))
    return float(np.mean(np.abs(first - second) / (first + second)))


class Summary(NamedTuple):
    """What the tables and findings are made of, by schedule and horizon (or pair of horizons)."""

    final: dict[tuple[str, int], Spread]
    accuracy: dict[tuple[str, int], Spread]
    to_anchor: dict[tuple[str, int], Spread]
    differences: dict[tuple[str, int, int], Spread]
    raw_differences: dict[tuple[str, int, int], Spread]
    least_smoothed: float

    def ranking(self, horizon: int) -> list[str]:
        return sorted(NAMES, key=lambda name: self.final[name, horizon].mean)

    def steadiest(self, pair: tuple[int, int]) -> list[str]:
        return sorted(NAMES, key=lambda name: self.differences[(name, *pair)].mean)


PAIRS = ((1, 2), (2, 4), (1, 4))


def summarize(study: Study) -> Summary:
    def curves(name: str, pair: tuple[int, int], *, smooth: bool) -> Spread:
        both = zip(*(study.of(name, horizon) for horizon in pair), strict=True)
        return Spread.of([curve_difference(a.curve, b.curve, smooth=smooth) for a, b in both])

    def apart(name: str, horizon: int) -> Spread:
        both = zip(study.of(name, horizon), study.of(ANCHOR, horizon), strict=True)
        return Spread.of([mine.loss - other.loss for mine, other in both])

    cells = list(study.shapes)
    pairs = [(name, *pair) for name in NAMES for pair in PAIRS]
    return Summary(
        final={cell: Spread.of([run.loss for run in study.of(*cell)]) for cell in cells},
        accuracy={cell: Spread.of([100 * run.accuracy for run in study.of(*cell)]) for cell in cells},
        to_anchor={cell: apart(*cell) for cell in cells},
        differences={(n, a, b): curves(n, (a, b), smooth=True) for n, a, b in pairs},
        raw_differences={(n, a, b): curves(n, (a, b), smooth=False) for n, a, b in pairs},
        least_smoothed=min(float(savitzky_golay(run.curve).min()) for cell in cells for run in study.of(*cell)),
    )


def tables(study: Study, summary: Summary) -> list[Table]:
    task = study.task
    columns = [f"x{horizon}" for horizon in HORIZONS]
    ranks = {horizon: summary.ranking(horizon) for horizon in HORIZONS}

    def ranked(name: str, horizon: int) -> str:
        return f"{summary.final[name, horizon].show()} ({ranks[horizon].index(name) + 1})"

    def apart(name: str, horizon: int) -> str:
        found = summary.to_anchor[name, horizon]
        return f"{found.show(sign='+')}{' *' if found.clear else ''}"

    ordered = ranks[HORIZONS[-1]]
    final = [
        (
            name,
            f"{study.tuned[name].lr:g}",
            *(ranked(name, horizon) for horizon in HORIZONS),
            summary.accuracy[name, HORIZONS[-1]].show(2),
        )
        for name in ordered
    ]
    others = [name for name in ordered if name != ANCHOR]
    moved = [
        (
            name,
            *(summary.differences[(name, *pair)].show() for pair in PAIRS),
            summary.raw_differences[name, 1, 4].show(),
        )
        for name in summary.steadiest((1, 4))
    ]
    rates = sorted({lr for tuned in study.tuned.values() for lr in tuned.tried})
    tried = [
        (name, *(f"{study.tuned[name].tried[lr]:.4f}" if lr in study.tuned[name].tried else "" for lr in rates))
        for name in NAMES
    ]
    return [
        Table(
            f"{task.name}: final validation loss, mean ± standard deviation over {len(study.seeds)} seeds (rank). "
            f"{task.about}",
            ("schedule", "base LR", *columns, f"x{HORIZONS[-1]} accuracy, %"),
            final,
        ),
        Table(
            f"{task.name}: final loss less that of {ANCHOR} with the same seed, mean ± standard deviation "
            "(*: differs from 0, t test at 95 %)",
            ("schedule", *columns),
            [(name, *(apart(name, horizon) for horizon in HORIZONS)) for name in others],
        ),
        Table(
            f"{task.name}: learning-curve difference between horizons, lower is steadier",
            ("schedule", *(f"x{a} to x{b}" for a, b in PAIRS), "x1 to x4, not smoothed"),
            moved,
        ),
        Table(
            f"{task.name}: tuning at x1, final loss of the tuning seed by base LR",
            ("schedule", *(f"{lr:g}" for lr in rates)),
            tried,
        ),
    ]


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Kendall's tau of two orders of the same names."""
    signs = [
        np.sign((first.index(a) - first.index(b)) * (second.index(a) - second.index(b)))
        for i, a in enumerate(NAMES)
        for b in NAMES[:i]
    ]
    return float(np.mean(signs))


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def findings(study: Study, summary: Summary) -> list[str]:
    task, told = study.task.name, []
    for horizon in HORIZONS:
        apart = {name: summary.to_anchor[name, horizon] for name in NAMES if name != ANCHOR}
        better = [name for name, found in apart.items() if found.clear and found.mean < 0]
        worse = [name for name, found in apart.items() if found.clear and found.mean > 0]
        told.append(
            f"{task}, x{horizon}: from lowest loss to highest {listed(summary.ranking(horizon))}. Clearly below "
            f"{ANCHOR}: {listed(better)}; clearly above: {listed(worse)}."
        )
    first, last = HORIZONS[0], HORIZONS[-1]
    kept = agreement(summary.ranking(first), summary.ranking(last))
    told.append(f"{task}: Kendall's tau between the ranking at x{first} and that at x{last} is {kept:+.2f}.")
    steady = summary.steadiest((first, last))
    tau = agreement(steady, summary.ranking(last))
    told.append(
        f"{task}: steadiest from x{first} to x{last}: {listed(steady)}. Kendall's tau between that order and the "
        f"ranking by final loss at x{last} is {tau:+.2f} (+1: the steadiest ends lowest)."
    )
    progress = np.linspace(0, 1, 201)
    factors = study.shapes[REFINED, first](progress)
    told.append(
        f"{task}: the refined schedule peaks at progress {progress[factors.argmax()]:.2f}, has a mean of "
        f"{factors.mean():.2f} ({ANCHOR}: 0.50), and {factors[100]:.2f} of its peak is left at half-way."
    )
    fragile = [name for name, tuned in study.tuned.items() if tuned.tried.get(2 * tuned.lr, 0) > 3 * tuned.best.loss]
    if fragile:
        told.append(
            f"{task}: twice the tuned base LR ends on more than three times the loss for {listed(fragile)}: one seed "
            "tuned them next to where training fails, which may be what they pay for at longer horizons."
        )
    edges = [name for name, tuned in study.tuned.items() if tuned.lr in (min(tuned.tried), max(tuned.tried))]
    if edges:
        told.append(f"{task}: tuning ended on an edge of its grid for {listed(edges)}.")
    if summary.least_smoothed <= 0:
        told.append(
            f"{task}: smoothing takes some curves to {summary.least_smoothed:.3f}, below zero, where the measure "
            "loses its meaning; read the column that is not smoothed."
        )
    return told


def record(study: Study, summary: Summary) -> dict[str, Any]:
    """The numbers behind a task's tables."""

    def runs(name: str, horizon: int) -> list[dict[str, Any]]:
        return [
            {
                "seed": seed,
                "loss": round(run.loss, 6),
                "accuracy": round(run.accuracy, 6),
                "curve": " ".join(f"{value:.5g}" for value in run.curve),
            }
            for seed, run in zip(study.seeds, study.of(name, horizon), strict=True)
        ]

    return {
        "about": study.task.about,
        "base_lr": {name: study.tuned[name].lr for name in NAMES},
        "tuning": {name: {f"{lr:g}": loss for lr, loss in study.tuned[name].tried.items()} for name in NAMES},
        "refined_from_norms": " ".join(f"{value:.5g}" for value in study.norms),
        "runs": {f"{name} x{horizon}": runs(name, horizon) for name, horizon in study.shapes},
        "curve_difference": {
            f"{name} x{a} to x{b}": {
                "smoothed": summary.differences[name, a, b]._asdict(),
                "raw": summary.raw_differences[name, a, b]._asdict(),
            }
            for name, a, b in summary.differences
        },
    }


def draw(studies: Sequence[Study], summaries: Sequence[Summary], path: Path) -> None:
    """A row a task: learning rates, learning curves at the first and last horizon, final losses."""
    figure, axes = plt.subplots(len(studies), 3, figsize=(15, 4.3 * len(studies)), layout="constrained")
    for (rates, curves, ends), study, summary in zip(axes, studies, summaries, strict=True):
        for index, name in enumerate(NAMES):
            color = f"C{index}"
            for horizon, line in ((HORIZONS[0], ":"), (HORIZONS[-1], "-")):
                total = num_steps(horizon)
                at = np.arange(WARMUP, total)
                lr = study.tuned[name].lr * study.shapes[name, horizon]((at - WARMUP) / (total - WARMUP))
                rates.plot(at, lr, line, color=color, lw=1.3)
                mean = np.mean([run.curve for run in study.of(name, horizon)], axis=0)
                curves.plot(np.arange(1, len(mean) + 1), mean, line, color=color, lw=1.3)
            apart = [summary.to_anchor[name, horizon] for horizon in HORIZONS]
            error = [found.deviation / math.sqrt(found.number) for found in apart]
            places = np.arange(len(HORIZONS)) + 0.04 * (index - len(NAMES) / 2)
            ends.errorbar(places, [found.mean for found in apart], error, fmt="o-", color=color, lw=1, label=name)
        rates.set(xlabel="step", ylabel="learning rate", title=f"{study.task.name}: x1 dotted, x4 solid")
        curves.set(xlabel=f"epoch of {EPOCH} steps", ylabel="validation loss", xscale="log", yscale="log")
        curves.set_title("mean learning curve: x1 dotted, x4 solid")
        ends.set(ylabel=f"final loss less that of {ANCHOR}", xlabel="horizon")
        ends.set_xticks(range(len(HORIZONS)), [f"x{horizon}" for horizon in HORIZONS])
        ends.set_title(f"mean and standard error over {len(study.seeds)} seeds", fontsize=10)
        ends.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def setting(studies: Sequence[Study], seconds: float) -> list[str]:
    """What must be known to read the tables."""

    def ends(name: str) -> str:
        return ", ".join(f"{SCHEDULES[name](horizon)(1.0):.3f}" for horizon in HORIZONS)

    lengths = ", ".join(f"{num_steps(horizon)}" for horizon in HORIZONS)
    told = [
        f"Small runs: {lengths} steps at x1, x2, x4, {WARMUP} of them warm-up for every schedule; an epoch is "
        f"{EPOCH} steps, no example is seen twice, and learning stops far from convergence.",
        "Seeds of a schedule differ in weights and order of examples; schedules and horizons share them. Tuned at "
        "x1 on one other seed, on a grid of factor 2 and on the same validation examples: a schedule's base LR may be "
        "off by the square root of 2, which is part of what is compared.",
        f"hyperbolic and exp-hyperbolic take an upper bound of {UPPER_BOUND} times x1 (their paper: 250 epochs for 50) "
        f"and an infimum of {INFIMUM:g} of the base LR, neither of them tuned; at x1, x2, x4 they end on "
        f"{ends('hyperbolic')} and {ends('exp-hyperbolic')} of the base LR.",
        "Clearly below or above means a single t test at 95 %, 30 of them in all, not corrected: one or two may be "
        "chance.",
        "Where tuned base LRs differ, what happens at longer horizons belongs to schedule and base LR together. The "
        "curves of wsd are the same at all horizons until the shorter one's cooldown: it is steady by construction.",
        f"All runs, tuning included, took {seconds / 60:.0f} minutes on one thread, waiting for other work on the "
        "machine included.",
    ]
    if any(len(study.seeds) < len(SEEDS) for study in studies):
        counts = ", ".join(f"{study.task.name} {len(study.seeds)}" for study in studies)
        told.insert(0, f"Stopped early: of {len(SEEDS)} seeds planned these many are complete and reported: {counts}.")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "adabatch-schedules"
    parser.add_argument("--cache", type=Path, default=default, help="folder of finished runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    run = Runner(options.cache, time.monotonic() + 60 * options.minutes)
    studies = [prepare(run, task) for task in tasks()]
    measure(run, studies)
    if min(len(study.seeds) for study in studies) < 2:
        parser.error("a spread needs two complete seeds: run again, finished runs are kept")
    summaries = [summarize(study) for study in studies]
    if not options.no_save:
        RESULTS.mkdir(exist_ok=True)
        draw(studies, summaries, RESULTS / "schedules.png")
    both = list(zip(studies, summaries, strict=True))
    publish(
        "schedules",
        question=f"{QUESTION}\n\n![learning rates, learning curves, final losses](schedules.png)",
        machine=machine,
        tables=[table for study, summary in both for table in tables(study, summary)],
        findings=[
            *setting(studies, run.seconds),
            *(line for study, summary in both for line in findings(study, summary)),
        ],
        data={study.task.name: record(study, summary) for study, summary in both},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
