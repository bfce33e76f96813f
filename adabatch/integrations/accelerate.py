"""Accelerate: an ``AdaptiveBatch`` around the results of ``accelerator.prepare``, on one process, DDP, FSDP2 or
DeepSpeed.

The accelerator keeps its precision, clipping, checkpoints and loaders. adabatch accumulates, so the accelerator's own
accumulation stays at 1, and ``accelerator.accumulate`` is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import checked
from adabatch.batch.criteria import Criterion
from adabatch.integrations.host_state import HostState
from adabatch.integrations.versions import require_version
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.engines.hosted import HostedEngine

OLDEST = "1.10"
"""The oldest release of Accelerate that was tried."""

require_version("accelerate", OLDEST)

from accelerate import Accelerator  # noqa: E402
from accelerate.data_loader import BatchSamplerShard  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402


@checked
def attach(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    criterion: Criterion,
    /,
    *,
    micro_batch_size: int,
    order: GlobalOrder | None = None,
    gradient_sync: GradientSync | None = None,
    **options: Any,
) -> AdaptiveBatch:
    """An ``AdaptiveBatch`` around the results of ``accelerator.prepare``.

        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        batches = attach(accelerator, model, optimizer, NormTest(eta=0.7), micro_batch_size=16,
                         limits=Limits(min=64, max=1024))
        for step in batches.steps(loader):
            for x, y in step:
                step.backward(loss_fn(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    The same loop runs on one process, DDP, FSDP2 (``fsdp_version=2``) and DeepSpeed. ``step.backward`` replaces
    ``accelerator.backward``. ``accelerator.sync_gradients`` is True in the last micro-batch of a step and after it. On
    DeepSpeed the engine steps when the inner loop ends, and ``optimizer.step()`` has no effect, as always with
    Accelerate.

    ``accelerator.save_state`` and ``load_state`` save and restore the batches, and the order if it is given. Build a
    ``ProgressLR`` from ``batches.optimizer`` after this call, do not prepare it, and pass it to
    ``accelerator.register_for_checkpointing``.

    Args:
        accelerator: an accelerator with ``gradient_accumulation_steps=1``.
        model: the model, as returned by ``prepare``.
        optimizer: the optimizer, as returned by ``prepare`` or before; a list for several.
        criterion: which batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank: the ``batch_size`` of the loader that was
            passed to ``prepare`` (with ``split_batches`` or ``dispatch_batches``, a rank's share of it).
        order: the ``GlobalOrder`` from which the loop takes its data, if any, so that its place is saved.
        gradient_sync: as in ``EngineOptions``, for FSDP2.
        options: all other arguments of ``AdaptiveBatch``, except ``engine`` and ``local_sgd``. The accelerator's
            ``scaler`` is used if it has one.

    Raises:
        ValueError: if the accelerator accumulates, if its kind of parallelism is not one of the four, if a prepared
            loader would lose examples, and for the reasons of ``AdaptiveBatch``.
        TypeError: if ``accelerator`` is not an ``Accelerator``.
    """
    _check_accelerator(accelerator)
    for name in ("engine", "local_sgd"):
        if options.get(name) is not None:
            raise ValueError(f"attach chooses {name}= from the accelerator: leave it out")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        batches = _on_deepspeed(accelerator, criterion, micro_batch_size, options)
    else:
        inner = engine_for(model, gradient_sync, accelerator.scaler)
        batches = AdaptiveBatch(
            model,
            _without_wrapper(optimizer),
            criterion,
            micro_batch_size=micro_batch_size,
            engine=_hosted(accelerator, inner),
            **options,
        )
    accelerator.register_for_checkpointing(HostState(batches, order=order, scaled=accelerator.scaler is not None))
    return batches


class _Watch:
    """Tells an accelerator about the progress of a step, and detects other accumulation."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        # accumulate() counts its calls in it.
        self._counted = accelerator.step
        self._num_loaders = -1

    def synchronizes(self, last: bool) -> None:
        """Called before each micro-batch, with whether it is the last of its step."""
        if self._num_loaders != len(self._accelerator._dataloaders):  # those that were prepared since
            _check_loaders(self._accelerator)
            self._num_loaders = len(self._accelerator._dataloaders)
        self.check()
        self._accelerator.sync_gradients = last

    def check(self) -> None:
        """Checks that nothing else accumulates.

        Raises:
            RuntimeError: if ``accelerator.accumulate`` was entered, or accumulation was set.
        """
        if self._accelerator.step != self._counted:
            raise RuntimeError(
                "accelerator.accumulate(model) counts micro-batches by itself, and would step at others than "
                "adabatch: leave it out; `for batch in step` accumulates"
            )
        _check_accumulation(self._accelerator)


def _hosted(accelerator: Any, inner: Engine, *, update: Any = None) -> Engine:
    watch = _Watch(accelerator)

    def ended() -> None:
        watch.check()
        if update is not None:
            update()

    return HostedEngine(inner, synchronizes=watch.synchronizes, ended=ended)


def _on_deepspeed(
    accelerator: Any, criterion: Criterion, micro_batch_size: int, options: dict[str, Any]
) -> AdaptiveBatch:
    # Here and not at the head, because DeepSpeed need not be installed.
    from adabatch.integrations.deepspeed import attached

    if accelerator.deepspeed_engine_wrapped is None:
        raise ValueError("the accelerator runs DeepSpeed, and has no engine yet: call accelerator.prepare first")
    engine = accelerator.deepspeed_engine_wrapped.engine
    return attached(
        engine,
        criterion,
        micro_batch_size,
        options,
        around=lambda inner: _hosted(accelerator, inner, update=engine.step),
    )


def _without_wrapper(optimizer: Any) -> Any:
    if isinstance(optimizer, list | tuple):
        return [_without_wrapper(one) for one in optimizer]
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_accelerator(accelerator: Accelerator) -> None:
    _check_accumulation(accelerator)
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "the accelerator shards by FullyShardedDataParallel, whose gradients cannot be measured: use "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    # MULTI_GPU, MULTI_CPU and the like are DDP on one kind of device each.
    known = kind.value in ("NO", "FSDP", "DEEPSPEED") or kind.value.startswith("MULTI_")
    if not known or _asked(accelerator, "tp_enabled", "cp_enabled", "sp_enabled"):
        raise ValueError(
            f"attach runs on one process, DDP, FSDP2 and DeepSpeed, and this accelerator runs {kind.value} with other "
            f"parallelism than over the data: leave out Megatron-LM, XLA, and tensor, context or sequence parallelism"
        )
    _check_loaders(accelerator)


def _asked(accelerator: Any, *names: str) -> bool:
    config = getattr(accelerator, "parallelism_config", None)  # not in older releases
    return config is not None and any(bool(getattr(config, name, False)) for name in names)


def _check_accumulation(accelerator: Any) -> None:
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, by which it "
            f"would divide losses and skip updates: use 1, adabatch accumulates by the plan"
        )


def _check_loaders(accelerator: Any) -> None:
    """Checks that no prepared loader skips batches of varying size."""
    # BatchSamplerShard distributes whole batches to the ranks, and yields a round of them only if the last one has
    # `batch_size` examples. Growing batches never have: in a trial 24 of 48 examples were yielded, without any message.
    for loader in accelerator._dataloaders:
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(shard, BatchSamplerShard):
            continue
        sampler = shard.batch_sampler
        if type(sampler) is BatchSampler or getattr(sampler, "batch_size", None) is None:
            continue
        raise ValueError(
            f"accelerator.prepare shards the batches of {type(sampler).__name__}, and would silently leave out those "
            f"that do not hold its batch_size={sampler.batch_size} examples: set its batch_size to None, or take "
            f"the data from adabatch.GlobalOrder(dataset), which is not prepared"
        )
