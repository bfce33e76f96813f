"""Ranks that are given the same examples: an error on every rank at the first step of a pass, or said to be wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import network, regression, train
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

from adabatch import AdaptiveBatch, Constant, GlobalOrder, LocalSGD

pytestmark = pytest.mark.distributed


def error_of(loader: Any, *, size: int = 24, **options: Any) -> str:
    """What a run over the loader raises; empty where it ends well."""
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(model, optimizer, Constant(size), micro_batch_size=4)
    try:
        train(batches, model, optimizer, loader, **options)
    except ValueError as error:
        return str(error)
    return ""


def pairs(x: torch.Tensor, y: torch.Tensor) -> list[Any]:
    return list(zip(x.split(4), y.split(4), strict=True))


def cases(rank: int) -> dict[str, str]:
    data, own = regression(48), regression(48, seed=rank)
    x, y = data.tensors
    ones = torch.ones(48, 6), torch.ones(48, 1)
    unlike = regression(48, seed=min(rank, 1)).tensors  # the last two ranks hold the same

    def seeded(seed: int) -> DataLoader[Any]:
        return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))

    found: dict[str, Callable[[], str]] = {
        "in order": lambda: error_of(DataLoader(data, batch_size=4)),
        "shuffled alike": lambda: error_of(seeded(0)),
        "one micro-batch a step": lambda: error_of(seeded(0), size=12),
        "generator": lambda: error_of(batch for batch in pairs(x, y)),
        "two of three": lambda: error_of(pairs(*unlike)),
        "sampler": lambda: error_of(DataLoader(data, batch_size=4, sampler=DistributedSampler(data))),
        "shuffled otherwise": lambda: error_of(seeded(rank)),
        "order": lambda: error_of(GlobalOrder(data)),
        "own": lambda: error_of(pairs(*own.tensors)),
        "allowed": lambda: error_of(DataLoader(data, batch_size=4), allow_same_data=True),
        "constant": lambda: error_of(pairs(*ones)),
        "one batch": lambda: error_of(pairs(x, y)[:1] * 6),
        "labels differ": lambda: error_of(pairs(x, y + rank)),
        # A glance at every 12th number sees the same; the second look finds the one that differs.
        "one number": lambda: error_of(pairs(*_with_one_number(rank))),
    }
    return {name: case() for name, case in found.items()}


def _with_one_number(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    x[1, 1] += rank
    return x, torch.randn(48, 1)


def test_ranks_with_the_same_examples_are_told_so(tmp_path: Path) -> None:
    words = (
        r"were given the same examples, to the bit: .*DistributedSampler\(dataset\).*adabatch.GlobalOrder\(dataset\)"
    )
    refused = {
        "in order": "ranks 0, 1, 2 ",
        "shuffled alike": "ranks 0, 1, 2 ",
        "one micro-batch a step": "ranks 0, 1, 2 ",
        "generator": "ranks 0, 1, 2 ",
        "two of three": "ranks 1, 2 ",
    }
    for found in run_ranks(cases, 3, tmp_path):
        for name, text in found.items():
            if name in refused:
                assert re.match(refused[name] + words, text), (name, text)
            else:
                assert text == "", name


def workers(rank: int) -> list[str]:
    found = []
    for seed in (0, rank):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        local = LocalSGD(model, optimizer, sync_every=2)
        batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, local_sgd=local)
        try:
            with local:
                train(batches, model, optimizer, DataLoader(regression(16, seed=seed), batch_size=4))
            found.append("")
        except ValueError as error:
            found.append(str(error))
        batches.remove()
    return found


def test_workers_of_local_sgd_need_data_of_their_own_too(tmp_path: Path) -> None:
    for same, own in run_ranks(workers, 2, tmp_path):
        assert same.startswith("ranks 0, 1 were given the same examples")
        assert own == ""
