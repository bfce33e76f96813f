"""A rank that is killed, hangs, freezes or raises in some part of a step: the others end soon, and name it.

Without a watchdog they would wait for as long as a collective may take, or see a connection that closed. The parts of a
step that are left out here are in benchmarks/faults.py.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
from support import lost_ranks
from support.loops import network
from support.lost_ranks import BOUND, PLACES, VICTIM, watched
from support.ranks import run_ranks
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, Watchdog
from adabatch.cli.commands import watched as watched_command
from adabatch.guards import EXIT_RANK_LOST, RankLost
from adabatch.runtime.launch.world import World

pytestmark = pytest.mark.distributed


def ends_of(tmp_path: Path, fault: str, part: str, **ranks: int) -> list[str]:
    """What is known of each rank's end."""
    ends = lost_ranks.ends_of(tmp_path, fault, part, **ranks)
    assert ends.seconds < BOUND
    return ends.accounts


@pytest.mark.parametrize("part", ["loading", "forward", "backward", "measuring", "between"])
def test_a_killed_rank_ends_the_others_by_name(tmp_path: Path, part: str) -> None:
    first, killed, third = ends_of(tmp_path, "kill", part, size=3)
    assert f"ended with code {-signal.SIGKILL}" in killed
    for end in (first, third):
        assert "rank 1 has died, last seen in " in end


def test_the_first_rank_may_be_the_one_that_dies(tmp_path: Path) -> None:
    _, other = ends_of(tmp_path, "kill", "backward", victim=0)
    assert "rank 0 has died, last seen in " in other


@pytest.mark.parametrize("part", ["loading", "backward", "measuring"])
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


def drawing_alone(rank: int) -> str:
    with watched_command(World(rank=rank, size=2), 0.5):
        if rank == 0:
            time.sleep(1.6)  # which no event can stand for: it is the time that is watched
    return "in order"


def test_a_rank_may_take_its_time_after_the_last_loop_of_a_command(tmp_path: Path) -> None:
    """As the first one does when it draws the picture of a long comparison, and the others have ended."""
    assert run_ranks(drawing_alone, 2, tmp_path) == ["in order"] * 2
