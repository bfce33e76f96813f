"""When the host waits for numbers of the device: once in a probed step, and never between two probes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.loops import network, regression
from torch.utils._python_dispatch import TorchDispatchMode

from adabatch import AdaptiveBatch, Control, GlobalOrder, Guard, Limits, Measure, NormTest


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait on an accelerator: ``item``, ``tolist``, conversions to bool, int and float."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    mode = HostReads()
    for name in ("tolist", "numpy"):  # these are not dispatched
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, original: Any = original, **options: Any) -> Any:
            mode.count += 1
            return original(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with mode:
        yield mode


def reads_of_steps(
    reads: HostReads, interval: int | None, guard: Guard, num_steps: int, late: bool = False
) -> list[int]:
    """How often the host read in each step, up to the beginning of the next one."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(0.5),
        micro_batch_size=2,
        limits=Limits(4, 8),
        control=Control(interval=interval),
        guard=guard,
        measure=Measure(late=late),
    )
    at = []
    for step in batches.steps(GlobalOrder(regression(64), shuffle=False)):
        at.append(reads.count)
        if len(at) > num_steps:
            break
        for x, y in step:
            step.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    return [after - before for before, after in itertools.pairwise(at)]


def test_the_counter_counts(reads: HostReads) -> None:
    value = torch.ones(2)
    assert bool(value.sum() > 0)
    assert reads.count == 1
    value.tolist()
    float(value[0])
    assert reads.count == 3


def test_between_two_probes_the_host_reads_nothing(reads: HostReads) -> None:
    assert reads_of_steps(reads, 3, Guard(skip_nonfinite="probed"), 7) == [1, 0, 0, 1, 0, 0, 1]


def test_a_probed_step_reads_once_whatever_is_checked(reads: HostReads) -> None:
    assert reads_of_steps(reads, 1, Guard(), 4) == [1] * 4


@pytest.mark.parametrize(("interval", "found"), [(1, [0, 1, 1, 1, 1, 1, 1]), (3, [0, 1, 0, 0, 1, 0, 0])])
def test_late_numbers_are_read_in_the_step_after(reads: HostReads, interval: int, found: list[int]) -> None:
    """No step reads what it has measured itself: the first reads nothing, neither before its update nor after it."""
    assert reads_of_steps(reads, interval, Guard(skip_nonfinite=False), 7, late=True) == found


def test_a_check_of_all_updates_reads_in_every_step(reads: HostReads) -> None:
    assert reads_of_steps(reads, 3, Guard(), 4) == [1] * 4
