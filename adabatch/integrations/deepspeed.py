"""DeepSpeed: an ``AdaptiveBatch`` around an engine of ``deepspeed.initialize``, with ZeRO 0, 1, 2 or 3.

The engine keeps its JSON config, precision, clipping, schedulers and checkpoints. adabatch controls the batch size, the
accumulation and the batch factor on the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack, final

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]
from torch import Tensor
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.options import Measure
from adabatch.arguments import checked
from adabatch.batch.criteria import Criterion
from adabatch.batch.plan import BatchPlan
from adabatch.lr.follow import Followers
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.optimizers.traits import ChecksRanks, NeedsWholeGradients
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.wrappers.backward import Backward

HELD = ("bit16_groups", "fp16_groups", "bf16_groups")
"""Attributes of DeepSpeed's optimizers that list the model's parameters. The optimizer inside holds copies of them."""


@checked
def attach(
    engine: DeepSpeedEngine, criterion: Criterion, /, *, micro_batch_size: int | None = None, **options: Any
) -> AdaptiveBatch:
    """An ``AdaptiveBatch`` around a DeepSpeed engine.

        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=AdamW(model.parameters()), config=...)
        batches = attach(engine, NormTest(eta=0.5), limits=Limits(min=64, max=4096), lr_rule="sqrt")
        for step in batches.steps(loader):
            for x, y in step:
                step.backward(loss_fn(engine(x), y))
            engine.step()

    Each ``engine.step()`` is an update, whatever the engine's own count of micro-batches. The engine's batch size
    starts at that of the config, and then follows the plan. A step's loss, moments and decision are available after
    ``engine.step()``. An update that the engine skips because float16 gradients overflow consumes its data, but changes
    neither the progress of the learning rate nor the averages.

    Save with the engine: ``engine.save_checkpoint(folder, client_state={"batches": batches.state_dict()})``, and load
    with ``_, state = engine.load_checkpoint(folder)`` and ``batches.load_state_dict(state["batches"])``.

    Args:
        engine: as ``deepspeed.initialize`` returned it, with an optimizer.
        criterion: which batch size to ask for.
        micro_batch_size: examples in one forward and backward on one rank; by default the engine's.
        options: all other arguments of ``AdaptiveBatch``, except ``probe``, ``engine`` and ``local_sgd``.
            ``Measure(l1=, layers=)`` needs ZeRO 0, because the other stages reveal only the norm of a step's gradient.

    Raises:
        ValueError: for the reasons of ``AdaptiveBatch``; and if the gradients of the engine cannot be measured: with
            pipeline, tensor, sequence or expert parallelism, DeepCompile, ZenFlow, optimizers that compress gradients
            or use orthogonal updates, or ``compute_grad_norm: false``.
        TypeError: if it is not an engine, or has no optimizer.
    """
    return attached(engine, criterion, micro_batch_size, options)


def attached(
    engine: Any,
    criterion: Criterion,
    micro_batch_size: int | None,
    options: dict[str, Any],
    *,
    around: Callable[[Engine], Engine] = lambda inner: inner,
) -> AdaptiveBatch:
    """What ``attach`` returns; ``around`` is the engine of a host around DeepSpeed."""
    check_engine(engine)
    check_options(engine, options)
    return AdaptiveBatch(
        engine.module,
        engine.basic_optimizer,
        criterion,
        micro_batch_size=engine.train_micro_batch_size_per_gpu() if micro_batch_size is None else micro_batch_size,
        engine=around(AttachedEngine(engine)),
        **options,
    )


@final
class AttachedEngine(Engine):
    """A DeepSpeed engine as an ``Engine`` of ``AdaptiveBatch``."""

    runs_alone = False
    holds_gradients = False  # the engine clears, clips and keeps them itself

    def __init__(self, engine: DeepSpeedEngine) -> None:
        ranks = Collectives(*([dist.group.WORLD] if dist.group.WORLD else []), device=engine.device)
        super().__init__(engine.module, ranks, Backward(self._backward, self._scale_on))
        self._engine = engine
        self._scale = torch.ones(())
        self._began = 0
        self._manages = manages_accumulation(engine)
        if self._manages:
            # A step of one micro-batch never enters no_sync(), which closes the window at its end.
            engine.set_gradient_accumulation_boundary(True)
        self._whole = engine.zero_optimization_stage() == 0
        # With ZeRO 0 the mean gradient is in the parameters after the backward, not yet clipped. The other stages
        # partition it, and show its norm only when they step.
        self.reduced = "backward" if self._whole and self._manages else "update"
        self.shards = engine.zero_optimization_stage() == 3

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        """The model's parameters, of which the optimizer may hold copies or shards."""
        held = {id(p) for p in trained_parameters(self._engine)}
        return [p for p in self.model.parameters() if id(p) in held]

    def begin(self, plan: BatchPlan) -> None:
        """Tells the engine the size of the batch."""
        self._began = self._engine.global_steps
        # The micro-batch first: from it and the batch, the engine computes its accumulation steps, and refuses a
        # remainder.
        self._engine.set_train_micro_batch_size(plan.micro_batch_size)
        self._engine.set_train_batch_size(plan.global_batch_size)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Keeps the window of accumulation open."""
        return self._within_window() if self._manages else nullcontext()

    def switched_off(self, *, last: bool) -> str | None:
        """The window of accumulation, which the user's loop may have left open."""
        on = not last or not self._manages or self._engine.is_gradient_accumulation_boundary()
        return None if on else "set_gradient_accumulation_boundary(False) is in force at the last micro-batch"

    def left_out(self) -> bool:
        """Whether ``engine.step()`` was called without a step of the optimizer."""
        # The engine counts a step whose update it skips, too.
        return bool(self._engine.global_steps > self._began)

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """``MicroBatchProbe``, which with ZeRO 1 to 3 takes the norm of the step's gradient from the engine."""
        if self._whole:
            return MicroBatchProbe(parameters, collectives=self.collectives, **options)
        return MicroBatchProbe(parameters, grad_sq=self._grad_sq, **options)

    @contextmanager
    def _within_window(self) -> Iterator[None]:
        """A context for a micro-batch that does not end the window of accumulation."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def _backward(self, loss: Tensor) -> None:
        # The gradient of the loss that is passed to the engine equals the factor by which the engine scales it, in
        # every precision. It is read now, because the engine may change the factor before the update.
        hook = loss.register_hook(self._note_scale) if loss.requires_grad else None  # type: ignore[no-untyped-call]
        try:
            # Not divided by the engine's accumulation steps: the step has weighted the loss already.
            self._engine.backward(loss, scale_wrt_gas=False)
        finally:
            if hook is not None:
                hook.remove()

    def _note_scale(self, grad: Tensor) -> None:
        self._scale = grad.detach().double()

    def _scale_on(self, device: torch.device) -> Tensor:
        return self._scale.to(device)

    def _grad_sq(self) -> Tensor:
        """The squared norm by which the engine is about to clip, multiplied by the loss scale again; shape ()."""
        norm = torch.as_tensor(self._engine.optimizer._global_grad_norm, dtype=torch.float64, device=self._scale.device)
        return (norm * self._scale).square()


def manages_accumulation(engine: DeepSpeedEngine) -> bool:
    """Whether the engine counts micro-batches itself: the default, and the only mode of releases before 0.19.6."""
    managed: Callable[[], bool] | None = getattr(engine, "managed_gradient_accumulation", None)
    return managed is None or managed()


def trained_parameters(engine: DeepSpeedEngine) -> list[Tensor]:
    """The model's parameters that the engine trains."""
    for name in HELD:
        groups = getattr(engine.optimizer, name, None)
        if groups:
            return [parameter for group in groups for parameter in group]
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def check_engine(engine: Any) -> None:
    """Checks that the gradients of an engine can be measured.

    Raises:
        ValueError, TypeError: as ``attach`` does.
    """
    if getattr(engine, "basic_optimizer", None) is None:
        raise TypeError("the engine has no optimizer: give one to deepspeed.initialize, or to its config")
    for name, refused in _refusals(engine).items():
        if refused:
            raise ValueError(f"adabatch cannot run on this DeepSpeed engine: {name}")


def _refusals(engine: Any) -> dict[str, bool]:
    """Reasons why an engine's gradients cannot be measured, and whether each applies."""
    stage, half = engine.zero_optimization_stage(), engine.fp16_enabled() or engine.bfloat16_enabled()
    late = stage == 0 and not manages_accumulation(engine)
    return {
        "PipelineEngine.train_batch runs the micro-batches, the reduction and the update of a batch in one call, so "
        "that nothing can be measured between them; use data parallelism": engine.pipeline_parallelism,
        "experts reduce their gradients over other ranks than the rest; use a model without MoE layers": bool(
            engine.has_moe_layers
        ),
        "its data-parallel ranks are not all ranks; use data parallelism without tensor or sequence parallelism": (
            engine.dp_world_size != dist.get_world_size()
        ),
        "DeepCompile reduces gradients inside compiled graphs; leave `compile` out of its config": _asked(
            engine, "is_deepcompile_enabled"
        ),
        "ZenFlow updates some parameters at other steps than the rest; leave `zenflow` out of its config": bool(
            getattr(engine, "zenflow", False)
        ),
        "its optimizer reduces compressed gradients itself; use one that leaves it to the engine": (
            not engine.enable_backward_allreduce
        ),
        "Muon puts its orthogonal update in the place of the gradient before the norm is taken; use another "
        "optimizer": type(engine.basic_optimizer).__name__.startswith("Muon"),
        "its optimizer needs whole gradients or layers, and ZeRO 1 to 3 give it flat pieces of them; use ZeRO 0, DDP "
        "or FSDP2": stage > 0 and isinstance(engine.basic_optimizer, NeedsWholeGradients),
        "K-FAC cannot share its factors among the ranks of an engine, and each rank would use its own examples only; "
        "use DDP or FSDP2": isinstance(engine.basic_optimizer, ChecksRanks) and engine.dp_world_size > 1,
        "it updates a part of the parameters by a second optimizer; leave `ratio` out of `offload_optimizer`": (
            getattr(engine.optimizer, "backup_optimizer", None) is not None
        ),
        "it keeps no gradient norm; leave `compute_grad_norm` out of `zero_optimization`": (
            stage > 0 and not getattr(engine, "zero_compute_grad_norm", lambda: True)()
        ),
        "ZeRO 0 without managed accumulation reduces and clips (or casts) the gradient in one go; use ZeRO 1, or "
        "gradient_clipping 0 and float32, or leave managed_gradient_accumulation out": late
        and (half or engine.gradient_clipping() > 0),
        "ZeRO 0 in float16 divides its gradients by a loss scale that no loss was multiplied by (DeepSpeed 0.19.8); "
        "use ZeRO 1": stage == 0 and engine.fp16_enabled(),
        "ZeRO 0 with torch_autocast in float16 unscales gradients in place; use ZeRO 1": bool(
            getattr(engine, "torch_autocast_z0_gradscaler", None)
        ),
    }


def _asked(engine: Any, question: str) -> bool:
    """The result of a method that returns a bool; False if an older release does not have it."""
    ask = getattr(engine, question, None)
    return ask is not None and bool(ask())


def check_options(engine: Any, options: dict[str, Any]) -> None:
    """Checks that options of ``AdaptiveBatch`` are possible with what the engine reveals of its gradients.

    Raises:
        ValueError: for the same reasons as ``attach``.
    """
    for name in ("probe", "engine", "local_sgd"):
        if options.get(name) is not None:
            way_out = ", or use DDP or FSDP2 for one of your own" if name == "probe" else ""
            raise ValueError(f"attach chooses {name}= from the DeepSpeed engine: leave it out{way_out}")
    measure = options.get("measure", Measure())
    for name in ("l1", "layers"):
        if getattr(measure, name) and engine.zero_optimization_stage() > 0:
            raise ValueError(
                f"Measure({name}=) needs the step's gradient itself, of which ZeRO "
                f"{engine.zero_optimization_stage()} shows the norm only: leave it out, or use ZeRO 0"
            )
    kind = type(engine.basic_optimizer)
    if "betas" in Followers.of(options.get("follow") or ()).settings and not kind.__module__.startswith("torch."):
        raise ValueError(
            f"follow='betas' needs the step counts of torch's own Adam, which {kind.__name__} of {kind.__module__} "
            f'keeps elsewhere: set "torch_adam": true in the config, give torch.optim.AdamW, or leave betas out'
        )
