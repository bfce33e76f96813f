"""The callback for Lightning on one process: equal to Lightning's own accumulation, resumed, and what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import (
    AWKWARD,
    LR,
    MICRO,
    Numbered,
    awkward,
    check_awkward,
    environment_kept,
    loss_of,
    needs,
)
from support.loops import all_lines, lines, network, weights
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, Measure, NormTest, ProgressLR

needs("lightning", "pytorch_lightning")

CLIP = 0.5
MONITOR = Measure(monitor=True)
ROOTS = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}

HOSTS_OWN = (  # what Lightning says of its own code, of the machine, and of runs as short as these
    "ignore:The `srun` command is available",
    r"ignore:`isinstance\(treespec",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory",
    "ignore:.*pkg_resources",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:The `LightningDataModule`",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)
pytestmark = [pytest.mark.filterwarnings(each) for each in HOSTS_OWN]

environment = pytest.fixture(autouse=True)(environment_kept)

Configured = Callable[[Any], Any]


def by_sgd(module: nn.Module) -> Any:
    return SGD(module.parameters(), lr=LR)


def by_adam(module: nn.Module) -> Any:
    """With a scheduler that steps after each update."""
    optimizer = AdamW(module.parameters(), lr=LR)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def module_of(configured: Configured = by_sgd, *, root: str = "lightning.pytorch", sharded: bool = False) -> Any:
    host = importlib.import_module(root)

    class Lit(host.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.served: list[int] = []
            self.windows: list[int] = []
            self.events: list[tuple[str, int]] = []
            self.outputs: list[float] = []

        def configure_model(self) -> None:
            if sharded and type(self.network).__name__ == "Sequential":
                from torch.distributed.fsdp import fully_shard

                fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert len(batch) == 3
            self.windows.append(0)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.served += batch[2].tolist()
            self.windows[-1] += 1
            loss = loss_of(self.network, batch)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return {"loss": loss, "size": len(batch[0])}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.outputs.append(outputs["loss"].item())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.network, batch))

        def on_validation_start(self) -> None:
            self.events.append(("validation", self.trainer.global_step))

        def on_train_epoch_end(self) -> None:
            self.events.append(("epoch", self.trainer.global_step))

        def configure_optimizers(self) -> Any:
            return configured(self)

    return Lit()


def trainer_of(*callbacks: Any, root: str = "lightning.pytorch", **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    bar = {"enable_progress_bar": False}
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **quiet, **bar}
    return importlib.import_module(root).Trainer(callbacks=list(callbacks), **{**defaults, **options})


def callback_of(criterion: Any, *, root: str = "lightning.pytorch", **options: Any) -> Any:
    module = importlib.import_module(f"adabatch.integrations.{ROOTS[root]}")
    return module.AdaptiveBatchCallback(criterion, micro_batch_size=MICRO, **options)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(), batch_size=MICRO, **options)


def half(scale: float = 2.0**10) -> Any:
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5))


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "precision"),
    [
        ("lightning.pytorch", "32-true"),
        ("lightning.pytorch", "bf16-mixed"),
        ("lightning.pytorch", "half"),
        ("pytorch_lightning", "32-true"),
    ],
)
def test_a_constant_batch_is_lightnings_own_accumulation_to_the_bit(root: str, precision: str) -> None:
    def options() -> dict[str, Any]:
        how = {"plugins": half()} if precision == "half" else {"precision": precision}
        return {**how, "root": root, "max_steps": 25, "max_epochs": 2, "gradient_clip_val": CLIP}

    theirs = module_of(by_adam, root=root)
    trainer_of(accumulate_grad_batches=4, **options()).fit(theirs, loader())
    module = module_of(by_adam, root=root)
    callback = callback_of(Constant(4 * MICRO), root=root, measure=MONITOR)
    trainer = trainer_of(callback, **options())
    trainer.fit(module, loader())
    assert trainer.global_step == callback.batches.progress.steps == 25
    assert module.windows == [4] * 25
    assert torch.equal(weights(module), weights(theirs))
    assert callback.batches.noise_scale > 0
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([LR / 26])


def test_a_loss_that_overflows_leaves_the_same_updates_out() -> None:
    def spoiled() -> Any:
        return DataLoader(Numbered(spoiled=70), batch_size=MICRO)

    theirs = module_of()
    trainer_of(accumulate_grad_batches=4, plugins=half(), max_epochs=1).fit(theirs, spoiled())
    module, callback = module_of(), callback_of(Constant(4 * MICRO), measure=MONITOR)
    trainer_of(callback, plugins=half(), max_epochs=1).fit(module, spoiled())
    assert torch.equal(weights(module), weights(theirs))
    assert (callback.batches.consumed.steps, callback.batches.progress.steps) == (16, 15)


def test_a_plan_that_grows_at_awkward_steps(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module, callback = module_of(), callback_of(awkward(1, first=2), measure=MONITOR)
    trainer = trainer_of(
        callback, max_steps=10, gradient_clip_val=CLIP, logger=logger, log_every_n_steps=1, enable_progress_bar=True
    )
    trainer.fit(module, GlobalOrder(Numbered(), seed=0))
    assert module.windows == [2] * 3 + AWKWARD[3:]
    logged = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    sizes = [row[logged[0].index("adabatch/global_batch_size")] for row in logged[1:]]
    assert [float(size) for size in sizes if size] == [MICRO * count for count in module.windows]
    assert "adabatch/loss" in logged[0]
    assert "adabatch/noise_scale" in logged[0]

    module, callback = module_of(), callback_of(awkward(1))
    trainer_of(callback, max_steps=10, gradient_clip_val=CLIP).fit(module, GlobalOrder(Numbered(), seed=0))
    found = {"weights": weights(module).tolist(), "windows": module.windows, "served": module.served}
    check_awkward([found], clip=CLIP)


def test_a_micro_batch_that_grows() -> None:
    module, callback = module_of(), callback_of(awkward(1), max_micro_batch_size=2 * MICRO)
    trainer_of(callback, max_steps=10).fit(module, GlobalOrder(Numbered(), seed=0))
    found = {"weights": weights(module).tolist(), "windows": module.windows, "served": module.served}
    check_awkward([found], windows=[1] * 3 + [2] * 3 + [1] * 2 + [5] * 2)


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_epochs_end_with_their_data(bar: str, tmp_path: Path) -> None:
    """Validation, schedulers per epoch, the bar and the counters, though no epoch knows its last step beforehand."""
    from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

    totals: list[tuple[Any, int]] = []
    losses: list[float] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                losses.append(trainer.callback_metrics["val_loss"].item())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            shown = trainer.progress_bar_callback
            total = shown.train_progress_bar.total
            totals.append((total, trainer.num_training_batches))

    def stepped(module: nn.Module) -> Any:
        optimizer = SGD(module.parameters(), lr=LR)
        return [optimizer], [LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    shown = TQDMProgressBar() if bar == "tqdm" else RichProgressBar()
    sizes = adabatch.Stages(MICRO, [adabatch.Stage(adabatch.steps(3), 5 * MICRO)])
    module, callback = module_of(stepped), callback_of(sizes, journal=tmp_path / "run.jsonl")
    options = {"enable_progress_bar": True, "num_sanity_val_steps": 2}
    trainer = trainer_of(callback, shown, Watch(), max_epochs=3, **options)
    trainer.fit(module, loader(shuffle=True), DataLoader(Numbered(8), batch_size=MICRO))
    ends = [3 + 13, 29, 42]  # of 64 micro-batches: 3 of 1 and 12 of 5 and a last one of 1; then 12 of 5 and one of 4
    assert module.windows == [1] * 3 + [5] * 12 + [1] + ([5] * 12 + [4]) * 2
    assert module.events == [("validation", 0)] + [(what, end) for end in ends for what in ("validation", "epoch")]
    told = [line for line in all_lines(tmp_path / "run.jsonl") if "evaluation" in line]
    assert [(line["step"], line["examples"]) for line in told] == list(zip(ends, (256, 512, 768), strict=True))
    assert [line["evaluation"] for line in told] == [{"loss": loss} for loss in losses], "without the sanity check"
    assert totals == [(16, 16), (13, 13), (13, 13)]
    assert trainer.current_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR / 8
    epochs = [sorted(module.served[start : start + 256]) for start in (0, 256, 512)]
    assert epochs == [list(range(256))] * 3
    assert module.served[:256] != module.served[256:512]


def test_the_mean_loss_of_a_step_is_what_lightning_is_told() -> None:
    module, callback = module_of(), callback_of(Constant(4 * MICRO), measure=MONITOR, journal=None)
    trainer = trainer_of(callback, max_epochs=1)
    trainer.fit(module, loader())
    plain, data = network(), Numbered()
    optimizer = SGD(plain.parameters(), lr=LR)
    for start in range(0, 256, 16):
        rows = [data[index] for index in range(start, start + 16)]
        loss = nn.functional.mse_loss(plain(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows]))
        assert module.outputs[start // 16] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(module.outputs) / 16, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "steps", "events"),
    [
        ({"max_steps": 7}, 7, []),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10, [("validation", 5), ("epoch", 5)]),
        ({"max_epochs": 1, "val_check_interval": 6}, 16, [("validation", 6), ("validation", 12), ("epoch", 16)]),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, 32, [("epoch", 16), ("validation", 32)]),
        ({"max_epochs": 1, "reload_dataloaders_every_n_epochs": 1}, 16, [("validation", 16), ("epoch", 16)]),
    ],
)
def test_lightnings_own_ends_and_intervals(options: dict[str, Any], steps: int, events: list[tuple[str, int]]) -> None:
    module, callback = module_of(), callback_of(Constant(4 * MICRO))
    trainer = trainer_of(callback, **options)
    trainer.fit(module, loader(), DataLoader(Numbered(8), batch_size=MICRO))
    assert trainer.global_step == callback.batches.consumed.steps == len(module.outputs) == steps
    assert module.events[: len(events)] == events


def test_until_ends_the_run() -> None:
    module, callback = module_of(), callback_of(Constant(4 * MICRO), until=adabatch.examples(400))
    trainer = trainer_of(callback, max_epochs=9)
    trainer.fit(module, loader())
    assert callback.batches.consumed.examples == 400
    assert trainer.current_epoch == 1


def test_a_loader_without_a_state_is_run_through_after_a_resume_in_mid_epoch(tmp_path: Path) -> None:
    from lightning.pytorch import Callback

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    module, callback = module_of(), callback_of(Constant(4 * MICRO))
    trainer_of(callback, Saves(), max_steps=7).fit(module, loader())
    module, callback = module_of(), callback_of(Constant(4 * MICRO))
    trainer = trainer_of(callback, max_epochs=2)
    validated = DataLoader(Numbered(8), batch_size=MICRO)
    trainer.fit(module, loader(), validated, ckpt_path=tmp_path / "one.ckpt")
    assert module.served == [*range(256)] * 2
    assert trainer.global_step == callback.batches.consumed.steps == 7 + 16 + 16
    assert module.events == [("validation", 23), ("epoch", 23), ("validation", 39), ("epoch", 39)]


def test_a_fit_leaves_nothing_behind() -> None:
    module, callback = module_of(), callback_of(Constant(4 * MICRO))
    trainer = trainer_of(callback, max_epochs=1)
    trainer.fit(module, loader())
    assert "run" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert trainer.global_step == 32


# --- measuring only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "half"])
def test_a_monitor_measures_lightnings_own_accumulation_and_changes_nothing(precision: str, tmp_path: Path) -> None:
    from adabatch.integrations.lightning import NoiseMonitorCallback

    def fit(*callbacks: Any) -> Any:
        how: dict[str, Any] = {"plugins": half()} if precision == "half" else {}
        module = module_of(by_adam)
        trainer = trainer_of(*callbacks, accumulate_grad_batches=4, max_epochs=1, gradient_clip_val=CLIP, **how)
        trainer.fit(module, loader(), DataLoader(Numbered(8), batch_size=MICRO))
        return module, trainer

    watch = NoiseMonitorCallback(micro_batch_size=MICRO, journal=tmp_path / "run.jsonl")
    theirs, _ = fit()
    module, trainer = fit(watch)
    assert torch.equal(weights(module), weights(theirs))
    told = all_lines(tmp_path / "run.jsonl")
    assert len(told) == 17
    assert told[-1]["step"] == 16
    assert told[-1]["evaluation"] == {"loss": trainer.callback_metrics["val_loss"].item()}
    adaptive = callback_of(Constant(4 * MICRO), measure=MONITOR)
    trainer_of(adaptive, max_epochs=1, gradient_clip_val=CLIP).fit(module_of(by_adam), loader())
    rounding = 1e-5 if precision == "32-true" else 0.05  # of gradients in float16
    assert watch.monitors[0].noise_scale == pytest.approx(adaptive.batches.noise_scale, rel=rounding)
    assert trainer.callback_metrics["adabatch/noise_scale"].item() == pytest.approx(watch.monitors[0].noise_scale)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def schedule_of(optimizer: Any, batches: AdaptiveBatch) -> ProgressLR:
    return ProgressLR(optimizer, adabatch.lr.cosine(), batches, total=adabatch.examples(4000))


@pytest.mark.parametrize("when", ["in mid-epoch", "after the last step", "at validation", "at the end of an epoch"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(when: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import Callback

    class Saver(Callback):
        def save(self, trainer: Any) -> None:
            if not (tmp_path / "run.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "run.ckpt")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            order = pl_module.order
            if (when == "in mid-epoch" and trainer.global_step == 5) or (
                when == "after the last step" and order.epoch == 1
            ):
                self.save(trainer)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if when == "at validation":
                self.save(trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if when == "at the end of an epoch":
                self.save(trainer)

    def run(name: str, *others: Any, epochs: int = 3, resume: str | None = None) -> Any:
        module = module_of(lambda module: AdamW(module.parameters(), lr=LR))
        module.order = GlobalOrder(Numbered(), seed=1)
        options: dict[str, Any] = {"limits": Limits(min=8, max=64), "lr_rule": "sqrt", "schedule": schedule_of}
        callback = callback_of(NormTest(eta=0.7), journal=tmp_path / f"{name}.jsonl", **options)
        trainer = trainer_of(callback, *others, max_epochs=epochs)
        validation = DataLoader(Numbered(8), batch_size=MICRO)
        trainer.fit(module, module.order, validation, ckpt_path=resume)
        return module, trainer, callback

    whole, trainer, _ = run("whole")
    run("resumed", Saver(), epochs=2)
    module, again, callback = run("resumed", resume=str(tmp_path / "run.ckpt"))
    assert again.global_step == trainer.global_step == callback.batches.consumed.steps
    assert again.current_epoch == trainer.current_epoch == 3
    assert torch.equal(weights(module), weights(whole))
    assert lines(tmp_path / "resumed.jsonl") == lines(tmp_path / "whole.jsonl")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches=4.*use 1"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5 is a share.*whole number of steps"),
        ({"val_check_interval": 0.25}, "val_check_interval=0.25 is a share"),
        ({"overfit_batches": 2}, r"overfit_batches=2.*GlobalOrder\(subset=\)"),
    ],
)
def test_settings_of_the_trainer_that_do_not_go_with_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(callback_of(Constant(16)), max_epochs=1, **options).fit(module_of(), loader())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FSDPStrategy", r"does not run on FSDPStrategy: use ModelParallelStrategy with fully_shard \(FSDP2\)"),
        ("DeepSpeedStrategy", r"does not run on DeepSpeedStrategy: .*adabatch.integrations.deepspeed.attach"),
        ("XLAStrategy", r"does not run on XLAStrategy: use one device, DDPStrategy or ModelParallelStrategy"),
    ],
)
def test_strategies_that_are_refused(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names: FSDP and DeepSpeed of Lightning run on CUDA only, and cannot be made here."""
    base = importlib.import_module("lightning.pytorch.strategies").Strategy
    trainer = trainer_of(callback_of(Constant(16)), max_epochs=1)
    monkeypatch.setattr(trainer.strategy, "__class__", type(name, (base,), {}))
    with pytest.raises(ValueError, match=words):
        trainer.callbacks[0].setup(trainer, None, "fit")


def test_modules_that_are_refused() -> None:
    module = module_of()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"optimizes by hand.*AdaptiveBatch in training_step"):
        trainer_of(callback_of(Constant(16)), max_epochs=1).fit(module, loader())
    with pytest.raises(ValueError, match=r"one loader of micro-batches or one GlobalOrder, got list"):
        trainer_of(callback_of(Constant(16)), max_epochs=1).fit(module_of(), [loader(), loader()])
    with pytest.raises(ValueError, match=r"chooses engine= from the trainer"):
        callback_of(Constant(16), engine=adabatch.EngineOptions())

    class Skips(type(module_of())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.raises(RuntimeError, match=r"training_step returned None"):
        trainer_of(callback_of(Constant(16)), max_epochs=1).fit(Skips(), loader())
    with pytest.raises(RuntimeError, match=r"there are no batches yet"):
        _ = callback_of(Constant(16)).batches


def test_accumulation_that_begins_in_a_later_epoch_is_refused() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    module, callback = module_of(), callback_of(Constant(4 * MICRO))
    trainer = trainer_of(callback, GradientAccumulationScheduler({1: 2}), max_epochs=2)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2.*no GradientAccumulationScheduler"):
        trainer.fit(module, loader())
    assert trainer.global_step == 16


def test_two_schedules_are_refused() -> None:
    callback = callback_of(
        Constant(4 * MICRO),
        schedule=lambda optimizer, batches: adabatch.ProgressLR(
            optimizer, adabatch.lr.cosine(), batches, total=adabatch.examples(256)
        ),
    )
    with pytest.raises(ValueError, match=r"returns a scheduler \(LambdaLR\), and the callback has a schedule="):
        trainer_of(callback, max_epochs=1).fit(module_of(by_adam), loader())
