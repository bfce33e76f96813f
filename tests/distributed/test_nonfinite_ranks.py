"""A number that is not finite, on one rank, at each place of a step: the update is left out on all ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.loops import loss_of, network, regression
from support.nonfinite import all_cases, outcomes, snapshot
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, GlobalOrder, steps
from adabatch.adaptive.options import Guard

pytestmark = pytest.mark.distributed


def test_what_is_not_finite_anywhere_in_a_step_is_left_out_on_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(all_cases, 2, tmp_path, str(tmp_path))
    assert [case for case, left_out in outcomes(results, tmp_path).items() if not left_out] == []


def left_alone(rank: int) -> list[bool]:
    """With "probed", a step without a probe is neither looked through nor left out."""
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4, guard=Guard(skip_nonfinite="probed"))
    for step in batches.steps(GlobalOrder(regression(64)), until=steps(1)):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.nan if rank == 1 else 1.0))
        optimizer.step()
    return [bool(torch.isfinite(each).all()) for each in snapshot(model)]


def test_steps_without_a_probe_are_left_alone_on_request(tmp_path):
    assert run_ranks(left_alone, 2, tmp_path) == [[False] * 4] * 2
