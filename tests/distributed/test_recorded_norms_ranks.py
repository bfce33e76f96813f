"""The recorder on two processes: norms of the reduced gradient, in a few bytes, and ranks that must agree on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import loss_of, network, regression
from support.options import grouped
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.utils.data import DataLoader

from adabatch import AdaptiveBatch, GlobalOrder, Limits, NormTest, ProgressLR, examples, lr
from adabatch.adaptive.options import Measure

pytestmark = pytest.mark.distributed

BUDGET = 72  # bytes a step and rank, for the measurement and everything recorded with it


def recorded(rank: int, folder: Path) -> dict[str, Any]:
    """A run whose batch grows on two ranks; what it wrote, what the gradients were, and what it sent."""
    model = DistributedDataParallel(network())
    optimizer = Adam(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.4),
        micro_batch_size=2,
        limits=Limits(min=8, max=64),
        lr_rule="sqrt_gain",
        follow=("betas", "eps"),
        measure=Measure(l1=True),
        journal=folder / "journal.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(400), clock="gain")
    original, sent, per_step, norms = dist.all_reduce, [], [], []

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **options)

    order = GlobalOrder(regression(200), seed=4)
    for step in batches.steps(order, until=examples(400)):
        dist.all_reduce = counted
        try:
            for batch in step:
                step.backward(loss_of(model, batch))
        finally:
            dist.all_reduce = original
        per_step.append(sum(sent))
        sent.clear()
        flat = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        norms.append((float(flat.norm(2)), float(flat.norm(1))))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {
        "norms": norms,
        "bytes": per_step,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "gain": batches.progress.gain_steps,
    }


def test_norms_of_the_reduced_gradient_within_the_budget(tmp_path: Path) -> None:
    first, second = run_ranks(recorded, 2, tmp_path, tmp_path)
    written = [json.loads(text) for text in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert written[-1]["plan"]["global_batch_size"] > 8
    # Every rank holds the same reduced gradient; float32 sums of 57 numbers.
    assert first["norms"] == second["norms"]
    assert [line["norms"]["l2"] for line in written] == pytest.approx([l2 for l2, _ in first["norms"]], rel=1e-5)
    assert [line["norms"]["l1"] for line in written] == pytest.approx([l1 for _, l1 in first["norms"]], rel=1e-5)
    assert torch.equal(first["weights"], second["weights"])
    assert first["gain"] == second["gain"]
    for sent in (first["bytes"], second["bytes"]):
        assert 0 < max(sent[1:]) <= BUDGET
        assert sent[0] <= BUDGET + 24  # the first step also compares the gradients of the ranks


def disagreeing(rank: int) -> list[str]:
    """Settings that only one rank has: sums of unequal length, or updates that drift apart."""
    errors = []
    for options in ({"record_l1": rank == 0}, {"follow": ("betas",) if rank == 0 else ()}):
        model = DistributedDataParallel(network())
        batches = AdaptiveBatch(
            model,
            Adam(model.parameters()),
            NormTest(eta=0.5),
            micro_batch_size=4,
            limits=Limits(min=8, max=64),
            **grouped(options),
        )
        try:
            next(batches.steps(DataLoader(regression(32), batch_size=4)))
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_ranks_that_record_or_follow_differently_all_say_so(tmp_path: Path) -> None:
    for errors in run_ranks(disagreeing, 2, tmp_path, timeout=30):
        assert all("the ranks were given different settings: " in error for error in errors)
