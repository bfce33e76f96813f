"""Checkpoints and signals on several ranks: whole and sharded models, other world sizes, one rank's trouble."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.loops import journal_text, lines, loss_of, network, regression
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, GlobalOrder, Limits, NormTest, ProgressLR, lr
from adabatch.adaptive.options import Guard, Measure
from adabatch.checkpointing import CheckpointError
from adabatch.checkpointing.files import checkpoints_in

pytestmark = pytest.mark.distributed

TOTAL = adabatch.examples(900)
FORTH = adabatch.examples(450)
KINDS = ["ddp", "fsdp"]


def parts(folder: Path, kind: str, *, seed: int = 0) -> dict[str, Any]:
    """A run whose batch grows; 7 rows of its first layer on 2 or 3 ranks: uneven shards."""
    model: nn.Module = nn.Sequential(network(seed=seed), nn.Dropout(0.1))
    if kind == "fsdp":
        fully_shard(model[0][0])
        fully_shard(model)
    elif dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.3),
        micro_batch_size=2,
        limits=Limits(min=12, max=96),
        lr_rule="sqrt",
        journal=folder / "journal.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.cosine(), batches, total=TOTAL)
    order = GlobalOrder(regression(200), seed=4)
    return {"model": model, "optimizer": optimizer, "batches": batches, "schedule": schedule, "order": order}


def train(run: dict[str, Any], until: adabatch.batch.Duration) -> None:
    for step in run["batches"].steps(run["order"], until=until):
        for batch in step:
            step.backward(loss_of(run["model"], batch))
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        run["schedule"].step()


def state(run: dict[str, Any]) -> dict[str, Any]:
    """Everything, sharded tensors whole."""

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor().clone()
        return value.clone() if isinstance(value, Tensor) else value

    model = run["model"].module if isinstance(run["model"], DistributedDataParallel) else run["model"]
    moments = run["optimizer"].state_dict()["state"]
    return {
        "model": {name: whole(value) for name, value in model.state_dict().items()},
        "moments": {(index, key): whole(value) for index, entry in moments.items() for key, value in entry.items()},
        "schedule": run["schedule"].state_dict(),
        "order": run["order"].state_dict(),
        "averages": run["batches"].state_dict()["control"],
        "consumed": run["batches"].consumed,
        "plan": run["batches"].plan.global_batch_size,
        "drawn": (float(torch.rand(())), random.random()),
    }


def equal(one: dict[str, Any], two: dict[str, Any], *but: str) -> None:
    for name in one.keys() - set(but):
        if name in ("model", "moments"):
            assert one[name].keys() == two[name].keys()
            assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name
        else:
            assert one[name] == two[name], name


def uninterrupted_and_saved(rank: int, folder: Path, kind: str) -> tuple[Any, Any]:
    torch.manual_seed(rank)
    random.seed(rank)
    run = parts(folder / "whole", kind)
    train(run, FORTH)
    with Checkpoints(folder / "saved", **run) as checkpoints:
        checkpoints.save()
        at_save = state(run)  # draws random numbers
        torch.manual_seed(50 + rank)
        train(run, TOTAL)  # while it is written
    return at_save, state(run)


def resumed(rank: int, folder: Path, kind: str, name: str) -> tuple[Any, Any, list[str]]:
    torch.manual_seed(99)
    run = parts(folder / name, kind, seed=8)
    loaded = adabatch.load(folder / "saved", **run)
    assert loaded is not None
    at_load = state(run)
    torch.manual_seed(50 + rank)
    train(run, TOTAL)
    return at_load, state(run), [str(difference) for difference in loaded.differences]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_and_goes_on_with_more_and_fewer_ranks(
    tmp_path: Path, kind: str
) -> None:
    """Saved on two ranks: on two to the bit; on one and three the same state, order and epochs."""
    before = run_ranks(uninterrupted_and_saved, 2, tmp_path, tmp_path, kind)
    shutil.copytree(tmp_path / "whole", tmp_path / "same")
    for (at_save, end), (at_load, again, differences) in zip(
        before, run_ranks(resumed, 2, tmp_path, tmp_path, kind, "same"), strict=True
    ):
        equal(at_save, at_load)
        equal(end, again)
        assert not differences
    assert journal_text(tmp_path / "whole/journal.jsonl") == journal_text(tmp_path / "same/journal.jsonl")
    for size in (1, 3):
        other = f"{size}"
        shutil.copytree(tmp_path / "whole", tmp_path / other)
        for rank, (at_load, again, differences) in enumerate(run_ranks(resumed, size, tmp_path, tmp_path, kind, other)):
            saved, end = before[min(rank, 1)]
            # The plan is the nearest that this many ranks can run; a third rank draws random numbers of its own.
            equal(saved, at_load, "drawn", "plan")
            assert (at_load["drawn"] == saved["drawn"]) == (rank < 2)
            assert abs(at_load["plan"] - saved["plan"]) <= 3
            assert again["order"]["epoch"] == end["order"]["epoch"] == 900 // 200
            assert f"world_size was 2 when the checkpoint was saved, and is {size} now" in differences
        journal = lines(tmp_path / other / "journal.jsonl")
        assert [line["examples"] for line in journal[1:]] == [
            line["examples"] + line["plan"]["global_batch_size"] for line in journal[:-1]
        ]
        assert {line["plan"]["dp_size"] for line in journal} == {2, size}
        assert all(12 <= line["plan"]["global_batch_size"] <= 96 for line in journal)


# --- loaders of others ------------------------------------------------------------------------------------------------


class Deal:
    """An endless loader of this rank, with a place of its own."""

    def __init__(self, rank: int, place: int = 0) -> None:
        self.rank, self.place = rank, place

    def __iter__(self) -> Any:
        while True:
            self.place += 1 + self.rank
            generator = torch.Generator().manual_seed(self.place)
            yield torch.randn(2, 6, generator=generator), torch.randn(2, 1, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def by_loader(rank: int, folder: Path, until: int) -> tuple[int, str]:
    run = {**parts(folder / "run", "ddp"), "order": Deal(rank)}
    try:
        adabatch.load(folder / "saved", **run)
    except ValueError as error:
        return 0, str(error)
    train(run, adabatch.steps(until))
    adabatch.save(folder / "saved", **run)
    return run["order"].place, ""


def test_a_loader_of_ones_own_is_saved_for_each_rank_and_wants_as_many_again(tmp_path: Path) -> None:
    whole = run_ranks(by_loader, 2, tmp_path, tmp_path / "whole", 9)
    run_ranks(by_loader, 2, tmp_path, tmp_path / "parts", 4)
    assert run_ranks(by_loader, 2, tmp_path, tmp_path / "parts", 9) == whole
    assert whole[1][0] == 2 * whole[0][0] > 0
    journals = [journal_text(tmp_path / name / "run/journal.jsonl") for name in ("whole", "parts")]
    assert journals[0] == journals[1]
    for _, said in run_ranks(by_loader, 3, tmp_path, tmp_path / "parts", 9):
        assert "order was saved with a state for each of 2 rank(s), and there are 3" in said


# --- one rank's trouble -----------------------------------------------------------------------------------------------


def load_on_each(rank: int, folders: list[Path]) -> tuple[str, tuple[str, ...]]:
    loaded = adabatch.load(folders[rank], model=DistributedDataParallel(network()))
    assert loaded is not None
    return loaded.path.name, loaded.damaged


def test_what_one_rank_finds_damaged_no_rank_loads(tmp_path: Path) -> None:
    """Each rank has a disk of its own here, and the second one's lost a checkpoint, and damaged another."""
    folders = [tmp_path / "first", tmp_path / "second"]
    model = network()
    for _ in range(3):
        adabatch.save(folders[0], model=model)
    shutil.copytree(folders[0], folders[1])
    shutil.rmtree(folders[1] / "000003-step-0")
    (folders[1] / "000002-step-0" / "state.pt").write_bytes(b"")
    (first, why), (second, because) = run_ranks(load_on_each, 2, tmp_path, folders)
    assert first == second == "000001-step-0"
    assert "damaged where another rank read it" in why[0]
    assert "manifest.json cannot be read" in because[0]
    assert "state.pt has 0 bytes" in because[1]


def sharded_with_trouble(rank: int, folder: Path) -> list[str]:
    """A disk that fails on the second rank, then on the first; each time all ranks hear of it, at the next save."""
    run = parts(folder / "run", "fsdp")
    train(run, adabatch.steps(2))
    said = []
    sealed, write = adabatch.checkpointing.run_state.sealed, torch.save
    checkpoints = Checkpoints(folder / "saved", **run)
    for troubled in (1, 0):

        def fails(*arguments: Any, troubled: int = troubled) -> Any:
            if rank == troubled:
                raise OSError(28, "No space left on device")
            return (sealed if troubled else write)(*arguments)

        if troubled:
            adabatch.checkpointing.run_state.sealed = fails
        else:
            torch.save = fails
        checkpoints.save()
        checkpoints._background._thread.join()  # what it raised is kept
        adabatch.checkpointing.run_state.sealed, torch.save = sealed, write
        try:
            checkpoints.save()
        except CheckpointError as error:
            said.append(str(error))
    checkpoints.save()
    checkpoints.close()
    return said


def test_a_disk_that_fails_on_one_rank_is_heard_of_on_all(tmp_path: Path) -> None:
    for said in run_ranks(sharded_with_trouble, 2, tmp_path, tmp_path):
        assert len(said) == 2
        assert "rank 1: OSError: [Errno 28] No space left on device" in said[0]
        assert "rank 0: OSError: [Errno 28] No space left on device" in said[1]
    assert list(checkpoints_in(tmp_path / "saved")) == [1]


def not_finite_on_one_rank(rank: int, folder: Path, kind: str) -> str:
    """A number that is not finite in the optimizer's state of the second rank, in its own shard under FSDP2."""
    run = parts(folder / "run", kind)
    train(run, adabatch.steps(2))
    adabatch.save(folder / "saved", **run, keep=1)
    state = next(iter(run["optimizer"].state.values()))["exp_avg"]
    if rank == 1:
        (state.to_local() if kind == "fsdp" else state)[0, 0] = torch.inf
    try:
        adabatch.save(folder / "saved", **run, keep=1)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_state_that_is_not_finite_on_one_rank_is_saved_by_none(tmp_path: Path, kind: str) -> None:
    first, second = run_ranks(not_finite_on_one_rank, 2, tmp_path, tmp_path, kind)
    assert "by another rank" in first
    assert "the optimizer's state['exp_avg'] of 0.0.weight holds numbers that are not finite" in second
    assert list(checkpoints_in(tmp_path / "saved")) == [1]


LOST = ["shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata"]


def save_often(rank: int, folder: Path) -> None:
    run = parts(folder / "run", "fsdp")
    train(run, adabatch.steps(2))
    for _ in range(len(LOST) + 1):
        adabatch.save(folder / "saved", **run, keep=9)


def load_sharded(rank: int, folder: Path) -> tuple[str, tuple[str, ...]]:
    loaded = adabatch.load(folder / "saved", **parts(folder / "again", "fsdp"))
    assert loaded is not None
    return loaded.path.name, loaded.damaged


def test_a_missing_shard_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    run_ranks(save_often, 2, tmp_path, tmp_path)
    for number, lost in enumerate(LOST, 2):
        (tmp_path / "saved" / f"{number:06d}-step-2" / lost).unlink()
    for name, damaged in run_ranks(load_sharded, 2, tmp_path, tmp_path):
        assert name == "000001-step-2"
        for problem, lost in zip(reversed(damaged), LOST, strict=True):
            assert f"{lost} cannot be read" in problem
    for said in run_ranks(wrong_kind, 2, tmp_path, tmp_path):
        assert "the checkpoint holds a sharded model, and this one is whole" in said


def wrong_kind(rank: int, folder: Path) -> str:
    run = parts(folder / "again", "ddp")
    try:
        adabatch.load(folder / "saved", **run)
    except ValueError as error:
        return str(error)
    return ""


# --- signals ----------------------------------------------------------------------------------------------------------


def signalled(rank: int, probed: bool, reduces: bool) -> list[int]:
    """The second rank gets a SIGTERM in the middle of step 5; at which steps each rank hears of it."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        adabatch.Constant(8),
        micro_batch_size=4,
        measure=Measure(monitor=probed),
        guard=Guard(skip_nonfinite=reduces),
    )
    heard = []
    with adabatch.Preemption(batches) as preemption:
        for step in batches.steps(GlobalOrder(regression(64)), until=adabatch.steps(40)):
            for batch in step:
                step.backward(loss_of(model, batch))
                if rank == 1 and batches.consumed.steps == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
            optimizer.step()
            optimizer.zero_grad()
            if preemption.agreed:
                heard.append(batches.consumed.steps)
    return heard


@pytest.mark.parametrize(("probed", "reduces", "first"), [(True, True, 6), (False, True, 6), (False, False, 16)])
def test_a_signal_to_one_rank_is_agreed_on_by_all_after_the_same_step(
    tmp_path: Path, probed: bool, reduces: bool, first: int
) -> None:
    """At once where a step reduces anyway; else at the next exchange, of which there is one in 16 steps."""
    for heard in run_ranks(signalled, 2, tmp_path, probed, reduces):
        assert heard == list(range(first, 41))


def by_the_clock(rank: int, folder: Path) -> list[int]:
    """Both ranks' clocks say that a checkpoint is due, the second one's always: only the first one's counts."""
    run = parts(folder, "ddp")
    saved = []
    now = 0.0
    adabatch.checkpointing.save_times.time.monotonic = lambda: now
    with Checkpoints(folder / "saved", **run, every_seconds=10, background=False) as checkpoints:
        for step in run["batches"].steps(run["order"], until=adabatch.steps(9)):
            for batch in step:
                step.backward(loss_of(run["model"], batch))
            run["optimizer"].step()
            run["optimizer"].zero_grad()
            run["schedule"].step()
            now += 3.0 if rank == 0 else 1000.0
            if checkpoints.step():
                saved.append(run["batches"].consumed.steps)
    return saved


def test_the_time_of_the_first_rank_says_when_all_save(tmp_path: Path) -> None:
    assert run_ranks(by_the_clock, 2, tmp_path, tmp_path) == [[5], [5]]


def uneven(rank: int) -> str:
    model = DistributedDataParallel(network())
    batches = AdaptiveBatch(
        model, AdamW(model.parameters()), adabatch.Constant(8), micro_batch_size=4, measure=Measure(monitor=True)
    )
    if rank == 1:
        adabatch.Preemption(batches)
    try:
        next(iter(batches.steps(GlobalOrder(regression(64)))))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_of_which_one_listens_raise_before_they_wait(tmp_path: Path) -> None:
    for said in run_ranks(uneven, 2, tmp_path):
        assert "whether Preemption or Checkpoints listen is " in said
