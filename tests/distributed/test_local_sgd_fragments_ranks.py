"""Fragments that are averaged in turn, on real ranks, beside a loop that holds all workers in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import loss_of, regression, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, LocalSGD, NormTest, load, save, steps
from adabatch.local_sgd import Change, Nesterov, SlowMo, Table

pytestmark = pytest.mark.distributed

WORKERS = 3
STEPS = 11
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

    def __init__(
        self,
        *,
        fragments: int,
        sync_every: int,
        workers: int = WORKERS,
        overlap: int = 0,
        mix: float = 0.5,
        outer: Outer = None,
        shares: list[float] | None = None,
    ) -> None:
        self.models = [deep() for _ in range(workers)]
        self.optimizers = [adamw(model.parameters()) for model in self.models]
        self.common = [nn.Parameter(p.detach().clone()) for p in self.models[0].parameters()]
        self.places = FRAGMENTS[fragments]
        self.outer = [outer([self.common[place] for place in places]) if outer else None for places in self.places]
        self.sync_every = sync_every
        self.overlap, self.mix = overlap, mix
        self.shares = shares or [1 / workers] * workers
        self.under_way: list[tuple[int, int, list[Tensor]]] = []

    @torch.no_grad()
    def means(self, number: int) -> list[Tensor]:
        rows = [[list(model.parameters())[place] for place in self.places[number]] for model in self.models]
        return [sum(s * p for s, p in zip(self.shares, each, strict=True)) for each in zip(*rows, strict=True)]

    @torch.no_grad()
    def apply(self, number: int, means: list[Tensor], mix: float) -> None:
        outer, common = self.outer[number], [self.common[place] for place in self.places[number]]
        for p, mean in zip(common, means, strict=True):
            if outer is None:
                p.copy_(mean)
            else:
                p.grad = p - mean
        if outer is not None:
            outer.step()
        for model in self.models:
            for place, p in zip(self.places[number], common, strict=True):
                own = list(model.parameters())[place]
                own.copy_(mix * own + (1 - mix) * p)

    def arrive(self, step: float) -> None:
        for since, number, means in self.under_way:
            if since + self.overlap <= step:
                self.apply(number, means, self.mix if self.overlap else 0.0)
        self.under_way = [each for each in self.under_way if each[0] + self.overlap > step]

    def go(self, num_steps: int) -> Tensor:
        count = len(self.places)
        offsets = [-(-(number + 1) * self.sync_every // count) for number in range(count)]
        for step in range(1, num_steps + 1):
            for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                one_step(model, optimizer, batch_of(worker, step - 1))
            self.arrive(step)
            for number, offset in enumerate(offsets):
                if step >= offset and (step - offset) % self.sync_every == 0:
                    self.under_way.append((step, number, self.means(number)))
            self.arrive(step)
        self.arrive(torch.inf)
        for number, offset in enumerate(offsets):  # what all workers hold already does not take another outer step
            if self.overlap or (num_steps - offset) % self.sync_every:
                self.apply(number, self.means(number), 0.0)
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


CASES: dict[str, tuple[Nesterov | None, str, dict[str, Any]]] = {
    "whole": (None, "equal", {"fragments": 1, "sync_every": 4}),
    "two": (None, "equal", {"fragments": 2, "sync_every": 4}),
    "three, uneven": (None, "examples", {"fragments": 3, "sync_every": 5}),
    "diloco": (Nesterov(), "equal", {"fragments": 2, "sync_every": 5}),
    "diloco, three": (Nesterov(), "examples", {"fragments": 3, "sync_every": 3}),
    "late": (None, "examples", {"fragments": 1, "sync_every": 4, "overlap": 3}),
    "late, without own": (None, "equal", {"fragments": 2, "sync_every": 4, "overlap": 1, "mix": 0.0}),
    "late diloco": (Nesterov(), "equal", {"fragments": 2, "sync_every": 4, "overlap": 2, "mix": 0.3}),
    # two of three are under way at a time
    "late diloco, three": (Nesterov(), "examples", {"fragments": 3, "sync_every": 5, "overlap": 4}),
}
"""Outer optimizer, weights, and what the reference is given too."""


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
            NormTest(eta=0.1),
            micro_batch_size=2,
            limits=Limits(min=12, max=48),
            control=Control(memory=4, confidence=0.6, growth=2.0, pace=math.inf),
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
    "slowmo, state": {"sync_every": 4, "fragments": 2, "outer": SlowMo(0.5), "spread": "within", "average_state": True},
    "late": {"sync_every": 4, "fragments": 2, "overlap": 3, "spread": "within"},
    "late, int8": {
        "sync_every": Table(2, [Change(steps(6), 5)]), "fragments": 3, "outer": Nesterov(), "compression": "int8",
        "warmup": steps(2), "measure": "last", "overlap": 4, "weights": "equal",
    },
}  # fmt: skip


def resumed(place: Path) -> dict[str, dict[str, Any]]:
    """Saved inside a round, at a step at which one fragment was averaged and the others were not."""
    found = {}
    for name, local in RESUMED.items():
        through, before, after = (Run(**copy.deepcopy(local)) for _ in range(3))
        through.go(17)
        before.go(10)
        save(place / name, **before.parts())
        assert load(place / name, **after.parts()) is not None
        after.go(7)
        found[name] = {
            "weights": torch.equal(weights(after.model), weights(through.model)),
            "sizes": [*before.sizes, *after.sizes] == through.sizes,
            "plans": through.sizes,
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
    results = run_ranks(in_turn, WORKERS, tmp_path, str(tmp_path), timeout=150)
    for found in results:
        for name, one in found["reference"].items():
            assert one["error"] < 2e-6, (name, one)
            assert one["same"], name
        sent = {name: one["sent"] for name, one in found["reference"].items()}
        assert sent["whole"] == [0, 0, 0, ring[1][0]] * 2 + [0] * 3
        assert sent["two"] == [0, ring[2][0], 0, ring[2][1]] * 2 + [0, ring[2][0], 0]
        assert sent["three, uneven"][:10] == [0, ring[3][0], 0, ring[3][1], ring[3][2]] * 2
        assert sent["diloco, three"] == [*ring[3]] * 3 + ring[3][:2]
        assert found["reference"]["diloco"]["rounds"] == 3
        for name, bits in {"bf16": 16, "int8": 8}.items():
            error, same, total = found["compressed"][name]
            assert 0 < error < 0.05
            assert same
            # five exchanges of one block a worker, sent twice to two others
            assert total == 5 * 2 * 2 * (256 * bits // 8 + (4 if bits == 8 else 0)), name
        assert found["compressed"]["state"] == [[False, False], [True, False], [False, False], [False, True]]
        for name, one in found["resumed"].items():
            measured, plans = one.pop("measured"), one["plans"]
            assert plans == results[0]["resumed"][name]["plans"]
            assert plans[-1] > plans[0], (name, plans)
            assert all(one.values()), (name, one)
            assert measured == {"average": [1, 5, 9, 13, 17], "late": [1, 5, 9, 13, 17], "slowmo": [1, 7, 13, 19]}.get(
                name, measured
            )


# --- in the background ----------------------------------------------------------------------------------------------


def with_buffers(rank: int) -> dict[str, Any]:
    """Running averages go with the last fragment, and are mixed as parameters are."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.0), nn.Linear(8, 1))
    optimizer = SGD(model.parameters(), lr=0.0)
    found = []
    with LocalSGD(model, optimizer, sync_every=4, overlap=2, mix=0.25) as local:
        for step in range(7):
            with torch.no_grad():
                model[1].running_mean.fill_(10 * rank + step)
            one_step(model, optimizer, batch_of(rank, 0))
            found.append(float(model[1].running_mean[0]) if step in (4, 5) else None)
        assert local.rounds == 1
    return {"seen": found[4:6], "same": same_on_all(model[1].running_mean)}


def encoded(rank: int) -> dict[str, Any]:
    found = {}
    late = {"fragments": 2, "sync_every": 4, "outer": Nesterov(lr=0.7, momentum=0.5)}
    for overlap in (1, 3):
        plain, _, _ = run_local(rank, overlap=overlap, **late)
        mine, local, _ = run_local(rank, overlap=overlap, compression="int8", **late)
        found[overlap] = (float((mine - plain).abs().max()), same_on_all(mine), local.bytes_sent)
        assert local.seconds_waited > 0
    return found


def half_precision(rank: int) -> tuple[bool, int, int]:
    """Sums of products with counts of examples travel in 32 bits."""
    model = nn.Linear(6, 1, dtype=torch.bfloat16)
    with LocalSGD(model, SGD(model.parameters(), lr=0.0), sync_every=4, overlap=1) as local:
        start = weights(model)
        for _ in range(5):
            local.count(1000)
            model(torch.ones(1, 6, dtype=torch.bfloat16)).sum().backward()
            local._optimizer.step()
        late, sent = torch.equal(weights(model), start), local.bytes_sent
    return late, sent, local.bytes_sent - sent


def mistakes(rank: int) -> dict[str, str]:
    """What one worker does wrong while an average is under way reaches all."""
    found = {}
    for way in ("leaves", "rates", "freezes", "ends"):
        model = deep()
        optimizer = adamw(model.parameters())
        outer = SlowMo(0.5) if way == "rates" else None
        if way == "rates":
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + rank)
        try:
            with LocalSGD(model, optimizer, sync_every=4, overlap=2, fragments=2, outer=outer):
                for step in range(10):
                    if rank == 2 and step == 7 and way == "leaves":
                        break
                    if rank == 2 and step == 5 and way == "freezes":
                        model[0].requires_grad_(False)
                    if rank == 2 and step == 9 and way == "ends":
                        dist.destroy_process_group()
                        raise SystemExit
                    one_step(model, optimizer, batch_of(rank, step))
        except RuntimeError as error:
            found[way] = str(error)
        except SystemExit:
            pass
    return found


def in_the_background(rank: int) -> dict[str, Any]:
    return {
        "buffers": with_buffers(rank), "encoded": encoded(rank), "half": half_precision(rank),
        "mistakes": mistakes(rank),
    }  # fmt: skip


def test_averages_in_the_background(tmp_path: Path) -> None:
    results = run_ranks(in_the_background, WORKERS, tmp_path, timeout=150)
    for rank, found in enumerate(results):
        # started after step 3, when their mean was 13, and applied after step 5
        assert found["buffers"]["seen"] == pytest.approx([10 * rank + 4, 0.25 * (10 * rank + 5) + 0.75 * 13])
        assert found["buffers"]["same"]
        for overlap, (error, same, sent) in found["encoded"].items():
            assert 0 < error < 0.05, overlap
            assert same
            assert sent == 7 * 2 * 2 * (256 + 4), overlap
        late, sent, rest = found["half"]
        assert late
        assert sent == 2 * 2 * 7 * 4 // 3
        assert rest == 2 * 2 * 7 * 2 // 3
        assert "(worker 0: 8; worker 1: 8; worker 2: 7)" in found["mistakes"]["leaves"]
        assert (
            "(worker 0: 4 steps at 0.01; worker 1: 4 steps at 0.02; worker 2: 4 steps at 0.03)"
            in (found["mistakes"]["rates"])
        )
        assert "the parameters that train are not those" in found["mistakes"]["freezes"]
        assert ("ends" in found["mistakes"]) == (rank < 2)
        assert rank == 2 or "local SGD could not finish round 3 (step 10)" in found["mistakes"]["ends"]


def sharded(rank: int) -> float:
    """Two nodes of two ranks, beside two workers that hold the whole model."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "shard"))
    model = deep()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = adamw(model.parameters())
    options = {"fragments": 2, "sync_every": 4, "overlap": 2}
    with LocalSGD(model, optimizer, workers=mesh["node"], outer=Nesterov(), **options):
        for step in range(STEPS):
            one_step(model, optimizer, batch_of(rank // 2, step))
    mine = torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])
    return float((mine - Reference(workers=2, outer=diloco, **options).go(STEPS)).abs().max())


def test_nodes_average_their_shards_in_the_background(tmp_path: Path) -> None:
    assert max(run_ranks(sharded, 4, tmp_path, timeout=150)) < 2e-6
