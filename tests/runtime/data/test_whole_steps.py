"""Steps of imposed sizes: loss, gradient, noise, progress and learning rate go by what really came."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Limits, NormTest, ProgressLR, WholeSteps

LR = 0.02
MICRO = 8
SIZES = [[8, 5], [3], [8, 8, 8, 1], [2, 2, 7], [8]]
"""Micro-batches of each step on one rank, as rollouts would give them."""
UNEQUAL = [[[8, 5], [3]], [[3], [8, 8, 1]], [[8], [7]], [[2, 2, 7], [1, 8, 8]]]
"""The same for each of two ranks."""


def pieces(sizes: list[int], start: int) -> list[tuple[Tensor, Tensor]]:
    x, y = regression(256).tensors
    ends = torch.tensor(sizes).cumsum(0) + start
    return [(x[end - size : end], y[end - size : end]) for size, end in zip(sizes, ends.tolist(), strict=True)]


def rollouts(steps: list[list[int]]) -> Iterator[list[Any]]:
    start = 0
    for sizes in steps:
        yield pieces(sizes, start)
        start += sum(sizes)


def made(model: nn.Module, **options: Any) -> tuple[AdaptiveBatch, SGD]:
    optimizer = SGD(model.parameters(), lr=LR)
    batches = AdaptiveBatch(
        model, optimizer, NormTest(eta=0.7), micro_batch_size=MICRO, limits=Limits(min=16, max=64), **options
    )
    return batches, optimizer


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(functional.mse_loss(model(x), y), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).double()


def test_a_step_is_what_comes(tmp_path: Path) -> None:
    """Against a loop by hand: one batch of all examples, and the gradient of each micro-batch on its own."""
    model, plain = network(), network()
    batches, optimizer = made(model, lr_rule="sqrt", journal=tmp_path / "run.jsonl")
    schedule = ProgressLR(optimizer, adabatch.lr.linear(), batches, total=adabatch.examples(100))
    by_hand = SGD(plain.parameters(), lr=LR)
    seen = 0
    for step, sizes in zip(batches.steps(WholeSteps(rollouts(SIZES))), SIZES, strict=True):
        for batch in step:
            step.backward(loss_of(model, batch))
        parts = pieces(sizes, seen)
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        grads = torch.stack([gradient(plain, *part) for part in parts])
        share = torch.tensor(sizes).double() / sum(sizes)
        mean = share @ grads
        assert step.global_batch_size == sum(sizes)
        assert step.plan.accumulation_steps == len(sizes)
        assert step.loss == pytest.approx(functional.mse_loss(plain(x), y).item(), rel=1e-5)
        assert step.moments is not None
        assert step.moments.grad_sq == pytest.approx(float(mean.square().sum()), rel=1e-5)
        assert step.moments.part_sq == pytest.approx(float(share @ grads.square().sum(1)), rel=1e-5)
        assert step.moments.num_examples == pytest.approx(sum(sizes))
        assert step.moments.num_parts == len(sizes)
        optimizer.step()
        optimizer.zero_grad()

        for group in by_hand.param_groups:
            group["lr"] = LR * (1 - seen / 100) * (sum(sizes) / 16) ** 0.5
        functional.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call]
        by_hand.step()
        by_hand.zero_grad()
        schedule.step()
        seen += sum(sizes)
        assert batches.progress.examples == batches.consumed.examples == seen
        assert weights(model) == pytest.approx(weights(plain), rel=1e-4, abs=1e-6)
    written = lines(tmp_path / "run.jsonl")
    assert [entry["plan"]["global_batch_size"] for entry in written] == [sum(sizes) for sizes in SIZES]
    assert [entry["plan"]["accumulation_steps"] for entry in written] == [len(sizes) for sizes in SIZES]
    assert batches.noise_scale > 0


def test_until_and_the_advice_of_the_plan() -> None:
    def endless() -> Iterator[list[Any]]:
        while True:
            asked.append(batches.plan.global_batch_size)
            yield pieces([8] * (asked[-1] // 8), 0)

    asked: list[int] = []
    model = network()
    optimizer = SGD(model.parameters(), lr=LR)
    table = adabatch.Stages(16, [adabatch.Stage(adabatch.steps(3), 32)])
    batches = AdaptiveBatch(model, optimizer, table, micro_batch_size=MICRO)
    for step in batches.steps(WholeSteps(endless()), until=adabatch.examples(100)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert asked == [16, 16, 16, 32, 32]
    assert batches.consumed.examples == sum(asked)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([[8, 9]], "micro-batches of 8 to 9 examples, but 1 to 8 are allowed"),
        ([[]], r"no micro-batch on this rank.*steps\(weigh=\) it may weigh 0"),
    ],
)
def test_steps_that_cannot_be_run(steps: list[list[int]], words: str) -> None:
    batches, _ = made(network())
    with pytest.raises(ValueError, match=words):
        next(batches.steps(WholeSteps(rollouts(steps))))


def test_what_is_no_data() -> None:
    with pytest.raises(TypeError, match="an iterable of lists of micro-batches, got 3"):
        WholeSteps(3)  # type: ignore[arg-type]


def of_rank(rank: int, steps: list[list[list[int]]]) -> Iterator[list[Any]]:
    start = 0
    for both in steps:
        yield pieces(both[rank], start + (sum(both[0]) if rank else 0))
        start += sum(map(sum, both))


def on_ranks(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = DistributedDataParallel(network())
    batches, optimizer = made(model, lr_rule="none")
    data = [*of_rank(rank, UNEQUAL), *of_rank(rank, UNEQUAL)][: 4 + rank]  # the data of rank 0 end first
    losses = []
    for step in batches.steps(WholeSteps(data)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss)
    found |= {"weights": weights(model).tolist(), "losses": losses, "examples": batches.consumed.examples}
    batches.remove()

    sharded = fully_shard(network())
    batches, optimizer = made(sharded)
    for step in batches.steps(WholeSteps([pieces([8, 4 + rank], 40 * rank)])):
        for batch in step:
            step.backward(loss_of(sharded, batch))
        found["sharded"] = [step.global_batch_size, step.loss]
        optimizer.step()
    try:
        next(batches.steps(WholeSteps(of_rank(rank, UNEQUAL))))
    except ValueError as error:
        found["refused"] = str(error)

    def fails() -> Iterator[list[Any]]:
        if rank:
            raise OSError("no rollout")
        yield pieces([8], 0)

    try:
        next(batches.steps(WholeSteps(fails())))
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.distributed
def test_ranks_may_have_unequal_shares(tmp_path: Path) -> None:
    found = run_ranks(on_ranks, 2, tmp_path)
    plain = network()
    optimizer = SGD(plain.parameters(), lr=LR)
    losses, start = [], 0
    for both in UNEQUAL:
        (batch,) = pieces([sum(map(sum, both))], start)
        loss = loss_of(plain, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        start += sum(map(sum, both))
    for rank in found:
        assert rank["examples"] == start
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
        assert rank["weights"] == found[0]["weights"]
        assert rank["weights"] == pytest.approx(weights(plain).tolist(), rel=1e-4, abs=1e-6)
        assert rank["sharded"] == found[0]["sharded"]
        assert rank["sharded"][0] == 8 + 4 + 8 + 5
        assert "between 1 and 2 micro-batches in a step" in rank["refused"]
    assert found[1]["failed"] == "OSError: no rollout"
    assert found[0]["failed"].startswith("RuntimeError: the data of another rank raised an error")
