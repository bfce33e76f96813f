"""At which rate does AdaGrad-Norm come to a stationary point of a smooth, non-convex function, if the batch grows?

    python benchmarks/adagrad_norm_rate.py

AdAdaGrad (Lau, Liu and Kolar 2024, arXiv:2402.11215) claims O(1/K) for AdaGrad-Norm under a norm test: the smallest
squared norm of the gradient in K steps. With a constant batch the bound is O(1/sqrt(K)) (Ward, Wu and Bottou 2020).

The noise of an example's gradient is normal, and known. So the mean of a batch is drawn at once, whatever its size, and
batches may grow without limit. On both functions every direction has the same noise. "Slow" is
``sum_i c_i (1 + x_i^2)^(-q/2)`` with q = 0.1, whose minimum is at infinity: gradient descent itself has there the
exponent ``-(2q + 2) / (q + 2) = -1.05``, so that nothing is much faster than the bound of O(1/K). "Wells" is
``sum_i c_i x_i^2 / (1 + x_i^2)``, with a minimum that is reached exponentially; runs that come to the largest batch
there, 2^40 examples, have no exponent.

The claim counts as reproduced if, on the slow function, all exponents are at most -0.9 with a growing batch, and at
least -0.75 with a constant one; as refuted if only the second is true."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from _harness import Machine, Spread, Table, publish
from torch import Tensor

from adabatch import Control, Limits, NormTest
from adabatch.batch.control import ControlState, decide
from adabatch.batch.moments import from_parts
from adabatch.batch.plan import PlanGrid, Progress
from adabatch.optim import AdaGradNorm

QUESTION = (
    "AdaGrad-Norm on smooth functions that are not convex, with gradient noise that is known: with which exponent of K "
    "does the smallest expected squared norm of the gradient in K steps fall, with a constant and with a growing batch?"
)
DIM, NOISE, STEPS, SEEDS, ETA, PARTS, FIRST = 10, 1.0, 6_000, 3, 0.5, 16, 16
"""Coordinates; variance of an example's gradient in each; steps; seeds; of the norm test; parts that are measured; the
constant batch, with which the others begin too."""
FIT_SHARE = 30
"""Exponents are fitted from this fraction of the steps on: one and a half decades."""
LRS = {"slow": (8.0, 32.0), "wells": (1.0,)}
FLAT = 0.1
SCALES = torch.linspace(5, 15, DIM, dtype=torch.float64)
GRID = PlanGrid(dp_size=1, micro_sizes=(1,), min_accumulation=PARTS)
LARGEST = 2**40
LIMITS = Limits(FIRST, LARGEST)


def slow(x: Tensor) -> Tensor:
    """The gradient of ``sum_i c_i (1 + x_i^2)^(-q/2)``, shape (DIM,)."""
    return -SCALES * FLAT * x * (1 + x * x) ** (-FLAT / 2 - 1)


def wells(x: Tensor) -> Tensor:
    """The gradient of ``sum_i c_i x_i^2 / (1 + x_i^2)``, shape (DIM,)."""
    return 2 * SCALES * x / (1 + x * x) ** 2


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"slow": slow, "wells": wells}


class Path(NamedTuple):
    """A run, step by step.

    Args:
        grad_sq: squared norm of the true gradient at the point of each step, shape (steps,).
        examples: consumed before it, shape (steps,).
    """

    grad_sq: np.ndarray
    examples: np.ndarray


class Constant:
    """Always the same batch."""

    def __init__(self, size: int = FIRST) -> None:
        self.size = size

    def draw(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """The mean gradient of the next batch, whose size is ``size``."""
        return _with_noise(grad, self.size, generator)


class Exact(Constant):
    """The smallest batch for which the true norm test holds: ``noise / batch <= eta^2 |true gradient|^2``."""

    def draw(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """With the true gradient, which no run knows."""
        wanted = DIM * NOISE / max(ETA**2 * float(grad.square().sum()), DIM * NOISE / LARGEST)
        self.size = max(self.size, math.ceil(wanted))
        return super().draw(grad, generator)


class Measured(Constant):
    """The batch of ``NormTest`` under the default ``Control``, from the parts of each step's own batch."""

    def __init__(self) -> None:
        self._state, self._progress = ControlState(), Progress()
        self._plan = GRID.nearest(FIRST)
        super().__init__(self._plan.global_batch_size)

    def draw(self, grad: Tensor, generator: torch.Generator) -> Tensor:
        """The mean of the parts, which then decide on the next batch."""
        self.size = self._plan.global_batch_size
        parts = torch.stack([_with_noise(grad, self.size / PARTS, generator) for _ in range(PARTS)])
        mean = parts.mean(0)
        sizes = np.full(PARTS, self.size / PARTS)
        moments = from_parts(parts.square().sum(1).numpy(), sizes, float(mean.square().sum()))
        self._progress = self._progress.after(self.size, None, None)
        decision = decide(
            NormTest(ETA),
            moments,
            control=Control(),
            limits=LIMITS,
            grid=GRID,
            plan=self._plan,
            progress=self._progress,
            state=self._state,
        )
        self._plan, self._state = decision.plan, decision.state
        return mean


def _with_noise(grad: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return grad + math.sqrt(NOISE / size) * torch.randn(DIM, dtype=grad.dtype, generator=generator)


BATCHES: dict[str, Callable[[], Constant]] = {
    f"constant {FIRST}": Constant,
    "norm test, true norms": Exact,
    "norm test, measured": Measured,
}


def run(gradient: Callable[[Tensor], Tensor], batch: Constant, seed: int, *, num_steps: int, lr: float) -> Path:
    """One run of ``AdaGradNorm`` from the same point."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    optimizer = AdaGradNorm([x], lr=lr)
    grad_sq, examples, consumed = np.empty(num_steps), np.empty(num_steps), 0.0
    for step in range(num_steps):
        grad = gradient(x.detach())
        grad_sq[step], examples[step] = float(grad.square().sum()), consumed
        x.grad = batch.draw(grad, generator)
        consumed += batch.size
        optimizer.step()
    return Path(grad_sq, examples)


def exponent(over: np.ndarray, values: np.ndarray, *, first: int) -> float:
    """The slope of ``log values`` over ``log over``, by least squares on points that are evenly spread on that scale.

    Args:
        over: positive and rising, shape (n,).
        values: positive, shape (n,).
        first: index from which the fit begins.
    """
    marks = np.geomspace(over[first], over[-1], 200)
    at = np.unique(np.searchsorted(over, marks).clip(first, len(over) - 1))
    slope, _ = np.polyfit(np.log(over[at]), np.log(values[at]), 1)
    return float(slope)


class Rates(NamedTuple):
    """The exponents of one method on one function.

    Args:
        steps: of the smallest mean over the seeds, over the number of steps.
        each: the same of each seed alone.
        examples: over the number of examples.
        last: the smallest mean squared norm.
        batch: mean of the last batches.
        consumed: mean number of examples.
    """

    steps: float
    each: list[float]
    examples: float
    last: float
    batch: float
    consumed: float


def rates(paths: Sequence[Path], *, first: int) -> Rates:
    """Of several seeds: the minimum is taken of their mean, as the claim is about an expectation."""
    count = np.arange(1, len(paths[0].grad_sq) + 1)
    least = np.minimum.accumulate(np.mean([path.grad_sq for path in paths], axis=0))
    examples = np.mean([path.examples for path in paths], axis=0)
    each = [exponent(count, np.minimum.accumulate(path.grad_sq), first=first) for path in paths]
    return Rates(
        exponent(count, least, first=first),
        each,
        exponent(examples, least, first=first),
        float(least[-1]),
        statistics.fmean(float(path.examples[-1] - path.examples[-2]) for path in paths),
        float(examples[-1]),
    )


def all_rates(*, num_steps: int, seeds: int) -> Iterator[tuple[str, str, float, Rates]]:
    """Function, method, learning rate and its rates."""
    for function, gradient in FUNCTIONS.items():
        for name, make in BATCHES.items():
            for lr in LRS[function]:
                paths = [run(gradient, make(), seed, num_steps=num_steps, lr=lr) for seed in range(seeds)]
                yield function, name, lr, rates(paths, first=num_steps // FIT_SHARE)


def sentence(found: Sequence[tuple[str, str, float, Rates]]) -> str:
    """What became of the claim on the function on which it is tight."""
    hard = [each for each in found if each[0] == "slow"]
    constant = [r for _, name, _, r in hard if name.startswith("constant")]
    growing = [r for _, name, _, r in hard if not name.startswith("constant")]
    as_claimed = all(max(rate.steps, *rate.each) <= -0.9 for rate in growing)
    slower = all(min(rate.steps, *rate.each) >= -0.75 for rate in constant)
    verdict = "reproduced" if as_claimed and slower else "refuted" if slower else "unclear"

    def span(chosen: Sequence[float]) -> str:
        return f"{min(chosen):.2f} to {max(chosen):.2f}"

    return (
        f"AdaGrad-Norm with a batch that grows by the norm test comes to a stationary point as O(1/K), and with a "
        f"constant batch as O(1/sqrt(K)): {verdict} (exponents of K on the slow function, over seeds, learning rates "
        f"and both growing batches: {span([e for r in growing for e in r.each])}, constant "
        f"{span([e for r in constant for e in r.each])}; in examples "
        f"{span([r.examples for r in growing])} and {span([r.examples for r in constant])}: growth saves steps, not "
        f"examples)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a run")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds")
    parser.add_argument("--no-save", action="store_true", help="only print the report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    found = list(all_rates(num_steps=options.steps, seeds=options.seeds))
    fitted = f"fitted from step {options.steps // FIT_SHARE:,} on"
    columns = (
        "batch",
        "lr",
        "exponent of K",
        "of each seed",
        "exponent of examples",
        "smallest squared norm",
        "last batch",
    )
    tables = [
        Table(
            f"{function}: {options.steps:,} steps, {options.seeds} seeds, {fitted}",
            columns,
            [
                (
                    name,
                    f"{lr:g}",
                    *(
                        ("-", "-", "-")  # of the noise of the largest batch, below which nothing falls
                        if rate.batch >= LARGEST
                        else (f"{rate.steps:.2f}", Spread.of(rate.each).show(2), f"{rate.examples:.2f}")
                    ),
                    f"{rate.last:.2e}",
                    f"{rate.batch:,.0f}",
                )
                for of, name, lr, rate in found
                if of == function
            ],
        )
        for function in FUNCTIONS
    ]
    publish(
        "adagrad_norm_rate",
        question=QUESTION,
        machine=machine,
        tables=tables,
        findings=[sentence(found)],
        data={f"{function}, {name}, lr {lr:g}": rate._asdict() for function, name, lr, rate in found},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
