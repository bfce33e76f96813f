"""A run on two ranks with a number that is not finite, on one of them, in some micro-batch of a step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, Control, GlobalOrder, Limits, NormTest, steps
from support.loops import lines, loss_of, network, regression

MICRO_BATCHES = 3
POISONED = 1  # of the steps 0, 1, 2
WRAPPERS = ("DDP", "FSDP2")
POLICIES = ("in a probed step", "between probes", "without a probe")
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
    criterion = Constant(4 * MICRO_BATCHES) if policy == "without a probe" else NormTest(eta=0.5)
    control = Control(interval=1 if policy == "in a probed step" else 3)  # of 3, only step 0 is probed
    batches = AdaptiveBatch(model, optimizer, criterion, control=control, journal=journal, **options)
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


def outcomes(results: list[list[list[bool]]], folder: Path) -> dict[tuple[str, str, str, int], bool]:
    """Whether, by case, the poisoned update and no other was left out, on all ranks and in the journal.

    Args:
        results: of ``all_cases``, by rank.
        folder: of the journals.
    """
    wanted = [index != POISONED for index in range(3)]
    found = {}
    for number, case in enumerate(CASES):
        journal = lines(folder / f"{number}.jsonl")
        named = [line["reason"] == "not finite" for line in journal] == [not applied for applied in wanted]
        found[case] = (
            all(result[number] == wanted for result in results)
            and [line["applied"] for line in journal] == wanted
            and (named or case[1] == "without a probe")
        )
    return found
