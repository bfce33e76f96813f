"""Mistakes of whole scripts that end without an error: each is said, and what is like them is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, Constant, GlobalOrder, ProgressLR, lr, steps
from adabatch.batch.plan import Duration

THREE = steps(3)

Loss = Callable[[nn.Module, Any], Tensor]


class Run:
    """Steps of three micro-batches of four examples."""

    def __init__(self, **options: Any) -> None:
        self.model = network()
        self.optimizer = SGD(self.model.parameters(), lr=0.01)
        self.batches = AdaptiveBatch(self.model, self.optimizer, Constant(12), micro_batch_size=4, **options)
        self.order = GlobalOrder(regression(96))

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "batches", "order")}

    def go(
        self,
        until: Duration = THREE,
        *,
        loss: Loss = loss_of,
        inner: Callable[[int], Any] = lambda index: None,
        before: Callable[[], Any] = lambda: None,
        after: Callable[[], Any] = lambda: None,
        loader: Any = None,
    ) -> None:
        for step in self.batches.steps(self.order if loader is None else loader, until=until):
            for index, batch in enumerate(step):
                inner(index)
                step.backward(loss(self.model, batch))
            before()
            self.optimizer.step()
            self.optimizer.zero_grad()
            after()


def warned(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    assert all(each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


# --- losses -----------------------------------------------------------------------------------------------------------


def classes(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(torch.cat([model(x), -model(x)], 1), (y[:, 0] > 0).long())


LOSSES: dict[str, tuple[Loss, str | None]] = {
    "sum": (lambda model, batch: functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), "was given a sum"),
    "divided": (lambda model, batch: loss_of(model, batch) / 3, "divided by 3, the number of micro-batches"),
    "divided classes": (lambda model, batch: classes(model, batch) / 3, "divided by 3, the number of micro-batches"),
    "mean": (loss_of, None),
    "half": (lambda model, batch: loss_of(model, batch) / 2, None),
    "of three": (lambda model, batch: (loss_of(model, batch) + 2 * classes(model, batch)) / 3, None),
    "sum over its number": (lambda model, batch: (model(batch[0]) - batch[1]).square().sum() / len(batch[0]), None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_no_mean_is_warned_of_once(name: str) -> None:
    loss, words = LOSSES[name]
    run = Run()
    found = warned(lambda: (run.go(loss=loss), run.go(steps(6), loss=loss)))
    assert [words in each for each in found if words] == ([True] if words else [])
    assert len(found) == (words is not None)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_gradients_that_are_cleared_before_the_update_are_an_error() -> None:
    run = Run()
    with pytest.raises(RuntimeError, match=r"cleared before optimizer.step\(\) of the SGD, which would change nothing"):
        run.go(before=run.optimizer.zero_grad)
    run = Run()
    run.go(before=lambda: (run.batches.leave_out(), run.optimizer.zero_grad()))
    assert run.batches.progress.steps == 0


def test_a_model_that_an_evaluation_left_in_its_mode_is_warned_of_once() -> None:
    run = Run()
    (said,) = warned(lambda: run.go(steps(5), after=run.model.eval))
    assert "call model.train() after an evaluation" in said
    run = Run()
    run.model.eval()  # from the beginning, as for a model with frozen statistics
    assert warned(run.go) == []


def test_an_until_that_was_reached_is_warned_of_and_not_after_a_load(tmp_path: Path) -> None:
    run = Run()
    run.go()
    (said,) = warned(run.go)
    assert "this loop has no step: until=3 steps counts from the beginning of the run, which has consumed 3" in said
    adabatch.save(tmp_path / "saved", **run.parts())
    run = Run()
    run.go(steps(2))
    adabatch.load(tmp_path / "saved", **run.parts())
    assert warned(run.go) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_intervals_that_nobody_asks_about_are_warned_of(tmp_path: Path) -> None:
    run = Run()

    def forgotten() -> None:
        with Checkpoints(tmp_path / "forgotten", **run.parts(), every=steps(2)):
            run.go()

    (said,) = warned(forgotten)
    assert "step() was never called" in said

    def saved() -> None:
        with Checkpoints(tmp_path / "saved", **run.parts(), every=steps(2)) as checkpoints:
            run.go(steps(6), after=checkpoints.step)

    assert warned(saved) == []


@pytest.mark.parametrize("call", ["load", "step"])
def test_checkpoints_inside_a_step_are_refused_though_none_is_due(tmp_path: Path, call: str) -> None:
    run = Run()
    with Checkpoints(tmp_path / "saved", **run.parts(), every=steps(100)) as checkpoints:
        run.go(after=checkpoints.step)
        checkpoints.save()
        with pytest.raises(RuntimeError, match="belongs between two steps, and `for batch in step` has not been run"):
            run.go(steps(6), inner=lambda index: getattr(checkpoints, call)() if index else None)
        run.optimizer.zero_grad()
        checkpoints.load()  # once the loop is left
        run.go(steps(6), after=checkpoints.step)
    assert run.batches.progress.steps == 6


def test_a_scheduler_of_torch_that_is_not_saved_is_warned_of(tmp_path: Path) -> None:
    run = Run()
    schedule = CosineAnnealingLR(run.optimizer, 10)
    run.go(after=schedule.step)
    (said,) = warned(lambda: adabatch.save(tmp_path / "without", **run.parts()))
    assert "the scheduler of the SGD is not among the parts" in said
    assert "give it as schedule=" in said
    assert warned(lambda: adabatch.save(tmp_path / "with", **run.parts(), schedule=schedule)) == []
    run = Run()  # whose place is that of the batches
    progress = ProgressLR(run.optimizer, lr.linear(), run.batches, total=steps(10))
    run.go(after=progress.step)
    assert warned(lambda: adabatch.save(tmp_path / "progress", **run.parts())) == []


# --- data -------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """The same examples in every process, or a share of them in each."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        data = regression(48)
        first, stride = (worker.id, worker.num_workers) if worker is not None and self.shared else (0, 1)
        return (data[index] for index in range(first, 48, stride))


def test_a_stream_that_its_loading_processes_repeat_is_refused() -> None:
    run = Run()
    repeated = DataLoader(Stream(shared=False), batch_size=4, num_workers=2)
    with pytest.raises(ValueError, match="the 2 loading processes of the DataLoader give the same examples"):
        run.go(loader=repeated)
    Run().go(loader=DataLoader(Stream(shared=True), batch_size=4, num_workers=2))
    for _ in Run().batches.steps(repeated, until=steps(0), allow_same_data=True):
        pass


def test_the_sampler_behind_a_progress_bar_goes_to_its_next_epoch() -> None:
    data = regression(24)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    Run().go(steps(5), loader=tqdm(DataLoader(data, batch_size=4, sampler=sampler), disable=True))
    assert sampler.epoch == 3
