"""On which clock, and under which rule, does training not depend on the batch size?

    ADABATCH_DATA=... python benchmarks/clock.py

The same model is trained by plain SGD at a constant small batch, at a constant large one, and with a batch that
grows from one to the other (doubled at each sixth of the progress). The small batch is the reference: its factor is
1 under every rule, and a total of T of its steps is the same run on every clock. What the other two do depends on
clock and rule: the linear decay of the learning rate runs over the clock, and so does the axis that their losses are
drawn against.

The distance of a pair of clock and rule: for two curves of the held-out loss L against progress p, the mean of
``|ln L_1(p) - ln L_2(p)|`` over p = 1/40, 2/40, ..., 1; the mean of that over the three pairs among small, large and
growing of a seed; mean and standard deviation over seeds. A curve is read after the first step past each of these p,
and interpolated in between (a large batch may take fewer steps than that). A loss above 10, or not finite, counts as
10. The floor is the distance of two small-batch runs that differ in the order of the data alone.

Runs of a seed share initial weights and order of the data. The base learning rate is tuned for the small batch on a
seed of its own, and carried over by the rule. Noise and signal come from the exact probe. Tokens would be another name
for examples here, as every example holds equally many."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import matplotlib
import numpy as np
import torch
from _harness import RESULTS, Machine, Spread, Table, publish
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, PerExampleProbe, ProgressLR, Stage, Stages
from adabatch.batch import Schedule
from adabatch.batch.plan import Duration, Unit
from adabatch.lr import linear
from adabatch.lr.rules import LRRule
from adabatch.recipes import Mnist, collate
from adabatch.recipes.models import MLP, LogisticRegression

matplotlib.use("agg")
from matplotlib import pyplot as plt

Pair = tuple[Unit, LRRule]
FloatArray = NDArray[np.float64]

QUESTION = (
    "The same model trained by SGD at a constant small, a constant large and a growing batch: under which clock (what "
    "progress counts) and which rule (how the learning rate follows the batch) do the three curves of the held-out "
    "loss against progress lie on each other?"
)
SMALL, LARGE = 16, 512
NUM_STEPS = 600  # of the small batch
GRID = 40  # points of the curves
CAP = 10.0
SEEDS, TUNING_SEED, REORDERED = (0, 1, 2, 3, 4), 1000, 100
BASE_LRS = tuple(0.05 * 2**k for k in range(6))
CLOCKS: tuple[Unit, ...] = ("examples", "steps", "gain_steps")
RULES: tuple[LRRule, ...] = get_args(LRRule)
POLICIES = ("small", "large", "growing")
ALL_PAIRS = tuple(itertools.product(CLOCKS, RULES))
MATCHED: tuple[Pair, ...] = (("examples", "linear"), ("steps", "none"), ("gain_steps", "gain"))
OURS = MATCHED[-1]
DIVISORS, IN_FULL = (1, 2, 4, 8), (1, 2)  # of the tuned base learning rate: for the matched pairs, and for all
MODELS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "logistic regression": ("convex, 7,850 parameters", LogisticRegression),
    "MLP": ("784-32-10 with ReLU, 25,450 parameters", lambda: MLP((784, 32, 10))),
}

PROGRESS = np.arange(1, GRID + 1) / GRID


class Run(NamedTuple):
    """Held-out log-losses at ``PROGRESS``, and what the run took."""

    curve: FloatArray
    steps: int
    examples: int

    @property
    def loss(self) -> float:
        return math.exp(self.curve[-1])


class Bench:
    """MNIST, and the runs on it."""

    def __init__(self) -> None:
        self.data, unseen = Mnist("train"), Mnist("test")
        rows = torch.linspace(0, len(unseen) - 1, 2000).long()
        self.unseen = unseen.tensors[0][rows], unseen.tensors[1][rows]

    def run(self, model: str, policy: str, seed: int, base_lr: float, pair: Pair = OURS, order: int = 0) -> Run:
        """One run; ``order`` is added to the seed of the data's order."""
        clock, rule = pair
        total = Duration(NUM_STEPS * (SMALL if clock == "examples" else 1), clock)
        torch.manual_seed(seed)
        network = MODELS[model][1]()
        optimizer = SGD(network.parameters(), lr=base_lr)
        batches = AdaptiveBatch(
            network,
            optimizer,
            sizes(policy, total),
            micro_batch_size=SMALL,
            max_micro_batch_size=LARGE,
            limits=Limits(SMALL, LARGE),
            lr_rule=rule,
            reference_batch_size=SMALL,
            probe=PerExampleProbe(network),
        )
        schedule = ProgressLR(optimizer, linear(), batches, total=total)
        at, losses = [0.0], [self.loss(network)]
        for step in batches.steps(GlobalOrder(self.data, seed=seed + order, collate_fn=collate), until=total):
            for x, y in step:
                step.backward(F.cross_entropy(network(x), y))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done = batches.consumed.count(clock) / total.count
            if math.floor(done * GRID) > math.floor(at[-1] * GRID):
                at.append(done)
                losses.append(self.loss(network))
        batches.remove()
        return Run(np.interp(PROGRESS, at, losses), batches.consumed.steps, batches.consumed.examples)

    @torch.no_grad()
    def loss(self, network: nn.Module) -> float:
        """Logarithm of the held-out loss."""
        value = float(F.cross_entropy(network(self.unseen[0]), self.unseen[1]))
        return math.log(min(value, CAP) if math.isfinite(value) else CAP)


def sizes(policy: str, total: Duration) -> Schedule:
    """The batch sizes of a policy over a run."""
    if policy != "growing":
        return Constant({"small": SMALL, "large": LARGE}[policy])
    doublings = round(math.log2(LARGE / SMALL))
    at = [round(total.count * k / (doublings + 1)) for k in range(1, doublings + 1)]
    return Stages(SMALL, [Stage(Duration(count, total.unit), SMALL << k) for k, count in enumerate(at, 1)])


def distance(runs: Sequence[Run]) -> float:
    """Mean over all pairs of runs of the mean distance of their log-losses."""
    return float(np.mean([np.abs(a.curve - b.curve).mean() for a, b in itertools.combinations(runs, 2)]))


class Study(NamedTuple):
    """What was measured of a model.

    Args:
        base_lr: tuned for the small batch.
        tried: final loss of the tuning seed by base learning rate.
        runs: by what the base learning rate was divided by and by pair of clock and rule, then by seed: small, large
            and growing.
        floor: distances of two small-batch runs at the tuned base learning rate, by seed.
    """

    base_lr: float
    tried: dict[float, float]
    runs: dict[tuple[int, Pair], list[list[Run]]]
    floor: list[float]

    def distances(self, pair: Pair, divisor: int = 1) -> list[float]:
        """By seed."""
        return [distance(runs) for runs in self.runs[divisor, pair]]

    def of_means(self, pair: Pair, divisor: int = 1) -> float:
        """The distance of the curves averaged over seeds, in which the noise of single runs cancels."""
        seeds = self.runs[divisor, pair]
        curves = [np.mean([runs[which].curve for runs in seeds], axis=0) for which in range(len(POLICIES))]
        return distance([Run(curve, 0, 0) for curve in curves])


def measure(bench: Bench, model: str, seeds: Sequence[int]) -> Study:
    tried = {lr: bench.run(model, "small", TUNING_SEED, lr).loss for lr in BASE_LRS}
    base_lr = min(tried, key=lambda lr: tried[lr])
    study = Study(base_lr, tried, {}, [])
    for seed in seeds:
        for divisor in DIVISORS:
            lr = base_lr / divisor
            small = bench.run(model, "small", seed, lr)
            if divisor == 1:
                study.floor.append(distance([small, bench.run(model, "small", seed, lr, order=REORDERED)]))
            for pair in ALL_PAIRS if divisor in IN_FULL else MATCHED:
                others = [bench.run(model, policy, seed, lr, pair) for policy in POLICIES[1:]]
                study.runs.setdefault((divisor, pair), []).append([small, *others])
        print(f"{model}, seed {seed}: {study.distances(OURS)[-1]:.4f}", flush=True)
    return study


def words(pair: Pair) -> str:
    return f"{pair[0].replace('_', '-')} and {pair[1]}"


def called(divisor: int) -> str:
    return "tuned" if divisor == 1 else f"tuned / {divisor}"


def tables(model: str, study: Study) -> list[Table]:
    def took(pair: Pair, which: int) -> str:
        runs = [runs[which] for runs in study.runs[1, pair]]
        mean = [np.mean([getattr(run, name) for run in runs]) for name in ("steps", "examples", "loss")]
        return f"{mean[0]:,.0f} / {mean[1]:,.0f} / {mean[2]:.3f}"

    def found(pair: Pair, divisor: int) -> str:
        return Spread.of(study.distances(pair, divisor)).show()

    return [
        *(
            Table(
                f"{model} ({MODELS[model][0]}), base LR {study.base_lr / divisor:g}, {called(divisor)}: mean distance "
                f"of the curves ± standard deviation over {len(study.floor)} seeds",
                ["rule", *(f"clock of {clock.replace('_', '-')}" for clock in CLOCKS)],
                [[rule, *(found((clock, rule), divisor) for clock in CLOCKS)] for rule in RULES],
            )
            for divisor in IN_FULL
        ),
        Table(
            f"{model}: the same for the pairs that match, by base LR",
            ["clock and rule", *map(called, DIVISORS)],
            [[words(pair), *(found(pair, divisor) for divisor in DIVISORS)] for pair in MATCHED],
        ),
        Table(
            f"{model}, tuned: steps / examples / final held-out loss",
            ["clock and rule", *POLICIES],
            [[words(pair), *(took(pair, which) for which in range(3))] for pair in MATCHED],
        ),
        Table(
            f"{model}: tuning of the small batch, final held-out loss by base LR",
            [f"{lr:g}" for lr in study.tried],
            [[f"{loss:.4f}" for loss in study.tried.values()]],
        ),
    ]


def findings(model: str, study: Study) -> list[str]:
    told = []
    for divisor in IN_FULL:
        ours = study.distances(OURS, divisor)
        others = {pair: study.distances(pair, divisor) for pair in ALL_PAIRS if pair != OURS}
        apart = {pair: Spread.of([b - a for a, b in zip(ours, found, strict=True)]) for pair, found in others.items()}
        clear = [pair for pair, found in apart.items() if found.clear and found.mean > 0]
        near = min(others, key=lambda pair: apart[pair].mean)
        won = sum(all(found[index] > own for found in others.values()) for index, own in enumerate(ours))
        met = "met" if apart[near].mean > 0 else "missed"
        told.append(
            f"{model}, {called(divisor)}: {met}. {words(OURS)} has {Spread.of(ours).show()}, the closest of the other "
            f"pairs, {words(near)}, {Spread.of(others[near]).show()}. {len(clear)} of these {len(others)} are clearly "
            f"farther apart (paired t test at 95 %, not corrected); {words(OURS)} is the closest of all on {won} of "
            f"{len(ours)} seeds. Of curves averaged over seeds first: {study.of_means(OURS, divisor):.4f} and, at best "
            f"of the others, {min(study.of_means(pair, divisor) for pair in others):.4f}."
        )
    told.append(
        f"{model}: two small-batch runs that differ in the order of the data alone are {Spread.of(study.floor).show()} "
        f"apart at the tuned base LR."
    )
    return told


SETTING = (
    f"The small batch is {SMALL}, the large one {LARGE}; {NUM_STEPS} steps of the small batch ({NUM_STEPS * SMALL:,} "
    "examples, a sixth of an epoch), linear decay to zero, no momentum, no warm-up.",
    "A pair matches where its rule multiplies a step by what its clock counts for it: linear and examples, none and "
    "steps, gain and gain-steps. As the base LR goes to zero all three follow the gradient flow, at equal progress by "
    "equal distances, and lie on each other whatever the noise is; what tells them apart are finite steps and noise.",
    "The clock of steps buys its agreement with examples: there the large batch takes as many steps as the small one.",
    "The tuned base LR is next to where training fails: twice it is no better for the small batch. There the gain, "
    "which is for steps that curvature does not limit, makes a larger batch overshoot. At half of it there is room.",
)


def record(study: Study) -> dict[str, Any]:
    """The numbers behind a model's tables."""

    def of(run: Run) -> dict[str, Any]:
        losses = " ".join(f"{value:.4g}" for value in run.curve)
        return {"steps": run.steps, "examples": run.examples, "log_loss": losses}

    return {
        "base_lr": study.base_lr,
        "tuning": {f"{lr:g}": round(loss, 6) for lr, loss in study.tried.items()},
        "floor": study.floor,
        "distances": {f"{words(pair)}, {called(by)}": study.distances(pair, by) for by, pair in study.runs},
        "runs": {
            f"{words(pair)}, {called(by)}": {
                policy: [of(runs[which]) for runs in seeds] for which, policy in enumerate(POLICIES)
            }
            for (by, pair), seeds in study.runs.items()
        },
    }


def draw(studies: Mapping[str, Study]) -> None:
    """A row a rule, a column a model and clock: the three curves, each seed a line."""
    columns = [(model, clock) for model in studies for clock in CLOCKS]
    figure, axes = plt.subplots(
        len(RULES), len(columns), figsize=(2.6 * len(columns), 2.1 * len(RULES)), sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for row, rule in zip(axes, RULES, strict=True):
        for axis, (model, clock) in zip(row, columns, strict=True):
            for which, policy in enumerate(POLICIES):
                for index, runs in enumerate(studies[model].runs[1, (clock, rule)]):
                    label = policy if index == 0 else None
                    axis.plot(PROGRESS, np.exp(runs[which].curve), color=f"C{which}", lw=0.8, label=label)
            axis.set(yscale="log", ylim=(0.2, 3))
            apart = np.mean(studies[model].distances((clock, rule)))
            axis.set_title(f"{clock.replace('_', '-')}, {rule}: {apart:.3f}", fontsize=9)
    for axis, (model, _) in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(f"progress ({model})", fontsize=8)
    for row in axes:
        row[0].set_ylabel("held-out loss", fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(RESULTS / "clock.png", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, two at least")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, began = Machine.here(), time.process_time()
    bench = Bench()
    studies = {model: measure(bench, model, SEEDS[: options.seeds]) for model in MODELS}
    if not options.no_save:
        RESULTS.mkdir(exist_ok=True)
        draw(studies)
    publish(
        "clock",
        question=f"{QUESTION}\n\n![loss against progress under each clock and rule](clock.png)",
        machine=machine,
        tables=[table for model, study in studies.items() for table in tables(model, study)],
        findings=[
            *SETTING,
            *(line for model, study in studies.items() for line in findings(model, study)),
            f"All runs, tuning included, took {(time.process_time() - began) / 60:.0f} minutes of one core.",
        ],
        data={model: record(study) for model, study in studies.items()},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
