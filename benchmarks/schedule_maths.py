"""How long do schedules take to compute, and how many digits are right, at a million steps?

    python benchmarks/schedule_maths.py

One thread; the time is that of the processor, so that other work on the machine counts little. The aims are 0.3 s for
the bound of 10^6 steps and 3 s for a schedule refined from 10^6 gradient norms. The digits are those of two schedules
with a closed form: constant, T2 = (1 + H_{T-1}) / 2, and linear decay, T2 = (T - 1/2 + H_{T-1}) / T."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from _harness import Machine, Table, Timings, interleave, publish

from adabatch.lr import (
    bound_terms,
    constant,
    cosine,
    discretize,
    last_iterate_multipliers,
    linear,
    longer_cooldown,
    refine,
    transfer,
    two_stage,
    wsd,
)

QUESTION = (
    "How long do the bound, refining, transfer and extension take at a million steps, and how exact is the bound?"
)
MILLION = 10**6
BOUND, REFINED = "bound and best base LR, a norm a step", "refine, window of a tenth"
AIMS = {BOUND: 0.3, REFINED: 3.0}  # seconds


def contenders() -> Mapping[str, Callable[[], object]]:
    factors, norms = discretize(cosine(), MILLION), np.random.default_rng(0).lognormal(size=MILLION)
    return {
        "factors of a cosine": lambda: discretize(cosine(), MILLION),
        "bound and best base LR, constant norm": lambda: bound_terms(factors),
        BOUND: lambda: bound_terms(factors, norms),
        "multipliers of the conversion to the last iterate": lambda: last_iterate_multipliers(norms),
        REFINED: lambda: refine(norms, "sgd"),
        "refine, window of a thousandth": lambda: refine(norms, "sgd", smoothing=1e-3),
        "refine, not smoothed": lambda: refine(norms, "adam", smoothing=0.0),
        "transfer, wsd to linear": lambda: transfer(1.0, wsd(cooldown=0.2), linear(), num_steps=MILLION, norms=norms),
        "extension in two stages, to twice the length": lambda: two_stage(MILLION // 2, MILLION, cooldown=0.2),
        "extension by a longer cooldown": lambda: longer_cooldown(MILLION // 2, MILLION, cooldown=0.2),
    }


def errors(num_steps: int) -> list[str]:
    """Relative errors of best base LR and bound against the closed forms, for constant and linear decay."""
    harmonic = math.fsum(1 / k for k in range(1, num_steps))
    exact = {
        constant(): (1 / (2 * num_steps), (1 + harmonic) / 2),
        linear(): (1 / (num_steps + 1), (num_steps - 0.5 + harmonic) / num_steps),
    }
    found = []
    for shape, (first, second) in exact.items():
        terms = bound_terms(discretize(shape, num_steps))
        found += [terms.best_base_lr / math.sqrt(first / second) - 1, terms.best / (2 * math.sqrt(first * second)) - 1]
    return [f"{abs(error):.0e}" for error in found]


def tables(timings: Timings) -> list[Table]:
    times = [
        (name, timings.of(name).show(0, 1e3), f"{AIMS[name] * 1e3:.0f}" if name in AIMS else "")
        for name in timings.seconds
    ]
    lengths = [10**power for power in range(2, 7)]
    return [
        Table(f"{MILLION:,} steps, milliseconds: median (quartiles)", ["what", "time", "aim"], times),
        Table(
            "Relative error against the closed form",
            ["steps", "constant: base LR", "constant: bound", "linear: base LR", "linear: bound"],
            [[f"{length:,}", *errors(length)] for length in lengths],
        ),
    ]


def findings(timings: Timings) -> list[str]:
    told = []
    for name, aim in AIMS.items():
        found = timings.of(name)
        word = "met" if found.median <= aim else "missed"
        told.append(f"{name}: {found.show(3)} s, aim {aim:g} s: {word}.")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine.here()
    timings = interleave(contenders, trials=1, rounds=options.rounds, warmup=1, clock=time.process_time)
    publish(
        "schedule_maths",
        question=QUESTION,
        machine=machine,
        tables=tables(timings),
        findings=findings(timings),
        data={"seconds": {name: [round(value, 5) for value in values] for name, values in timings.seconds.items()}},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
