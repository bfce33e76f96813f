"""A number that is not finite, on one rank, at each place of a step: the update is left out on all ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import lines, loss_of, network, regression
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, Control, GlobalOrder, Limits, NormTest, steps

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 3
POISONED = 1  # of the steps 0, 1, 2; the probe of an interval of 3 sees step 0 only
WRAPPERS = ("DDP", "FSDP2")
POLICIES = ("between probes", "without a probe")
POISONS = ("loss", "infinite loss of a finite gradient", "one number of one parameter", "input")
CASES = list(itertools.product(WRAPPERS, POLICIES, POISONS, range(MICRO_BATCHES)))


def wrapped(wrapper: str) -> torch.nn.Module:
    model = network()
    return fully_shard(model) if wrapper == "FSDP2" else DistributedDataParallel(model)


def one_number(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad.view(-1)[-1] = math.inf
    return grad


def poisoned_loss(model: torch.nn.Module, batch: Any, poison: str) -> Tensor:
    x, y = batch
    if poison == "input":
        return loss_of(model, (torch.where(torch.arange(len(x))[:, None] == 0, math.nan, x), y))
    if poison == "one number of one parameter":
        outputs = model(x)
        outputs.register_hook(one_number)
        return (outputs - y).square().mean()
    return loss_of(model, batch) * math.nan if poison == "loss" else loss_of(model, batch) + math.inf


def snapshot(model: torch.nn.Module) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def poisoned(rank: int, wrapper: str, policy: str, poison: str, position: int, journal: Path) -> list[bool]:
    """Whether the weights of this rank moved, in each of three steps."""
    model = wrapped(wrapper)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"micro_batch_size": 2, "limits": Limits(min=4 * MICRO_BATCHES, max=4 * MICRO_BATCHES)}
    criterion = NormTest(eta=0.5) if policy == "between probes" else Constant(4 * MICRO_BATCHES)
    batches = AdaptiveBatch(model, optimizer, criterion, control=Control(interval=3), journal=journal, **options)
    moved = []
    for index, step in enumerate(batches.steps(GlobalOrder(regression(64)), until=steps(3))):
        before = snapshot(model)
        for number, batch in enumerate(step):
            here = (index, number, rank) == (POISONED, position, 1)
            step.backward(poisoned_loss(model, batch, poison) if here else loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        after = snapshot(model)
        assert all(torch.isfinite(each).all() for each in after)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return moved


def all_cases(rank: int, folder: str) -> list[list[bool]]:
    return [poisoned(rank, *case, Path(folder) / f"{number}.jsonl") for number, case in enumerate(CASES)]


def test_what_is_not_finite_anywhere_in_a_step_is_left_out_on_all_ranks(tmp_path):
    results = run_ranks(all_cases, 2, tmp_path, str(tmp_path))
    for number, case in enumerate(CASES):
        for moved in (result[number] for result in results):
            assert moved == [True, False, True], case
        journal = lines(tmp_path / f"{number}.jsonl")
        assert [line["applied"] for line in journal] == [True, False, True], case
        if case[1] == "between probes":
            assert [line["reason"] == "not finite" for line in journal] == [False, True, False], case


def left_alone(rank: int) -> list[bool]:
    """With "probed", a step without a probe is neither looked through nor left out."""
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, skip_nonfinite="probed")
    for step in batches.steps(GlobalOrder(regression(64)), until=steps(1)):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.nan if rank == 1 else 1.0))
        optimizer.step()
    return [bool(torch.isfinite(each).all()) for each in snapshot(model)]


def test_steps_without_a_probe_are_left_alone_on_request(tmp_path):
    assert run_ranks(left_alone, 2, tmp_path) == [[False] * 4] * 2
