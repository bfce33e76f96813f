"""Workers that are unequal, or not the same ones in every round, beside a simulation of all of them in one process."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, LocalSGD, load, save, steps
from adabatch.local_sgd import Nesterov, Table
from adabatch.runtime.local_sgd import pace, transfers
from adabatch.runtime.local_sgd.pace import StepClock, own_steps

H, ROUNDS, SIZE = 6, 4, 3
EXAMPLES = regression(3000).tensors


def batch_of(worker: int, number: int) -> tuple[Tensor, Tensor]:
    """The worker's own examples: worker w takes 3 + w at each step."""
    first = worker * 900 + number * 7
    x, y = EXAMPLES
    return x[first : first + SIZE + worker], y[first : first + SIZE + worker]


def one_step(model: nn.Module, optimizer: SGD, batch: tuple[Tensor, Tensor]) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.5)


class Simulation:
    """DiLoCo with unequal workers, written down plainly: torch's own SGD is the outer optimizer."""

    def __init__(self, num_workers: int) -> None:
        self.models = [network() for _ in range(num_workers)]
        self.optimizers = [sgd(model) for model in self.models]
        self.taken = [0] * num_workers
        self.master = nn.Parameter(weights(self.models[0]))
        self.outer = SGD([self.master], lr=0.7, momentum=0.9, nesterov=True)

    def round(self, lengths: Sequence[int], shares: Sequence[float]) -> None:
        for worker, length in enumerate(lengths):
            for _ in range(length):
                one_step(self.models[worker], self.optimizers[worker], batch_of(worker, self.taken[worker]))
                self.taken[worker] += 1
        mean = sum(s / sum(shares) * weights(model) for s, model in zip(shares, self.models, strict=True))
        self.master.grad = self.master.detach() - mean
        self.outer.step()
        for model in self.models:
            nn.utils.vector_to_parameters(self.master.detach().clone(), model.parameters())

    def go_on_with(self, workers: Sequence[int]) -> None:
        """New workers, each with the inner optimizer of an old one."""
        states = [self.optimizers[worker].state_dict() for worker in workers]
        self.taken = [self.taken[worker] for worker in workers]
        self.models = [network() for _ in workers]
        self.optimizers = [sgd(model) for model in self.models]
        for model, optimizer, state in zip(self.models, self.optimizers, states, strict=True):
            nn.utils.vector_to_parameters(self.master.detach().clone(), model.parameters())
            optimizer.load_state_dict(torch.load(_saved(state), weights_only=True))


def _saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


class Clock:
    """A clock that tells the time which a worker's steps are said to take."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


# --- how many steps -------------------------------------------------------------------------------------------------


def test_steps_by_speed() -> None:
    assert [own_steps(16, [1.0, 1.0], worker) for worker in (0, 1)] == [16, 16]
    assert [own_steps(16, [0.1, 0.2, 0.15, 9.0], worker) for worker in range(4)] == [16, 8, 10, 1]
    assert own_steps(16, [], 3) == 16
    assert own_steps(16, [0.1, 9.0], 1, at_least=4) == 4


def test_the_clock_leaves_out_waits_and_what_happens_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "perf_counter", clock)
    times = StepClock(torch.device("cpu"))
    assert times.seconds == 0.0

    def a_round(seconds: float, *, between: float, waited: float, num_steps: int = 5) -> None:
        clock.time += between
        for step in range(num_steps):
            clock.time += seconds
            times.step(waited, last=step == num_steps - 1)
        times.round_over(waited)

    a_round(2.0, between=100.0, waited=0.0)
    assert times.seconds == pytest.approx(2.0)
    a_round(4.0, between=50.0, waited=0.0)
    a_round(4.0, between=0.0, waited=0.0)
    assert times.seconds == pytest.approx(4.0)
    for _ in range(3):  # of a single step: from the end of the round before
        a_round(7.0, between=0.0, waited=0.0, num_steps=1)
    assert times.seconds == pytest.approx(7.0)
    for step in range(3):  # a wait of 30 s inside a round
        clock.time += 1.0 + 30.0 * (step == 1)
        times.step(30.0 if step else 0.0, last=step == 2)
    times.round_over(30.0)
    a_round(1.0, between=9.0, waited=30.0)
    assert times.seconds == pytest.approx(1.0)


# --- on ranks -------------------------------------------------------------------------------------------------------


def by_speed(
    rank: int,
    options: dict[str, Any],
    counts: bool,
    place: str | None = None,
    seconds: Sequence[float] = (1.0, 2.0, 3.0),
) -> dict[str, Any]:
    """Workers that take so many seconds for a step, each by its own clock."""
    clock = Clock()
    pace.perf_counter = clock  # type: ignore[attr-defined]
    transfers.time = SimpleNamespace(perf_counter=clock)  # type: ignore[attr-defined]
    model = network(seed=rank)
    optimizer = sgd(model)
    lengths: list[int] = []
    taken = 0
    with LocalSGD(model, optimizer, sync_every=H, outer=Nesterov(), by_speed=True, **options) as local:
        while local.rounds < ROUNDS:
            if place is not None and (local.rounds, local.step_in_round) == (2, 1):
                # a new object goes on in the middle of a round
                mine = f"{place}.{rank}"
                torch.save([model.state_dict(), optimizer.state_dict(), local.state_dict()], mine)
                model, place = network(seed=9), None
                optimizer = sgd(model)
                local.remove()
                local = LocalSGD(model, optimizer, sync_every=H, outer=Nesterov(), by_speed=True, **options)
                for part, state in zip((model, optimizer, local), torch.load(mine, weights_only=True), strict=True):
                    part.load_state_dict(state)
            if local.step_in_round == 0:
                lengths.append(local.sync_every)
            one_step_of(model, optimizer, batch_of(rank, taken), local if counts else None, clock, seconds[rank])
            taken += 1
    return {"lengths": lengths, "weights": weights(model), "rounds": local.rounds, "steps": local.steps}


def one_step_of(
    model: nn.Module, optimizer: SGD, batch: tuple[Tensor, Tensor], local: LocalSGD | None, clock: Clock, seconds: float
) -> None:
    loss_of(model, batch).backward()
    clock.time += seconds
    if local is not None:
        local.count(len(batch[0]))
    optimizer.step()
    optimizer.zero_grad()


LENGTHS = [[H] * 3, *[[6, 3, 2]] * (ROUNDS - 1)]


def reference(shares: Sequence[float]) -> Tensor:
    simulation = Simulation(3)
    for lengths in LENGTHS:
        simulation.round(lengths, shares)
    return simulation.master.detach()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("counts", "options", "shares"),
    [
        # examples of a step, not of a round: 6 x 3, 3 x 4 and 2 x 5 examples have moved their workers by 6, 3, 2 steps
        (True, {}, [3, 4, 5]),
        (False, {}, [1, 1, 1]),
        (True, {"weights": "equal"}, [1, 1, 1]),
    ],
    ids=["examples", "not counted", "equal"],
)
def test_workers_step_by_their_speed(
    tmp_path: Path, counts: bool, options: dict[str, Any], shares: Sequence[float]
) -> None:
    found = run_ranks(by_speed, 3, tmp_path, options, counts)
    right = reference(shares)
    for rank, each in enumerate(found):
        assert each["lengths"] == [lengths[rank] for lengths in LENGTHS]
        assert each["steps"] == sum(each["lengths"])
        assert each["rounds"] == ROUNDS
        torch.testing.assert_close(each["weights"], right, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_lengths_are_saved_in_the_middle_of_a_round(tmp_path: Path) -> None:
    for rank, each in enumerate(run_ranks(by_speed, 3, tmp_path, {}, True, str(tmp_path / "state"))):
        assert each["lengths"][:3] == [H, LENGTHS[1][rank], LENGTHS[1][rank]]
        torch.testing.assert_close(each["weights"], reference([3, 4, 5]), rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_fragments_are_averaged_in_the_same_order_by_unequal_workers(tmp_path: Path) -> None:
    found = run_ranks(by_speed, 3, tmp_path, {"fragments": 2}, True, None, (1.0, 2.0, 7.0))
    # the third takes no step in the time of the first one's six, and needs one for each fragment
    assert [each["lengths"] for each in found] == [[6, 6, 6, 6], [6, 3, 3, 3], [6, 2, 2, 2]]
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert torch.equal(found[0]["weights"], found[2]["weights"])


def miscounted(rank: int) -> str:
    """The second worker has lost count of its rounds."""
    model = network()
    optimizer = sgd(model)
    try:
        with LocalSGD(model, optimizer, sync_every=4, by_speed=True) as local:
            local._rounds.memory.rounds += rank
            for number in range(4):
                one_step(model, optimizer, batch_of(rank, number))
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_workers_in_different_rounds_are_told(tmp_path: Path) -> None:
    for message in run_ranks(miscounted, 2, tmp_path):
        assert "after different numbers of rounds (worker 0: 0; worker 1: 1)" in message


def test_what_does_not_go_with_it_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"must be a number, got sync_every=Table\(first=2"):
        LocalSGD(model, optimizer, sync_every=Table(2, []), by_speed=True)
    with pytest.raises(ValueError, match="cannot be combined with overlap=1"):
        LocalSGD(model, optimizer, sync_every=4, overlap=1, by_speed=True)
    with (
        LocalSGD(model, optimizer, sync_every=4, by_speed=True) as local,
        pytest.raises(ValueError, match="AdaptiveBatch the same plans"),
    ):
        AdaptiveBatch(model, optimizer, Constant(4), micro_batch_size=4, local_sgd=local)


# --- workers that leave and join ------------------------------------------------------------------------------------

WORLDS = [(3, [0, 1, 2]), (2, [0, 1]), (3, [0, 1, 0])]
"""How many workers there are, and whose inner optimizer each of them has."""


def some_rounds(rank: int, place: str, number: int) -> tuple[Tensor, int]:
    """Two rounds, after those that were saved before."""
    model = network(seed=7 + rank)
    optimizer = sgd(model)
    with LocalSGD(model, optimizer, sync_every=4, outer=Nesterov()) as local:
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "local_sgd": local}
        if number:
            assert load(f"{place}.{number}", **parts) is not None
        else:
            nn.utils.vector_to_parameters(weights(network()), model.parameters())
        begun = local.rounds
        while local.rounds < begun + 2:
            one_step(model, optimizer, batch_of(rank, local.steps))
        save(f"{place}.{number + 1}", **parts)
    return weights(model), local.rounds


@pytest.mark.distributed
def test_three_workers_go_on_as_two_and_then_as_three(tmp_path: Path) -> None:
    """Outer momentum goes on, and every worker has the inner momentum of one that was there before."""
    simulation = Simulation(3)
    for number, (size, workers) in enumerate(WORLDS):
        if number:
            simulation.go_on_with(workers)
        for _ in range(2):
            simulation.round([4] * size, [1] * size)
        for found, rounds in run_ranks(some_rounds, size, tmp_path, str(tmp_path / "saved"), number):
            torch.testing.assert_close(found, simulation.master.detach(), rtol=1e-5, atol=1e-6)
            assert rounds == 2 * (number + 1)


def in_a_round(rank: int, place: str, num_steps: int) -> str:
    model = network()
    optimizer = sgd(model)
    with LocalSGD(model, optimizer, sync_every=4, outer=Nesterov()) as local:
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "local_sgd": local}
        try:
            load(place, **parts, missing_ok=True)
        except ValueError as error:
            return str(error)
        for number in range(num_steps):
            one_step(model, optimizer, batch_of(rank, number))
        save(place, **parts)
    return "nothing"


@pytest.mark.distributed
def test_a_checkpoint_inside_a_round_says_that_it_needs_as_many_workers(tmp_path: Path) -> None:
    assert run_ranks(in_a_round, 3, tmp_path, str(tmp_path / "saved"), 6) == ["nothing"] * 3
    for message in run_ranks(in_a_round, 2, tmp_path, str(tmp_path / "saved"), 0):
        assert "was saved by 3 workers, and there are 2: in the middle of a round" in message


def test_durations_in_steps_are_for_equal_workers() -> None:
    """The warm-up, in which all workers take single steps, is allowed."""
    model = network()
    LocalSGD(model, sgd(model), sync_every=4, warmup=steps(3), by_speed=True).remove()
