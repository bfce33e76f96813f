"""A rank that is killed, hangs, freezes or raises in some part of a step: the others end soon, and name it.

Without a watchdog they would wait for as long as a collective may take, or see a connection that closed. The parts of a
step that are left out here are in benchmarks/faults.py.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from loops import loss_of, network, regression
from ranks import RanksFailed, run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import Dataset

from adabatch import EXIT_RANK_LOST, AdaptiveBatch, Constant, GlobalOrder, RankLost, Watchdog, steps

pytestmark = pytest.mark.distributed

TIMEOUT, GRACE = 2.0, 0.5
VICTIM = 1

PLACES = {
    "loading": "the loading of micro-batch 1 of step 2",
    "forward": "the forward of micro-batch 1 of step 2",
    "backward": "the backward of micro-batch 1 of step 2",
    "between": "what follows the micro-batches of step 2",
}


def sleeping() -> None:
    time.sleep(1000)


def harm(fault: str) -> None:
    if fault in ("kill", "freeze"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    elif fault == "hang":
        sleeping()
    elif fault == "raise":
        raise ZeroDivisionError("the sky over rank one")


class Hurting(Dataset[Any]):
    """Data whose reading may do harm."""

    def __init__(self) -> None:
        self.inner = regression(512)
        self.hurt: Any = lambda: None

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.hurt()
        return self.inner[index]


def watched(rank: int, size: int, folder: str, fault: str, part: str, victim: int) -> str:
    """A run in which one rank comes to harm at a place; what ends a rank from outside is in its file."""
    os.dup2(os.open(f"{folder}/{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.05)
    batches = AdaptiveBatch(model, optimizer, Constant(6 * size), micro_batch_size=3, monitor=True)
    data = Hurting()

    def here(place: str, index: int, number: int) -> None:
        if (place, index, number, rank) == (part, 2, 1, victim):
            harm(fault)

    with Watchdog(batches, timeout=TIMEOUT, grace=GRACE):
        for index, step in enumerate(batches.steps(GlobalOrder(data), until=steps(5))):
            for number, batch in enumerate(step):
                here("forward", index, number)
                loss = loss_of(model, batch)
                loss.register_hook(lambda grad, at=(index, number): here("backward", *at))
                step.backward(loss)
                data.hurt = lambda at=(index, number + 1): here("loading", *at)
            here("between", index, 1)
            optimizer.step()
            optimizer.zero_grad()
    return "in order"


def ends_of(tmp_path: Path, fault: str, part: str, *, size: int = 2, victim: int = VICTIM) -> list[str]:
    """How each rank ended: its traceback or exit status, and what it wrote to standard error."""
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run_ranks(watched, size, tmp_path, size, str(tmp_path), fault, part, victim, timeout=60)
    assert time.monotonic() - begin < 55  # before the collectives gave up, on a busy machine too
    accounts = re.split(r"^--- rank \d", str(failure.value), flags=re.MULTILINE)[1:]
    return [account + (tmp_path / f"{rank}.stderr").read_text() for rank, account in enumerate(accounts)]


@pytest.mark.parametrize("part", PLACES)
def test_a_killed_rank_ends_the_others_by_name(tmp_path: Path, part: str) -> None:
    first, killed, third = ends_of(tmp_path, "kill", part, size=3)
    assert f"ended with code {-signal.SIGKILL}" in killed
    for end in (first, third):
        assert "rank 1 has died, last seen in " in end


def test_the_first_rank_may_be_the_one_that_dies(tmp_path: Path) -> None:
    _, other = ends_of(tmp_path, "kill", "backward", victim=0)
    assert "rank 0 has died, last seen in " in other


@pytest.mark.parametrize("part", ["loading", "backward"])
def test_a_rank_that_hangs_is_named_with_its_place(tmp_path: Path, part: str) -> None:
    waiting, hanging = ends_of(tmp_path, "hang", part)
    words = f"rank 1 has not moved for 2 s, in {PLACES[part]}, and the other ranks wait"
    if part == "backward":  # where the others wait too, in its reduction
        words = "no rank has moved for 2 s, all in the backward of micro-batch 1 of step 2"
    for end in (waiting, hanging):
        assert words in end, end
        assert f"ended with code {EXIT_RANK_LOST}" in end
    assert "in sleeping" in hanging  # where it hung
    assert "in sleeping" not in waiting


def test_a_frozen_process_is_named(tmp_path: Path) -> None:
    waiting, _ = ends_of(tmp_path, "freeze", "forward")
    assert re.search(r"rank 1 has not (moved|been heard of) for 2 s", waiting), waiting


@pytest.mark.parametrize("part", ["loading", "forward", "between"])
def test_an_error_of_one_rank_is_told_to_the_others(tmp_path: Path, part: str) -> None:
    told, raising = ends_of(tmp_path, "raise", part)
    assert "ZeroDivisionError: the sky over rank one" in raising
    assert f"rank 1 raised ZeroDivisionError: the sky over rank one, in {PLACES[part]}" in told


def test_a_run_in_which_nothing_happens_ends_in_order(tmp_path: Path) -> None:
    assert run_ranks(watched, 3, tmp_path, 3, str(tmp_path), "nothing", "forward", VICTIM) == ["in order"] * 3


def test_a_single_process_is_not_watched() -> None:
    model = network()
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), Constant(4), micro_batch_size=4)
    with Watchdog(batches):
        assert "adabatch watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("inf")}, {"grace": -1}], ids=str)
def test_times_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    model = network()
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), Constant(4), micro_batch_size=4)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Watchdog(batches, **wrong)
    assert issubclass(RankLost, RuntimeError)
