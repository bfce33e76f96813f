"""What the probe costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator

import torch

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import MOST_STEPS, checked, require
from adabatch.batch.plan import steps
from adabatch.batch.schedules import Constant
from adabatch.runtime.engines.copies import fingerprint
from adabatch.verification.running import ACCUMULATION, adaptive, again, begin_training, size_of, update
from adabatch.verification.training import Check, Make, Training

WARM_UP_PAIRS = 3


@checked
def cost(make: Make, *, num_pairs: int = 20, max_cost: float | None = None) -> Check:
    """The time of a step with the probe over one without: median and quartiles of pairs of steps in turn.

    Two copies of the training take turns, so that other load on the machine slows both. A step is 4 micro-batches per
    rank, with their data and the update. Every step is probed here; ``Control(interval=)`` makes probes rarer.

    Raises:
        ValueError: if the data set is smaller than the step, or there are fewer than 2 pairs.
    """
    if num_pairs < 2:
        raise ValueError(f"quartiles need at least 2 pairs of steps, got num_pairs={num_pairs}")
    require(max_cost is None or max_cost > 0, "max_cost must be positive", max_cost)
    require(num_pairs <= MOST_STEPS, f"num_pairs must be at most {MOST_STEPS}", num_pairs)
    probed, ranks = begin_training(make)
    plain = again(make, probed, fingerprint(probed.model.parameters()), ranks)
    policy = Constant(size_of(probed, ranks, ACCUMULATION))
    both = [adaptive(probed, policy, probed=True), adaptive(plain, policy, probed=False)]
    count = WARM_UP_PAIRS + num_pairs
    # generators, which stop after each step, so that two loops can take turns in one thread
    clocks = [_seconds(training, batches, count) for training, batches in zip((probed, plain), both, strict=True)]
    times = [[0.0] * count, [0.0] * count]
    for pair in range(count):
        # in alternating order: the second of a pair finds warmer caches
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which][pair] = next(clocks[which])
    for clock, batches in zip(clocks, both, strict=True):
        clock.close()
        batches.remove()
    # means over the ranks, so that all reach the same result
    sums = ranks.sum_of(*times[0][WARM_UP_PAIRS:], *times[1][WARM_UP_PAIRS:])
    with_probe, without = sums[:num_pairs], sums[num_pairs:]
    ratios = [a / b for a, b in zip(with_probe, without, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    milliseconds = statistics.median(without) / ranks.size * 1e3
    text = (
        f"a probed step takes {median:.3f} (quartiles {low:.3f} to {high:.3f}, {num_pairs} pairs) of one without, "
        f"{milliseconds:.3g} ms"
    )
    return Check("cost", max_cost is None or median <= max_cost, median, max_cost, text)


def _seconds(training: Training, batches: AdaptiveBatch, until: int) -> Generator[float, None, None]:
    """The times of the steps of a run, each as it is made."""
    device = next(training.model.parameters()).device
    began = _now(device)
    for step in batches.steps(training.loader, until=steps(until), count=training.count, weigh=training.weigh):
        for batch in step:
            step.backward(training.loss(training.model, batch))
        update(training)
        yield _now(device) - began
        began = _now(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # kernels run asynchronously: without this the clock would read when they were launched
        torch.cuda.synchronize(device)
    return time.perf_counter()
