"""Replicas under torchft's own lighthouse and managers, each a thread with a store of its own, which come and go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchft
from torch import nn
from torchft.coordination import LighthouseClient, LighthouseServer

import adabatch
from adabatch.batch.plan import Duration
from adabatch.integrations.torchft import attach
from support.hosts import LR, MICRO, Numbered, awkward, loss_of
from support.loops import network

MONITOR = adabatch.Measure(monitor=True)
WITHOUT_END = adabatch.examples(10**6)
PATIENCE = timedelta(seconds=60)
_ONE_AT_A_TIME = threading.Lock()
"""Threads share the generator of random numbers that a network's first weights come from."""


class Taken(NamedTuple):
    """A step of one replica: what it took of it, and whether the step counted."""

    step: int
    numbers: list[int]
    num_examples: int
    replicas: int
    committed: bool


class Replica(NamedTuple):
    """What a replica holds, for a test to look into."""

    batches: adabatch.AdaptiveBatch
    model: nn.Module
    manager: Any
    taken: list[Taken]


@contextmanager
def lighthouse() -> Iterator[str]:
    """Waits for every replica that shows signs of life; forgets one that has shown none for a second."""
    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=60_000, heartbeat_timeout_ms=1000)
    try:
        yield server.address()
    finally:
        server.shutdown()


@contextmanager
def manager_at(address: str, name: str, **options: Any) -> Iterator[tuple[Any, dist.TCPStore]]:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    made = {
        "pg": torchft.ProcessGroupGloo(timeout=timedelta(seconds=20)),
        "load_state_dict": None,
        "state_dict": None,
        "min_replica_size": 1,
        "use_async_quorum": False,
        "replica_id": name,
        "store_addr": "localhost",
        "store_port": store.port,
        "rank": 0,
        "world_size": 1,
        "lighthouse_addr": address,
        "timeout": PATIENCE,
        "quorum_timeout": PATIENCE,
    }
    manager = torchft.Manager(**(made | options))
    # The first sign of life, so that the lighthouse knows of this replica before any other asks for a quorum.
    LighthouseClient(address, PATIENCE).heartbeat(store.get("replica_id").decode())
    try:
        yield manager, store
    finally:
        manager.shutdown()
        manager._checkpoint_transport._server.server_close()  # torchft leaves its socket open
        made["pg"].shutdown()


def train(
    address: str,
    name: str,
    *,
    scale: float = 1.0,
    ddp: bool = False,
    ready: Callable[[], object] = lambda: None,
    before: Callable[[Replica], object] = lambda replica: None,
    in_step: Callable[[Replica], object] = lambda replica: None,
    over: Callable[[Replica], bool] = lambda replica: False,
    until: Duration = WITHOUT_END,
    **options: Any,
) -> Replica:
    """One replica's training.

    Args:
        address: of the lighthouse.
        name: of the replica.
        scale: of its first weights, to tell replicas apart until one has the state of another.
        ddp: train in torchft's ``DistributedDataParallel``, not plain.
        ready: called when its manager is there, before the first quorum.
        before: called before each step; an error in it is the replica's death.
        in_step: called before the first backward of each step.
        over: asked after each step, whether to leave the loop.
        until: the end of the run.
        options: of ``attach``.
    """
    with _ONE_AT_A_TIME:
        model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    with manager_at(address, name) as (manager, _):
        wrapped = torchft.DistributedDataParallel(manager, model) if ddp else model
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR, momentum=0.0)
        manager.register_state_dict_fn("model", model.load_state_dict, model.state_dict)
        manager.register_state_dict_fn("optimizer", optimizer.load_state_dict, optimizer.state_dict)
        data = adabatch.GlobalOrder(Numbered(), seed=0)
        given = {"criterion": awkward(1, first=2), "micro_batch_size": MICRO, "measure": MONITOR} | options
        batches = attach(manager, wrapped, optimizer, given.pop("criterion"), order=data, **given)
        replica = Replica(batches, model, manager, [])
        ready()
        before(replica)
        for step in batches.steps(data, until=until):
            number, numbers = batches.consumed.steps, []
            replicas = manager.num_participants()
            for batch in step:
                if not numbers:
                    in_step(replica)
                step.backward(loss_of(wrapped, batch))
                numbers += batch[2].tolist()
            assert step.decision is not None
            committed = step.decision.reason != "not committed"
            optimizer.step()
            optimizer.zero_grad()
            replica.taken.append(Taken(number, numbers, step.global_batch_size, replicas, committed))
            if over(replica):
                break
            before(replica)
        return replica


def together(*replicas: Callable[[], Replica]) -> list[Replica]:
    """Runs replicas in threads; what each returned, or the first error."""
    results: list[Any] = [None] * len(replicas)

    def run(index: int) -> None:
        try:
            results[index] = replicas[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(replicas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert all(result is not None for result in results), "a replica hangs"
    return results
