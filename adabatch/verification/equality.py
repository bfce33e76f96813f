"""The difference between two states, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adabatch.adaptive import AdaptiveBatch
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.nested import leaves
from adabatch.runtime.wrappers.fsdp2 import own_piece
from adabatch.verification.training import Training


def state_of(training: Training, batches: AdaptiveBatch | None = None) -> dict[str, Any]:
    """The state that a checkpoint would contain."""
    state: dict[str, Any] = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    if training.scaler is not None:
        state["scaler"] = training.scaler.state_dict()
    if batches is not None:
        state["batches"] = batches.state_dict()
        if isinstance(training.loader, GlobalOrder):
            state["order"] = training.loader.state_dict()
    return state


def _numbers(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers in a state, by their paths."""
    for keys, value in leaves(state):
        path = "".join(f"/{key}" for key in keys)
        if isinstance(value, Tensor):
            yield path, own_piece(value.detach())[0]
        elif isinstance(value, bool | int | float):
            yield path, torch.tensor(value, dtype=torch.float64)


def largest_difference(found: Mapping[str, Any], expected: Mapping[str, Any], ranks: Collectives) -> float:
    """The largest difference of any number on any rank; infinite if the structures or non-finite values differ."""
    mine, other = dict(_numbers(found)), dict(_numbers(expected))
    worst = 0.0 if mine.keys() == other.keys() else math.inf
    # no rank may leave before the reduction below, even if the structures differ
    for path in mine.keys() & other.keys():
        worst = max(worst, _apart(mine[path], other[path]))
    return largest_of(worst, ranks)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    unequal = (a != b) & ~((a != a) & (b != b))  # two NaN count as equal
    if not bool(unequal.any()):
        return 0.0
    # complex128 holds every type exactly, integers up to 2 ** 53
    apart = (a[unequal].to(torch.complex128) - b[unequal].to(torch.complex128)).abs().max().item()
    return apart if math.isfinite(apart) else math.inf


def largest_of(value: float, ranks: Collectives) -> float:
    """The largest of all ranks."""
    return -ranks.minimum_of(-value)[0]
