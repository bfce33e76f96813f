"""Which momentum should Shampoo have by default? Losses on images that were held out, each momentum with its best rate.

    ADABATCH_DATA=... python benchmarks/shampoo_momentum.py

MNIST, normalized, the last 10,000 of the training images held out; 784-256-256-10 with ReLU, set up by the width plan;
131,072 examples at a constant batch, the learning rate falling linearly to 0. The rate of each momentum is tuned at
each batch by the median loss of three seeds on the images held out, on a grid of factor 2 that is made longer until the
best is not at its end. AdamW is tuned likewise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from _harness import Machine, Table, publish
from second_order import SEEDS, Batches, Cell, prepared, train_step
from torch import Tensor

from adabatch.recipes.data import Mnist

BATCHES, MOMENTA = (128, 512, 2048, 8192), (0.0, 0.5, 0.8, 0.9)
EXAMPLES, HELD_OUT, FARTHEST = 131_072, 10_000, 4


@cache
def mnist() -> tuple[Tensor, Tensor]:
    images, labels = Mnist("train").tensors
    return (images.flatten(1) - 0.1307) / 0.3081, labels


def held_out_loss(method: str, momentum: float, batch: int, rate: float, seed: int) -> float:
    """Infinite where the run diverged."""
    images, labels = mnist()
    model, optimizer = prepared(Cell(method, 256, rate, seed))
    if method == "shampoo":
        for group in optimizer.param_groups:
            group["momentum"] = momentum
    batches = Batches(images[:-HELD_OUT], labels[:-HELD_OUT], batch, seed)
    base = [group["lr"] for group in optimizer.param_groups]
    num_steps = EXAMPLES // batch
    for step in range(num_steps):
        for group, first in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = first * (1 - step / num_steps)
        try:
            loss = float(train_step(model, optimizer, *batches.next()))
        except RuntimeError:  # statistics that are not finite
            return math.inf
        if not math.isfinite(loss):
            return math.inf
    with torch.no_grad():
        return float(F.cross_entropy(model(images[-HELD_OUT:]), labels[-HELD_OUT:]))


def tuned(losses_at: Callable[[float], list[float]], first: float) -> tuple[float, list[float]]:
    """The learning rate with the lowest median loss, and its losses."""
    runs: dict[float, list[float]] = {}
    rates = [first, first * 2, first / 2]
    while rates:
        runs |= {rate: losses_at(rate) for rate in rates}
        best = min(runs, key=lambda rate: statistics.median(runs[rate]))
        beyond = {min(runs): best / 2, max(runs): best * 2}.get(best)
        rates = [beyond] if beyond and abs(math.log2(beyond / first)) <= FARTHEST else []
    return best, runs[best]


def main() -> None:
    torch.set_num_threads(1)
    machine = Machine.here()
    rows, found = [], []
    for batch in BATCHES:
        for method, momentum in [("adamw", 0.9), *(("shampoo", momentum) for momentum in MOMENTA)]:
            first = 2.0**-8 if method == "adamw" else 2.0**-5 * (1 if momentum < 0.5 else 1 - momentum)

            def losses_at(
                rate: float, method: str = method, momentum: float = momentum, batch: int = batch
            ) -> list[float]:
                return [held_out_loss(method, momentum, batch, rate, seed) for seed in SEEDS]

            rate, losses = tuned(losses_at, first)
            name = "AdamW" if method == "adamw" else f"Shampoo, momentum {momentum:g}"
            rows.append([f"{batch:,}", name, f"{rate:.3g}", " / ".join(f"{loss:.4f}" for loss in losses)])
            print(rows[-1], flush=True)
            found.append({"method": method, "momentum": momentum, "batch": batch, "lr": rate, "losses": losses})
    medians = {
        (one["batch"], one["momentum"]): statistics.median(one["losses"]) for one in found if one["method"] == "shampoo"
    }
    findings = []
    for batch in BATCHES:
        best = min(MOMENTA, key=lambda momentum: medians[batch, momentum])
        findings.append(f"Batch {batch:,}: the lowest median loss of Shampoo has momentum {best:g}.")
    publish(
        "shampoo_momentum",
        question="Which momentum should Shampoo have by default?",
        machine=machine,
        tables=[
            Table(
                f"Cross-entropy on {HELD_OUT:,} images held out after {EXAMPLES:,} examples (seeds 0 / 1 / 2)",
                ["batch", "method", "best learning rate", "losses"],
                rows,
            )
        ],
        findings=findings,
        data={"runs": found},
    )


if __name__ == "__main__":
    main()
