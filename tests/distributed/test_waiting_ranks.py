"""A rank that calls alone what all ranks must call is named on all of them, and says so if it waits for long."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, Constant, GlobalOrder, Guard, LocalSGD
from adabatch.runtime import waiting

pytestmark = pytest.mark.distributed


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def saved_late(rank: int, folder: Path) -> list[list[str]]:
    """The second rank comes after the first one's patience has ended, then at once."""
    model = DistributedDataParallel(network())
    found = []
    for patience in (0.2, 60.0):
        waiting.PATIENCE = patience
        said = Said()
        logging.getLogger("adabatch").addHandler(said)
        time.sleep(2.0 if rank and patience < 1 else 0.0)
        adabatch.save(folder, model=model)
        logging.getLogger("adabatch").removeHandler(said)
        found.append([message for message in said.messages if "has waited" in message])
    return found


def test_a_save_that_waits_for_other_ranks_is_named(tmp_path: Path) -> None:
    first, _ = run_ranks(saved_late, 2, tmp_path, tmp_path / "saved")
    assert len(first[0]) == 1
    assert "has waited for 0.2 s in save() or step() of Checkpoints, which all ranks must call" in first[0][0]
    assert "call it on every rank" in first[0][0]
    assert first[1] == []


# --- while the others go on -----------------------------------------------------------------------------------------


def sharded() -> nn.Module:
    model = network()
    fully_shard(model[0])
    return fully_shard(model)


def read_by(kind: str, batches: AdaptiveBatch, model: nn.Module, order: GlobalOrder) -> Iterator[Any]:
    """The steps of a loop, after their updates."""
    data = regression(96)
    loader: Any = order
    if kind == "loader":
        loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data))
    for step in batches.steps(loader, until=adabatch.steps(8)):
        for batch in step:
            step.backward(loss_of(model, batch))
        batches.optimizer.step()
        batches.optimizer.zero_grad()
        yield step


def saved_alone(rank: int, folder: Path, kind: str, alone: int) -> tuple[str, list[str]]:
    said = Said()
    logging.getLogger("adabatch").addHandler(said)
    model = sharded() if kind == "fsdp2" else DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.01)
    guard = Guard(skip_nonfinite=False) if kind == "nothing reduced" else Guard()
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, guard=guard)
    order = GlobalOrder(regression(96))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches, "order": order}
    checkpoints = Checkpoints(folder, **parts, background=False)
    try:
        if kind == "load" and rank == alone:
            checkpoints.load()
        for step in read_by(kind, batches, model, order):
            if step.number == 2:
                checkpoints.save()  # once as it should be
            if rank == alone and step.number == 4:
                checkpoints.save()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", said.messages
    return "nothing", said.messages


@pytest.mark.parametrize(
    ("kind", "alone"),
    [("order", 0), ("order", 1), ("loader", 0), ("nothing reduced", 0), ("fsdp2", 0), ("load", 0)],
)
def test_a_save_on_one_rank_is_named_on_all_while_the_others_go_on(tmp_path: Path, kind: str, alone: int) -> None:
    found = run_ranks(saved_alone, 2, tmp_path, tmp_path / "saved", kind, alone)
    call = "load() of Checkpoints" if kind == "load" else "save() or step() of Checkpoints"
    where = "the beginning of steps() of step 0" if kind == "load" else "of step 5"
    (own, _), (other, said) = found[alone], found[1 - alone]
    assert f"rank {alone} waits in {call}, which all ranks must call, and rank {1 - alone} has gone on to" in own
    assert where in own
    assert "call it on every rank" in own
    assert any(own.partition(": ")[2] in message for message in said)
    if kind != "fsdp2":  # whose collectives in the forward are those of torch
        assert other == own.replace("RuntimeError", "RankLost")


# --- without a reduction, or without a word -------------------------------------------------------------------------


def alone(rank: int, kind: str, folder: Path) -> str:
    """What the second rank alone does; the first one's error."""
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model, optimizer, Constant(16), micro_batch_size=4, guard=Guard(skip_nonfinite=False, check_every=None)
    )
    order = GlobalOrder(regression(96))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "batches": batches, "order": order}
    checkpoints = Checkpoints(folder, **parts, background=False)
    try:
        for step in batches.steps(order, until=adabatch.steps(8)):
            for index, batch in enumerate(step):
                if rank and kind == "skip" and (step.number, index) == (2, 0):
                    continue
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            if rank and step.number == 2:
                if kind == "break":
                    break
                if kind == "close":
                    checkpoints.close()
                if kind == "watch":
                    with adabatch.Watchdog(batches, timeout=20):
                        pass
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("skip", "rank 1 raised RuntimeError: step.backward(loss) must be called once for each micro-batch"),
        ("break", "rank 1 has left its loop over the steps in step 2, by `break` or an error"),
        ("close", "rank 1 waits in close() of Checkpoints, which all ranks must call, and rank 0 has gone on to"),
        ("watch", "rank 1 waits in `with Watchdog(...)`, which all ranks must call, and rank 0 has gone on to"),
    ],
)
def test_what_one_rank_does_alone_is_named_on_the_other(tmp_path: Path, kind: str, words: str) -> None:
    first, _ = run_ranks(alone, 2, tmp_path, kind, tmp_path / "saved")
    assert first.startswith(f"RankLost: {words}")


def in_evaluation(rank: int) -> list[str]:
    """The first rank evaluates for longer than the second one's patience."""
    waiting.PATIENCE = 1.5
    said = Said()
    logging.getLogger("adabatch").addHandler(said)
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4)
    for step in batches.steps(GlobalOrder(regression(96)), until=adabatch.steps(4)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step.number == 2:
            time.sleep(5)  # for which no event can stand: it is the time that is told
    return said.messages


def test_a_rank_that_waits_for_long_says_where_the_others_stand(tmp_path: Path) -> None:
    first, (second,) = run_ranks(in_evaluation, 2, tmp_path)
    assert first == []
    assert "rank 1 has waited for 1.5 s in the backward of micro-batch 1 of step 3" in second
    assert "rank 0 in what follows the micro-batches of step 2 does not move" in second


# --- workers of local SGD -------------------------------------------------------------------------------------------


def local_steps(model: nn.Module, optimizer: SGD, number: int, *, seconds: float = 0.0) -> None:
    batch = regression(8)[:]
    for _ in range(number):
        time.sleep(seconds)
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, folder: Path, kind: str, options: dict[str, Any]) -> str:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    try:
        with LocalSGD(model, optimizer, **options) as local, Checkpoints(folder, **parts, local_sgd=local) as kept:
            if kind == "load" and rank == 0:
                kept.load(missing_ok=True)
            # with by_speed the second worker, which is slower, needs more rounds for as many steps
            local_steps(model, optimizer, 9, seconds=0.02 * rank)
            if rank == 0 or kind == "by steps":
                kept.save()
            local_steps(model, optimizer, 9)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "options", "does"),
    [
        ("save", {"sync_every": 4}, "saves a checkpoint"),
        ("save", {"sync_every": 1}, "saves a checkpoint"),
        ("save", {"sync_every": 4, "overlap": 2}, "saves a checkpoint"),
        ("load", {"sync_every": 4}, "loads a checkpoint"),
        ("load", {"sync_every": 1}, "loads a checkpoint"),
        ("by steps", {"sync_every": 4, "by_speed": True}, "saves a checkpoint"),
    ],
)
def test_a_worker_that_saves_or_loads_alone_is_named_by_all(
    tmp_path: Path, kind: str, options: dict[str, Any], does: str
) -> None:
    for message in run_ranks(worker, 2, tmp_path, tmp_path / "saved", kind, options):
        assert "the workers are doing different things" in message
        assert f"worker 0 {does} after" in message


def left_apart(rank: int) -> list[str]:
    """Workers without a `with` block, whose last round is not over when the object is dropped."""
    said = Said()
    logging.getLogger("adabatch").addHandler(said)
    for number, synchronize in ((4, False), (6, True), (6, False)):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        local = LocalSGD(model, optimizer, sync_every=4)
        local_steps(model, optimizer, number)
        if synchronize:
            local.synchronize()
        del local, optimizer, model
        gc.collect()
    return said.messages


def test_workers_that_are_dropped_apart_say_so(tmp_path: Path) -> None:
    for (said,) in run_ranks(left_apart, 2, tmp_path):
        assert "hold different parameters at its end: the last 2 step(s) were not averaged" in said


def by_speed_and_not(rank: int, folder: Path) -> str:
    message = "nothing"
    for speed in (True, False):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        with LocalSGD(model, optimizer, sync_every=4, by_speed=speed) as local:
            if speed:
                while local.rounds < 3:
                    local_steps(model, optimizer, 1, seconds=0.02 * (1 + rank))
                adabatch.save(folder, model=model, optimizer=optimizer, local_sgd=local)
                continue
            try:
                adabatch.load(folder, model=model, optimizer=optimizer, local_sgd=local)
            except ValueError as error:
                message = str(error)
    return message


def test_workers_that_stepped_by_their_speed_do_not_go_on_alike(tmp_path: Path) -> None:
    for message in run_ranks(by_speed_and_not, 2, tmp_path, tmp_path / "saved"):
        assert "the state was saved with by_speed=True" in message
        assert "give by_speed=True" in message
