"""Fragments that are averaged in turn, on real ranks, beside a loop that holds all workers in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import loss_of, regression, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, LocalSGD, NormTest, load, save, steps
from adabatch.runtime.local_sgd import Change, Nesterov, SlowMo, Table

pytestmark = pytest.mark.distributed

WORKERS = 3
STEPS = 14
DATA = regression(3000).tensors
Batch = tuple[Tensor, Tensor]


def deep(*, seed: int = 0) -> nn.Sequential:
    """Four layers, the largest in the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1)
        )


FRAGMENTS: dict[int, list[tuple[int, ...]]] = {
    1: [tuple(range(8))],
    # layers of 56, 81, 50 and 6 numbers: the largest first, each to the smallest fragment so far
    2: [(2, 3, 6, 7), (0, 1, 4, 5)],
    3: [(2, 3), (0, 1), (4, 5, 6, 7)],
}
"""The places of the parameters of each fragment, dealt by hand."""


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def batch_of(worker: int, step: int, *, size: int = 4) -> Batch:
    first = (step * WORKERS + worker) * size
    return DATA[0][first : first + size], DATA[1][first : first + size]


def one_step(model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


Outer = Callable[[list[nn.Parameter]], Optimizer] | None
"""Torch's optimizer of the outer step; None for the mean."""


class Reference:
    """Local SGD in fragments, written down plainly: every worker's model, and one copy that is common to all."""

    def __init__(self, *, fragments: int, sync_every: int, outer: Outer = None, shares: list[float] | None = None):
        self.models = [deep() for _ in range(WORKERS)]
        self.optimizers = [adamw(model.parameters()) for model in self.models]
        self.common = [nn.Parameter(p.detach().clone()) for p in self.models[0].parameters()]
        self.places = FRAGMENTS[fragments]
        self.outer = [outer([self.common[place] for place in places]) if outer else None for places in self.places]
        self.sync_every = sync_every
        self.shares = shares or [1 / WORKERS] * WORKERS

    @torch.no_grad()
    def mean(self, place: int) -> Tensor:
        rows = [list(model.parameters())[place] for model in self.models]
        return sum(share * row for share, row in zip(self.shares, rows, strict=True))

    @torch.no_grad()
    def average(self, number: int) -> None:
        outer = self.outer[number]
        for place in self.places[number]:
            if outer is None:
                self.common[place].copy_(self.mean(place))
            else:
                self.common[place].grad = self.common[place] - self.mean(place)
        if outer is not None:
            outer.step()
        for place in self.places[number]:
            for model in self.models:
                list(model.parameters())[place].copy_(self.common[place])

    def go(self, num_steps: int) -> Tensor:
        count = len(self.places)
        for step in range(1, num_steps + 1):
            for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                one_step(model, optimizer, batch_of(worker, step - 1))
            for number in range(count):
                offset = -(-(number + 1) * self.sync_every // count)
                if step >= offset and (step - offset) % self.sync_every == 0:
                    self.average(number)
        for number in range(count):  # those that were averaged just now do not change, except by an outer step
            offset = -(-(number + 1) * self.sync_every // count)
            if (num_steps - offset) % self.sync_every:
                self.average(number)
        return weights(self.models[0])


def run_local(rank: int, num_steps: int = STEPS, **options: Any) -> tuple[Tensor, LocalSGD, list[int]]:
    """A loop of the user's own, and the bytes that each of its steps sent."""
    model = deep(seed=rank)
    optimizer = adamw(model.parameters())
    sent = []
    with LocalSGD(model, optimizer, **options) as local:
        for step in range(num_steps):
            before = local.bytes_sent
            local.count(rank + 1)
            one_step(model, optimizer, batch_of(rank, step))
            sent.append(local.bytes_sent - before)
    return weights(model), local, sent


def same_on_all(vector: Tensor) -> bool:
    found = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(found, vector)
    return all(torch.equal(vector, other) for other in found)


def diloco(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def beside_the_reference(rank: int) -> dict[str, Any]:
    found = {}
    for name, fragments, sync_every, outer, weighing in (
        ("whole", 1, 4, None, "equal"), ("two", 2, 4, None, "equal"), ("three, uneven", 3, 5, None, "examples"),
        ("diloco", 2, 5, Nesterov(), "equal"), ("diloco, three", 3, 3, Nesterov(), "examples"),
    ):  # fmt: skip
        mine, local, sent = run_local(rank, fragments=fragments, sync_every=sync_every, outer=outer, weights=weighing)
        shares = None if weighing == "equal" else [1 / 6, 2 / 6, 3 / 6]
        theirs = Reference(fragments=fragments, sync_every=sync_every, outer=outer and diloco, shares=shares)
        found[name] = {
            "error": float((mine - theirs.go(STEPS)).abs().max()),
            "same": same_on_all(mine),
            "rounds": local.rounds,
            "sent": sent,
        }
    return found


# --- what goes with fragments ---------------------------------------------------------------------------------------


def compressed(rank: int) -> dict[str, Any]:
    """Fewer bits with errors of each fragment's own, and the optimizer's state with its parameters."""
    found = {}
    plain, _, _ = run_local(rank, fragments=2, sync_every=4, outer=Nesterov(lr=0.7, momentum=0.5))
    for compression in ("bf16", "int8"):
        mine, _, sent = run_local(
            rank, fragments=2, sync_every=4, outer=Nesterov(lr=0.7, momentum=0.5), compression=compression
        )
        found[compression] = (float((mine - plain).abs().max()), same_on_all(mine), sum(sent))
    model = deep()
    optimizer = adamw(model.parameters())
    local = LocalSGD(model, optimizer, sync_every=4, fragments=2, average_state=True)
    agreed = []
    for step in range(4):
        one_step(model, optimizer, batch_of(rank, step))
        states = [optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()]
        agreed.append([same_on_all(torch.cat([states[place] for place in places])) for places in FRAGMENTS[2]])
    local.remove()
    return {**found, "state": agreed}


class Run:
    """A model in training under ``AdaptiveBatch`` and local SGD in fragments."""

    def __init__(self, **local: Any) -> None:
        self.model = deep()
        self.optimizer = adamw(self.model.parameters())
        self.local = LocalSGD(self.model, self.optimizer, **local)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            NormTest(eta=0.3),
            micro_batch_size=2,
            limits=Limits(min=12, max=192),
            control=Control(memory=4, confidence=0.6, growth=2.0),
            local_sgd=self.local,
        )
        self.order = GlobalOrder(regression(3000))
        self.sizes: list[int] = []
        self.measured: list[int] = []

    def go(self, num_steps: int) -> None:
        for step in self.batches.steps(self.order, until=steps(self.batches.consumed.steps + num_steps)):
            for batch in step:
                step.backward(loss_of(self.model, batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.sizes.append(step.global_batch_size)
            if step.moments is not None:
                self.measured.append(self.batches.consumed.steps)

    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "batches": self.batches, "order": self.order,
            "local_sgd": self.local,
        }  # fmt: skip


RESUMED: dict[str, dict[str, Any]] = {
    "average": {"sync_every": 4, "fragments": 2, "spread": "within"},
    "nesterov, int8": {
        "sync_every": Table(2, [Change(steps(4), 5)]), "fragments": 3, "outer": Nesterov(), "compression": "int8",
        "warmup": steps(2), "measure": "last",
    },
    "slowmo": {"sync_every": 6, "fragments": 2, "outer": SlowMo(0.5), "spread": "within", "average_state": True},
}  # fmt: skip


def resumed(place: Path) -> dict[str, dict[str, Any]]:
    """Saved inside a round, at a step at which one fragment was averaged and the others were not."""
    found = {}
    for name, local in RESUMED.items():
        through, before, after = (Run(**copy.deepcopy(local)) for _ in range(3))
        through.go(20)
        before.go(10)
        save(place / name, **before.parts())
        assert load(place / name, **after.parts()) is not None
        after.go(10)
        found[name] = {
            "weights": torch.equal(weights(after.model), weights(through.model)),
            "sizes": [*before.sizes, *after.sizes] == through.sizes,
            "grew": through.sizes[-1] > through.sizes[0],
            "measured": through.measured,
            "counts": (after.local.rounds, after.local.bytes_sent) == (through.local.rounds, through.local.bytes_sent),
            "apart": not same_on_all(weights(after.model)),
        }
        after.local.synchronize()
        found[name]["together"] = same_on_all(weights(after.model))
        for run in (through, before, after):
            run.local.remove()
            run.batches.remove()
    return found


def in_turn(rank: int, place: str) -> dict[str, Any]:
    return {
        "reference": beside_the_reference(rank), "compressed": compressed(rank), "resumed": resumed(Path(place))
    }  # fmt: skip


def test_fragments_are_averaged_in_turn(tmp_path: Path) -> None:
    # numbers of the fragments, times 4 bytes, 2/3 of them twice over in a ring
    ring = {count: [2 * 2 * 4 * size // 3 for size in sizes] for count, sizes in {
        1: [193], 2: [87, 106], 3: [81, 56, 56]
    }.items()}  # fmt: skip
    for found in run_ranks(in_turn, WORKERS, tmp_path, str(tmp_path)):
        for name, one in found["reference"].items():
            assert one["error"] < 2e-6, (name, one)
            assert one["same"], name
        sent = {name: one["sent"] for name, one in found["reference"].items()}
        assert sent["whole"] == [0, 0, 0, ring[1][0]] * 3 + [0, 0]
        assert sent["two"] == [0, ring[2][0], 0, ring[2][1]] * 3 + [0, ring[2][0]]
        assert sent["three, uneven"][:10] == [0, ring[3][0], 0, ring[3][1], ring[3][2]] * 2
        assert sent["diloco, three"] == [*ring[3]] * 4 + ring[3][:2]
        assert found["reference"]["diloco"]["rounds"] == 3
        for name, bits in {"bf16": 16, "int8": 8}.items():
            error, same, total = found["compressed"][name]
            assert 0 < error < 0.05
            assert same
            # seven exchanges of one block a worker, sent twice to two others
            assert total == 7 * 2 * 2 * (256 * bits // 8 + (4 if bits == 8 else 0)), name
        assert found["compressed"]["state"] == [[False, False], [True, False], [False, False], [False, True]]
        for name, one in found["resumed"].items():
            measured = one.pop("measured")
            assert all(one.values()), (name, one)
            assert measured == {"average": [1, 5, 9, 13, 17], "slowmo": [1, 7, 13, 19]}.get(name, measured)
