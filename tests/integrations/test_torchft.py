"""torchft: the global batch is held while replicas come and go, with torchft's own manager and lighthouse."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import MICRO, NUM_EXAMPLES, Numbered, awkward, by_hand, loss_of
from support.loops import network, weights

import adabatch
from adabatch import GlobalOrder

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

import torchft
from support.replicas import MONITOR, Replica, lighthouse, manager_at, together, train

from adabatch.integrations.torchft import attach

pytestmark = [
    pytest.mark.distributed,
    # Warnings of torchft itself, which as errors would make its reconfiguration and recovery fail
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning"),
]

SIZES = [2 * MICRO] * 3 + [4 * MICRO] * 3 + [2 * MICRO] * 2 + [5 * MICRO] * 2
"""Of the steps of ``awkward(1, first=2)``."""


@pytest.fixture(scope="module", autouse=True)
def timers() -> None:
    """torchft keeps the threads of its timers for the rest of the process: they are there before any test."""
    future: torch.futures.Future[None] = torch.futures.Future()
    waiting = torchft.futures.future_timeout(future, timedelta(seconds=30))
    future.set_result(None)
    waiting.wait()


@pytest.fixture
def address() -> Iterator[str]:
    with lighthouse() as found:
        yield found


def noise_in_one_process() -> float:
    """The averaged noise scale of the same run without torchft."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batches = adabatch.AdaptiveBatch(model, optimizer, awkward(1, first=2), micro_batch_size=MICRO, measure=MONITOR)
    for step in batches.steps(GlobalOrder(Numbered(), seed=0), until=adabatch.steps(len(SIZES))):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return batches.noise_scale


def served(*replicas: Replica) -> list[int]:
    """The examples of the steps that counted, by their numbers."""
    return sorted(number for one in replicas for step in one.taken if step.committed for number in step.numbers)


@pytest.mark.parametrize(("count", "ddp"), [(1, False), (3, False), (2, True)])
def test_replicas_are_one_process(address: str, count: int, ddp: bool) -> None:
    """Whatever their number: sizes, progress, weights and noise are those of one process, and each example is once."""
    barrier = threading.Barrier(count)
    run = partial(train, address, ddp=ddp, ready=barrier.wait, until=adabatch.steps(len(SIZES)))
    replicas = together(*(partial(run, str(number), scale=1.0 + number) for number in range(count)))
    expected = by_hand(SIZES)
    first = [weights(replica.model).tolist() for replica in replicas]
    for replica in replicas:
        assert [one.num_examples for one in replica.taken] == SIZES
        assert {one.replicas for one in replica.taken} == {count}
        assert replica.batches.consumed.examples == sum(SIZES)
        assert replica.batches.noise_scale == pytest.approx(replicas[0].batches.noise_scale, rel=0)
    assert all(each == first[0] for each in first), "the replicas have the same bits"
    assert served(*replicas) == expected["served"]
    # torchft takes the weights of one of the replicas for all at the first step, of which one is not said.
    if count == 1:
        assert first[0] == pytest.approx(expected["weights"], rel=1e-6, abs=1e-6)
        assert replicas[0].batches.noise_scale == pytest.approx(noise_in_one_process(), rel=1e-4)


def test_a_replica_leaves_and_another_joins(address: str) -> None:
    """The batch is held with two, one and two replicas; plan, place and weights go to the one that joins."""
    start, alone = threading.Barrier(2), threading.Event()

    def enough(replica: Replica) -> bool:
        """After three steps of two replicas that follow one of a single replica."""
        there = [one.replicas for one in replica.taken]
        if there[-1] == 1:
            alone.set()
        return 1 in there and there[-3:] == [2, 2, 2]

    def comes_again() -> Replica:
        first = train(address, "1", ready=start.wait, over=lambda replica: len(replica.taken) == 4)
        alone.wait(100)
        second = train(address, "1", scale=3.0, over=lambda replica: len(replica.taken) == 3)
        return second._replace(taken=first.taken + second.taken)

    one, two = together(lambda: train(address, "0", ready=start.wait, over=enough), comes_again)
    assert max(Counter(step.step for step in two.taken).values()) == 1
    sizes = [step.num_examples for step in one.taken]
    assert sizes == (SIZES + [5 * MICRO] * len(sizes))[: len(sizes)]
    assert weights(one.model).tolist() == weights(two.model).tolist()
    assert weights(one.model).tolist() == pytest.approx(by_hand(sizes)["weights"], rel=1e-5, abs=1e-5)
    assert one.batches.consumed == two.batches.consumed
    served_in_epochs(one, two)


def test_a_step_that_no_replica_commits_is_run_again(address: str) -> None:
    """It is left out of weights, noise and progress, and its examples come again."""
    barrier = threading.Barrier(2)

    def fails_once(replica: Replica) -> None:
        if len(replica.taken) == 4:
            replica.manager.report_error(RuntimeError("a reduction failed"))

    run = partial(train, address, ready=barrier.wait, in_step=fails_once, until=adabatch.steps(len(SIZES)))
    replicas = together(partial(run, "0"), partial(run, "1"))
    for replica in replicas:
        assert [one.committed for one in replica.taken] == [True] * 4 + [False] + [True] * 6
        failed, again = replica.taken[4:6]
        assert (failed.step, failed.numbers) == (again.step, again.numbers)
        assert replica.batches.consumed == replicas[0].batches.progress
        assert replica.batches.consumed.steps == len(SIZES)
        assert replica.batches.noise_scale == pytest.approx(noise_in_one_process(), rel=1e-4)
        assert weights(replica.model).tolist() == pytest.approx(by_hand(SIZES)["weights"], rel=1e-6, abs=1e-6)
    assert served(*replicas) == by_hand(SIZES)["served"]


def test_a_replica_that_does_not_commit_gets_the_state_of_the_other(address: str) -> None:
    barrier = threading.Barrier(2)

    def fails_late(replica: Replica) -> None:
        """After all reductions, when the other one commits."""
        if len(replica.taken) == 4:
            ask = replica.manager.should_commit

            def fail() -> bool:
                del replica.manager.should_commit
                replica.manager.report_error(RuntimeError("found at the end"))
                return bool(ask())

            replica.manager.should_commit = fail

    run = partial(train, address, ready=barrier.wait, until=adabatch.steps(len(SIZES)))
    one, two = together(partial(run, "0"), partial(run, "1", in_step=fails_late))
    assert [step.step for step in one.taken if step.committed] == list(range(10))
    assert [step.step for step in two.taken if step.committed] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert one.batches.consumed == two.batches.consumed
    assert one.batches.noise_scale == two.batches.noise_scale
    assert weights(one.model).tolist() == weights(two.model).tolist()
    assert weights(one.model).tolist() == pytest.approx(by_hand(SIZES)["weights"], rel=1e-6, abs=1e-6)


def test_replicas_with_other_settings_are_named(address: str) -> None:
    barrier = threading.Barrier(2)
    run = partial(train, address, ready=barrier.wait, until=adabatch.steps(2))
    with pytest.raises(ValueError, match=r"different settings than the one whose state it takes \(lr_rule: .*there\)"):
        together(partial(run, "0"), partial(run, "1", lr_rule="linear"))


def served_in_epochs(*replicas: Replica) -> None:
    """That the steps which counted took the first so many places of the order, each once."""
    order = GlobalOrder(Numbered(), seed=0)
    found = served(*replicas)
    epochs = -(-len(found) // NUM_EXAMPLES)
    places = torch.cat([order.permutation(epoch) for epoch in range(epochs)])[: len(found)]
    assert found == sorted(places.tolist())


def test_the_code_of_the_page_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "elastic.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, "docs/elastic.md", "exec"), namespace)
    namespace["manager"]._checkpoint_transport._server.server_close()  # torchft leaves its socket open
    assert namespace["batches"].consumed.examples >= 4096


# --- refusals --------------------------------------------------------------------------------------------------------


def attached(manager: Any, **changes: Any) -> adabatch.AdaptiveBatch:
    model = network()
    parts = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": adabatch.Constant(16),
        "order": GlobalOrder(Numbered()),
    } | changes
    positional = [parts.pop(name) for name in ("model", "optimizer", "criterion")]
    return attach(manager, *positional, micro_batch_size=MICRO, **parts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_async_quorum": True}, "make it with use_async_quorum=False"),
        ({"world_size_mode": torchft.manager.WorldSizeMode.FIXED_WITH_SPARES}, "use WorldSizeMode.DYNAMIC"),
        ({"world_size": 2}, "start one manager for each process"),
    ],
)
def test_managers_that_are_refused(address: str, options: dict[str, Any], words: str) -> None:
    with manager_at(address, "0", **options) as (manager, _), pytest.raises(ValueError, match=words):
        attached(manager)


def test_what_is_refused(address: str) -> None:
    sgd = torch.optim.SGD(network().parameters(), lr=0.1)
    limits = adabatch.Limits(min=8, max=64)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"order": "data"}, TypeError, "order must be a GlobalOrder, got 'data'"),
        ({"engine": adabatch.EngineOptions()}, ValueError, "attach chooses engine= by the manager"),
        ({"guard": adabatch.Guard(check_every=5)}, ValueError, r"Guard\(trial=\) and Guard\(check_every=\)"),
        (
            {"criterion": adabatch.batch.CoordinateNormTest(0.5, quantile=0.9), "limits": limits},
            ValueError,
            "use a criterion in the Euclidean norm",
        ),
    ]
    with pytest.raises(TypeError, match=r"takes a torchft.Manager first, got str"):
        attached("manager")
    with manager_at(address, "0") as (manager, _):
        for changes, kind, words in refused:
            with pytest.raises(kind, match=words):
                attached(manager, **changes)
        with pytest.raises(ValueError, match=r"torchft.Optimizer forms the quorum"):
            attached(manager, optimizer=torchft.Optimizer(manager, sgd))
        batches = attached(manager)
        with pytest.raises(ValueError, match=r"give steps\(until=\)"):
            next(batches.steps(GlobalOrder(Numbered())))
        with pytest.raises(ValueError, match=r"share the steps of a GlobalOrder"):
            next(batches.steps([torch.ones(4, 1)], until=adabatch.steps(1)))
        with pytest.raises(RuntimeError, match=r"knows no state but that of the batches"):
            next(batches.steps(GlobalOrder(Numbered()), until=adabatch.steps(1)))
