"""What a person may ask of a run, tried on each engine: the cells of the table of docs/engines.md."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, GlobalOrder, Limits, NoiseScale, NormTest
from adabatch.optim.kfac import KFAC
from adabatch.optim.shampoo import Shampoo
from support.deepspeed_engines import engine_of
from support.loops import network, regression
from support.options import grouped

RANKED = ["DDP", "FSDP2", "ZeRO 0", "ZeRO 2", "ZeRO 3", "local SGD"]
"""The engines that run on several ranks."""

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Habit:
    """Something that is asked of a run.

    Args:
        criterion: which batch size to ask for.
        optimizer: model -> optimizer.
        probe: model -> probe of the user's own.
        options: of ``AdaptiveBatch``.
        steps: options of its ``steps``.
        loader: of micro-batches of 4, made on each rank.
    """

    criterion: Callable[[], Any] = lambda: NormTest(eta=0.5)
    optimizer: Callable[[nn.Module], Optimizer] = lambda model: SGD(model.parameters(), lr=0.02)
    probe: Callable[[nn.Module], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    loader: Callable[[], Any] = lambda: GlobalOrder(regression(256))


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def kfac(model: nn.Module) -> Optimizer:
    wrapped = isinstance(model, DistributedDataParallel | FSDPModule)
    spread = adabatch.across_ranks(model) if wrapped else {}
    return KFAC(model.parameters(), model, likelihood="gaussian", **spread)


def own_loader() -> DataLoader[Any]:
    """Of examples that no other rank has."""
    return DataLoader(regression(256, seed=dist.get_rank() if dist.is_initialized() else 0), batch_size=4)


HABITS = {
    "`NormTest`, `NoiseScale()`": Habit(),
    "`Goodput`": Habit(criterion=adabatch.Goodput),
    '`NoiseScale(norm="adam")`': Habit(criterion=partial(NoiseScale, norm="adam"), optimizer=adamw),
    '`NoiseScale(norm="sign")`': Habit(criterion=partial(NoiseScale, norm="sign")),
    "`CoordinateNormTest`": Habit(criterion=partial(adabatch.batch.CoordinateNormTest, eta=0.7, quantile=0.5)),
    "exact tests: `PerExampleProbe`": Habit(
        criterion=partial(adabatch.batch.InnerProductTest, theta=0.9),
        probe=lambda model: adabatch.PerExampleProbe(model, products=True),
    ),
    "`CommHookProbe`": Habit(probe=adabatch.probes.CommHookProbe),
    "a micro-batch that grows": Habit(options={"max_micro_batch_size": 32}),
    "a loader of your own": Habit(loader=own_loader),
    "`steps(weigh=)`": Habit(steps={"weigh": lambda batch: len(batch[0]) + 1}),
    '`lr_rule="gain"`, a shape of `ProgressLR`': Habit(options={"lr_rule": "gain"}),
    "`follow=`": Habit(optimizer=adamw, options={"lr_rule": "sqrt", "follow": ("betas", "eps", "weight_decay")}),
    "`Measure(l1=)`": Habit(options={"record_l1": True}),
    "`Measure(layers=)`": Habit(options={"per_layer": "module"}),
    "`EngineOptions(scaler=)`, float16": Habit(options={"scaler": torch.amp.GradScaler("cpu")}),
    "`AdaGradNorm`": Habit(optimizer=lambda model: adabatch.optim.AdaGradNorm(model.parameters())),
    "`Shampoo`": Habit(optimizer=lambda model: Shampoo(model.parameters(), 0.01)),
    "`KFAC`": Habit(optimizer=kfac),
    "`Guard(check_every=)`": Habit(options={"check_every": 1}),
}


def tried(engine: str, habit: Habit) -> str:
    """ "yes" if a run on the engine trains and measures as the habit asks, else what it was refused with."""
    with ExitStack() as stack:
        try:
            return _run(engine, habit, stack)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def _run(engine: str, habit: Habit, stack: ExitStack) -> str:
    model: Any = network()
    options = {"micro_batch_size": 4, "limits": Limits(min=16, max=64), **habit.options}
    if engine.startswith("ZeRO"):
        from adabatch.integrations.deepspeed import attach

        # The optimizer is made from the model as it is.
        model = engine_of(int(engine[-1]), lambda _: habit.optimizer(model), model=model)
        optimizer = model.basic_optimizer
        if habit.probe is not None:
            options["probe"] = habit.probe(model.module)
        batches = attach(model, habit.criterion(), **grouped(options))
        update: Callable[[], None] = model.step
    else:
        if engine == "DDP":
            model = DistributedDataParallel(model)
        elif engine == "FSDP2":
            model = fully_shard(model)
        optimizer = habit.optimizer(model)
        if engine == "local SGD":
            local = stack.enter_context(adabatch.LocalSGD(model, optimizer, sync_every=2))
            options["local_sgd"] = local
        if habit.probe is not None:
            options["probe"] = habit.probe(model)
        batches = AdaptiveBatch(model, optimizer, habit.criterion(), **grouped(options))
        scaler = habit.options.get("scaler")

        def update() -> None:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()

    stack.callback(batches.remove)
    schedule = adabatch.ProgressLR(optimizer, adabatch.lr.cosine(), batches, total=adabatch.steps(100))
    measured = 0
    for step in batches.steps(habit.loader(), until=adabatch.steps(STEPS), **habit.steps):
        for x, y in step:
            outputs = model(x)
            if isinstance(optimizer, KFAC):
                optimizer.observe(outputs)
            step.backward(functional.mse_loss(outputs, y))
        update()
        schedule.step()
        measured += step.moments is not None
    assert measured > 0, "nothing was measured"
    return "yes"
