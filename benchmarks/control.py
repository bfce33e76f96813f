"""Which average of noise and signal can be trusted, and what does the control make of it?

    python benchmarks/control.py

A simulation, seeded: gradients are normal with ``d`` equally noisy directions, in parts, so that the noise of a probe
is chi-square with ``(num_parts - 1) d`` degrees of freedom. First the averages alone, ours and those that were
considered, on the noise of one probe after another; then the whole control, on what it must withstand and what it must
follow."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from _harness import Machine, Table, publish
from support.simulated import GRID, RIGHT, Level, drawn, sizes

from adabatch import Control, NoiseScale, NormTest
from adabatch.batch import Observation, Progress
from adabatch.batch.averages import Averages, ProbeWindow
from adabatch.batch.criteria import Criterion
from adabatch.batch.estimates import estimate
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, micro_batch_sizes

QUESTION = (
    "Which average of noise and signal is right on clean data, hardly moved by a probe that is wrong, and quick to "
    "follow a change; and does the control that uses it withstand spikes, follow jumps, and rest where it should?"
)
TWO_PARTS = PlanGrid(dp_size=2, micro_sizes=micro_batch_sizes(8, 2**20))


# --- averages ---------------------------------------------------------------------------------------------------------


class Average(Protocol):
    """Of the noise of one probe after another."""

    def add(self, moments: GradientMoments) -> None: ...

    @property
    def noise(self) -> float: ...


class Plain:
    """An exponential average of ten probes, as before."""

    def __init__(self) -> None:
        self._averages = Averages()

    def add(self, moments: GradientMoments) -> None:
        self._averages = self._averages.after(moments, Control().decay)

    @property
    def noise(self) -> float:
        return self._averages.noise


class Winsorised:
    """The same; a probe counts as no further from the average than four of its own standard deviations."""

    def __init__(self) -> None:
        self._weight = self.noise = self._variance = 0.0

    def add(self, moments: GradientMoments) -> None:
        self._weight = Control().decay * self._weight + 1
        share, difference = 1 / self._weight, moments.noise - self.noise
        if self._weight > 3:
            reach = 4 * math.sqrt(self._variance)
            difference = min(max(difference, -reach), reach)
        self.noise += share * difference
        self._variance = (1 - share) * (self._variance + share * difference**2)


class Logarithms:
    """The exponential of an average logarithm and half its variance: right for a log-normal noise."""

    def __init__(self) -> None:
        self._weight = self._mean = self._variance = 0.0

    def add(self, moments: GradientMoments) -> None:
        self._weight = Control().decay * self._weight + 1
        share, difference = 1 / self._weight, math.log(moments.noise) - self._mean
        self._mean += share * difference
        self._variance = (1 - share) * (self._variance + share * difference**2)

    @property
    def noise(self) -> float:
        return math.exp(self._mean + self._variance / 2)


class MedianOfMeans:
    """The median of the means of the last five stretches of three probes."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=15)

    def add(self, moments: GradientMoments) -> None:
        self._last.append(moments.noise)

    @property
    def noise(self) -> float:
        stretches = [list(self._last)[start : start + 3] for start in range(0, len(self._last), 3)]
        return statistics.median(statistics.fmean(stretch) for stretch in stretches)


class Judged:
    """Ours (`ProbeWindow`): each of the last seven is judged by their median, on the scale of cube roots."""

    def __init__(self, control: Control | None = None) -> None:
        self._window, self._control = ProbeWindow(), control or Control(memory_share=0.0)

    def add(self, moments: GradientMoments) -> None:
        self._window = self._window.after(moments, decay=self._control.decay_after(self._window.num_probes + 1))

    @property
    def noise(self) -> float:
        return self._window.averages.noise


AVERAGES: dict[str, Callable[[], Average]] = {
    "plain average, memory 10": Plain,
    "winsorised at 4 deviations": Winsorised,
    "logarithms, corrected": Logarithms,
    "median of means, 5 x 3": MedianOfMeans,
    "judged by neighbours, memory 10": Judged,
    "the same, memory growing to 50": lambda: Judged(Control()),
}


def followed(make: Callable[[], Average], measurements: Iterable[GradientMoments]) -> list[float]:
    average, levels = make(), []
    for moments in measurements:
        average.add(moments)
        levels.append(average.noise)
    return levels


def compared(make: Callable[[], Average], *, num_parts: int, d: int, trials: int) -> dict[str, float]:
    """How one average does on noise of one, from so many parts and directions."""
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=num_parts, dp_size=1)
    clean, plain, spiked, early, delays = [], [], [], [], []
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        probes = [drawn(rng, plan, noise=1.0, d=d) for _ in range(100)]
        levels = followed(make, probes)
        clean += levels[40::6]
        # The mean of the same probes, so that their own error cancels.
        plain.append(statistics.fmean(moments.noise for moments in probes[40:]))
        spike = drawn(rng, plan, noise=1.0, d=d, part=20.0)
        spiked.append(max(followed(make, [*probes[:60], spike, *probes[60:]])[60:]) / levels[59])
        early.append(followed(make, [probes[0].scaled(100.0), *probes[1:6]])[-1])
        risen = followed(make, [*probes[:60], *(drawn(rng, plan, noise=4.0, d=d) for _ in range(60))])[60:]
        delays.append(next((step + 1 for step, level in enumerate(risen) if level >= 3.2), 60))
    return {
        "bias": statistics.fmean(clean) / statistics.fmean(plain) - 1,
        "deviation": statistics.pstdev(clean),
        "spiked": statistics.median(spiked),
        "early": statistics.median(early),
        "delay": statistics.median(delays),
    }


# --- the control ------------------------------------------------------------------------------------------------------


def first(found: Sequence[int], reached: Callable[[int], bool], *, start: int = 0) -> int:
    """Steps until a batch is reached; their number where it is not."""
    return next((step for step, size in enumerate(found[start:], 1) if reached(size)), len(found) - start + 1)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median and range."""
    found = sorted(values)
    return f"{statistics.median(found):.{digits}f} ({found[0]:.{digits}f} to {found[-1]:.{digits}f})"


def withstood(seeds: int) -> list[tuple[str, str, list[float]]]:
    """What should leave the batch alone: the batch over what it was."""
    rows = []
    for times in (2, 4, 7, 10, 100, 10_000):
        found = [
            sizes(261, seed=seed, d=50, part=lambda step, k=times: float(k) if step == 200 else 1.0)  # type: ignore[misc]
            for seed in range(seeds)
        ]
        after = [run[260] / run[199] for run in found]
        rows.append((f"one of 20 parts x {times:,} at one step, after 60 steps", "within 1.5", after))
    chance = np.random.default_rng(0).random(6000)
    times = np.where(chance < 0.0003, 5.0, np.where(chance < 0.0023, 3.0, 1.0))
    kinds: dict[str, dict[str, Level]] = {
        "one part": {"part": lambda step: float(1 + 20 * (times[step] - 1))},
        "all parts": {"shared": lambda step: float(times[step])},
    }
    for name, spikes in kinds.items():
        runs = [sizes(6000, seed=seed, **spikes) for seed in range(2)]  # type: ignore[arg-type]
        over = [size / RIGHT for run in runs for size in run[100:]]
        rows.append((f"0.2 % of steps x 3 and 0.03 % x 5, in {name}: any of 6,000 steps", "within 2", over))
    rested = [size / RIGHT for seed in range(seeds) for size in sizes(1000, seed=seed, d=10)[100:]]
    rows.append(("nothing, 10 directions: any of 900 steps", "", rested))
    return rows


def kept_up(seeds: int) -> list[tuple[str, str, list[float]]]:
    """What the batch should follow: probes until it is within 0.8 of where it should be."""
    rows: list[tuple[str, str, list[float]]] = []
    for d, (name, grid) in itertools.product((10, 100, 1000), (("many parts", GRID), ("two parts", TWO_PARTS))):
        up, down = [], []
        for seed in range(seeds):
            run = sizes(260, seed=seed, d=d, grid=grid, rest=lambda step: RIGHT if step < 200 else 4 * RIGHT)
            up.append(float(first(run, lambda size: size >= 3.2 * RIGHT, start=200)))
            run = sizes(260, seed=seed, d=d, grid=grid, start=640, rest=lambda step: 4 * RIGHT if step < 200 else RIGHT)
            down.append(float(first(run, lambda size: size <= RIGHT / 0.8, start=200)))
        rows.append((f"noise scale x 4, {d} directions, {name}", "10", up))
        rows.append((f"noise scale / 4, {d} directions, {name}", "20", down))
    free = Control(pace=math.inf)
    for d in (10, 1000):
        delays = []
        for seed in range(seeds):
            runs = [
                sizes(
                    150,
                    seed=seed,
                    d=d,
                    rest=lambda step: 2000,
                    control=free,
                    shared=lambda step, k=k: k if step == 0 else 1.0,
                )  # type: ignore[misc]
                for k in (1.0, 100.0)
            ]
            plain, spiked = (float(first(run, lambda size: size >= 1600)) for run in runs)
            delays.append(spiked - plain)
        rows.append((f"delay by a shared gradient x 100 at the first step, {d} directions", "5", delays))
    criteria: list[tuple[str, Criterion]] = [
        ("NormTest(0.707)", NormTest(math.sqrt(0.5))),
        ("NoiseScale()", NoiseScale()),
    ]
    for (name, criterion), d in itertools.product(criteria, (10, 100, 10_000)):
        took = [
            sizes(
                200,
                seed=seed,
                criterion=criterion,
                eta=math.sqrt(0.5),
                rest=lambda step: 20_000,
                d=d,
                grid=TWO_PARTS,
                start=64,
                control=free,
            )
            for seed in range(seeds)
        ]
        steps = [float(first(run, lambda size: size >= 16_000)) for run in took]
        rows.append((f"from 64 to 20,000, {name}, {d:,} directions", "oracle: 8", steps))
    return rows


def rests(eta: float) -> list[float]:
    """The batch over the documented one, for a micro-batch that grows and for one that does not, exactly measured."""
    rest = 20_000 * (1 - eta**2) / eta**2
    grids = PlanGrid(dp_size=8, micro_sizes=micro_batch_sizes(8, 2**18)), PlanGrid(dp_size=8, micro_sizes=(4,))
    return [
        sizes(
            60, seed=0, eta=eta, rest=lambda step: rest, d=10**7, grid=grid, start=64, control=Control(pace=math.inf)
        )[-1]
        / rest
        for grid in grids
    ]


def coverage(trials: int, *, d: int, num_parts: int, ratio: float, probes: int) -> tuple[float, float]:
    """How often each bound of the bar holds the truth, at a confidence of 0.9."""
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=num_parts, dp_size=1)
    noise, held = plan.global_batch_size / ratio, np.zeros(2)
    for trial in range(trials):
        rng, window = np.random.default_rng(trial), ProbeWindow()
        for _ in range(probes):
            moments = drawn(rng, plan, noise=noise, d=d)
            window = window.after(moments, decay=Control().decay_after(window.num_probes + 1))
        seen = Observation(None, Progress())
        bar = estimate(NormTest(0.5), window.averages, plan, seen=seen, confidence=0.9)
        held += bar.low <= 3 * noise, 3 * noise <= bar.high
    return float(held[0] / trials), float(held[1] / trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="runs of each case of the control")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    worlds = {"2 parts, 3 directions": (2, 3), "2 parts, 30": (2, 30), "8 parts, 30": (8, 30)}
    alone = {
        (name, world): compared(make, num_parts=parts, d=d, trials=4 * options.seeds)
        for (name, make), (world, (parts, d)) in itertools.product(AVERAGES.items(), worlds.items())
    }
    etas = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
    settled = {eta: rests(eta) for eta in etas}
    bars = [
        (
            (d, num_parts, ratio, probes),
            coverage(50 * options.seeds, d=d, num_parts=num_parts, ratio=ratio, probes=probes),
        )
        for d, num_parts, ratio, probes in (
            (10, 2, 1.0, 20),
            (10, 8, 1.0, 20),
            (1000, 8, 1.0, 20),
            (100, 4, 0.25, 20),
            (10, 8, 0.05, 60),
            (30, 8, 4.0, 20),
        )
    ]
    stood, kept = withstood(options.seeds), kept_up(options.seeds)
    tables = [
        Table(
            "Averages of a noise of 1: bias (over the mean of the same probes), deviation; level after a spike (over "
            "that before), and five probes after a first probe x 10,000; probes until 0.8 of a rise by 4",
            ["average", "noise from", "bias", "deviation", "spike", "first", "rise"],
            [
                [
                    name,
                    world,
                    f"{row['bias']:+.1%}",
                    f"{row['deviation']:.2f}",
                    f"{row['spiked']:.2f}",
                    f"{row['early']:,.2f}",
                    f"{row['delay']:.0f}",
                ]
                for (name, world), row in alone.items()
            ],
        ),
        Table(
            "What should leave the batch alone: batch over the right one, median (range)",
            ["what", "aim", "batch"],
            [[what, aim, spread(values)] for what, aim, values in stood],
        ),
        Table(
            "What the batch should follow: probes, median (range)",
            ["what", "aim", "probes"],
            [[what, aim, spread(values, 0)] for what, aim, values in kept],
        ),
        Table(
            "Where the norm test rests: batch over noise scale x (1 - eta^2) / eta^2 (aim 0.85 to 1.15)",
            ["eta", "growing micro-batch", "one micro-batch size"],
            [[f"{eta:g}", *(f"{value:.2f}" for value in settled[eta])] for eta in etas],
        ),
        Table(
            "How often a bound of the error bar holds the truth, at a confidence of 0.9 (aim 0.87 to 0.94)",
            ["directions", "parts", "batch over noise scale", "probes", "lower", "upper"],
            [[*map(str, case), f"{low:.2f}", f"{high:.2f}"] for case, (low, high) in bars],
        ),
    ]
    names = {name for name, _ in alone}
    most = {name: max(abs(row["bias"]) for (other, _), row in alone.items() if other == name) for name in names}
    mine = "the same, memory growing to 50"
    by_spike = {
        name: max(row["spiked"] for (other, _), row in alone.items() if other == name)
        for name in (mine, "plain average, memory 10")
    }
    findings = [
        f"Largest bias of each average: {', '.join(f'{name} {most[name]:.1%}' for name in AVERAGES)}.",
        "A spike in one part moves ours (median of runs, worst case) by a factor of {:.2f}, the plain average by "
        "{:.1f}.".format(*by_spike.values()),
        f"Rest of the norm test: {min(map(min, settled.values())):.2f} to {max(map(max, settled.values())):.2f} of the "
        f"documented batch.",
    ]
    publish(
        "control",
        question=QUESTION,
        machine=machine,
        tables=tables,
        findings=findings,
        data=data_of(alone, stood, kept, settled, bars),
        save=not options.no_save,
    )


def data_of(
    alone: dict[tuple[str, str], dict[str, float]],
    stood: list[tuple[str, str, list[float]]],
    kept: list[tuple[str, str, list[float]]],
    settled: dict[float, list[float]],
    bars: list[tuple[tuple[float, ...], tuple[float, float]]],
) -> dict[str, Any]:
    return {
        "averages": [{"average": name, "noise": world, **row} for (name, world), row in alone.items()],
        "withstood": {what: [round(q, 3) for q in np.quantile(values, (0, 0.5, 1))] for what, _, values in stood},
        "followed": {what: values for what, _, values in kept},
        "rest": {str(eta): values for eta, values in settled.items()},
        "coverage": [[*case, *bounds] for case, bounds in bars],
    }


if __name__ == "__main__":
    main()
