"""Checks before a run with the Trainer of Transformers; each error names what to change."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


def refuse_arguments(trainer: Any) -> None:
    """Refuses arguments with which the run would be wrong.

    Args:
        trainer: a trainer with ``AdaptiveMixin``.

    Raises:
        ValueError: if there are any; says what to do.
    """
    for reason, holds in _refusals(trainer).items():
        if holds:
            raise ValueError(f"adabatch cannot run in this {type(trainer).__name__}: {reason}")


def _base_with_a_schedule(trainer: Any) -> str | None:
    """The class behind the mixin that overrides the Trainer's ``create_scheduler``, if one does."""
    order: tuple[type, ...] = type(trainer).__mro__
    # By its name, because the module of the mixin imports this one.
    mixin = next(index for index, each in enumerate(order) if each.__name__ == "AdaptiveMixin")
    owner = next(each for each in order[mixin + 1 :] if "create_scheduler" in vars(each))
    in_front = any("create_scheduler" in vars(each) for each in order[:mixin])
    return None if in_front or owner is Trainer else owner.__name__


def _refusals(trainer: Any) -> dict[str, bool]:
    """Reasons why a run would be wrong, and whether each applies."""
    args, adaptive = trainer.args, trainer.adaptive
    by_threads = {
        "torch.nn.DataParallel splits each micro-batch over the GPUs of one process; start one process per GPU with "
        "torchrun, or show one GPU with CUDA_VISIBLE_DEVICES": args.n_gpu > 1,
    }
    if adaptive.monitor_only:
        return by_threads
    config = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = [getattr(config, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")]
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    loaded_in_shards = getattr(trainer, "is_distributed_loading_by_transformers", False)  # not in older releases
    lomo = str(getattr(args.optim, "value", args.optim))
    schedules = _base_with_a_schedule(trainer)
    return by_threads | {
        f"{schedules} makes a schedule in a create_scheduler of its own, which would be left out; override "
        f"create_scheduler in the class with AdaptiveMixin in front, and return self.progress_lr(shape)": (
            schedules is not None and not trainer.base_schedule_is_left_out
        ),
        f"gradient_accumulation_steps={args.gradient_accumulation_steps} would make windows of its own; use 1, and "
        f"min_batch_size, adabatch accumulates by the plan": args.gradient_accumulation_steps != 1,
        "auto_find_batch_size changes the micro-batch in the middle of a run; leave it out, and set "
        "per_device_train_batch_size (larger ones can be tried with max_micro_batch_size)": args.auto_find_batch_size,
        "tensor, context and sequence parallelism give several ranks the same examples; use data parallelism (DDP, "
        "FSDP2 or DeepSpeed)": max(sizes) > 1 or trainer.get_tp_size() > 1,
        "its model is spread over several devices of one process (device_map), as a pipeline; use FSDP2 or DeepSpeed "
        "ZeRO 3": bool(getattr(trainer, "is_model_parallel", False)),
        'FSDP1 does not show the gradients of a rank; set "version": 2 in fsdp_config': (
            plugin is not None and getattr(plugin, "fsdp_version", 1) != 2
        ),
        "its model was sharded while it was loaded, which has not been tested; use from_pretrained without "
        "distributed_config, and fsdp or deepspeed of the TrainingArguments": loaded_in_shards,
        "enable_jit_checkpoint would save in the middle of a step; set control.should_save and should_training_stop "
        "in a callback of your own, and so save from on_step_end": getattr(args, "enable_jit_checkpoint", False),
        "the scheduler of DeepSpeed's JSON counts steps; leave `scheduler` out of it, and set lr_scheduler_type": (
            deepspeed is not None and "scheduler" in deepspeed.config
        ),
        f"optim={lomo!r} updates weights inside the backward of each micro-batch; use adamw_torch": (
            "lomo" in lomo or "layerwise" in lomo
        ),
        "it generates its data for a fixed number of micro-batches (steps_per_generation), and a step that takes more "
        "would train on rollouts of older weights; train with a constant batch, and monitor_only=True": hasattr(
            args, "steps_per_generation"
        ),
    }
