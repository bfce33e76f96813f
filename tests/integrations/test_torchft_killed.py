"""torchft: a replica that is killed in the middle of a step, with replicas in processes of their own."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import MICRO, Numbered, by_hand
from support.loops import weights

from adabatch import GlobalOrder

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from support.ranks import PRELOADED
from support.replicas import Replica, lighthouse, train

pytestmark = pytest.mark.distributed

PROCESSES = multiprocessing.get_context("forkserver")
KILLED_AT = 4
"""Steps that the replica finishes before the one in which it is killed."""
LAST = 10
"""Steps of the survivor."""


@pytest.fixture
def address() -> Iterator[str]:
    with lighthouse() as found:
        yield found


def replica(address: str, name: str, folder: str) -> None:
    """Trains until it is killed, or for ``LAST`` steps, and then leaves its findings in ``folder / name``."""
    torch.set_num_threads(1)
    place = Path(folder)

    def wait(path: Path) -> None:
        while not path.exists():
            time.sleep(0.01)

    def ready() -> None:
        (place / f"{name} is ready").touch()
        for each in ("0", "1"):
            wait(place / f"{each} is ready")

    def in_step(replica: Replica) -> None:
        if name == "1" and len(replica.taken) == KILLED_AT:
            (place / "in the step").touch()
            time.sleep(100)

    found = train(
        address, name, ready=ready, in_step=in_step, over=lambda replica: replica.batches.consumed.steps == LAST
    )
    told = {"taken": [tuple(step) for step in found.taken], "weights": weights(found.model).tolist()}
    (place / name).write_bytes(pickle.dumps(told))


def test_a_replica_is_killed_in_the_middle_of_a_step(address: str, tmp_path: Path) -> None:
    """The survivor runs that step again, alone: sizes and weights are those of one process, each example is once."""
    PROCESSES.set_forkserver_preload(PRELOADED)
    replicas = [PROCESSES.Process(target=replica, args=(address, name, str(tmp_path))) for name in ("0", "1")]
    for each in replicas:
        each.start()
    try:
        _await(tmp_path / "in the step", replicas)
        replicas[1].kill()
        _await(tmp_path / "0", replicas[:1])
        replicas[0].join(30)
        assert replicas[0].exitcode == 0
    finally:
        for each in replicas:
            each.kill()
            each.join()
    found: dict[str, Any] = pickle.loads((tmp_path / "0").read_bytes())
    counted = [step for step in found["taken"] if step[4]]
    lost = [step for step in found["taken"] if not step[4]]
    assert [step[0] for step in counted] == list(range(LAST))
    assert [step[3] for step in counted] == [2] * KILLED_AT + [1] * (LAST - KILLED_AT)
    assert [step[0] for step in lost] == [KILLED_AT], "the step in which a reduction failed"
    sizes = [step[2] for step in counted]
    assert sizes == [2 * MICRO] * 3 + [4 * MICRO] * 3 + [2 * MICRO] * 2 + [5 * MICRO] * 2
    assert found["weights"] == pytest.approx(by_hand(sizes)["weights"], rel=1e-5, abs=1e-5)
    alone = [number for step in counted[KILLED_AT:] for number in step[1]]
    places = GlobalOrder(Numbered(), seed=0).permutation(0).tolist()
    start = sum(sizes[:KILLED_AT])
    assert sorted(alone) == sorted(places[start : start + len(alone)])


def _await(path: Path, replicas: list[Any]) -> None:
    """Waits for a file, for 120 s at most and while the replicas live."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        assert all(each.exitcode in (None, 0) for each in replicas), [each.exitcode for each in replicas]
        time.sleep(0.02)
