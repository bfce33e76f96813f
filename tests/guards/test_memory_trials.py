"""Micro-batches that are tried before a step is made of them: memory runs out, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, regression, weights
from support.options import grouped
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import Dataset

from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, NormTest, PerExampleProbe, examples
from adabatch.batch.schedules import Stage, Stages
from adabatch.guards.memory_trials import is_out_of_memory

NUM_EXAMPLES = 640
GROWING = Stages(8, [Stage(examples(40), 16), Stage(examples(120), 32), Stage(examples(300), 64)])
EXBIBYTE = 1 << 60


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """A data set whose examples carry their numbers."""

    def __init__(self) -> None:
        self._data = regression(NUM_EXAMPLES)

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x, y = self._data[index]
        return x, y, index


class Hungry(nn.Module):
    """Dropout, batch normalization or neither, and an allocation that no machine has room for above some size."""

    def __init__(self, *, most: int = NUM_EXAMPLES, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.most = most
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        if len(x) > self.most:
            torch.empty(EXBIBYTE, dtype=torch.uint8)
        return output


class Run:
    """A run of ``Hungry`` and what it was given."""

    def __init__(
        self,
        *,
        most: int = NUM_EXAMPLES,
        tried: bool = True,
        largest: int = 64,
        micro: int = 4,
        norm: bool = True,
        workers: int = 0,
        criterion: Any = GROWING,
        journal: Path | None = None,
        **options: Any,
    ) -> None:
        self.model = Hungry(most=most, norm=norm)
        self.optimizer = SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.given: list[int] = []
        self.order = GlobalOrder(Numbered(), seed=1, num_workers=workers)
        self.batches = AdaptiveBatch(
            self.model,
            self.optimizer,
            criterion,
            micro_batch_size=micro,
            max_micro_batch_size=largest,
            journal=journal,
            **grouped(
                {name: make(self.model) if name == "probe" else make for name, make in options.items()},
                trial=self.loss_of if tried else None,
            ),
        )

    def loss_of(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return functional.mse_loss(self.model(x), y)

    def train(self, until: int = NUM_EXAMPLES) -> Run:
        for step in self.batches.steps(self.order, until=examples(until)):
            for batch in step:
                self.given += batch[2].tolist()
                step.backward(self.loss_of(batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self) -> Tensor:
        return torch.cat([weights(self.model), *(buffer.flatten() for buffer in self.model.buffers())])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"monitor": True},
        {"probe": lambda model: PerExampleProbe(model, products=True), "norm": False, "monitor": True},
        {"criterion": NormTest(eta=0.6), "limits": Limits(min=8, max=128)},
    ],
    ids=["schedule", "micro-batch probe", "per-example probe", "norm test"],
)
def test_trials_that_fit_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """Not a bit of weights, momenta, running statistics, dropout masks and journal."""
    torch.manual_seed(5)
    tried = Run(journal=tmp_path / "tried", **options).train()
    torch.manual_seed(5)
    bare = Run(journal=tmp_path / "bare", tried=False, **options).train()
    assert max(line["plan"]["micro_batch_size"] for line in lines(tmp_path / "tried")) > 4
    assert torch.equal(tried.state(), bare.state())
    assert tried.given == bare.given
    assert lines(tmp_path / "tried") == lines(tmp_path / "bare")
    assert tried.batches.too_large is None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_size_that_fits_stays_and_steps_accumulate(workers: int, tmp_path: Path) -> None:
    run = Run(most=16, workers=workers, journal=tmp_path / "journal").train()
    written = lines(tmp_path / "journal")
    assert run.batches.too_large == 32
    assert max(line["plan"]["micro_batch_size"] for line in written) == 16
    plans = [(line["plan"]["global_batch_size"], line["plan"]["micro_batch_size"]) for line in written]
    assert (64, 16) in plans
    assert [line["out_of_memory"] for line in written if "out_of_memory" in line] == [[32]]
    assert next(line for line in written if "out_of_memory" in line)["plan"]["global_batch_size"] == 32
    # Every example once, in the order's own order.
    assert run.given[:NUM_EXAMPLES] == run.order.permutation(0).tolist()


def test_a_run_that_was_told_the_size_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    found = Run(most=16, journal=tmp_path / "found").train()
    torch.manual_seed(5)
    told = Run(largest=16, tried=False, journal=tmp_path / "told").train()
    assert torch.equal(found.state(), told.state())
    drop = lambda line: {name: value for name, value in line.items() if name != "out_of_memory"}  # noqa: E731
    assert [drop(line) for line in lines(tmp_path / "found")] == lines(tmp_path / "told")


def test_a_first_plan_is_tried_too_and_several_sizes_at_once(tmp_path: Path) -> None:
    run = Run(most=9, criterion=Constant(64), journal=tmp_path / "journal").train(128)
    first, second = lines(tmp_path / "journal")
    assert first["out_of_memory"] == [64, 32, 16]
    assert first["plan"] == {"micro_batch_size": 8, "accumulation_steps": 8, "dp_size": 1, "global_batch_size": 64}
    assert "out_of_memory" not in second
    assert run.given == run.order.permutation(0).tolist()[:128]


def test_the_smallest_size_is_the_users_own() -> None:
    """A loop that has no memory for what was asked for fails as any loop does."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Run(most=2).train()


def test_a_second_micro_batch_finds_the_gradient_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps accumulate, that is when most memory is needed."""
    seen: list[tuple[int, bool]] = []
    plain = Run.loss_of

    def watched(self: Run, batch: Any) -> Tensor:
        seen.append((len(batch[0]), next(self.model.parameters()).grad is not None))
        return plain(self, batch)

    monkeypatch.setattr(Run, "loss_of", watched)
    Run(criterion=Constant(32), largest=8).train(32)
    trial, step = seen[:2], seen[2:]
    assert trial == [(8, False), (8, True)]
    assert step == [(8, False), (8, True), (8, True), (8, True)]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_error_that_has_nothing_to_do_with_memory_is_raised(tmp_path: Path) -> None:
    class Broken(Run):
        def loss_of(self, batch: Any) -> Tensor:
            if len(batch[0]) > 8:
                raise KeyError("labels")
            return super().loss_of(batch)

    with pytest.raises(KeyError, match="labels"):
        Broken().train()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(EXBIBYTE, dtype=torch.uint8),
        lambda: bytearray(EXBIBYTE),
    ],
)
def test_allocators_are_understood(allocate: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert is_out_of_memory(raised.value)


def test_what_accelerators_say_is_understood() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_micro_batch_that_does_not_grow_is_not_tried() -> None:
    with pytest.raises(ValueError, match="this run has micro-batches of 4 only: give a max_micro_batch_size above 4"):
        Run(largest=4)


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_remembers_what_did_not_fit(tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = Run(most=16, journal=tmp_path / "whole").train()

    torch.manual_seed(5)
    first = Run(most=16, journal=tmp_path / "parts").train(320)
    numbers = torch.get_rng_state()
    second = Run(most=16, journal=tmp_path / "parts")
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.batches.load_state_dict(first.batches.state_dict())
    second.order.load_state_dict(first.order.state_dict())
    torch.set_rng_state(numbers)
    second.train()
    assert second.batches.too_large == 32
    assert torch.equal(second.state(), whole.state())
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_other_sizes_are_tried_anew() -> None:
    """As on a machine with more memory, where the user asks for other sizes."""
    found = Run(most=16).train(400)
    assert found.batches.too_large == 32
    larger = Run(largest=128)
    larger.batches.load_state_dict(found.batches.state_dict())
    larger.order.load_state_dict(found.order.state_dict())
    larger.train()
    assert larger.batches.too_large is None
    assert larger.batches.plan.micro_batch_size > 16
    bare = Run(tried=False)
    bare.batches.load_state_dict(found.batches.state_dict())
    assert bare.batches.too_large is None
