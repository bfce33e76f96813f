"""`adabatch train` under what a cluster does to it: killed, preempted, given more or fewer processes, a full disk."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.elastic import check_order, two_one_three_two
from support.jobs import Attempt, Ended, await_lines, command, ended, killed_runs, lines, same

from adabatch import EXIT_PREEMPTED
from adabatch.checkpointing.files import checkpoints_in
from adabatch.cli.main import main

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What two processes come to that nobody disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Attempt(folder, command(folder), 2).join() == [0, 0], (folder / "output").read_text()
    return ended(folder)


def check_equal(folder: Path, whole: Ended) -> None:
    found = ended(folder)
    assert found.given == whole.given
    assert found.journal == whole.journal
    assert same(found.state, whole.state)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path: Path, uninterrupted: Ended) -> None:
    """Five kills at random instants, of one process or both; at least one while a checkpoint was being written."""
    kills = killed_runs(
        tmp_path,
        5,
        chance=random.Random(2),
        check=lambda run: check_equal(run, uninterrupted),
    )
    assert sum(1 for _ in kills) >= 5


def test_a_preempted_run_saves_itself_exits_75_and_goes_on_by_the_same_command(
    tmp_path: Path, uninterrupted: Ended
) -> None:
    """SIGTERM to one process, SIGUSR1 to the other; without any checkpoint but those that the signals ask for."""
    arguments = command(tmp_path, checkpoint={})
    for count, (rank, number) in enumerate([(1, signal.SIGTERM), (0, signal.SIGUSR1)], 1):
        attempt = Attempt(tmp_path, arguments, 2)
        await_lines(tmp_path, 20 * count, size=2)
        attempt.signal(rank, number)
        assert attempt.join() == [EXIT_PREEMPTED] * 2
        assert next(iter(checkpoints_in(tmp_path / "run" / "checkpoints"))) == count
    assert Attempt(tmp_path, arguments, 2).join() == [0, 0]
    check_equal(tmp_path, uninterrupted)
    assert "the same command continues" in (tmp_path / "output").read_text()


@pytest.mark.timeout(600)  # agents wait for each other's silence
def test_two_one_three_and_two_processes_under_torchrun_take_the_same_order(tmp_path: Path) -> None:
    """Elastic agents: one is drained, two join, one loses its power. Epochs stay whole, batches within their plan."""
    journal = two_one_three_two(tmp_path)
    assert [size for size, _ in itertools.groupby(line["plan"]["dp_size"] for line in journal)] == [2, 1, 3, 2]
    check_order(tmp_path, journal)


def test_a_full_disk_is_one_clear_line_and_the_checkpoint_before_is_gone_on_from(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIVEN", str(tmp_path / "given"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = small_disk / "checkpoints"
    saving = {"directory": str(folder), "every": {"count": 5, "unit": "steps"}, "keep": 9}
    short = {"count": 1000, "unit": "examples"}
    with torch.random.fork_rng(devices=[]):
        assert main(command(tmp_path, checkpoint=saving, total=short)) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"adabatch train: error: a checkpoint could not be written to {folder}: ")
        assert "No space left on device" in error
        newest, *older = checkpoints_in(folder).values()
        shutil.rmtree(older[-1])  # room for one
        assert main(command(tmp_path, checkpoint={**saving, "keep": 1}, total=short)) == 0
    assert f"resuming from {newest}" in capsys.readouterr().out
    assert sum(line["plan"]["global_batch_size"] for line in lines(tmp_path)) >= 1000
