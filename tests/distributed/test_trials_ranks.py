"""One rank of several without the memory for a larger micro-batch: all stay with smaller ones, and nobody waits."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import TensorDataset

from adabatch import AdaptiveBatch, GlobalOrder, LocalSGD, examples
from adabatch.adaptive.options import Guard
from adabatch.batch.schedules import Stage, Stages

pytestmark = pytest.mark.distributed

NUM_EXAMPLES = 152
GROWING = Stages(8, [Stage(examples(8), 16), Stage(examples(24), 32), Stage(examples(88), 64)])
WIDE = 1 << 22
"""Numbers that an example takes in the forward: 16 MiB."""


class Hungry(nn.Module):
    """Batch normalization, and activations whose width makes no other difference than the memory they take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output.expand(-1, self.width).contiguous()[:, :1]


class Job:
    """One rank of a run."""

    def __init__(
        self, rank: int, journal: Path, *, largest: int, tried: bool = True, local: bool = False, width: int = 2
    ) -> None:
        model = Hungry(width)
        self.model = model if local else DistributedDataParallel(model)
        self.optimizer = SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.given: list[int] = []
        numbers = torch.arange(NUM_EXAMPLES)
        data = TensorDataset(torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(0)), numbers)
        self.order = GlobalOrder(data, seed=1)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            GROWING,
            micro_batch_size=4,
            max_micro_batch_size=largest,
            guard=Guard(trial=self.loss_of if tried else None),
            local_sgd=LocalSGD(self.model, self.optimizer, sync_every=2) if local else None,
            journal=journal,
        )
        torch.manual_seed(rank)

    def loss_of(self, batch: Any) -> Tensor:
        x, _ = batch
        return functional.mse_loss(self.model(x), x[:, :1])

    def train(self, *, after_first: Callable[[], None] = lambda: None) -> dict[str, Any]:
        for step in self.batches.steps(self.order, until=examples(NUM_EXAMPLES)):
            for batch in step:
                self.given += batch[1].tolist()
                step.backward(self.loss_of(batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step.plan.micro_batch_size == 4:
                after_first()
        state = torch.cat([weights(self.model), *(buffer.flatten() for buffer in self.model.buffers())])
        return {"too large": self.batches.too_large, "given": self.given, "state": state.tolist()}


def short_of_memory(rank: int, journal: Path, local: bool) -> dict[str, Any]:
    """Rank 1 may take 400 MiB more than it has: micro-batches of 8 fit, and one of 32 takes 512 MiB and more."""

    def limit() -> None:
        """Once all threads run, which take memory of their own."""
        if rank == 1:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (400 << 20), resource.RLIM_INFINITY))

    return Job(rank, journal, largest=32, local=local, width=WIDE).train(after_first=limit)


def told(rank: int, journal: Path, largest: int, local: bool) -> dict[str, Any]:
    return Job(rank, journal, largest=largest, tried=False, local=local).train()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("local", [False, True], ids=["DDP", "local SGD"])
def test_all_ranks_stay_with_what_the_poorest_can(local: bool, tmp_path: Path) -> None:
    """As a run does that was told the size beforehand: the same weights and statistics, to the bit."""
    found = run_ranks(short_of_memory, 2, tmp_path, tmp_path / "found", local, timeout=120)
    too_large = found[0]["too large"]
    assert too_large in (16, 32)
    assert found[1]["too large"] == too_large
    written = lines(tmp_path / "found")
    assert [line["out_of_memory"] for line in written if "out_of_memory" in line] == [[too_large]]
    assert max(line["plan"]["micro_batch_size"] for line in written) == too_large // 2
    assert max(line["plan"]["global_batch_size"] for line in written) == 64
    assert sorted(found[0]["given"] + found[1]["given"]) == list(range(NUM_EXAMPLES))
    same = run_ranks(told, 2, tmp_path, tmp_path / "told", too_large // 2, local, timeout=120)
    assert [each["state"] for each in found] == [each["state"] for each in same]


class Impatient(Job):
    """Its first rank breaks off trials by an error of its own."""

    def loss_of(self, batch: Any) -> Tensor:
        if len(batch[0]) > 4 and torch.distributed.get_rank() == 0:
            raise KeyError("labels")
        return super().loss_of(batch)


def broken(rank: int, journal: Path) -> str:
    try:
        Impatient(rank, journal, largest=32).train()
    except (KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    first, second = run_ranks(broken, 2, tmp_path, tmp_path / "journal")
    assert first == "KeyError: 'labels'"
    assert second == (
        "RuntimeError: the trial of a micro-batch of 8 examples failed on another rank: its own error says why"
    )


def refused(rank: int, journal: Path) -> tuple[str, str]:
    model = fully_shard(nn.Linear(6, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError) as sharded:
        AdaptiveBatch(
            model,
            optimizer,
            GROWING,
            micro_batch_size=4,
            max_micro_batch_size=16,
            guard=Guard(trial=lambda batch: model(batch).sum()),
        )
    job = Job(rank, journal, largest=16, tried=rank == 0)
    with pytest.raises(ValueError) as different:
        next(job.batches.steps(job.order))
    return str(sharded.value), str(different.value)


def test_what_cannot_be_tried_alone_is_refused(tmp_path: Path) -> None:
    for sharded, different in run_ranks(refused, 2, tmp_path, tmp_path / "journal"):
        assert "one that runs out of memory would leave the others waiting: leave trial= out" in sharded
        assert "the ranks were given different settings: " in different
