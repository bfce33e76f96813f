"""``integrations.transformers``: what cannot be right is refused, by name and with the way out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.causal_lm import Sentences, llama, training_arguments
from support.hosts import environment_kept, needs
from support.trainers import adaptive, fresh_state, grown, mixed

import adabatch

needs("transformers", "accelerate")

os.environ["HF_HUB_OFFLINE"] = "1"
environment = pytest.fixture(autouse=True)(environment_kept)
fresh = pytest.fixture(autouse=True)(fresh_state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "use 1, and min_batch_size"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size changes the micro-batch"),
        ({"optim": "adalomo"}, "use adamw_torch"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "use one of constant"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "use one of constant"),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}}, "set max_steps"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 3, "warmup_type": "cosine"},
                "max_steps": 9,
            },
            "no warmup_type but linear",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}, "use 0.5"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "one of min_lr and min_lr_rate"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"last_epoch": 3}}, "leave out last_epoch"),
        ({"train_sampling_strategy": "group_by_length"}, "'random' or 'sequential'"),
    ],
)
def test_arguments_that_cannot_be_right(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grown(tmp_path, **options).train()


def _several_gpus(trainer: Any) -> None:
    trainer.args._n_gpu = 2


def _tensor_parallel(trainer: Any) -> None:
    trainer.accelerator.state.parallelism_config = SimpleNamespace(
        tp_size=2, cp_size=1, sp_size=1, tp_enabled=True, non_data_parallel_size=2
    )


def _context_parallel(trainer: Any) -> None:
    trainer.accelerator.state.parallelism_config = SimpleNamespace(
        tp_size=1, cp_size=2, sp_size=1, tp_enabled=False, non_data_parallel_size=2
    )


def _first_fsdp(trainer: Any) -> None:
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)


def _scheduler_of_deepspeed(trainer: Any) -> None:
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={"scheduler": {"type": "WarmupLR"}})


def _sharded_at_load(trainer: Any) -> None:
    trainer.is_distributed_loading_by_transformers = True


def _checkpoint_in_a_step(trainer: Any) -> None:
    trainer.args.enable_jit_checkpoint = True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_several_gpus, "one process per GPU with torchrun"),
        (_tensor_parallel, "use data parallelism"),
        (_context_parallel, "use data parallelism"),
        (_first_fsdp, '"version": 2 in fsdp_config'),
        (_scheduler_of_deepspeed, "leave `scheduler` out of it"),
        (_sharded_at_load, "from_pretrained without distributed_config"),
        (_checkpoint_in_a_step, "save from on_step_end"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_places_of_a_run_that_need_several_devices(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    """They are set by hand in a trainer on one CPU, as the Trainer and Accelerate set them."""
    trainer = grown(tmp_path)
    change(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_a_model_over_several_devices(tmp_path: Path) -> None:
    model = llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="as a pipeline; use FSDP2 or DeepSpeed"):
        grown(tmp_path, model=model)


def test_a_schedule_that_counts_steps(tmp_path: Path) -> None:
    from adabatch.integrations.transformers import AdaptiveTrainer

    def trained(**options: Any) -> Any:
        model = llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = AdaptiveTrainer(
            model, training_arguments(tmp_path, **options), train_dataset=Sentences(), optimizers=(optimizer, schedule),
            adaptive=adaptive(criterion="constant", min_batch_size=8),
        )  # fmt: skip
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match=r"LambdaLR that the Trainer was given counts steps.*set max_steps"):
        trained(num_train_epochs=1)
    rates = [entry["learning_rate"] for entry in trained(max_steps=3).state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_a_schedule_behind_the_mixin_and_one_in_front(tmp_path: Path) -> None:
    from transformers import Trainer

    class Behind(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            raise AssertionError("left out")

    with pytest.raises(ValueError, match="Behind makes a schedule in a create_scheduler of its own"):
        grown(tmp_path, base=Behind)

    class InFront(mixed(Behind)):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = self.progress_lr(adabatch.lr.linear(floor=0.5))
            return self.lr_scheduler

    trainer = InFront(
        llama(), training_arguments(tmp_path, max_steps=4), train_dataset=Sentences(),
        adaptive=adaptive(criterion="constant", min_batch_size=8),
    )  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.1, 0.0875, 0.075, 0.0625])


def test_a_batch_sampler_that_packs(tmp_path: Path) -> None:
    from transformers import Trainer

    class Packs(torch.utils.data.BatchSampler):
        pass

    class Packed(Trainer):
        def get_train_dataloader(self) -> Any:
            order = torch.utils.data.RandomSampler(self.train_dataset)
            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=Packs(order, 4, drop_last=False))

    with pytest.raises(ValueError, match="Packs orders the examples in batches of one size"):
        grown(tmp_path, base=Packed).train()


def test_data_that_is_only_iterable(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from (Sentences()[index] for index in range(8))

    with pytest.raises(ValueError, match="only iterable"):
        grown(tmp_path, data=Stream(), max_steps=2).train()


def test_a_trainer_without_its_arguments(tmp_path: Path) -> None:
    from adabatch.integrations.transformers import AdaptiveTrainer

    with pytest.raises(TypeError, match="needs adaptive=AdaptiveArguments"):
        AdaptiveTrainer(llama(), training_arguments(tmp_path), train_dataset=Sentences())


def test_a_checkpoint_of_a_later_version(tmp_path: Path) -> None:
    state = importlib.import_module("adabatch.integrations.transformers_state")
    torch.save({"format": state.STATE_FORMAT + 1}, tmp_path / state.STATE_FILE)
    with pytest.raises(ValueError, match="this version reads up to 1: upgrade adabatch"):
        state.saved_state(str(tmp_path))
