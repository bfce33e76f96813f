"""The engines that can run a job: how they hold model and optimizer, make an update, and save themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.options import EngineOptions
from adabatch.checkpointing.checkpoints import Checkpoints, Loaded
from adabatch.cli.optimizers import MakeOptimizer, is_second_order, optimizer_of
from adabatch.runtime.launch.world import World

EngineName = Literal["ddp", "fsdp2", "deepspeed"]
"""The engine that averages gradients over the processes of a job."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Saving(Protocol):
    """The methods of checkpoints that a job uses."""

    def load(self, *, missing_ok: bool | None = None) -> Loaded | None:
        """Loads the newest checkpoint."""
        ...

    def start_over(self) -> None:
        """Begins a new run, whatever is in the folder."""
        ...

    def step(self, *, now: bool = False) -> bool:
        """Saves if a checkpoint is due."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class JobEngine(NamedTuple):
    """A model and its optimizer on an engine.

    Args:
        model: as the engine holds it.
        forward: inputs -> outputs.
        optimizer: a schedule writes its learning rates.
        batches: criterion and options -> the ``AdaptiveBatch`` around it.
        update: called after a step's micro-batches.
        checkpoints: folder and parts -> the object that saves them.
        runs_alone: whether a rank can run a micro-batch without the others.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: Optimizer
    batches: Callable[..., AdaptiveBatch]
    update: Callable[[], None]
    checkpoints: Callable[..., Saving]
    runs_alone: bool = False


def job_engine(
    name: EngineName,
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    world: World,
    *,
    config: Path | None,
    options: EngineOptions,
    micro_batch_size: int,
    averages: bool = True,
) -> JobEngine:
    """A model on the engine that a job names.

    Args:
        name: the engine.
        model: on its device.
        make_optimizer: parameters, and for K-FAC the model, -> optimizer.
        world: the processes.
        config: the JSON file of DeepSpeed.
        options: of the others.
        micro_batch_size: that of DeepSpeed, if its config does not contain one.
        averages: False if local SGD averages, and the engine does not wrap the model.

    Raises:
        ValueError: if a config is given for an engine without one, or missing for DeepSpeed, or DeepSpeed refuses it.
        ImportError: if DeepSpeed is not installed.
        FileNotFoundError: if the config does not exist.
    """
    # "ddp" is the default, and without averages simply means the model as it is
    if name != "ddp" and not averages:
        raise ValueError(f"local_sgd trains a plain model on each process, got engine: {name}: leave one of them out")
    if name == "deepspeed":
        if options != EngineOptions():
            raise ValueError("engine_options is for ddp and fsdp2; deepspeed has them in its own config: leave it out")
        return _deepspeed(model, make_optimizer, world, config, micro_batch_size)
    if config is not None:
        raise ValueError(f"engine_config={config} is for engine: deepspeed; {name} has none: leave it out")
    if world.size > 1 and averages:
        wrapped = DistributedDataParallel(model) if name == "ddp" else fully_shard(model)
        assert isinstance(wrapped, nn.Module)
        model = wrapped
    # after the wrapper, because fully_shard replaces the parameters
    optimizer = optimizer_of(make_optimizer, model, averages=averages)

    scaler = options.scaler

    def update() -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        # here and not in the loop: an evaluation between two steps then needs no memory for gradients
        optimizer.zero_grad()

    return JobEngine(
        model=model,
        forward=model,
        optimizer=optimizer,
        batches=lambda criterion, **others: AdaptiveBatch(model, optimizer, criterion, engine=options, **others),
        update=update,
        checkpoints=lambda folder, **parts: Checkpoints(
            folder, model=model, optimizer=optimizer, scaler=scaler, **parts
        ),
        # in a forward of FSDP2 the ranks gather shards from each other
        runs_alone=name == "ddp" or world.size == 1,
    )


def _deepspeed(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    world: World,
    config: Path | None,
    micro_batch_size: int,
) -> JobEngine:
    if config is None:
        raise ValueError("engine: deepspeed needs engine_config, DeepSpeed's JSON file, such as launch/deepspeed.json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"engine_config={config} is not JSON: {error}") from error
    if is_second_order(make_optimizer):
        raise ValueError(
            "engine: deepspeed runs no second-order optimizer of a config, since ZeRO 1 to 3 leave it no layer's "
            "matrix: use engine: ddp or fsdp2 for K-FAC and Shampoo"
        )
    if world.launcher == "nobody" and not dist.is_initialized():
        raise ValueError("engine: deepspeed runs under a launcher: launch/deepspeed.sh, or deepspeed --num_gpus 1")
    import deepspeed  # type: ignore[import-untyped]

    from adabatch.integrations.deepspeed import attach
    from adabatch.integrations.deepspeed_checkpoints import DeepSpeedCheckpoints

    # On a CPU, DeepSpeed first compiles an operator that only inference uses. This takes a minute and a half, under a
    # lock that blocks all other processes forever if this process is killed in the meantime.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed needs one of the three, and computes the others
    if not any(key in settings for key in BATCH_KEYS):
        settings["train_micro_batch_size_per_gpu"] = micro_batch_size
    engine = deepspeed.initialize(model=model, optimizer=optimizer_of(make_optimizer, model), config=settings)[0]
    precision = next(engine.module.parameters()).dtype

    def forward(inputs: Tensor) -> Tensor:
        # The loss is computed in float32, as autocast would do.
        outputs: Tensor = engine(inputs.to(precision) if inputs.is_floating_point() else inputs).float()
        return outputs

    def checkpoints(folder: Path, *, local_sgd: None, config: object, background: bool, **parts: Any) -> Saving:
        # DeepSpeed writes synchronously unless its own config says otherwise, and does not compare configs.
        return DeepSpeedCheckpoints(folder, engine=engine, **parts)

    return JobEngine(
        model=engine,
        forward=forward,
        optimizer=engine.basic_optimizer,
        batches=lambda criterion, **options: attach(engine, criterion, **options),
        update=engine.step,
        checkpoints=checkpoints,
    )
