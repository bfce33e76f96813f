"""Probes drawn at random, as training would show them, and what the control makes of a run of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from adabatch.batch.control import Control, ControlState, Limits, decide
from adabatch.batch.criteria import Criterion, NormTest
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress, micro_batch_sizes

Level = Callable[[int], float]
"""Step -> a level."""

GRID = PlanGrid(dp_size=1, micro_sizes=(8,), min_accumulation=2)
TWO_PARTS = PlanGrid(dp_size=2, micro_sizes=micro_batch_sizes(8, 2**14))
LIMITS = Limits(16, 2**24)
RIGHT = 160
"""The batch at which the runs below should rest: twenty micro-batches of 8."""


def constantly(level: float) -> Level:
    return lambda step: level


AT_REST, CLEAN = constantly(RIGHT), constantly(1)


def drawn(
    rng: np.random.Generator, plan: BatchPlan, *, noise: float, d: int, signal: float = 1.0, part: float = 1.0
) -> GradientMoments:
    """What a step measures; ``part`` multiplies the gradient of its first micro-batch."""
    micro, num_parts, size = plan.micro_batch_size, plan.num_parts, plan.global_batch_size
    if part != 1:
        parts = rng.standard_normal((num_parts, d)) * math.sqrt(noise / d / micro)
        parts[:, 0] += math.sqrt(signal)
        parts[0] *= part
        return GradientMoments(
            float((parts**2).sum(1).mean()), micro, float((parts.mean(0) ** 2).sum()), size, num_parts
        )
    along = math.sqrt(signal) + math.sqrt(noise / d / size) * rng.standard_normal()
    grad_sq = along**2 + (noise / d / size * rng.chisquare(d - 1) if d > 1 else 0.0)
    between = noise / d / micro * rng.chisquare((num_parts - 1) * d) / num_parts
    return GradientMoments(grad_sq + between, micro, grad_sq, size, num_parts)


def sizes(
    num_steps: int,
    *,
    seed: int,
    rest: Level = AT_REST,
    eta: float = 0.5,
    criterion: Criterion | None = None,
    d: int = 30,
    part: Level = CLEAN,
    shared: Level = CLEAN,
    grid: PlanGrid = GRID,
    control: Control | None = None,
    start: int = RIGHT,
    limits: Limits = LIMITS,
) -> list[int]:
    """The batch after each step of a run in which the norm test should come to ``rest``."""
    rng, state, progress, plan = np.random.default_rng(seed), ControlState(), Progress(), grid.nearest(start)
    found = []
    for step in range(num_steps):
        noise = rest(step) * eta**2 / (1 - eta**2)
        moments = drawn(rng, plan, noise=noise, d=d, part=part(step)).scaled(shared(step))
        progress = progress.after(plan.global_batch_size)
        decision = decide(
            criterion or NormTest(eta),
            moments,
            control=control or Control(),
            limits=limits,
            grid=grid,
            plan=plan,
            progress=progress,
            state=state,
        )
        plan, state = decision.plan, decision.state
        found.append(plan.global_batch_size)
    return found
