"""The ladder: plain, DDP and FSDP2 take the same decisions; and what a person does around a step works on each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from support.ladder import BY_ACCUMULATION, BY_MICRO_BATCH, JUMP, WINDOWS, check_same, climb_with, growths
from support.loops import lines, loss_of, network, regression, train, train_by_hand
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, DistributedSampler

import adabatch
from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, NormTest, ProgressLR, examples, lr
from adabatch.adaptive.options import EngineOptions, Measure
from adabatch.optim import AdaGradNorm
from adabatch.runtime.probes.comm_hook import CommHookProbe

pytestmark = pytest.mark.distributed


def sharded(model: nn.Sequential | None = None, **options: Any) -> nn.Module:
    """The network in two units; its 7 rows are uneven over 2 ranks."""
    model = network() if model is None else model
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def replicated() -> nn.Module:
    return DistributedDataParallel(network())


def whole(model: nn.Module) -> Tensor:
    """All weights in one vector, gathered where they are sharded."""
    pieces = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return torch.cat([piece.flatten() for piece in pieces]).clone()


def run(model: nn.Module, *, num_steps: int, **options: Any) -> dict[str, Any]:
    """The ladder's run on a model of torch's own."""
    return climb_with(
        model, {"criterion": NormTest(eta=0.7), **options}, num_steps=num_steps, whole=lambda: whole(model)
    )


# --- the same decisions ----------------------------------------------------------------------------------------------

Rungs = dict[str, dict[str, Any]]


def by_micro_batch(rank: int, place: str) -> dict[str, Rungs]:
    """What was decided, and the weights, on each rung."""
    rungs = {"plain": run(network(), num_steps=200, **BY_MICRO_BATCH)}
    dist.init_process_group("gloo", init_method=f"file://{place}/ladder", rank=rank, world_size=2)
    rungs["DDP, tensor hooks"] = run(replicated(), num_steps=200, **BY_MICRO_BATCH)
    model = replicated()
    rungs["DDP, communication hook"] = run(model, num_steps=200, probe=CommHookProbe(model), **BY_MICRO_BATCH)
    rungs["FSDP2, each"] = run(sharded(), num_steps=200, **BY_MICRO_BATCH)
    rungs["FSDP2, last"] = run(sharded(), num_steps=200, gradient_sync="last", **BY_MICRO_BATCH)
    return {"micro-batch": rungs}


def by_accumulation(rank: int) -> dict[str, Rungs]:
    """The same where parts are micro-batches, and where they are ranks."""
    each = {"DDP, tensor hooks": run(replicated(), num_steps=80, **BY_ACCUMULATION)}
    each["FSDP2, each"] = run(fully_shard(network()), num_steps=80, **BY_ACCUMULATION)
    model = replicated()
    last = {"DDP, communication hook": run(model, num_steps=80, probe=CommHookProbe(model), **BY_ACCUMULATION)}
    last["FSDP2, last"] = run(fully_shard(network()), num_steps=80, gradient_sync="last", **BY_ACCUMULATION)
    return {"parts of a micro-batch": each, "parts of a rank": last}


def check_rungs(first: dict[str, Rungs], second: dict[str, Rungs], *, num_steps: int) -> None:
    for ladder, rungs in first.items():
        reference = next(iter(rungs.values()))
        assert len(reference["decisions"]) == num_steps
        assert growths(reference) >= 5, ladder
        for rung, found in rungs.items():
            check_same(f"{ladder}, {rung}", found, reference, windows="plain" not in rungs)
            assert found == second[ladder][rung], (ladder, rung)  # to the bit, on all ranks


def test_plain_ddp_and_fsdp_choose_the_same_batch_size_at_every_step(tmp_path: Path) -> None:
    results = run_ranks(by_micro_batch, 2, tmp_path, str(tmp_path), connect=False, timeout=200)
    check_rungs(*results, num_steps=200)


def test_growth_by_accumulation_is_the_same_where_the_parts_are(tmp_path: Path) -> None:
    check_rungs(*run_ranks(by_accumulation, 2, tmp_path, timeout=200), num_steps=80)


# --- what a person does around a step, on FSDP2 ----------------------------------------------------------------------


def loader_of(rank: int) -> DataLoader[Any]:
    data = regression(96)
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank, shuffle=False))


def constant(rank: int) -> dict[str, bool]:
    """Whether a constant policy is, bit by bit, the loop that one writes by hand."""
    same = {}
    kinds: list[Callable[[Any], Optimizer]] = [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01)]
    for optimizer_of in kinds:
        for accumulation in (1, 3):
            model, by_hand = sharded(), sharded()
            optimizer, other = optimizer_of(model.parameters()), optimizer_of(by_hand.parameters())
            size = 8 * accumulation
            batches = AdaptiveBatch(
                model, optimizer, Constant(size), micro_batch_size=4, measure=Measure(monitor=True), lr_rule="sqrt"
            )
            train(batches, model, optimizer, loader_of(rank))
            train_by_hand(by_hand, other, loader_of(rank), accumulation=accumulation)
            same[f"{type(optimizer).__name__}, {accumulation}"] = torch.equal(whole(model), whole(by_hand))

    model, by_hand = sharded(), sharded()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(by_hand.parameters(), lr=0.1)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(24),
        micro_batch_size=4,
        measure=Measure(monitor=True),
        engine=EngineOptions(gradient_sync="last"),
    )
    train(batches, model, optimizer, loader_of(rank))
    for index, batch in enumerate(loader_of(rank)):
        by_hand.set_requires_gradient_sync(index % 3 == 2)
        (loss_of(by_hand, batch) / 3).backward()
        if index % 3 == 2:
            other.step()
            other.zero_grad()
    same["one reduction a step"] = torch.equal(whole(model), whole(by_hand))
    same["nothing trained"] = not torch.equal(whole(model), whole(sharded()))
    return same


class Run:
    """A whole training run that can be saved, with what it did."""

    def __init__(self, model: nn.Module, journal: Path | None = None) -> None:
        self.model = model
        self.optimizer = AdamW(model.parameters(), lr=0.01)
        self.batches = AdaptiveBatch(
            model, self.optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=64),
            lr_rule="sqrt", measure=Measure(l1=True), journal=journal,
        )  # fmt: skip
        self.schedule = ProgressLR(self.optimizer, lr.cosine(), self.batches, total=examples(1000))
        self.order = GlobalOrder(regression(96))

    def go(self, num_steps: int) -> None:
        until = adabatch.steps(self.batches.consumed.steps + num_steps)
        train(self.batches, self.model, self.optimizer, self.order, schedule=self.schedule, until=until)

    def save(self, folder: Path) -> None:
        arrays = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        checkpoint.save(arrays, checkpoint_id=folder / "arrays")
        ours = [each.state_dict() for each in (self.batches, self.schedule, self.order)]
        torch.save(ours, folder / f"{dist.get_rank()}.pt")

    def load(self, folder: Path) -> None:
        arrays = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        checkpoint.load(arrays, checkpoint_id=folder / "arrays")
        set_model_state_dict(self.model, arrays["model"])
        set_optimizer_state_dict(self.model, self.optimizer, arrays["optimizer"])
        ours = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=True)
        for each, state in zip((self.batches, self.schedule, self.order), ours, strict=True):
            each.load_state_dict(state)


def resumed(place: Path) -> dict[str, bool]:
    """Whether a run that is saved and loaded is, bit by bit, the one that was not."""
    through, before, after = Run(sharded()), Run(sharded()), Run(sharded(network(seed=1)))
    through.go(24)
    before.go(11)
    before.save(place)
    after.load(place)
    after.go(13)
    return {
        "weights": torch.equal(whole(through.model), whole(after.model)),
        "batches": through.batches.state_dict() == after.batches.state_dict(),
        "schedule": through.schedule.state_dict() == after.schedule.state_dict(),
        "order": through.order.state_dict() == after.order.state_dict(),
        "grew": after.batches.plan.global_batch_size > 8,
    }


def not_a_number(rank: int, model: nn.Module) -> dict[str, Any]:
    """One rank's loss is not finite in the third of five steps."""
    optimizer = AdaGradNorm(model.parameters(), lr=0.5)
    batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=16, max=16))
    weights, applied = [whole(model)], []
    for step in batches.steps(loader_of(rank), until=adabatch.steps(5)):
        for batch in step:
            loss = loss_of(model, batch)
            step.backward(loss * math.nan if rank == 1 and batches.consumed.steps == 2 else loss)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(whole(model))
        applied.append((step.finite, str(step.decision.reason)))
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(weights)]
    return {"moved": moved, "applied": applied, "steps": batches.progress.steps, "finite": weights[-1].isfinite().all()}


def around_a_step(rank: int, place: str) -> dict[str, Any]:
    """All of it, on two ranks."""
    folder = Path(place)
    found: dict[str, Any] = {"constant": constant(rank), "resumed": resumed(folder)}
    found["not a number"] = {name: not_a_number(rank, model) for name, model in pair().items()}
    for name, model in pair().items():
        Run(model, folder / f"{name}.jsonl").go(12)
    dist.barrier()
    found["journals"] = {name: lines(folder / f"{name}.jsonl") for name in pair()}

    jump: dict[str, Any] = {**JUMP, "num_steps": len(WINDOWS), "monitor": False}
    found["jump"] = {
        "DDP": run(replicated(), **jump),
        "FSDP2": run(sharded(), **jump),
        "FSDP2, last": run(sharded(), gradient_sync="last", **jump),
        "FSDP2, probed": run(sharded(), **{**jump, "monitor": True}),
    }
    return found


def pair() -> dict[str, nn.Module]:
    return {"DDP": replicated(), "FSDP2": sharded()}


def test_what_a_person_does_around_a_step(tmp_path: Path) -> None:
    for found in run_ranks(around_a_step, 2, tmp_path, str(tmp_path), timeout=150):
        assert len(found["constant"]) == 6
        assert all(found["constant"].values()), found["constant"]
        assert all(found["resumed"].values()), found["resumed"]

        for name, seen in found["not a number"].items():
            assert seen["moved"] == [True, True, False, True, True], name
            assert [finite for finite, _ in seen["applied"]] == seen["moved"], name
            assert seen["applied"][2][1] == "not finite", name
            assert seen["steps"] == 4, name
            assert seen["finite"], name

        ddp, fsdp = found["journals"]["DDP"], found["journals"]["FSDP2"]
        assert len(ddp) == len(fsdp) == 12
        for theirs, ours in zip(ddp, fsdp, strict=True):
            assert rounded(ours) == rounded(theirs)

        for name, jumped in found["jump"].items():
            assert jumped["windows"] == WINDOWS, name
            assert [size for size, _ in jumped["decisions"]] == [8] * 3 + [32] * 5, name
            assert jumped["weights"] == pytest.approx(found["jump"]["DDP"]["weights"], rel=1e-5, abs=1e-6), name
        assert found["jump"]["FSDP2"]["weights"] == found["jump"]["FSDP2, probed"]["weights"]


def rounded(entry: Any) -> Any:
    """A line of a journal with its numbers to four digits: sums of float32, and small differences of them."""
    if isinstance(entry, dict):
        return {name: rounded(value) for name, value in entry.items()}
    if isinstance(entry, list):
        return [rounded(value) for value in entry]
    return float(f"{entry:.3g}") if isinstance(entry, float) else entry


def grids(rank: int) -> dict[str, Any]:
    """Four ranks in a row, and two by two."""
    options: dict[str, Any] = {"micro_batch_size": 4, "limits": Limits(min=16, max=64), "num_steps": 25}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {
        "DDP": run(replicated(), **options),
        "FSDP2": run(sharded(), **options),
        "HSDP": run(sharded(mesh=mesh), **options),
        "HSDP, last": run(sharded(mesh=mesh), gradient_sync="last", **options),
    }


def test_replicas_are_counted_once(tmp_path: Path) -> None:
    results = run_ranks(grids, 4, tmp_path, timeout=150)
    for found in results:
        for name in ("FSDP2", "HSDP"):
            check_same(name, found[name], found["DDP"])
        for name in found:
            assert found[name] == results[0][name], name
