"""The micro-batch probe under DDP, against the gradients of all ranks' parts computed one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.hard_models import CASES, SPARSE, dense
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant
from adabatch.adaptive.options import Measure
from adabatch.batch import GradientMoments
from adabatch.batch.moments import from_parts

pytestmark = pytest.mark.distributed

MICRO = 4
# Examples in each micro-batch, rank by rank: as many micro-batches on each, with as many examples or not.
SIZES: dict[str, list[list[int]]] = {
    "two parts": [[4], [4]],
    "four parts": [[4, 4], [4, 4]],
    "eight parts": [[4] * 4, [4] * 4],
    "small last ones": [[4, 4, 1], [4, 4, 3]],
    "uneven ranks": [[4, 4], [1, 2]],
}


def drawn(loss_of: Callable[..., Tensor], size: int, seed: int, dtype: torch.dtype, model: nn.Module) -> Tensor:
    """The loss of micro-batch ``seed``: the same data on whichever rank, for the probe and for the oracle."""
    torch.manual_seed(seed)
    return loss_of(model, size, dtype)


def part_by_part(model: nn.Module, losses: list[list[Any]], sizes: list[list[int]]) -> GradientMoments:
    """The oracle: the gradient of the mean over the examples of all ranks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts, shares = [], []
    for of_rank, counts in zip(losses, sizes, strict=True):
        for loss, count in zip(of_rank, counts, strict=True):
            grads = torch.autograd.grad(loss(model), parameters, allow_unused=True)
            zipped = zip(grads, parameters, strict=True)
            parts.append(torch.cat([dense(torch.zeros_like(p) if g is None else g) for g, p in zipped]))
            shares.append(count / sum(map(sum, sizes)))
    stacked = torch.stack(parts).real  # (num_parts, d)
    mean = (torch.tensor(shares, dtype=torch.float64)[:, None] * stacked).sum(0)
    flat = [count for counts in sizes for count in counts]
    return from_parts(stacked.square().sum(1).numpy(), flat, float(mean.square().sum()), weights=shares)


def measured_and_expected(rank: int, cases: Sequence[str]) -> list[tuple[str, str, tuple[Any, ...], tuple[Any, ...]]]:
    found = []
    for case in cases:
        tried = {**CASES, "sparse": SPARSE}[case]
        for dtype in (torch.float32, torch.float64):
            for name, sizes in SIZES.items():
                torch.manual_seed(1)
                oracle = tried.make().to(dtype)
                torch.manual_seed(1)
                model = DistributedDataParallel(tried.make().to(dtype), find_unused_parameters=case == "unused")
                losses = [
                    [
                        functools.partial(drawn, tried.loss, count, 100 * owner + index, dtype)
                        for index, count in enumerate(counts)
                    ]
                    for owner, counts in enumerate(sizes)
                ]
                batches = AdaptiveBatch(
                    model,
                    SGD(model.parameters(), lr=0.0),
                    Constant(MICRO * len(sizes[0]) * 2),
                    micro_batch_size=MICRO,
                    measure=Measure(monitor=True),
                )
                loader = list(zip(losses[rank], sizes[rank], strict=True))
                for step in batches.steps(loader, count=lambda batch: batch[1]):
                    for loss, _ in step:
                        step.backward(loss(model))
                    batches.leave_out()
                    found.append((f"{case}, {name}", str(dtype), step.moments, part_by_part(oracle, losses, sizes)))
                batches.remove()
    return [(case, dtype, tuple(moments), tuple(expected)) for case, dtype, moments, expected in found]


@pytest.mark.parametrize("cases", [("network", "tied"), ("sparse", "unused", "checkpointed")], ids=str)
def test_moments_are_those_of_all_ranks_parts_computed_one_by_one(tmp_path, cases):
    results = run_ranks(measured_and_expected, 2, tmp_path, cases)
    assert len(results[0]) == len(cases) * 2 * len(SIZES)
    for (case, dtype, *both), (_, _, *others) in zip(*results, strict=True):
        found, expected = map(GradientMoments._make, both)
        assert found == GradientMoments._make(others[0]), case  # the same bits on both ranks
        tolerance = {"torch.float32": 1e-5, "torch.float64": 1e-10}[dtype]
        assert found.num_parts == expected.num_parts, case
        for name in ("part_sq", "part_size", "grad_sq", "num_examples"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance), (case, name)
        scale = expected.part_sq * expected.num_examples  # the noise is a difference of two norms of this size
        assert found.noise == pytest.approx(expected.noise, rel=tolerance, abs=tolerance * scale), case
        assert found.signal == pytest.approx(expected.signal, rel=tolerance, abs=tolerance * expected.part_sq), case
