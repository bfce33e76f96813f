"""`adabatch train` under what a cluster does to it: killed, preempted, given more or fewer processes, a full disk."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jobs import NUM_EXAMPLES, SEED, Agent, Attempt, Ended, command, ended, free_port, killed_runs, same
from torch.utils.data import TensorDataset

from adabatch import EXIT_PREEMPTED, GlobalOrder
from adabatch.cli.main import main
from adabatch.runtime.checkpoint import checkpoints_in

pytestmark = pytest.mark.distributed


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the journal says so far; a last line may be under way."""
    path = folder / "run" / "journal.jsonl"
    texts = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(text) for text in texts]


def await_lines(folder: Path, count: int, *, size: int) -> None:
    """Until the last ``count`` steps were of ``size`` ranks."""
    deadline = time.monotonic() + 120
    while [line["plan"]["dp_size"] for line in lines(folder)][-count:] != [size] * count:
        assert time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.05)


class Whole(NamedTuple):
    """What two processes come to that nobody disturbs, and in what time."""

    result: Ended
    seconds: float


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Attempt(folder, ["train", "--help"], 2).join() == [0, 0]  # the first one waits for torch to be imported
    began = time.monotonic()
    assert Attempt(folder, command(folder), 2).join() == [0, 0], (folder / "output").read_text()
    return Whole(ended(folder), time.monotonic() - began)


def check_equal(folder: Path, whole: Whole) -> None:
    found = ended(folder)
    assert found.given == whole.result.given
    assert found.journal == whole.result.journal
    assert same(found.state, whole.result.state)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path: Path, uninterrupted: Whole) -> None:
    """Five kills at random instants, of one process or both; at least one while a checkpoint was being written."""
    kills = killed_runs(
        tmp_path,
        5,
        seconds=uninterrupted.seconds,
        chance=random.Random(2),
        check=lambda run: check_equal(run, uninterrupted),
    )
    assert sum(1 for _ in kills) >= 5


def test_a_preempted_run_saves_itself_exits_75_and_goes_on_by_the_same_command(
    tmp_path: Path, uninterrupted: Whole
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
    assert "the same command goes on" in (tmp_path / "output").read_text()


@pytest.mark.timeout(600)  # agents wait for each other's silence
def test_two_one_three_and_two_processes_under_torchrun_take_the_same_order(tmp_path: Path) -> None:
    """Elastic agents: one is drained, two join, one loses its power. Epochs stay whole, batches within their plan."""
    arguments = command(
        tmp_path,
        model={"class_path": "jobs.Net", "init_args": {"pause": 0.005}},
        total={"count": 4000, "unit": "examples"},
    )
    port = free_port()
    agents = [Agent(tmp_path, arguments, port), Agent(tmp_path, arguments, port)]
    try:
        await_lines(tmp_path, 8, size=2)
        agents[1].leave(signal.SIGTERM)
        await_lines(tmp_path, 8, size=1)
        agents[1:] = [Agent(tmp_path, arguments, port), Agent(tmp_path, arguments, port)]
        await_lines(tmp_path, 8, size=3)
        agents[2].leave(signal.SIGKILL)
        for agent in agents[:2]:
            agent.process.join(120)
            assert agent.process.exitcode == 0, (tmp_path / "output").read_text()
    finally:
        for agent in agents:
            agent.process.kill()
            agent.process.join()

    journal = lines(tmp_path)
    sizes = [line["plan"]["dp_size"] for line in journal]
    assert [size for size, _ in itertools.groupby(sizes)] == [2, 1, 3, 2]
    given: dict[tuple[int, int, int], list[int]] = {}
    for path in tmp_path.glob("given.*"):
        for told in map(json.loads, path.read_text().splitlines()):
            given[told["end"], told["size"], told["rank"]] = told["given"]  # of a step that was lost, what came last
    order = GlobalOrder(TensorDataset(torch.zeros(NUM_EXAMPLES)), seed=SEED)
    positions = torch.cat([order.permutation(epoch) for epoch in range(4000 // NUM_EXAMPLES + 1)]).tolist()
    begin = 0
    for before, line in itertools.pairwise([None, *journal]):
        assert line is not None
        batch, size = line["plan"]["global_batch_size"], line["plan"]["dp_size"]
        assert line["examples"] == begin
        end = begin + batch
        taken = [example for rank in range(size) for example in given[end, size, rank]]
        assert sorted(taken) == sorted(positions[begin:end])
        begin = end
        assert 12 <= batch <= 48
        if before is not None:
            # Accumulation makes up for ranks that went: 6 examples are the coarsest step that 3 ranks of 2 can take.
            assert abs(batch - before["next"]) <= 3
            # The averages hold numbers per example, so they go on from where they were whatever the ranks.
            assert line["averages"]["noise"] == pytest.approx(before["averages"]["noise"], rel=0.7)
    assert begin >= 4000


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
    assert f"going on from {newest}" in capsys.readouterr().out
    assert sum(line["plan"]["global_batch_size"] for line in lines(tmp_path)) >= 1000
