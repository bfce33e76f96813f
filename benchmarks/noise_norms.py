"""How far apart are noise scales in the norms of optimizers, and how well are they estimated from micro-batches?

    python benchmarks/noise_norms.py

A small convolutional network learns the handwritten digits with AdamW. At a few points of the run its weights are held,
and noise scales are measured there: from every example of the data set, which is the truth for draws from it, and from
steps of micro-batches at several batch sizes, whose noises and signals are averaged as the control does. Then what the
coordinate-wise norm test asks for at several quantiles, next to the plain norm test. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _harness import Machine, Table, interleave, publish
from torch import Tensor, nn
from torch.nn import functional

from adabatch import MicroBatchProbe, NormTest, PerExampleProbe
from adabatch.batch import CoordinateNormTest, GradientMoments, Observation, Progress
from adabatch.recipes import DigitsCNN
from adabatch.recipes.digits import Digits
from adabatch.runtime.probes.metrics import norm_of
from adabatch.runtime.probes.protocol import Probe

UPDATES = (5, 50, 300)
MICRO = 16
BATCHES = (64, 256, 1024)
QUANTILES = (0.5, 0.9, 0.99, 1.0)
NORMS = ("euclidean", "adam", "sign", "spectral")
EXAMPLES = 16_384  # behind each average


class Task:
    """The network, its data, and steps of it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        data = Digits("train")
        self.x, self.y = (
            torch.stack(list(column)) for column in zip(*(data[i] for i in range(len(data))), strict=True)
        )
        self.model: nn.Module = DigitsCNN()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.drawn = torch.Generator().manual_seed(seed)

    def loss(self, rows: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def draw(self, size: int) -> Tensor:
        return torch.randint(len(self.x), (size,), generator=self.drawn)

    def learn(self, updates: int) -> None:
        for _ in range(updates):
            self.optimizer.zero_grad()
            self.loss(self.draw(64)).backward()
            self.optimizer.step()

    def norm(self, name: str) -> Any:
        return norm_of(name, self.optimizer)

    def measure(self, probe: Probe, parts: Sequence[Tensor]) -> GradientMoments:
        self.optimizer.zero_grad()
        probe.start(1)
        total = sum(len(rows) for rows in parts)
        for rows in parts:
            probe.begin_part()
            (self.loss(rows) * (len(rows) / total)).backward()
            probe.end_part(len(rows), len(rows) / total)
        moments = probe.moments(probe.collect().tolist())
        probe.remove()
        return moments

    def truth(self, norm: str) -> float:
        """Noise scale of draws from the data set: their mean gradient is that of all its examples."""
        if norm == "spectral":  # single examples as micro-batches of one
            probe = MicroBatchProbe(self.model.parameters(), norm=self.norm(norm))
            noise = self.measure(probe, torch.arange(len(self.x)).split(1)).noise
            matrices = [p.grad for p in self.model.parameters() if p.ndim == 2 and p.grad is not None]
            return noise / sum(float(torch.linalg.matrix_norm(each, "nuc")) for each in matrices) ** 2
        moments = self.measure(PerExampleProbe(self.model, norm=self.norm(norm)), [torch.arange(len(self.x))])
        return moments.noise / (moments.grad_sq if norm != "sign" else (moments.grad_l1 or math.nan) ** 2)

    def estimate(self, norm: str, batch: int) -> float:
        """From micro-batches: averaged noise over averaged signal."""
        noise = signal = 0.0
        for _ in range(EXAMPLES // batch):
            probe = MicroBatchProbe(self.model.parameters(), norm=self.norm(norm))
            moments = self.measure(probe, self.draw(batch).split(MICRO))
            noise, signal = noise + moments.noise, signal + moments.signal
        return noise / signal if signal > 0 else math.inf

    def asked(self, quantile: float, batch: int, *, examples: bool) -> float:
        """What the coordinate-wise test asks for over what the norm test does: the median of some steps."""
        found = []
        for _ in range(5):
            rows = self.draw(batch)
            if examples:
                moments = self.measure(PerExampleProbe(self.model, quantile=quantile), [rows])
            else:
                moments = self.measure(MicroBatchProbe(self.model.parameters(), quantile=quantile), rows.split(MICRO))
            seen = Observation(moments, Progress())
            found.append(CoordinateNormTest(1.0, quantile=quantile).wanted(seen) / NormTest(1.0).wanted(seen))
        return statistics.median(found)


class Costs:
    """A step of four micro-batches of a transformer, 256 wide, with 1.6 million parameters in matrices."""

    def __init__(self, norm: str | None) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.x = torch.randn(4, 8, 64, 256)
        self.probe = None
        if norm is not None:
            self.probe = MicroBatchProbe(self.model.parameters(), norm=norm_of(norm, self.optimizer))

    def step(self) -> None:
        if self.probe is not None:
            self.probe.start(1)
        for x in self.x:
            if self.probe is not None:
                self.probe.begin_part()
            (self.model(x).square().mean() / 4).backward()
            if self.probe is not None:
                self.probe.end_part(8, 0.25)
        if self.probe is not None:
            self.probe.moments(self.probe.collect().tolist())
        self.optimizer.step()
        self.optimizer.zero_grad()


def costs() -> dict[str, Callable[[], object]]:
    return {"no probe": Costs(None).step, **{norm: Costs(norm).step for norm in NORMS}}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and range over the seeds."""
    low, middle, high = (f"{value:.{digits}g}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    torch.set_num_threads(1)
    scales: dict[str, list[float]] = {}
    coordinates: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        task, done = Task(seed), 0
        for updates in UPDATES:
            task.learn(updates - done)
            done = updates
            for norm in NORMS:
                scales.setdefault(f"{updates}, {norm}, all", []).append(task.truth(norm))
                for batch in BATCHES:
                    scales.setdefault(f"{updates}, {norm}, {batch}", []).append(task.estimate(norm, batch))
        for quantile in QUANTILES:
            for batch in BATCHES:
                for examples in (False, True):
                    name = f"{quantile}, {batch}, {examples}"
                    coordinates.setdefault(name, []).append(task.asked(quantile, batch, examples=examples))
    rows = []
    medians: dict[str, list[float]] = {}
    for updates in UPDATES:
        for norm in NORMS:
            truth = scales[f"{updates}, {norm}, all"]
            found = [scales[f"{updates}, {norm}, {batch}"] for batch in BATCHES]
            ratios = [[e / t for e, t in zip(each, truth, strict=True)] for each in found]
            rows.append((str(updates), norm, spread(truth), *map(spread, ratios)))
            medians.setdefault(norm, []).extend(map(statistics.median, ratios))
    asked = []
    for quantile in QUANTILES:
        for examples in (False, True):
            found = [coordinates[f"{quantile}, {batch}, {examples}"] for batch in BATCHES]
            asked.append((str(quantile), "examples" if examples else f"parts of {MICRO}", *map(spread, found)))
    sizes = [f"batch {batch}" for batch in BATCHES]
    timings = interleave(costs, trials=2, rounds=8, clock=time.process_time)
    dear = [(name, timings.of(name).show(0, 1e3), timings.ratio(name, "no probe").show()) for name in timings.seconds]
    publish(
        "noise_norms",
        question="How far apart are the noise scales of a network in the norms of optimizers, how well are they "
        "estimated from micro-batches, and what does the coordinate-wise norm test ask for?",
        machine=machine,
        tables=[
            Table(
                f"Noise scale in examples, and estimates over it from {EXAMPLES:,} examples: median (range) of seeds",
                ("after updates", "norm", "of all examples", *sizes),
                rows,
            ),
            Table(
                f"What CoordinateNormTest asks for over NormTest, after {UPDATES[-1]} updates: median (range)",
                ("quantile", "parts", *sizes),
                asked,
            ),
            Table(
                "A probed step of four micro-batches of 512 tokens, a transformer of two layers 256 wide: median "
                "(quartiles)",
                ("norm", "ms", "of a step without a probe"),
                dear,
            ),
        ],
        findings=[
            f"In the norm {norm}, the median estimates lie between {min(found):.2f} and {max(found):.2f} of the truth."
            for norm, found in medians.items()
        ],
        data={"seeds": options.seeds, "scales": scales, "coordinates": coordinates},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
