"""What does a rarer probe cost in decisions, and what does the automatic interval keep?

    python benchmarks/interval.py

First a seeded simulation of the control, as in `control.py`: the batch that is right stays, grows sixteenfold over the
run, or jumps to four times as much in its middle; how far the batch lies from it, for fixed intervals and the automatic
one. Then a small real run: an MLP on scikit-learn's digits, the same examples, seed by seed, with a probe at every step
and with the automatic interval. Averages must not be biased by the interval: their mean noise scale stands beside.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Machine, Spread, Table, publish
from support.simulated import Level, constantly, drawn

import adabatch
from adabatch.batch.control import Control, ControlState, Limits, decide
from adabatch.batch.criteria import NormTest
from adabatch.batch.plan import PlanGrid, Progress
from adabatch.recipes import collate
from adabatch.recipes.digits import Digits

GRID = PlanGrid(dp_size=1, micro_sizes=(8,), min_accumulation=2)
ETA, START, FIRST = 0.5, 160, 250
INTERVALS: dict[str, int | None] = {"1": 1, "2": 2, "5": 5, "10": 10, "20": 20, "automatic": None}


def scenarios(steps: int) -> dict[str, Level]:
    """The batch at which the run should rest, by step."""
    return {
        "constant": constantly(START),
        "grows sixteenfold": lambda step: START * 16 ** (step / steps),
        "jumps to four times": lambda step: START * (4 if step >= steps // 2 else 1),
    }


class Quality(NamedTuple):
    """How well a simulated run followed."""

    off: float  # mean |log2(batch / right)|
    far: float  # share of steps beyond a factor of 1.5
    probes: int
    lag: float  # steps from the jump until the batch is within 1.5 times; NaN without a jump
    noise_scale: float  # mean of the averages' over the right one


def simulated(rest: Level, interval: int | None, *, steps: int, seed: int) -> Quality:
    """One run; the first steps, in which all of them probe alike, are left out of the means."""
    rng, state, progress, plan = np.random.default_rng(seed), ControlState(), Progress(), GRID.nearest(START)
    control, probes, off, scale = Control(interval=interval), 0, [], []
    for step in range(steps):
        noise = rest(step) * ETA**2 / (1 - ETA**2)
        moments = drawn(rng, plan, noise=noise, d=30) if state.until_probe == 0 else None
        probes += moments is not None
        progress = progress.after(plan.global_batch_size)
        decision = decide(
            NormTest(ETA),
            moments,
            control=control,
            limits=Limits(16, 2**16),
            grid=GRID,
            plan=plan,
            progress=progress,
            state=state,
        )
        plan, state = decision.plan, decision.state
        off.append(math.log2(plan.global_batch_size / rest(step)))
        scale.append(state.averages.noise / noise)
    distance = np.abs(off)
    within = np.flatnonzero(distance[steps // 2 :] < math.log2(1.5))
    jumped = rest(steps // 2) / rest(steps // 2 - 1) > 2
    return Quality(
        float(distance[FIRST:].mean()),
        float((distance[FIRST:] > math.log2(1.5)).mean()),
        probes,
        float(within[0]) if jumped and len(within) else math.nan,
        float(np.mean(scale[FIRST:])),
    )


class Trained(NamedTuple):
    """A real run."""

    loss: float
    steps: int
    probes: int
    mean_batch: float


def trained(interval: int | None, *, seed: int, total: int) -> Trained:
    """An MLP on the digits, with the norm test."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        NormTest(0.8),
        micro_batch_size=8,
        limits=Limits(16, 256),
        control=Control(interval=interval),
        lr_rule="sqrt",
        guard=adabatch.Guard(skip_nonfinite="probed"),
    )
    order = adabatch.GlobalOrder(Digits(flatten=True), seed=seed, collate_fn=collate)
    probes = steps = 0
    for step in batches.steps(order, until=adabatch.examples(total)):
        for x, y in step:
            step.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        probes += step.probed
        steps += 1
    seen = batches.consumed.examples
    batches.remove()
    test = Digits("test", flatten=True)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(test.tensors[0]), test.tensors[1]).item()
    return Trained(loss, steps, probes, seen / steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--examples", type=int, default=60_000, help="of each real run")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    rows, raw, told = [], [], []
    for title, rest in scenarios(options.steps).items():
        for name, interval in INTERVALS.items():
            found = [simulated(rest, interval, steps=options.steps, seed=seed) for seed in range(options.seeds)]
            off, far, probes, lag, scale = (float(np.mean(column)) for column in zip(*found, strict=True))
            rows.append(
                (
                    title,
                    name,
                    f"{probes:,.0f}",
                    f"{2**off - 1:.1%}",
                    f"{far:.1%}",
                    "" if math.isnan(lag) else f"{lag:.0f}",
                    f"{scale:.3f}",
                )
            )
            raw.append({"scenario": title, "interval": name, "runs": [each._asdict() for each in found]})
    real: dict[str, list[Any]] = {
        name: [trained(interval, seed=seed, total=options.examples) for seed in range(3)]
        for name, interval in (("1", 1), ("automatic", None), ("10", 10))
    }
    real_rows = [
        (
            name,
            Spread.of([each.loss for each in runs]).show(4),
            f"{np.mean([each.steps for each in runs]):,.0f}",
            f"{np.mean([each.probes for each in runs]):,.0f}",
            Spread.of([each.mean_batch for each in runs]).show(1),
        )
        for name, runs in real.items()
    ]
    pairs = zip(real["automatic"], real["1"], strict=True)
    difference = Spread.of([mine.loss - theirs.loss for mine, theirs in pairs])
    told.append(
        f"The real run's test loss with the automatic interval minus that with a probe at every step, seed by seed: "
        f"{difference.show(4, sign='+')} ({'clear' if difference.clear else 'not clear at the 95 % level'})."
    )
    publish(
        "interval",
        question="What does a rarer probe cost in decisions, and what does the automatic interval keep?",
        machine=machine,
        tables=[
            Table(
                f"Simulated, {options.steps:,} steps, mean of {options.seeds} seeds, after the first {FIRST}",
                (
                    "right batch",
                    "interval",
                    "probes",
                    "off by, typically",
                    "steps off by 1.5 or more",
                    "steps to follow the jump",
                    "mean average noise, over the right one",
                ),
                rows,
            ),
            Table(
                f"An MLP on digits, {options.examples:,} examples, 3 seeds",
                ("interval", "test loss", "steps", "probes", "mean batch"),
                real_rows,
            ),
        ],
        findings=told,
        data={
            "simulated": raw,
            "real": {name: [each._asdict() for each in runs] for name, runs in real.items()},
        },
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
