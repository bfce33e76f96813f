"""``AdaptiveBatch`` under DDP: equal to the loop by hand, to one process, and to itself after a resume."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from support.loops import lines, network, regression, train, train_by_hand, weights
from support.ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    NormTest,
    ProgressLR,
    Stage,
    Stages,
    examples,
    lr,
    steps,
)
from adabatch.adaptive.options import Measure
from adabatch.batch import Observation
from adabatch.batch.needs import Needs

pytestmark = pytest.mark.distributed

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
}


def same_on_all(vector: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    largest, least = vector.clone(), vector.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return torch.equal(largest, least)


# --- a constant policy is the loop by hand --------------------------------------------------------------------------


def in_order(order: GlobalOrder, rank: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of 4: of every 8 positions, the first or the second half."""
    x, y = order.dataset.tensors
    positions = torch.cat([order.permutation(epoch) for epoch in range(epochs)])
    for chunk in positions.split(8):
        mine = chunk[4 * rank : 4 * rank + 4]
        yield x[mine], y[mine]


def sampled() -> DataLoader[Any]:
    data = regression(96)
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=5))


def by_hand_and_adaptive(rank: int) -> list[tuple[str, bool, int]]:
    found = []
    for (name, make), accumulation, source in itertools.product(OPTIMIZERS.items(), (1, 3, 4), ("loader", "order")):
        by_hand = DistributedDataParallel(network())
        micro_batches = sampled() if source == "loader" else itertools.islice(
            in_order(GlobalOrder(regression(64), seed=2), rank, 2), 12
        )  # fmt: skip
        train_by_hand(by_hand, make(by_hand.parameters()), micro_batches, accumulation=accumulation)
        for monitor in (False, True):
            model = DistributedDataParallel(network())
            optimizer = make(model.parameters())
            batches = AdaptiveBatch(
                model, optimizer, Constant(8 * accumulation), micro_batch_size=4, measure=Measure(monitor=monitor)
            )
            loader = sampled() if source == "loader" else GlobalOrder(regression(64), seed=2)
            train(batches, model, optimizer, loader, until=examples(96))
            equal = torch.equal(weights(model), weights(by_hand)) and same_on_all(weights(model))
            found.append((f"{name}, {accumulation}, {source}, {monitor}", equal, batches.progress.steps))
            batches.remove()
    return found


def test_a_constant_policy_is_a_ddp_loop_by_hand_to_the_bit(tmp_path):
    for result in run_ranks(by_hand_and_adaptive, 2, tmp_path):
        assert len(result) == 24
        for (case, equal, num_steps), accumulation in zip(result, ([1] * 4 + [3] * 4 + [4] * 4) * 2, strict=True):
            assert equal, case
            assert num_steps == 96 // (8 * accumulation), case


# --- one process and two are the same run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Even(NormTest):
    """The norm test, rounded up to what both one process and two can make up of the same parts."""

    needs: ClassVar[Needs] = NormTest.needs

    def rest(self, observation: Observation) -> float:
        rest = super().rest(observation)
        return 4.0 * -(-rest // 4) if math.isfinite(rest) else rest


def growing(model: torch.nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A run whose batch follows the noise; what happened at each step."""
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Even(eta=0.9),
        micro_batch_size=2,
        limits=Limits(min=4, max=64),
        # Half of a batch is not always what two processes can make up: only growth.
        control=Control(memory=5, confidence=0.5, hysteresis=0.1, growth=2.0, pace=math.inf, monotone=True),
        lr_rule="sqrt",
    )
    schedule = ProgressLR(optimizer, lr.cosine(), batches, total=examples(3000), warmup=steps(5))
    record: list[dict[str, Any]] = []

    def each(step: Any) -> None:
        record.append(
            {
                "batch": step.global_batch_size,
                "parts": step.moments.num_parts,
                "part_size": step.moments.part_size,
                "next": step.decision.plan.global_batch_size,
                "noise": step.moments.noise,
                "part_sq": step.moments.part_sq,
                "loss": step.loss,
                "lr": schedule.get_last_lr(),
                "weights": weights(model),
            }
        )

    train(
        batches, model, optimizer, GlobalOrder(regression(512, dtype=dtype), seed=1), each=each, schedule=schedule,
        until=steps(64),
    )  # fmt: skip
    return record


def growing_under_ddp(rank: int, name: str) -> list[dict[str, Any]]:
    dtype = getattr(torch, name)
    return growing(DistributedDataParallel(network(dtype=dtype)), dtype)


@pytest.mark.parametrize(("name", "rel"), [("float32", 1e-5), ("float64", 1e-10)])
def test_two_processes_do_what_one_does(tmp_path, name, rel):
    dtype = getattr(torch, name)
    alone = growing(network(dtype=dtype), dtype)
    sizes = [line["batch"] for line in alone]
    assert len(alone) == 64
    assert sum(after > before for before, after in itertools.pairwise(sizes)) >= 5
    for together in run_ranks(growing_under_ddp, 2, tmp_path, name):
        for key in ("batch", "parts", "next", "lr"):
            assert [line[key] for line in together] == [line[key] for line in alone], key
        for index, (mine, other) in enumerate(zip(together, alone, strict=True)):
            # The noise is a difference of two norms of the size of part_sq * batch.
            scale = other["part_sq"] * other["batch"]
            assert mine["part_size"] == pytest.approx(2, rel=1e-12)
            assert mine["noise"] == pytest.approx(other["noise"], rel=rel, abs=rel * scale), index
            assert mine["loss"] == pytest.approx(other["loss"], rel=10 * rel), index
            assert torch.allclose(mine["weights"], other["weights"], rtol=10 * rel, atol=10 * rel), index


# --- a change of the batch leaves the ranks together ----------------------------------------------------------------


def changing(rank: int, folder: str) -> dict[str, Any]:
    """1 -> 4 accumulation steps after 3 updates, on to 8, back to 2 and to 1; a gradient reduction counted by DDP."""
    model = DistributedDataParallel(network(dtype=torch.float64))
    reduced = []

    def counting(_, bucket):  # annotations would have to be types, not strings
        reduced.append(bucket.index())
        gradient = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(gradient, async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, counting)
    optimizer = Adam(model.parameters(), lr=0.01)
    table = Stages(8, [Stage(steps(3), 32), Stage(steps(6), 64), Stage(steps(8), 16), Stage(steps(10), 8)])
    batches = AdaptiveBatch(
        model,
        optimizer,
        table,
        micro_batch_size=4,
        lr_rule="linear",
        measure=Measure(monitor=True),
        journal=f"{folder}/journal.jsonl",
    )
    order = GlobalOrder(regression(256, dtype=torch.float64), seed=8)
    sizes, equal, reductions = [], [], []

    def each(step: Any) -> None:
        sizes.append(step.global_batch_size)
        equal.append(same_on_all(weights(model)))
        reductions.append(len(reduced))

    train(batches, model, optimizer, order, each=each, until=steps(14))
    return {"sizes": sizes, "equal": equal, "reductions": reductions, "weights": weights(model)}


def test_no_change_of_the_batch_parts_the_ranks(tmp_path):
    results = run_ranks(changing, 2, tmp_path, str(tmp_path))
    sizes = [8] * 3 + [32] * 3 + [64] * 2 + [16] * 2 + [8] * 4
    for result in results:
        assert result["sizes"] == sizes
        assert all(result["equal"])
        # One reduction an update, in the last micro-batch: no window was cut short or run over.
        assert result["reductions"] == list(range(1, 15))
    journal = lines(tmp_path / "journal.jsonl")
    assert [line["plan"]["global_batch_size"] for line in journal] == sizes
    assert [line["plan"]["accumulation_steps"] for line in journal] == [size // 8 for size in sizes]

    # The windows by hand, on one process: each update takes the next examples of the order, all of them.
    model = network(dtype=torch.float64)
    order = GlobalOrder(regression(256, dtype=torch.float64), seed=8)
    x, y = order.dataset.tensors
    positions = torch.cat([order.permutation(epoch) for epoch in range(2)])
    optimizer = Adam(model.parameters(), lr=0.01)
    begin = 0
    for size in sizes:
        mine = positions[begin : begin + size]
        (model(x[mine]) - y[mine]).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 0.01 * size / 8
        optimizer.step()
        optimizer.zero_grad()
        begin += size
    assert torch.allclose(results[0]["weights"], weights(model), rtol=1e-9, atol=1e-9)


# --- resumed is uninterrupted ---------------------------------------------------------------------------------------


class Everything:
    def __init__(self, model: torch.nn.Module, journal: str | None = None) -> None:
        self.model = model
        self.optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        self.order = GlobalOrder(regression(100), seed=3)
        self.batches = AdaptiveBatch(
            model,
            self.optimizer,
            NormTest(eta=0.4),
            micro_batch_size=2,
            max_micro_batch_size=8,
            limits=Limits(min=4, max=64),
            control=Control(memory=4, confidence=0.6),
            lr_rule="sqrt",
            journal=journal,
        )
        self.schedule = ProgressLR(
            self.optimizer, lr.wsd(cooldown=0.4), self.batches, total=examples(400), warmup=steps(5)
        )

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "order", "batches", "schedule")}

    def own(self) -> str:
        """What adabatch saves."""
        return json.dumps([part.state_dict() for part in (self.order, self.batches, self.schedule)])

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def run(self) -> list[tuple[bytes, str]]:
        found: list[tuple[bytes, str]] = []
        train(
            self.batches, self.model, self.optimizer, self.order, schedule=self.schedule, until=examples(400),
            each=lambda _: found.append((self.save(), self.own())),
        )  # fmt: skip
        return found


def resumed(rank: int, folder: str) -> dict[str, Any]:
    whole = Everything(DistributedDataParallel(network()), f"{folder}/whole.jsonl")
    states = whole.run()
    equal = []
    for at, (saved, own) in enumerate(states[:-1], start=1):
        part = Everything(DistributedDataParallel(network()), f"{folder}/{at}.jsonl")
        part.load(saved)
        loaded = part.own() == own
        part.run()
        equal.append(loaded and torch.equal(weights(part.model), weights(whole.model)) and part.own() == states[-1][1])
    middle = states[len(states) // 2]
    return {"equal": equal, "own": [own for _, own in states], "middle": middle[0], "weights": weights(whole.model)}


def test_a_resumed_run_is_the_uninterrupted_one_on_every_rank(tmp_path):
    results = run_ranks(resumed, 2, tmp_path, str(tmp_path))
    assert results[0]["own"] == results[1]["own"]  # what is saved is equal on all ranks
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    journal = lines(tmp_path / "whole.jsonl")
    assert len({line["plan"]["global_batch_size"] for line in journal}) >= 4
    for result in results:
        assert len(result["equal"]) == len(journal) - 1 > 8
        assert all(result["equal"])
    for at in range(1, len(journal)):
        assert lines(tmp_path / f"{at}.jsonl") == journal[at:]

    # On one process the same data come next, in the same batch size, with the same learning rate.
    alone = Everything(network())
    state = torch.load(io.BytesIO(results[0]["middle"]), weights_only=True)
    state["model"] = {key.removeprefix("module."): value for key, value in state["model"].items()}
    file = io.BytesIO()
    torch.save(state, file)
    alone.load(file.getvalue())
    assert alone.batches.plan.global_batch_size == state["batches"]["plan"]["micro_batch_size"] * (
        state["batches"]["plan"]["accumulation_steps"] * 2
    )
    assert alone.batches.plan.dp_size == 1
    assert alone.order.state_dict() == state["order"]
    seen: list[float] = []
    step = next(alone.batches.steps(alone.order))
    for x, y in step:
        seen += x[:, 0].tolist()
        step.backward((alone.model(x) - y).square().mean())
    begin = state["order"]["epoch"] * 100 + state["order"]["examples"]
    positions = torch.cat([alone.order.permutation(epoch) for epoch in range(5)])
    x, _ = alone.order.dataset.tensors
    assert seen == x[positions[begin : begin + step.global_batch_size], 0].tolist()


# --- what it costs on the wire --------------------------------------------------------------------------------------


def bytes_sent(rank: int) -> dict[str, list[int]]:
    """Bytes that adabatch gives to all_reduce a step; the gradients go through DDP's own reducer, and not by here."""
    sent = [0]
    plain = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent[0] += tensor.nbytes
        return plain(tensor, *arguments, **options)

    dist.all_reduce = counting
    found = {}
    data = regression(192)
    sources: dict[str, Any] = {
        "order": GlobalOrder(data),
        "loader": DataLoader(data, batch_size=2, sampler=DistributedSampler(data)),
    }
    for name, source in sources.items():
        model = DistributedDataParallel(network())
        optimizer = SGD(model.parameters(), lr=0.05)
        batches = AdaptiveBatch(model, optimizer, NormTest(eta=0.4), micro_batch_size=2, limits=Limits(min=4, max=64))
        sent[0] = 0
        each: list[int] = []
        train(batches, model, optimizer, source, each=lambda _, each=each: each.append(sent[0]))
        each.append(sent[0])
        found[name] = each
    dist.all_reduce = plain
    return found


def test_at_most_80_bytes_a_step_are_sent(tmp_path):
    for result in run_ranks(bytes_sent, 2, tmp_path):
        for name, sent in result.items():
            num_steps = len(sent) - 1
            assert num_steps >= 6
            each = [after - before for before, after in itertools.pairwise(sent[:-1])]
            assert max(each[:-1]) <= 80, name
            # A pass costs a little more at its ends: settings 16 bytes, errors of one rank 8, data 8 per rank, copies
            # of the weights 24 per rank (at both ends if it is long enough), and 40 for where the loaders end.
            assert sent[-1] <= 80 * num_steps + 176, name
