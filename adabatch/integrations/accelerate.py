"""Accelerate: an ``AdaptiveBatch`` around what ``accelerator.prepare`` made, on one process, DDP, FSDP2 or DeepSpeed.

The accelerator keeps its precision, its clipping, its checkpoints and its loaders. Accumulation is ours, so its own
stays at 1 and ``accelerator.accumulate`` is left out.
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
from adabatch.integrations.versions import require
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.engines.hosted import HostedEngine

OLDEST = "1.10"
"""The oldest release of Accelerate that was tried."""

require("accelerate", OLDEST)

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
    """An ``AdaptiveBatch`` around what ``accelerator.prepare`` returned.

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

    The same loop runs on one process, DDP, FSDP2 (``fsdp_version=2``) and DeepSpeed. ``step.backward`` takes the place
    of ``accelerator.backward``. ``accelerator.sync_gradients`` is True in the last micro-batch of a step and after it.
    On DeepSpeed the engine steps when the inner loop ends, and ``optimizer.step()`` has no effect, as always with
    Accelerate.

    ``accelerator.save_state`` and ``load_state`` save and restore the batches, and the order if it is given. A
    ``ProgressLR`` is built from ``batches.optimizer`` after this call, is not prepared, and is given to
    ``accelerator.register_for_checkpointing``.

    Args:
        accelerator: with ``gradient_accumulation_steps=1``.
        model: as ``prepare`` returned it.
        optimizer: as ``prepare`` returned it, or as it was before; several in a list.
        criterion: which batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank: the ``batch_size`` of the loader that was
            given to ``prepare`` (with ``split_batches`` or ``dispatch_batches`` a rank's share of it).
        order: a ``GlobalOrder`` that the loop takes its data from, if it does, so that its place is saved.
        gradient_sync: as in ``EngineOptions``, for FSDP2.
        options: everything else that ``AdaptiveBatch`` takes, but for ``engine`` and ``local_sgd``. The accelerator's
            ``scaler`` is used if it has one.

    Raises:
        ValueError: if the accelerator accumulates, if its kind of parallelism is none of the four, if a prepared
            loader would lose examples, or as ``AdaptiveBatch`` raises it.
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
    """Says to an accelerator where a step stands, and notices what would count beside it."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._counted = accelerator.step
        self._num_loaders = -1

    def synchronizes(self, last: bool) -> None:
        """The next micro-batch is the last of its step, or not."""
        if self._num_loaders != len(self._accelerator._dataloaders):  # those that were prepared since
            _check_loaders(self._accelerator)
            self._num_loaders = len(self._accelerator._dataloaders)
        self.check()
        self._accelerator.sync_gradients = last

    def check(self) -> None:
        """That nobody else accumulates.

        Raises:
            RuntimeError: ``accelerator.accumulate`` was entered, or accumulation was set.
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
    from adabatch.integrations.deepspeed import AttachedEngine, check_engine, check_options

    if accelerator.deepspeed_engine_wrapped is None:
        raise ValueError("the accelerator runs DeepSpeed, and has no engine yet: call accelerator.prepare first")
    engine = accelerator.deepspeed_engine_wrapped.engine
    check_engine(engine)
    check_options(engine, options)
    return AdaptiveBatch(
        engine.module,
        engine.basic_optimizer,
        criterion,
        micro_batch_size=micro_batch_size,
        engine=_hosted(accelerator, AttachedEngine(engine), update=engine.step),
        **options,
    )


def _without_wrapper(optimizer: Any) -> Any:
    if isinstance(optimizer, list | tuple):
        return [_without_wrapper(one) for one in optimizer]
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_accelerator(accelerator: Any) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"attach takes an accelerate.Accelerator first, got {type(accelerator).__name__}")
    _check_accumulation(accelerator)
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "the accelerator shards by FullyShardedDataParallel, whose gradients cannot be measured: use "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
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
    """That no prepared loader leaves out batches of other sizes than the first.

    ``BatchSamplerShard`` deals whole batches to the ranks, and hands a round of them out if the last has ``batch_size``
    examples. Batches that grow never have: 24 of 48 examples were served in a trial, without a word.
    """
    for loader in accelerator._dataloaders:
        shard = getattr(loader, "batch_sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(shard, BatchSamplerShard):
            continue
        sampler = shard.batch_sampler
        if type(sampler) is BatchSampler or getattr(sampler, "batch_size", None) is None:
            continue
        raise ValueError(
            f"accelerator.prepare shards the batches of {type(sampler).__name__}, and would leave out, without a word, "
            f"those that do not hold its batch_size={sampler.batch_size} examples: set its batch_size to None, or take "
            f"the data from adabatch.GlobalOrder(dataset), which is not prepared"
        )
