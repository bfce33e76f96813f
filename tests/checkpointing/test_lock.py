"""One run, one folder: who holds it, who may take it over, and what an orphan finds when it comes back."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, GlobalOrder, Limits, NormTest
from adabatch.checkpointing import CheckpointError
from adabatch.checkpointing.files import checkpoints_in
from adabatch.checkpointing.lock import LOCK, FolderInUse, FolderLock, Holder, Lock, read_lock
from adabatch.runtime.launch.world import launcher_job

HOLDS = """
import sys, time
from pathlib import Path
from adabatch.checkpointing.lock import FolderLock
FolderLock(Path(sys.argv[1])).claim("0123456789ab")
print("held", flush=True)
time.sleep(600)
"""


class Run:
    """A small run with a journal."""

    def __init__(self, folder: Path, *, journal: str = "journal.jsonl") -> None:
        self.folder = folder
        self.model = network()
        self.optimizer = SGD(self.model.parameters(), lr=0.01)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            NormTest(eta=0.5),
            micro_batch_size=4,
            limits=Limits(min=8, max=8),
            journal=folder / journal,
        )
        self.order = GlobalOrder(regression(300))

    @property
    def token(self) -> str:
        return self.batches.journal.run

    def checkpoints(self, **options: Any) -> Checkpoints:
        return Checkpoints(
            self.folder / "saved",
            model=self.model,
            optimizer=self.optimizer,
            batches=self.batches,
            order=self.order,
            **{"background": False, **options},
        )

    def train(self, until: int) -> None:
        for step in self.batches.steps(self.order, until=adabatch.steps(until)):
            for batch in step:
                step.backward(loss_of(self.model, batch))
            self.optimizer.step()
            self.optimizer.zero_grad()


def claimed(folder: Path, **changes: Any) -> None:
    """The lock of another process."""
    FolderLock(folder).claim("0123456789ab")
    lock = json.loads((folder / LOCK).read_text())
    lock["holder"] |= changes
    (folder / LOCK).write_text(json.dumps(lock))


def test_a_folder_in_use_names_its_holder_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "saved")], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            run = Run(tmp_path)
            message = rf"in use by process {other.pid} on {platform.node()}, since 20.*kill {other.pid}"
            with pytest.raises(FolderInUse, match=message):
                run.checkpoints().load()
            with pytest.raises(FolderInUse, match=message):
                run.checkpoints().save()
            other.send_signal(signal.SIGKILL)
            # Until it is waited for it is a zombie, which holds nothing.
            while Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":
                time.sleep(0.01)
            with run.checkpoints() as checkpoints:
                checkpoints.save()
                holder = read_lock(tmp_path / "saved").holder
                assert holder is not None
                assert holder.pid == os.getpid()
        finally:
            other.kill()
    assert read_lock(tmp_path / "saved") == Lock(run.token, None)


def test_another_process_of_the_same_number_holds_nothing(tmp_path: Path) -> None:
    """The number was given again, or the machine has been started again."""
    for changes in ({"started": 1}, {"boot": "another"}, {"pid": 2**22 + 1}):
        claimed(tmp_path, **changes)
        lock = FolderLock(tmp_path)
        lock.claim(None)
        lock.check()
        assert read_lock(tmp_path).run == "0123456789ab"
        lock.release()


def test_a_holder_on_another_host_is_not_followed_unless_the_launcher_restarts_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed(tmp_path, host="elsewhere", pid=77, job="TORCHELASTIC_RUN_ID=job7")
    with pytest.raises(FolderInUse, match=rf"process 77 on elsewhere.* remove {tmp_path / LOCK}; whether"):
        FolderLock(tmp_path).claim(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job8")
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path).claim(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    FolderLock(tmp_path).claim(None)
    claimed(tmp_path, host="elsewhere", pid=77)
    (tmp_path / LOCK).unlink()
    FolderLock(tmp_path).claim(None)


def test_the_names_that_launchers_give_a_job() -> None:
    assert launcher_job({}) is None
    assert launcher_job({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": ""}) is None
    assert launcher_job({"SLURM_JOB_ID": "12"}) == "SLURM_JOB_ID=12"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": 1, "holder": null}', '{"run": "a", "holder": {"pid": 1}}'])
def test_a_lock_that_is_none_locks_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    assert read_lock(tmp_path) == Lock(None, None)
    FolderLock(tmp_path).claim("a")
    assert read_lock(tmp_path).run == "a"


def test_objects_of_one_process_share_a_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.checkpoints() as checkpoints:
        checkpoints.save()
        run.train(2)
        parts = {"model": run.model, "optimizer": run.optimizer, "batches": run.batches, "order": run.order}
        adabatch.save(tmp_path / "saved", **parts)
        run.train(3)
        checkpoints.save()
    assert list(checkpoints_in(tmp_path / "saved")) == [3, 2, 1]
    assert run.batches.journal.guard is None


def test_an_orphan_writes_neither_journal_nor_checkpoints_beside_its_successor(tmp_path: Path) -> None:
    orphan = Run(tmp_path)
    checkpoints = orphan.checkpoints(keep=1)
    orphan.train(2)
    checkpoints.save()
    # The successor, on another host, after somebody removed the lock.
    (tmp_path / "saved" / LOCK).unlink()
    claimed(tmp_path / "saved", host="elsewhere", pid=77)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(FolderInUse, match=r"belongs to process 77 on elsewhere, since .* nothing more is written"):
        orphan.train(3)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    with pytest.raises(FolderInUse):
        checkpoints.save()
    checkpoints.close()
    assert list(checkpoints_in(tmp_path / "saved")) == [1]
    holder = read_lock(tmp_path / "saved").holder
    assert holder is not None
    assert holder.host == "elsewhere"


def test_two_writers_never_share_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan in the middle of a write, whose successor saves at the same step under the same number."""
    write, places = torch.save, []

    def written(state: Any, file: Any) -> None:
        places.append(Path(file.name).parent)
        write(state, file)
        if len(places) == 1:
            claimed(tmp_path / "saved", host="elsewhere")
            (tmp_path / "saved" / LOCK).unlink()
            with Run(tmp_path, journal="other.jsonl").checkpoints() as successor:
                successor.save()

    monkeypatch.setattr("adabatch.checkpointing.run_state.torch.save", written)
    with pytest.raises(CheckpointError), Run(tmp_path).checkpoints() as checkpoints:
        checkpoints.save()
    assert places[0] != places[1]
    (path,) = checkpoints_in(tmp_path / "saved").values()
    assert path.name == "000001-step-0"


def test_a_run_killed_in_its_first_checkpoint_leaves_no_token_to_its_successor(tmp_path: Path) -> None:
    killed = Run(tmp_path)
    claimed(tmp_path / "saved", pid=2**22 + 1)
    lock = json.loads((tmp_path / "saved" / LOCK).read_text())
    (tmp_path / "saved" / LOCK).write_text(json.dumps(lock | {"run": killed.token}))
    (tmp_path / "saved/000001-step-0.ab.unfinished").mkdir()
    second = Run(tmp_path)
    with second.checkpoints() as checkpoints:
        assert checkpoints.load() is None
        second.train(2)
        checkpoints.save()
    assert read_lock(tmp_path / "saved").run == second.token
    assert sorted(os.listdir(tmp_path / "saved")) == ["000001-step-2", LOCK]
    third = Run(tmp_path)
    with third.checkpoints() as checkpoints:
        assert checkpoints.load() is not None
    assert third.token == second.token


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The first state that is written waits for this event; later ones do not."""
    write, event, first = torch.save, threading.Event(), threading.Semaphore(1)

    def written(state: Any, file: Any) -> None:
        if first.acquire(blocking=False):
            event.wait(60)
        write(state, file)

    monkeypatch.setattr("adabatch.checkpointing.run_state.torch.save", written)
    yield event
    event.set()


@pytest.mark.parametrize("loads", [False, True])
def test_a_second_run_of_the_process_waits_for_the_first_one_to_close(
    tmp_path: Path, slow_disk: threading.Event, loads: bool
) -> None:
    first = Run(tmp_path, journal="first.jsonl")
    writing = first.checkpoints(background=True)
    writing.save()
    second = Run(tmp_path, journal="second.jsonl")
    other = second.checkpoints()
    if loads:
        assert other.load() is None
    with pytest.raises(
        CheckpointError, match=rf"run {first.token} of this process, which is still writing .* close\(\)"
    ):
        other.save()
    slow_disk.set()
    writing.close()
    (path,) = checkpoints_in(tmp_path / "saved").values()
    assert json.loads((path / "manifest.json").read_text().splitlines()[0])["contents"]["run"] == first.token
    with pytest.raises(CheckpointError, match=f"holds the checkpoints of run {first.token}"):
        second.checkpoints().save()


def test_a_run_whose_folder_another_one_of_the_process_took_writes_nothing_more(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    first, second = Run(tmp_path, journal="first.jsonl"), Run(tmp_path, journal="second.jsonl")
    writing = first.checkpoints(background=True)
    writing.save()
    with second.checkpoints() as other:
        other.start_over()
        other.save()
        slow_disk.set()
        with pytest.raises(
            FolderInUse, match=f"taken from run {first.token} by run {second.token} of the same process"
        ):
            first.train(1)
        with pytest.raises(FolderInUse, match="so its loop should end"):
            writing.close()
    assert lines(tmp_path / "first.jsonl") == []
    (path,) = checkpoints_in(tmp_path / "saved").values()
    assert json.loads((path / "manifest.json").read_text().splitlines()[0])["contents"]["run"] == second.token


def test_a_save_beside_one_in_the_background_keeps_both(tmp_path: Path, slow_disk: threading.Event) -> None:
    run = Run(tmp_path)
    parts = {"model": run.model, "optimizer": run.optimizer, "batches": run.batches, "order": run.order}
    with run.checkpoints(background=True) as checkpoints:
        checkpoints.save()
        adabatch.save(tmp_path / "saved", **parts)
        slow_disk.set()
    assert list(checkpoints_in(tmp_path / "saved")) == [2, 1]


def test_a_closed_object_of_the_run_that_released_the_folder_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second = run.checkpoints(), run.checkpoints()
    first.save()
    second.save()
    first.close()
    with pytest.raises(
        FolderInUse, match=r"no longer held by this .*another Checkpoints object of this run was closed"
    ):
        second.save()
    second.close()
    with run.checkpoints() as again:
        again.save()


def test_an_evaluation_reads_beside_a_run_and_leaves_no_trace(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.checkpoints() as checkpoints:
        checkpoints.save()
    claimed(tmp_path / "saved", host="elsewhere")
    before = sorted(tmp_path.rglob("*"))
    assert adabatch.load(tmp_path / "saved", model=network(seed=3)) is not None
    assert sorted(tmp_path.rglob("*")) == before


# --- whose they are ---------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_token_through_its_checkpoints(tmp_path: Path) -> None:
    first = Run(tmp_path)
    with first.checkpoints() as checkpoints:
        first.train(2)
        checkpoints.save()
    second = Run(tmp_path)
    assert second.token != first.token
    with second.checkpoints() as checkpoints:
        checkpoints.load()
        assert second.token == first.token
        second.train(4)
        checkpoints.save()
    texts = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(text)["run"] for text in texts] == [first.token] * 4


def test_a_run_does_not_save_among_those_of_another_unless_it_starts_over(tmp_path: Path) -> None:
    first = Run(tmp_path)
    with first.checkpoints() as checkpoints:
        first.train(2)
        checkpoints.save()
    second = Run(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds the checkpoints of run {first.token}, and this is run"):
        second.checkpoints().save()
    with second.checkpoints() as checkpoints:
        checkpoints.start_over()
        second.train(1)
        checkpoints.save()
    assert lines(tmp_path / "journal.jsonl")[0]["step"] == 0
    assert len(lines(tmp_path / "journal.jsonl")) == 1
    assert len(lines(tmp_path / "journal.jsonl.cut")) == 2
    third = Run(tmp_path)
    with third.checkpoints() as checkpoints:
        checkpoints.load()
    assert third.token == second.token


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name)
        with run.checkpoints() as checkpoints:
            run.train(2)
            checkpoints.save()
    other = run.token
    (tmp_path / "other/saved/000001-step-2").rename(tmp_path / "one/saved/000007-step-2")
    with pytest.raises(ValueError, match=rf"000007-step-2 is of run {other}, and its folder belongs to run [0-9a-f]+"):
        Run(tmp_path / "one").checkpoints().load()
    (tmp_path / "one/saved" / LOCK).unlink()
    with pytest.raises(ValueError, match=rf"is of run {other}, and the journal .* was last written by run [0-9a-f]+"):
        Run(tmp_path / "one").checkpoints().load()
    forked = Run(tmp_path / "one", journal="forked.jsonl")
    with forked.checkpoints() as checkpoints:
        assert checkpoints.load() is not None
    assert forked.token == other


def test_runs_without_batches_do_not_share_a_folder(tmp_path: Path) -> None:
    def run_of(path: Path) -> object:
        return json.loads((path / "manifest.json").read_text().splitlines()[0])["contents"]["run"]

    folder, first = tmp_path / "saved", network()
    for _ in range(2):
        adabatch.save(folder, model=first)
    token = read_lock(folder).run
    assert token is not None
    assert [run_of(path) for path in checkpoints_in(folder).values()] == [token, token]
    second = network(seed=1)
    with pytest.raises(
        CheckpointError, match=rf"holds the checkpoints of run {token}, and this is run .*start_over\(\)"
    ):
        adabatch.save(folder, model=second)
    adabatch.load(folder, model=second)  # goes on with that run
    adabatch.save(folder, model=second)
    assert {run_of(path) for path in checkpoints_in(folder).values()} == {token}
    third = network(seed=2)
    adabatch.load(folder, model=third)
    adabatch.save(tmp_path / "other", model=third)  # begins from its weights, and is a run of its own
    assert read_lock(tmp_path / "other").run not in (token, None)
    with Checkpoints(folder, model=network(seed=3)) as checkpoints:
        checkpoints.start_over()
        checkpoints.save()
    assert read_lock(folder).run not in (token, None)


def test_a_model_of_a_run_with_batches_is_of_that_run_without_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.checkpoints() as checkpoints:
        checkpoints.save()
    adabatch.save(tmp_path / "saved", model=run.model)
    with pytest.raises(CheckpointError, match=f"holds the checkpoints of run {run.token}"):
        adabatch.save(tmp_path / "saved", model=network())


# --- what is not there ------------------------------------------------------------------------------------------------


def test_an_evaluation_of_nothing_is_an_error_unless_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        for options in ({}, {"missing_ok": False}):
            with pytest.raises(FileNotFoundError, match=rf"no checkpoint in {tmp_path / name}: .*missing_ok=True"):
                adabatch.load(tmp_path / name, model=network(), **options)
        assert adabatch.load(tmp_path / name, model=network(), missing_ok=True) is None
    run = Run(tmp_path)
    with pytest.raises(FileNotFoundError):
        run.checkpoints().load(missing_ok=False)
    assert run.checkpoints().load() is None


def test_a_folder_that_can_only_be_read_is_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    with run.checkpoints() as checkpoints:
        checkpoints.save()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FolderLock, "_write", refused)
    with Run(tmp_path).checkpoints() as checkpoints:
        assert checkpoints.load() is not None


def test_a_holder_is_named_for_people() -> None:
    holder = Holder("host", 7, 1, "", "2026-01-02T03:04:05+00:00", None)
    assert str(holder) == "process 7 on host, since 2026-01-02T03:04:05+00:00"
