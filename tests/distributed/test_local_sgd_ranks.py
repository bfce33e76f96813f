"""Local SGD on real ranks, beside DDP, torch's own averager and a simulation of all workers in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import lines, loss_of, network, regression, train, weights
from support.options import grouped
from support.ranks import run_ranks
from support.wrapped import check
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    LocalSGD,
    NormTest,
    PerExampleProbe,
    ProgressLR,
    examples,
    load,
    lr,
    save,
    steps,
)
from adabatch.adaptive.options import Measure
from adabatch.batch.moments import GradientMoments, from_parts
from adabatch.local_sgd import Change, Nesterov, Quadratic, SlowMo, Table
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.local_sgd.transfers import Errors

pytestmark = pytest.mark.distributed

WORKERS = 4
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "local SGD": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.01),
}
Batch = tuple[Tensor, Tensor]
Batches = Callable[[int, int], Sequence[Batch]]
"""Worker and step -> its micro-batches."""


EXAMPLES = regression(3000).tensors


def batches_of(worker: int, step: int, *, size: int = 3, parts: int = 1) -> list[Batch]:
    """Fresh examples for every worker and step."""
    x, y = EXAMPLES
    first = (step * WORKERS + worker) * size * parts
    return [(x[at : at + size], y[at : at + size]) for at in range(first, first + size * parts, size)]


def one_step(model: nn.Module, optimizer: Optimizer, micro_batches: Sequence[Batch]) -> None:
    for batch in micro_batches:
        (loss_of(model, batch) / len(micro_batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def everywhere(vector: Tensor) -> list[Tensor]:
    """The vector of every rank."""
    found = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(found, vector)
    return found


def same_on_all(vector: Tensor) -> bool:
    return all(torch.equal(vector, other) for other in everywhere(vector))


class Simulation:
    """All workers in one process, each with a model of its own: what local SGD is, written down plainly."""

    def __init__(self, make: Callable[[Any], Optimizer], num_workers: int = WORKERS) -> None:
        self.models = [network() for _ in range(num_workers)]
        self.optimizers = [make(model.parameters()) for model in self.models]
        self.anchor = weights(self.models[0])
        self.momentum = torch.zeros_like(self.anchor)

    def steps(self, batches: Batches, which: range) -> None:
        for step in which:
            for worker, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                one_step(model, optimizer, batches(worker, step))

    def mean(self, shares: Sequence[float] | None = None) -> Tensor:
        shares = shares or [1 / len(self.models)] * len(self.models)
        return sum(share * weights(model) for share, model in zip(shares, self.models, strict=True))

    def end_round(self, vector: Tensor) -> None:
        self.anchor = vector
        for model in self.models:
            nn.utils.vector_to_parameters(vector.clone(), model.parameters())

    def average_state(self) -> None:
        for parameters in zip(*(model.parameters() for model in self.models), strict=True):
            states = [optimizer.state[p] for optimizer, p in zip(self.optimizers, parameters, strict=True)]
            for name in states[0]:
                mean = torch.stack([state[name] for state in states]).mean(0)
                for state in states:
                    state[name].copy_(mean)


def run_local(
    rank: int, make: Callable[[Any], Optimizer], num_steps: int, batches: Batches = batches_of, **options: Any
) -> tuple[Tensor, LocalSGD, Optimizer]:
    """A loop of the user's own, without ``AdaptiveBatch``."""
    model = network(seed=rank)  # other weights on every rank: the first one's count
    optimizer = make(model.parameters())
    with LocalSGD(model, optimizer, **options) as local:
        for step in range(num_steps):
            micro_batches = batches(rank, step)
            one_step(model, optimizer, micro_batches)
            local.count(0)
    return weights(model), local, optimizer


# --- against torch, and against the simulation ----------------------------------------------------------------------


def beside_torch(rank: int) -> dict[str, bool]:
    """The same averages as ``PeriodicModelAverager``."""
    same = {}
    for name, make in OPTIMIZERS.items():
        mine, _, _ = run_local(rank, make, 12, sync_every=4)
        model = network()
        optimizer = make(model.parameters())
        averager = PeriodicModelAverager(period=4, warmup_steps=3)  # it averages after steps 4, 8 and 12
        for step in range(12):
            for batch in batches_of(rank, step):
                loss_of(model, batch).backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
            optimizer.zero_grad()
        same[name] = torch.allclose(mine, weights(model), rtol=0, atol=1e-7) and same_on_all(mine)
    return same


def outer_steps(rank: int) -> dict[str, Any]:
    """DiLoCo by torch's SGD, SlowMo and plain averages by hand."""
    found = {}
    make = OPTIMIZERS["AdamW"]
    for name, outer, average_state in (
        ("average", None, False), ("average, state too", None, True),
        ("nesterov", Nesterov(lr=0.7, momentum=0.9), False), ("slowmo", SlowMo(momentum=0.6, lr=0.9), False),
    ):  # fmt: skip
        # 14 steps: three rounds of four, and one of two at the end of the block
        mine, local, optimizer = run_local(rank, make, 14, sync_every=4, outer=outer, average_state=average_state)
        simulation = Simulation(make)
        master = nn.Parameter(simulation.anchor.clone())
        diloco = SGD([master], lr=0.7, momentum=0.9, nesterov=True)
        for which in (range(4), range(4, 8), range(8, 12), range(12, 14)):
            simulation.steps(batches_of, which)
            mean = simulation.mean()
            if name == "nesterov":
                master.grad = master.detach() - mean
                diloco.step()
                mean = master.detach().clone()
            elif name == "slowmo":
                inner = 0.01
                simulation.momentum = 0.6 * simulation.momentum + (simulation.anchor - mean) / inner
                mean = simulation.anchor - 0.9 * inner * simulation.momentum
            if average_state:
                simulation.average_state()
            simulation.end_round(mean)
        state = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in optimizer.param_groups[0]["params"]])
        found[name] = {
            "error": float((mine - simulation.anchor).abs().max()),
            "moved": float((mine - weights(network())).abs().max()),
            "rounds": (local.rounds, local.steps, local.step_in_round),
            "state agrees": same_on_all(state),
        }
    return found


def schedules_of_h(rank: int) -> dict[str, Any]:
    """When averages happen: by a table, by the quadratic rule, after a warm-up."""
    found = {}
    for name, options in (
        ("table", {"sync_every": Table(2, [Change(steps(4), 3), Change(steps(8), 5)])}),
        ("quadratic", {"sync_every": Quadratic(alpha=0.05, base=1, longest=9)}),
        ("warm-up", {"sync_every": 5, "warmup": steps(3)}),
    ):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = ProgressLR(optimizer, lr.linear(), total=steps(16))
        ended = []
        with LocalSGD(model, optimizer, **options) as local:
            for step in range(16):
                one_step(model, optimizer, batches_of(rank, step))
                schedule.step()
                agreed = same_on_all(weights(model))
                assert agreed == (local.step_in_round == 0)
                if agreed:
                    ended.append(step + 1)
        found[name] = ended
    return found


def unequal(rank: int) -> dict[str, float]:
    """Workers with 1 to 4 micro-batches a step: their share follows the examples, or does not."""

    def mine(worker: int, step: int) -> list[Batch]:
        return batches_of(worker, step, parts=4)[: worker + 1]

    found = {}
    for shares in ("examples", "equal"):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.05)
        with LocalSGD(model, optimizer, sync_every=3, weights=shares) as local:  # type: ignore[arg-type]
            for step in range(6):
                one_step(model, optimizer, mine(rank, step))
                local.count(sum(len(x) for x, _ in mine(rank, step)))
        simulation = Simulation(OPTIMIZERS["local SGD"])
        for which in (range(3), range(3, 6)):
            simulation.steps(mine, which)
            simulation.end_round(simulation.mean([0.1, 0.2, 0.3, 0.4] if shares == "examples" else None))
        found[shares] = float((weights(model) - simulation.anchor).abs().max())
    return found


def unequal_with_a_loader(rank: int) -> float:
    """The same through ``AdaptiveBatch``, whose loader has one to four examples a micro-batch."""

    def mine(worker: int, step: int) -> list[Batch]:
        return [(x[: worker + 1], y[: worker + 1]) for x, y in batches_of(worker, step, size=4, parts=2)]

    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    with LocalSGD(model, optimizer, sync_every=3) as local:
        batches = AdaptiveBatch(
            model, optimizer, Constant(32), micro_batch_size=4, measure=Measure(monitor=True), local_sgd=local
        )
        loader = [batch for step in range(6) for batch in mine(rank, step)]
        train(batches, model, optimizer, loader, count=lambda batch: len(batch[0]))
    simulation = Simulation(OPTIMIZERS["local SGD"])
    for which in (range(3), range(3, 6)):
        simulation.steps(mine, which)
        simulation.end_round(simulation.mean([0.1, 0.2, 0.3, 0.4]))
    return float((weights(model) - simulation.anchor).abs().max())


def plainly(rank: int) -> dict[str, Any]:
    found = unequal(rank)
    found["with a loader"] = unequal_with_a_loader(rank)
    return {"torch": beside_torch(rank), "outer": outer_steps(rank), "ends": schedules_of_h(rank), "unequal": found}


def test_averages_outer_steps_and_schedules(tmp_path: Path) -> None:
    for found in run_ranks(plainly, WORKERS, tmp_path):
        assert found["torch"] == dict.fromkeys(OPTIMIZERS, True)
        for name, outer in found["outer"].items():
            assert outer["error"] < 2e-6 < 1e-2 < outer["moved"], (name, outer)
            assert outer["rounds"] == (4, 14, 0)
            assert outer["state agrees"] == (name == "average, state too")
        assert found["ends"] == {
            "table": [2, 4, 7, 10, 15],
            # lr = 0.05 (1 - step/16): 1, then (1 / (1 - 1/16))^2 = 1.1, ..., at step 5 2.1, at 7 3.2, at 10 7.1
            "quadratic": [1, 2, 3, 4, 5, 7, 10],
            "warm-up": [1, 2, 3, 8, 13],
        }
        assert max(found["unequal"].values()) < 1e-6


# --- with AdaptiveBatch ---------------------------------------------------------------------------------------------

DATA = regression(4096)
ADAPTIVE: dict[str, Any] = {
    "criterion": NormTest(eta=0.6),
    "lr_rule": "sqrt",
    "micro_batch_size": 2, "max_micro_batch_size": 64, "limits": Limits(min=8, max=512),
    "control": Control(memory=6, confidence=0.6, growth=2.0, pace=math.inf),
}  # fmt: skip
CONSTANT: dict[str, Any] = {
    "criterion": Constant(24), "monitor": True, "limits": None, "max_micro_batch_size": None, "lr_rule": "none"
}  # fmt: skip


class Run:
    """A model in training under ``AdaptiveBatch`` and local SGD, or under DDP where ``local`` has no settings."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer],
        *,
        local: dict[str, Any],
        probe_of: Callable[[nn.Module], Any] = lambda model: None,
        shape: lr.Shape | None = None,
        **options: Any,
    ) -> None:
        self.model: nn.Module = network() if local else DistributedDataParallel(network())
        self.optimizer = make(self.model.parameters())
        self.local = LocalSGD(self.model, self.optimizer, **local) if local else None
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            local_sgd=self.local,
            probe=probe_of(self.model),
            **grouped({**ADAPTIVE, **options}),
        )
        self.schedule = ProgressLR(self.optimizer, shape or lr.cosine(), self.batches, total=examples(20_000))
        self.order = GlobalOrder(DATA)
        self.sizes: list[int] = []
        self.moments: list[GradientMoments | None] = []

    def go(self, num_steps: int, *, clip: float | None = None) -> None:
        until = steps(self.batches.consumed.steps + num_steps)
        for step in self.batches.steps(self.order, until=until):
            for batch in step:
                step.backward(loss_of(self.model, batch))
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.sizes.append(step.global_batch_size)
            self.moments.append(step.moments)

    def parts(self) -> dict[str, Any]:
        found = {
            "model": self.model, "optimizer": self.optimizer, "batches": self.batches, "schedule": self.schedule,
            "order": self.order, "local_sgd": self.local,
        }  # fmt: skip
        return {name: part for name, part in found.items() if part is not None}


def one_is_ddp(place: Path) -> dict[str, Any]:
    """``sync_every=1``, and a warm-up, beside DDP: weights, batch sizes, moments and journal."""
    found = {}
    for name, make in OPTIMIZERS.items():
        ddp = Run(make, local={}, journal=place / "ddp.jsonl")
        ddp.go(24, clip=1.0)
        for local in ({"sync_every": 1}, {"sync_every": 8, "warmup": steps(24)}):
            run = Run(make, local=local, journal=place / "local.jsonl")
            run.go(24, clip=1.0)
            assert run.local is not None
            pairs = [pair for pair in zip(run.moments, ddp.moments, strict=True) if None not in pair]
            assert len(pairs) == 24
            found[f"{name}, {', '.join(local)}"] = {
                "error": float((weights(run.model) - weights(ddp.model)).abs().max()),
                "sizes": run.sizes == ddp.sizes and len(set(run.sizes)) > 3,
                "noise": max(abs(mine.noise - theirs.noise) / theirs.noise for mine, theirs in pairs),
                "rounds": run.local.rounds,
                "same on all": same_on_all(weights(run.model)),
            }
    return found


def in_order(worker: int, step: int) -> list[Batch]:
    """What a worker takes of the data in order, by steps of 4 workers x 3 micro-batches x 2 examples."""
    starts = [(step * 3 + index) * 2 * WORKERS + worker * 2 for index in range(3)]
    return [(DATA.tensors[0][at : at + 2], DATA.tensors[1][at : at + 2]) for at in starts]


def gradients(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The gradient of each micro-batch, shape (num_parts, d), float64."""
    grads = [torch.autograd.grad(loss_of(model, batch), list(model.parameters())) for batch in batches]
    return torch.stack([torch.cat([each.flatten() for each in grad]) for grad in grads]).double()


def oracle(workers: Sequence[Tensor], size: int, spread: str) -> GradientMoments:
    """Moments of the workers' parts, each of shape (num_parts, d): of all together, or the mean of each one's own."""

    def moments(rows: Tensor) -> GradientMoments:
        mean = rows.mean(0)
        plain = from_parts(rows.square().sum(1).numpy(), size, float(mean.square().sum()))
        return plain._replace(grad_l1=float(mean.abs().sum()))

    if spread == "across":
        return moments(torch.cat(list(workers)))
    own = [moments(rows) for rows in workers]
    means = {name: sum(getattr(each, name) for each in own) / len(own) for name in ("part_sq", "grad_sq", "grad_l1")}
    return own[0]._replace(**means)


def expected(simulation: Simulation, step: int, *, spread: str, by_example: bool) -> GradientMoments:
    """The gradient of every part, at the place where its worker stands."""
    workers = []
    for worker, model in enumerate(simulation.models):
        batches = in_order(worker, step)
        if by_example:
            batches = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
        workers.append(gradients(model, batches))
    return oracle(workers, 1 if by_example else 2, spread)


def measured_once_a_round() -> dict[str, Any]:
    """Moments at the first and the last local step, in both forms, from micro-batches and from examples."""
    found: dict[str, Any] = {}
    cases = itertools.product(("first", "last"), ("across", "within"), (False, True))
    for number, (measure, spread, by_example) in enumerate(cases):
        make = list(OPTIMIZERS.values())[number % 3]
        run = Run(
            make,
            local={"sync_every": 4, "measure": measure, "spread": spread},
            probe_of=PerExampleProbe if by_example else lambda model: None,
            shape=lr.constant(),
            **CONSTANT,
        )
        run.order = GlobalOrder(DATA, shuffle=False)
        run.go(12)
        simulation = Simulation(make)
        for step in range(12):
            mine = run.moments[step]
            if step % 4 == (0 if measure == "first" else 3):
                assert mine is not None
                check(mine, expected(simulation, step, spread=spread, by_example=by_example), 2e-5)
            else:
                assert mine is None
            simulation.steps(in_order, range(step, step + 1))
            if step % 4 == 3:
                simulation.end_round(simulation.mean())
        assert run.local is not None
        assert torch.allclose(weights(run.model), simulation.anchor, atol=2e-6)
        found[f"{measure}, {spread}, {by_example}"] = run.local.bytes_sent
    return found


def drift() -> dict[str, float]:
    """Mean measured noise where workers agree, and after 16 steps apart at a rate that is large."""
    found = {}
    for measure, spread in itertools.product(("first", "last"), ("across", "within")):
        local = {"sync_every": 16, "measure": measure, "spread": spread}
        options = {**CONSTANT, "criterion": Constant(128), "micro_batch_size": 16}
        run = Run(lambda parameters: SGD(parameters, lr=0.2), local=local, shape=lr.constant(), **options)
        run.go(96)
        seen = [moments.noise for moments in run.moments if moments is not None]
        assert len(seen) == 6
        found[f"{measure}, {spread}"] = sum(seen) / len(seen)
    return found


def decisions(rank: int, place: Path) -> dict[str, Any]:
    """What each method decides when batches are free to grow."""
    found = {}
    for (name, make), spread in itertools.product(OPTIMIZERS.items(), ("across", "within")):
        local = {"sync_every": 4, "spread": spread}
        run = Run(
            make, local=local, criterion=NormTest(eta=0.35), limits=Limits(min=16, max=512),
            journal=place / f"{name} {spread}.jsonl",
        )  # fmt: skip
        run.go(32)
        found[f"{name}, {spread}"] = run.sizes
    return found


def adaptive(rank: int, place: str) -> dict[str, Any]:
    return {
        "one": one_is_ddp(Path(place)), "bytes": measured_once_a_round(), "drift": drift(),
        "decisions": decisions(rank, Path(place)),
    }  # fmt: skip


def test_adaptive_batches_under_local_sgd(tmp_path: Path) -> None:
    results = run_ranks(adaptive, WORKERS, tmp_path, str(tmp_path), timeout=150)
    for found in results:
        for name, one in found["one"].items():
            assert one["error"] < 1e-6, (name, one)
            assert one["noise"] < 1e-4, (name, one)
            assert one["sizes"], name
            assert one["rounds"] == 24
            assert one["same on all"]
        # 57 parameters of 4 bytes, 3/4 of them twice over in a ring, and 4 flags for who has a gradient: three rounds
        # of an average, and of a gradient where it is formed.
        ring = 2 * 3 * 57 * 4 // 4
        for name, sent in found["bytes"].items():
            gradient = 2 * 3 * (57 + 4) * 4 // 4 if "across" in name else 0
            assert sent == 3 * (ring + gradient), name
        drift = found["drift"]
        # Both are unbiased where workers agree. Apart, the same parameters show more noise across than within.
        assert drift["first, across"] == pytest.approx(drift["first, within"], rel=0.1)
        assert drift["last, across"] > 1.2 * drift["last, within"]
        assert drift["last, across"] > 1.4 * drift["first, across"]
        for name, sizes in found["decisions"].items():
            assert sizes == results[0]["decisions"][name]
            assert sizes[-1] > 2 * sizes[0], (name, sizes)
    journal = lines(tmp_path / "AdamW within.jsonl")
    assert [line["local_sgd"]["step_in_round"] for line in journal] == [1, 2, 3, 0] * 8
    assert [line["moments"] is not None for line in journal] == [True, False, False, False] * 8
    last = journal[-1]["local_sgd"]
    assert (last["rounds"], last["bytes_sent"], last["bytes_saved"]) == (8, 8 * ring, 24 * ring)
    assert lines(tmp_path / "local.jsonl")[-1]["local_sgd"]["rounds"] == 24


# --- compression, state, nodes, failures ----------------------------------------------------------------------------


def compressed(rank: int) -> dict[str, Any]:
    """What comes of fewer bits: in one exchange, in a hundred, in a run."""
    found: dict[str, Any] = {}
    exchange = Exchange(Collectives(dist.group.WORLD))
    generator = torch.Generator().manual_seed(rank)
    change = [torch.randn(700, generator=generator), torch.randn(3, 100, generator=generator) * 1e-4]
    exact = [each.clone() for each in change]
    exchange.mean(exact, weight=1 / WORKERS)
    zeros = [torch.zeros_like(each) for each in change]
    for compression in ("bf16", "int8"):
        errors, total, first = Errors(), torch.zeros(1000), torch.zeros(1000)
        for turn in range(100):
            sent = [each.clone() for each in change]
            exchange.compressed_mean(
                sent, zeros, shares=[1 / WORKERS] * WORKERS, compression=compression, errors=errors
            )
            flat = torch.cat([each.flatten() for each in sent])
            assert turn % 50 or same_on_all(flat)
            first, total = (flat, flat) if turn == 0 else (first, total + flat)
        goal = torch.cat([each.flatten() for each in exact])
        made = {}
        for name in ("none", compression):
            made[name], local, _ = run_local(
                rank, OPTIMIZERS["momentum"], 24, sync_every=4, compression=name, outer=Nesterov(lr=0.7, momentum=0.5)
            )
        found[compression] = {
            "once": float((first - goal).abs().max()),
            "on average": float((total / 100 - goal).abs().max()),
            "run": float((made[compression] - made["none"]).abs().max()),
            "same on all": same_on_all(made[compression]),
            "bytes": local.bytes_sent,
        }
    return found


SAVED: dict[str, dict[str, Any]] = {
    "average": {"sync_every": 5},
    "nesterov, int8, state": {
        "sync_every": 5, "outer": Nesterov(), "compression": "int8", "average_state": True, "warmup": steps(4)
    },
    "slowmo, quadratic": {"sync_every": Quadratic(0.025, 4), "outer": SlowMo(0.5), "measure": "last"},
}  # fmt: skip


def resumed(place: Path) -> dict[str, dict[str, bool]]:
    """A run that is saved in the middle of a round, and one that is not."""
    found = {}
    for name, local in SAVED.items():
        through, before, after = (Run(OPTIMIZERS["AdamW"], local=local) for _ in range(3))
        through.go(24)
        before.go(11)
        save(place / name, **before.parts())
        assert load(place / name, **after.parts()) is not None
        after.go(13)
        assert before.local is not None
        assert after.local is not None
        assert through.local is not None
        found[name] = {
            "in a round": before.local.step_in_round > 0,
            "weights": torch.equal(weights(after.model), weights(through.model)),
            "sizes": [*before.sizes, *after.sizes] == through.sizes,
            "counts": (after.local.rounds, after.local.bytes_sent, after.local.bytes_saved)
            == (through.local.rounds, through.local.bytes_sent, through.local.bytes_saved),
        }
        after.go(4)
        after.local.synchronize()
        save(place / f"{name}, between", **after.parts())
    return found


def half_as_many(rank: int, place: str) -> dict[str, str]:
    """Two workers go on where four were, and take what they can."""
    found = {}
    for name, local in SAVED.items():
        for when in ("", ", between"):
            run = Run(OPTIMIZERS["AdamW"], local=local)
            found[name + when] = refusal(load, Path(place) / (name + when), **run.parts())
            if found[name + when] == NOT_REFUSED:
                assert same_on_all(weights(run.model))
                run.go(8)
                assert run.local is not None
                run.local.synchronize()
                assert same_on_all(weights(run.model))
    return found


def nodes(rank: int) -> dict[str, Any]:
    """Two nodes of two ranks: sharded inside, averaged between, beside two workers simulated whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "shard"))

    def sharded(mesh: DeviceMesh) -> nn.Module:
        model = network()
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def whole(model: nn.Module) -> Tensor:
        return torch.cat([p.detach().full_tensor().flatten() for p in model.parameters() if isinstance(p, DTensor)])

    def of_node(node: int, step: int) -> list[Batch]:
        return [batch for number in (0, 1) for batch in in_order(2 * node + number, step)]

    found: dict[str, Any] = {}
    for name, (sync_every, spread, outer) in {
        "across": (4, "across", None), "within": (4, "within", Nesterov()), "one": (1, "across", None)
    }.items():  # fmt: skip
        model = sharded(mesh["shard"])
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        local = LocalSGD(
            model, optimizer, sync_every=sync_every, workers=mesh["node"], spread=spread, outer=outer,
            average_state=outer is None,
        )  # fmt: skip
        batches = AdaptiveBatch(
            model, optimizer, Constant(24), micro_batch_size=2, measure=Measure(monitor=True, l1=True), local_sgd=local
        )
        # With H = 1 the two nodes are one worker.
        simulation = Simulation(OPTIMIZERS["AdamW"], 1 if sync_every == 1 else 2)
        master = nn.Parameter(simulation.anchor.clone())
        diloco = SGD([master], lr=0.7, momentum=0.9, nesterov=True)
        for index, step in enumerate(batches.steps(GlobalOrder(DATA, shuffle=False), until=steps(8))):
            for batch in step:
                step.backward(loss_of(model, batch))
            if step.moments is not None:
                parts = [gradients(simulation.models[-node], of_node(node, index)) for node in (0, 1)]
                check(step.moments, oracle(parts, 2, spread), 2e-5)
            optimizer.step()
            optimizer.zero_grad()
            if sync_every == 1:
                simulation.steps(lambda _, step: [*of_node(0, step), *of_node(1, step)], range(index, index + 1))
                continue
            simulation.steps(of_node, range(index, index + 1))
            if index % 4 == 3:
                mean = simulation.mean()
                if outer is None:
                    simulation.average_state()
                else:
                    master.grad = master.detach() - mean
                    diloco.step()
                    mean = master.detach().clone()
                simulation.end_round(mean)
        error = float((whole(model) - weights(simulation.models[0])).abs().max())
        found[name] = (error, local.rounds, same_on_all(whole(model)))
        local.remove()
        batches.remove()

    other = sharded(mesh["shard"])
    held = OPTIMIZERS["local SGD"](other.parameters())
    found["refused"] = [
        refusal(LocalSGD, other, held, sync_every=2),
        refusal(LocalSGD, other, held, sync_every=2, workers=mesh["shard"]),
        refusal(LocalSGD, other, held, sync_every=2, workers=mesh),
    ]
    return found


NOT_REFUSED = "nothing was refused"


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        return str(error)
    return NOT_REFUSED


def refused(rank: int) -> list[str]:
    """What several ranks can get wrong; each on all of them at once."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1 * (1 + rank))
    wrapped = DistributedDataParallel(network())
    found = [
        refusal(AdaptiveBatch, model, optimizer, Constant(8), micro_batch_size=2),
        refusal(LocalSGD, wrapped, SGD(wrapped.parameters(), lr=0.1), sync_every=4),
        refusal(LocalSGD, model, optimizer, sync_every=4 + rank),
    ]
    # Rates that differ would make rounds that differ.
    local = LocalSGD(model, optimizer, sync_every=Quadratic(alpha=0.4, base=1, longest=8))
    found.append(refusal(lambda: [one_step(model, optimizer, batches_of(rank, step)) for step in range(40)]))
    local.remove()
    return found


def in_turn(rank: int, place: str) -> dict[str, Any]:
    return {
        "compressed": compressed(rank), "resumed": resumed(Path(place)), "nodes": nodes(rank), "refused": refused(rank)
    }  # fmt: skip


def test_compression_state_nodes_and_mistakes(tmp_path: Path) -> None:
    for found in run_ranks(in_turn, WORKERS, tmp_path, str(tmp_path), timeout=150):
        for name, (step, bits) in {"bf16": (1 / 256, 16), "int8": (1 / 254, 8)}.items():
            seen = found["compressed"][name]
            assert 1e-4 < seen["once"] < 4 * 2 * step  # normal numbers stay below 4; two encodings
            assert seen["on average"] < seen["once"] / 20  # what was left out came later
            assert 0 < seen["run"] < 0.05, found["compressed"]
            assert seen["same on all"]
            # Six rounds, each of one block a worker (57 numbers fill a part of one) sent twice to three others.
            block = 256 * bits // 8 + (4 if bits == 8 else 0)
            assert seen["bytes"] == 6 * 2 * 3 * block
        for name, same in found["resumed"].items():
            assert all(same.values()), (name, same)
        refused = found["nodes"].pop("refused")
        for name, (error, rounds, same) in found["nodes"].items():
            assert error < 2e-6, name
            assert (rounds, same) == (8 if name == "one" else 2, True)
        for text, message in zip(
            ("the model is sharded", "hold different shards", "mesh of one dimension"), refused, strict=True
        ):
            assert text in message
        for text, message in zip(
            (
                "a plain Sequential",
                "is in DistributedDataParallel",
                "different settings",
                "begin different rounds",
            ),
            found["refused"],
            strict=True,
        ):
            assert text in message

    for found in run_ranks(half_as_many, 2, tmp_path, str(tmp_path)):
        for name, message in found.items():
            allowed = "between" in name and "int8" not in name
            assert message == NOT_REFUSED if allowed else "saved by 4 workers, and there are 2" in message, name


def deserted(rank: int) -> dict[str, str]:
    """The last worker leaves the block early, then ends in the middle of a round."""
    found = {}
    for way in ("leaves", "ends"):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1)
        local = LocalSGD(model, optimizer, sync_every=4)
        try:
            for step in range(8):
                if rank == 2 and step == 6:
                    if way == "leaves":
                        local.synchronize()
                        break
                    dist.destroy_process_group()
                    return found
                one_step(model, optimizer, batches_of(rank, step))
        except RuntimeError as error:
            found[way] = str(error)
        local.remove()
    return found


def test_a_worker_that_ends_is_reported_and_not_waited_for(tmp_path: Path) -> None:
    first, second, last = run_ranks(deserted, 3, tmp_path, timeout=30)
    for found in (first, second, last):
        assert "(worker 0: 8; worker 1: 8; worker 2: 6)" in found["leaves"]
    for found in (first, second):
        assert "could not finish round 2 (step 8)" in found["ends"]
        assert "from the last checkpoint" in found["ends"]
    assert "ends" not in last
