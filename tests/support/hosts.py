"""What the tests of hosts share: a plan that grows at awkward steps, and the same run by hand.

Imports no host: each is imported by the tests that need it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import Dataset

import adabatch
from adabatch import GlobalOrder, Stage, Stages
from support.loops import network, regression, weights

LR = 0.02
MICRO = 4
NUM_EXAMPLES = 256

AWKWARD = [1] * 3 + [4] * 3 + [2] * 2 + [5] * 2
"""Micro-batches of each step, per rank: to 4 after 3 steps, which is no multiple of 4, down to 2 and up to 5."""


def awkward(ranks: int, *, first: int = 1) -> Stages:
    """The schedule of ``AWKWARD``; ``first`` is the number of micro-batches of the first three steps."""
    sizes = [MICRO * ranks * count for count in (first, 4, 2, 5)]
    later = [Stage(adabatch.steps(after), size) for after, size in zip((3, 6, 8), sizes[1:], strict=True)]
    return Stages(sizes[0], later)


def needs(*packages: str) -> None:
    """Skips a module whose hosts are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (pip install {package})", allow_module_level=True)


def rank_variables(rank: int, size: int, port: int) -> None:
    """Sets what a launcher sets, in a process that ends after the test."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), GROUP_RANK="0", NODE_RANK="0", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
        DS_BUILD_OPS="0",
    )  # fmt: skip


def environment_kept() -> Iterator[None]:
    """For a fixture: puts back the variables that a host leaves behind."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


class Numbered(Dataset[Any]):
    """Regression data whose examples carry their numbers, so that a test can see which were served."""

    def __init__(self, num_examples: int = NUM_EXAMPLES, *, spoiled: int | None = None) -> None:
        self.data = regression(num_examples)
        if spoiled is not None:
            self.data.tensors[0][spoiled] = torch.inf

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x, y = self.data[index]
        return x, y, index


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error of a micro-batch of ``Numbered``."""
    x, y, _ = batch
    return functional.mse_loss(model(x), y)


def by_hand(sizes: Iterable[int], *, clip: float | None = None) -> dict[str, Any]:
    """SGD on whole batches of these sizes, in the order of ``GlobalOrder(Numbered())``: slow and obvious."""
    data, model = Numbered(), network()
    optimizer = SGD(model.parameters(), lr=LR)
    order = GlobalOrder(data, seed=0)
    sequence = torch.cat([order.permutation(0), order.permutation(1)]).tolist()
    losses, seen = [], 0
    for size in sizes:
        chosen = sequence[seen : seen + size]
        x = torch.stack([data[index][0] for index in chosen])
        y = torch.stack([data[index][1] for index in chosen])
        loss = functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seen += size
    return {"weights": weights(model).tolist(), "losses": losses, "served": sorted(sequence[:seen])}


def check_awkward(found: list[dict[str, Any]], *, clip: float | None = None, windows: list[int] | None = None) -> None:
    """That a run on these ranks is the run by hand: no short step, ranks equal, each example once.

    Float32 sums of up to 40 gradients in another order differ by about 1e-6.

    Args:
        found: of each rank ``weights``, ``windows`` (micro-batches of each step) and ``served``.
        clip: norm by which the run was clipped.
        windows: what is expected of them; ``AWKWARD`` by default.
    """
    expected = AWKWARD if windows is None else windows
    reference = by_hand([count * MICRO * len(found) for count in AWKWARD], clip=clip)
    for rank in found:
        assert rank["windows"] == expected
        assert rank["weights"] == found[0]["weights"]
        assert rank["weights"] == pytest.approx(reference["weights"], rel=1e-4, abs=2e-6)
    assert sorted(number for rank in found for number in rank["served"]) == reference["served"]
