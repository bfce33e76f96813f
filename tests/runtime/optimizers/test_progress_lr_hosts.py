"""``ProgressLR`` inside Accelerate, Lightning and the Trainer of Transformers, each as its own documentation shows.

What they have in common is checked in each: the rate of every optimizer step is the formula's, under accumulation too,
and a run that is saved and resumed by the host goes on where it was. Skipped where a host is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loops import network, regression
from support.ports import free_port
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from adabatch import ProgressLR, lr, steps

# Hosts warn of much that is no concern of ours: workers of loaders, folders that exist, their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

TOTAL = 10


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [each for each in packages if importlib.util.find_spec(each) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (pip install {' '.join(missing)})")


def schedule_of(optimizer: Optimizer) -> ProgressLR:
    """Warm-up over 2 of 10 steps, then a line."""
    return ProgressLR(optimizer, lr.linear(), total=steps(TOTAL), warmup=steps(2))


def rate(index: int, base: float = 0.1) -> float:
    """The same, of update ``index``."""
    return base * (index + 1) / 2 if index < 2 else base * (TOTAL - index) / (TOTAL - 2)


def rates(count: int, first: int = 0) -> list[float]:
    return [rate(index) for index in range(first, first + count)]


def watched(optimizer: Optimizer) -> list[float]:
    """The rate of every step that the optimizer takes from now on."""
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(float(optimizer.param_groups[0]["lr"])))
    return seen


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Hosts leave variables behind."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


# --- Accelerate -----------------------------------------------------------------------------------------------------


def accelerated(folder: Path, *, until: int, accumulation: int = 1, resume: bool = False) -> tuple[list[float], Any]:
    """A run of its documentation: prepare all, accumulate, step both."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = network()
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    schedule: Any = schedule_of(optimizer)
    seen = watched(optimizer)
    loader: Any = DataLoader(regression(400), batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resume:
        accelerator.load_state(str(folder))
    while len(seen) < until:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(functional.mse_loss(model(x), y))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if len(seen) == until:
                break
    accelerator.save_state(str(folder))
    return seen, schedule


@needs("accelerate")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate_steps_it_after_every_update(accumulation: int, tmp_path: Path) -> None:
    seen, schedule = accelerated(tmp_path, until=7, accumulation=accumulation)
    assert seen == pytest.approx(rates(7), rel=1e-12)
    assert schedule.get_last_lr() == pytest.approx([rate(7)])
    assert isinstance(schedule.scheduler, ProgressLR)


@needs("accelerate")
def test_accelerate_saves_and_resumes_it(tmp_path: Path) -> None:
    first, _ = accelerated(tmp_path, until=4)
    second, schedule = accelerated(tmp_path, until=6, resume=True)
    assert first + second == pytest.approx(rates(TOTAL), rel=1e-12, abs=1e-12)
    assert schedule.get_last_lr() == [0.0]


@needs("accelerate")
def test_accelerates_wrapper_of_an_optimizer_is_refused_with_the_way_out() -> None:
    from accelerate import Accelerator

    optimizer = Accelerator(cpu=True).prepare(SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer is not an optimizer.*before accelerator.prepare"):
        schedule_of(optimizer)


def on_two_ranks(rank: int, port: int) -> dict[str, list[float]]:
    """Accelerate steps a schedule once for every process, as it takes the loader to be split; ours does not mind."""
    from accelerate import Accelerator

    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found: dict[str, list[float]] = {}
    for name in ("ours", "torch"):
        model = network()
        optimizer: Any = SGD(model.parameters(), lr=0.1)
        schedule: Any = schedule_of(optimizer) if name == "ours" else LambdaLR(optimizer, lambda t: 1 - t / TOTAL)
        found[name] = watched(optimizer)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        data = regression(64)
        for index in range(5):
            accelerator.backward(functional.mse_loss(model(data[index : index + 4][0]), data[index : index + 4][1]))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return found


@needs("accelerate")
@pytest.mark.distributed
def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    for found in run_ranks(on_two_ranks, 2, tmp_path, free_port(), connect=False, timeout=120):
        assert found["ours"] == pytest.approx(rates(5), rel=1e-12)
        assert found["torch"] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02]), "two steps of the schedule an update"


# --- Lightning ------------------------------------------------------------------------------------------------------


def lit(*, epochs: int, accumulation: int = 1, checkpoint: Path | None = None) -> tuple[list[float], Any, Any]:
    """``configure_optimizers`` as in its documentation, and ``Trainer.fit`` over epochs of half the total."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return functional.mse_loss(self.network(x), y)

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            self.seen = watched(optimizer)
            self.schedule = schedule_of(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    module = Lit()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(regression(2 * TOTAL * accumulation), batch_size=4)
    trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module.seen, module.schedule, trainer


@needs("lightning")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_lightning_fits_two_epochs(accumulation: int) -> None:
    seen, schedule, trainer = lit(epochs=2, accumulation=accumulation)
    assert trainer.lr_scheduler_configs[0].scheduler is schedule
    assert seen == pytest.approx(rates(TOTAL), rel=1e-12, abs=1e-12)
    assert schedule.get_last_lr() == [0.0]


@needs("lightning")
def test_lightning_saves_and_resumes_it(tmp_path: Path) -> None:
    first, _, trainer = lit(epochs=1)
    assert len(first) == TOTAL // 2
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second, schedule, _ = lit(epochs=2, checkpoint=tmp_path / "run.ckpt")
    assert first + second == pytest.approx(rates(TOTAL), rel=1e-12, abs=1e-12)
    assert schedule.get_last_lr() == [0.0]


# --- Transformers ---------------------------------------------------------------------------------------------------


class Regressor(nn.Module):
    """A model as the Trainer wants it: batches by name, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.network(x)
        return {"loss": functional.mse_loss(out, labels), "logits": out}


def hugged(folder: Path, *, until: int, accumulation: int = 1, resume: bool = False) -> tuple[list[float], Any]:
    """``Trainer(optimizers=(optimizer, scheduler))``."""
    from transformers import Trainer, TrainingArguments

    data = regression(4 * TOTAL * accumulation)
    model = Regressor()
    optimizer = AdamW(model.parameters(), lr=0.1)
    schedule = schedule_of(optimizer)
    seen = watched(optimizer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=until,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_steps=until,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in zip(*data.tensors, strict=True)],
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=resume)
    return seen, trainer


def logged(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@needs("transformers", "accelerate")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainer_of_transformers(accumulation: int, tmp_path: Path) -> None:
    seen, trainer = hugged(tmp_path, until=TOTAL, accumulation=accumulation)
    assert seen == pytest.approx(rates(TOTAL), rel=1e-12)
    assert logged(trainer) == pytest.approx(rates(TOTAL), rel=1e-12, abs=1e-12)


@needs("transformers", "accelerate")
def test_the_trainer_of_transformers_saves_and_resumes_it(tmp_path: Path) -> None:
    first, _ = hugged(tmp_path, until=4)
    second, _ = hugged(tmp_path, until=TOTAL, resume=True)
    assert first + second == pytest.approx(rates(TOTAL), rel=1e-12)
