"""A run on several gloo ranks in which one comes to harm in some part of a step, and how each of them ends."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import Dataset

from adabatch import AdaptiveBatch, GlobalOrder, Limits, NormTest, Watchdog, steps
from adabatch.batch import Observation
from support.loops import loss_of, network, regression
from support.ranks import RanksFailed, run_ranks

TIMEOUT, GRACE = 2.0, 0.5
BOUND = 55.0
"""Seconds until all must have ended, on a busy machine too: before the collectives give up."""

VICTIM = 1

PLACES = {
    "loading": "the loading of micro-batch 1 of step 2",
    "forward": "the forward of micro-batch 1 of step 2",
    "backward": "the backward of micro-batch 1 of step 2",
    "measuring": "the measuring of step 2",
    "between": "what follows the micro-batches of step 2",
    "update": "what follows the micro-batches of step 2",
}
"""Where harm may come to a rank, and what the watchdog calls it."""


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


class HurtingTest(NormTest):
    """The norm test; to ask it may do harm."""

    hurt: Any = staticmethod(lambda: None)

    def wanted(self, observation: Observation) -> float:
        HurtingTest.hurt()
        return super().wanted(observation)

    def rest(self, observation: Observation) -> float:
        HurtingTest.hurt()
        return super().rest(observation)


def watched(rank: int, size: int, folder: str, fault: str, part: str, victim: int) -> str:
    """A run in which one rank comes to harm at a place; what ends a rank from outside is in its file."""
    os.dup2(os.open(f"{folder}/{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
    model = DistributedDataParallel(network())
    optimizer = SGD(model.parameters(), lr=0.05)
    limits = Limits(min=6 * size, max=6 * size)
    batches = AdaptiveBatch(model, optimizer, HurtingTest(eta=0.5), micro_batch_size=3, limits=limits)
    data = Hurting()

    def here(place: str, index: int, number: int) -> None:
        if (place, index, number, rank) == (part, 2, 1, victim):
            harm(fault)

    with Watchdog(batches, timeout=TIMEOUT, grace=GRACE):
        for index, step in enumerate(batches.steps(GlobalOrder(data), until=steps(5))):
            HurtingTest.hurt = staticmethod(lambda at=index: here("measuring", at, 1))
            for number, batch in enumerate(step):
                here("forward", index, number)
                loss = loss_of(model, batch)
                loss.register_hook(lambda grad, at=(index, number): here("backward", *at))
                step.backward(loss)
                data.hurt = lambda at=(index, number + 1): here("loading", *at)
            here("between", index, 1)
            hook = optimizer.register_step_pre_hook(lambda *_, at=index: here("update", at, 1))
            optimizer.step()
            hook.remove()
            optimizer.zero_grad()
    return "in order"


class Ends(NamedTuple):
    """How a run ended.

    Args:
        accounts: of each rank its traceback or exit status, and what it wrote to standard error.
        seconds: until all had ended, their start in it.
    """

    accounts: list[str]
    seconds: float


def ends_of(folder: Path, fault: str, part: str, *, size: int = 2, victim: int = VICTIM) -> Ends:
    """Runs it, and waits until all ranks have ended.

    Raises:
        AssertionError: they ended in order.
    """
    begin = time.monotonic()
    try:
        run_ranks(watched, size, folder, size, str(folder), fault, part, victim, timeout=BOUND + 5)
    except RanksFailed as failure:
        seconds = time.monotonic() - begin
        accounts = re.split(r"^--- rank \d", str(failure), flags=re.MULTILINE)[1:]
        told = [account + (folder / f"{rank}.stderr").read_text() for rank, account in enumerate(accounts)]
        return Ends(told, seconds)
    raise AssertionError(f"no rank came to harm by {fault} in {part}")
