"""K-FAC on two ranks, under DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adabatch import AdaptiveBatch, Constant
from adabatch.optim import KFAC
from adabatch.runtime.optimizers.matrix_owners import across_ranks, dealt_out

pytestmark = pytest.mark.distributed

STEPS = 4
OPTIONS: list[dict[str, Any]] = [
    {"fisher": "gauss-newton", "refresh": 20, "warmup_refreshes": 2, "momentum": 0.9},
    {"fisher": "empirical", "kl_clip": 1e-2, "others": "adamw", "damping_form": "kronecker"},
]


class Net(nn.Module):
    """An odd number of rows, so that the shards are uneven; a bias, an embedding, and a norm if others are trained."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7) if norm else nn.Identity()
        self.head = nn.Linear(7, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.mix(self.embed(tokens)))).mean(1))


def train(model: nn.Module, optimizer: KFAC, share: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randint(9, (16, 4), generator=generator)[share]
        y = torch.randint(3, (16,), generator=generator)[share]
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.observe(outputs, y)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()


def made(options: dict[str, Any]) -> Net:
    torch.manual_seed(0)
    return Net(norm="others" in options).double()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def on_rank(rank: int, wrap: str) -> list[tuple[list[Tensor], list[bool]]]:
    results = []
    for options in OPTIONS:
        model = made(options)
        wrapped: nn.Module = model
        if wrap == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            fully_shard(model.head)
            fully_shard(model)
        optimizer = KFAC(wrapped.parameters(), wrapped, **options, **across_ranks(wrapped))
        owns = [optimizer._owner.owns(layer.name) for layer in optimizer._layers]
        train(wrapped, optimizer, slice(rank * 8, rank * 8 + 8))
        results.append(([whole(p.detach()).clone() for p in model.parameters()], owns))
        optimizer.remove()
    return results


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(tmp_path: Path, wrap: str) -> None:
    ranks = run_ranks(on_rank, 2, tmp_path, wrap)
    for index, options in enumerate(OPTIONS):
        model = made(options)
        train(model, KFAC(model.parameters(), model, **options), slice(None))
        for rank in ranks:
            for mine, theirs in zip(model.parameters(), rank[index][0], strict=True):
                torch.testing.assert_close(theirs, mine.detach(), rtol=1e-5, atol=1e-8)
        owners = list(zip(ranks[0][index][1], ranks[1][index][1], strict=True))
        assert all(first != second for first, second in owners), "one owner a layer"
        assert any(first for first, _ in owners)
        assert any(second for _, second in owners)


def readouts(rank: int) -> bool:
    """A readout of one row, which only the first of two ranks holds; then one of zeros."""
    for factor in (1, 0):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        model[1].weight.data *= factor
        fully_shard(model)
        refused = pytest.raises(ValueError, match="the weight of 1 is all zeros") if factor == 0 else nullcontext()
        with refused:
            KFAC(model.parameters(), model, likelihood="gaussian", **across_ranks(model)).remove()
    return True


def test_a_rank_that_holds_no_row_of_the_readout_takes_it_for_what_it_is(tmp_path: Path) -> None:
    assert all(run_ranks(readouts, 2, tmp_path))


def unobserved(rank: int) -> str:
    wrapped = DistributedDataParallel(made({}))
    optimizer = KFAC(wrapped.parameters(), wrapped, **across_ranks(wrapped))
    wrapped(torch.zeros(4, 2, dtype=torch.int64)).sum().backward()
    with pytest.raises(RuntimeError, match="K-FAC has not observed anything yet") as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_that_observed_nothing_say_so_together(tmp_path: Path) -> None:
    first, second = run_ranks(unobserved, 2, tmp_path)
    assert first == second


def by_itself(rank: int) -> str:
    model = DistributedDataParallel(made(OPTIONS[0]))
    optimizer = KFAC(model.parameters(), model)
    with pytest.raises(ValueError) as refused:
        AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    AdaptiveBatch(model, KFAC(model.parameters(), model, **across_ranks(model)), Constant(8), micro_batch_size=4)
    return str(refused.value)


def test_ranks_of_one_model_share_its_curvature(tmp_path: Path) -> None:
    for said in run_ranks(by_itself, 2, tmp_path):
        assert (
            "their weights would drift apart: KFAC(model.parameters(), model, **adabatch.across_ranks(model))" in said
        )


def test_layers_are_dealt_out_by_cost() -> None:
    owners = dealt_out({"a": 10, "b": 9, "c": 8, "d": 1, "e": 1}, 3)
    assert owners == {"a": 0, "b": 1, "c": 2, "d": 2, "e": 1}


def test_an_engine_that_cuts_gradients_flat_is_refused() -> None:
    class Engine(nn.Linear):
        def zero_optimization_stage(self) -> int:
            return 2

    with pytest.raises(ValueError, match=r"ZeRO 2 cuts gradients.*use DistributedDataParallel or fully_shard"):
        across_ranks(Engine(2, 2))
