"""The rungs of the ladder: runs, described once, that every engine must take in the same way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, NormTest, Stage, Stages
from support.loops import loss_of, regression, weights
from support.options import grouped

LR = 0.02
WINDOWS = [1] * 3 + [4] * 5
"""Accumulation steps of ``JUMP``."""

# Micro-batches that double, and are all that grows: then two ranks and two accumulation steps have the same parts.
BY_MICRO_BATCH: dict[str, Any] = {
    "criterion": NormTest(eta=0.7),
    "micro_batch_size": 4,
    "max_micro_batch_size": 256,
    "limits": Limits(min=8, max=512),
    "control": Control(hysteresis=0.99, growth=2.0, memory=30),
    "lr_rule": "none",
}
BY_ACCUMULATION: dict[str, Any] = {
    "criterion": NormTest(eta=0.5),
    "micro_batch_size": 2,
    "limits": Limits(min=4, max=48),
    "control": Control(growth=1.6, hold=12),
    "lr_rule": "none",
}
# From 1 to 4 accumulation steps after 3 steps, which is no multiple of 4.
JUMP: dict[str, Any] = {
    "criterion": Stages(8, [Stage(adabatch.steps(3), 32)]),
    "micro_batch_size": 4,
    "monitor": True,
}


def climb(
    batches: AdaptiveBatch,
    model: nn.Module,
    update: Callable[[], None],
    *,
    num_steps: int,
    whole: Callable[[], Tensor] | None = None,
) -> dict[str, Any]:
    """A run, in JSON's types: batch size and reason, windows and moments of every step, and the weights at the end.

    Args:
        batches: around the engine.
        model: what the loss is computed from.
        update: what comes after the inner loop.
        num_steps: how many.
        whole: all weights in one vector; by default those of ``model``.
    """
    decisions, windows, moments = [], [], []
    for step in batches.steps(GlobalOrder(regression(1024)), until=adabatch.steps(num_steps)):
        windows.append(0)
        for batch in step:
            step.backward(loss_of(model, batch))
            windows[-1] += 1
        update()
        decisions.append([step.global_batch_size, str(step.decision.reason) if step.decision else None])
        moments.append([step.moments.part_sq, step.moments.grad_sq] if step.moments else None)
    batches.remove()
    reached = weights(model) if whole is None else whole()
    return {"decisions": decisions, "windows": windows, "moments": moments, "weights": reached.tolist()}


def climb_with(
    model: nn.Module, run: Mapping[str, Any], *, num_steps: int, whole: Callable[[], Tensor] | None = None
) -> dict[str, Any]:
    """The same on a model of torch's own, with SGD, as ``run`` says."""
    optimizer = SGD(model.parameters(), lr=LR)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    options = dict(run)
    batches = AdaptiveBatch(model, optimizer, options.pop("criterion"), **grouped(options))
    return climb(batches, model, update, num_steps=num_steps, whole=whole)


def check_same(rung: str, found: dict[str, Any], reference: dict[str, Any], *, windows: bool = True) -> None:
    """That a run is the reference run: integers exactly, moments within 1e-5, weights as float32 sums allow."""
    for index, (mine, theirs) in enumerate(zip(found["decisions"], reference["decisions"], strict=True)):
        assert mine == theirs, (rung, index)
    if windows:
        assert found["windows"] == reference["windows"], rung
    for mine, theirs in zip(found["moments"], reference["moments"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5), rung
    assert found["weights"] == pytest.approx(reference["weights"], rel=1e-4, abs=1e-5), rung


def growths(run: dict[str, Any]) -> int:
    """How often the batch grew."""
    sizes = [size for size, _ in run["decisions"]]
    return sum(later > earlier for earlier, later in itertools.pairwise(sizes))
