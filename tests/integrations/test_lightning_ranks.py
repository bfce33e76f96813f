"""Lightning and Fabric on two gloo ranks: DDP and FSDP2, in one start of two processes."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import LR, MICRO, Numbered, awkward, check_awkward, loss_of, needs, rank_variables
from support.loops import network
from support.ports import free_port
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, Measure, NormTest

needs("lightning", "pytorch_lightning")

CLIP = 0.5
MONITOR = Measure(monitor=True)


def whole(model: nn.Module) -> list[float]:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    values: list[float] = torch.cat([p.detach().flatten() for p in full]).tolist()
    return values


def module_of(kind: Any, *, sharded: bool) -> Any:
    host = importlib.import_module("lightning.pytorch")

    class Lit(host.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.served: list[int] = []
            self.windows: list[int] = []

        def configure_model(self) -> None:
            if sharded:
                fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.windows.append(0)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.served += batch[2].tolist()
            self.windows[-1] += 1
            return loss_of(self.network, batch)

        def on_train_end(self) -> None:
            self.reached = whole(self.network)

        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=LR)

    return Lit()


def fit(
    criterion: Any, data: Any, *, kind: Any = SGD, sharded: bool = False, resume: Any = None, save: Any = None,
    accumulate: int = 1, max_steps: int = 10, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A fit on the ranks of this job, with the callback if there is a criterion."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from adabatch.integrations.lightning import AdaptiveBatchCallback

    module = module_of(kind, sharded=sharded)
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if sharded:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [] if criterion is None else [AdaptiveBatchCallback(criterion, micro_batch_size=MICRO, **options)]
    trainer = Trainer(
        callbacks=callbacks, strategy=strategy, accelerator="cpu", devices=2, max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=None if sharded else CLIP, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return {"weights": module.reached, "windows": module.windows, "served": module.served}


def in_fabric(sharded: bool) -> dict[str, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        return fully_shard(model, mesh=mesh["data_parallel"])

    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if sharded:
        strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(network()) if sharded else network()
    optimizer: Any = SGD(model.parameters(), lr=LR)
    if sharded:
        optimizer = fabric.setup_optimizers(optimizer)
    else:
        model, optimizer = fabric.setup(model, optimizer)
    batches = AdaptiveBatch(model, optimizer, awkward(2), micro_batch_size=MICRO, measure=MONITOR)
    windows, served = [], []
    for step in batches.steps(GlobalOrder(Numbered(), seed=0), until=adabatch.steps(10)):
        for batch in step:
            served += batch[2].tolist()
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        windows.append(len(step.portion.sizes))
    return {"weights": whole(model), "windows": windows, "served": served}


def on_ranks(rank: int, port: int, folder: str) -> dict[str, Any]:
    """All that needs two ranks."""
    warnings.simplefilter("ignore")
    rank_variables(rank, 2, port)
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # as under torchrun: processes are started by somebody else
    found: dict[str, Any] = {}
    for name, sharded in (("DDP", False), ("FSDP2", True)):
        order = GlobalOrder(Numbered(), seed=0)
        found[name] = fit(awkward(2), order, sharded=sharded, measure=MONITOR)
        order = GlobalOrder(Numbered(), seed=0)
        grows = {"max_micro_batch_size": 2 * MICRO}
        found[f"{name}, micro-batch grows"] = fit(awkward(2), order, sharded=sharded, **grows)
        found[f"{name}, Fabric"] = in_fabric(sharded)

        parts, saved = [], f"{folder}/{name}.ckpt"
        for until, resume, save in ((14, None, None), (6, None, saved), (14, saved, None)):
            options: dict[str, Any] = {"limits": Limits(min=16, max=64), "lr_rule": "sqrt", "kind": AdamW}
            options |= {"sharded": sharded, "max_steps": until, "resume": resume, "save": save}
            parts.append(fit(NormTest(eta=0.7), GlobalOrder(Numbered(), seed=0), **options))
        found[f"{name}, resumed"] = parts
    shares = DataLoader(Numbered(), batch_size=MICRO, shuffle=True)  # Lightning gives each rank its share
    torch.manual_seed(5)
    theirs = fit(None, shares, kind=AdamW, accumulate=4)
    torch.manual_seed(5)
    found["constant"] = fit(Constant(8 * MICRO), shares, kind=AdamW, measure=MONITOR)
    found["host alone"] = theirs
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    found = run_ranks(on_ranks, 2, tmp_path, free_port(), str(tmp_path), connect=False, timeout=200)
    for name, clip in (("DDP", CLIP), ("FSDP2", None)):
        check_awkward([rank[name] for rank in found], clip=clip)
        grown = [rank[f"{name}, micro-batch grows"] for rank in found]
        check_awkward(grown, clip=clip, windows=[1] * 3 + [2] * 3 + [1] * 2 + [5] * 2)
        check_awkward([rank[f"{name}, Fabric"] for rank in found])
        for rank in found:
            once, _, again = rank[f"{name}, resumed"]
            assert again["weights"] == once["weights"]
            assert again["windows"] == once["windows"][6:]
    for rank in found:
        assert rank["constant"]["served"] == rank["host alone"]["served"]
        assert rank["constant"]["weights"] == pytest.approx(rank["host alone"]["weights"], rel=1e-6, abs=1e-6)
        assert rank["constant"]["weights"] == found[0]["constant"]["weights"]
