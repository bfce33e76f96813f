"""float16 with a ``GradScaler`` on two ranks: what overflows on one of them is left out on both, by every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, network, regression
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, NormTest, ProgressLR, examples, lr, steps
from adabatch.adaptive.options import EngineOptions
from adabatch.runtime.probes.comm_hook import CommHookProbe

pytestmark = pytest.mark.distributed

STEPS, OVERFLOWS = 6, {0, 3}
ENGINES = ["DDP", "DDP, fused", "DDP, float16 hook", "FSDP2, each", "FSDP2, last", "FSDP2, reduced in float16"]


def whole(model: nn.Module) -> Tensor:
    pieces = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return torch.cat([piece.flatten() for piece in pieces]).clone()


def half_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return functional.mse_loss(model(x).float(), y)


def run(rank: int, engine: str, journal: Path) -> dict[str, list[Any]]:
    """Six steps; in two of them rank 1's loss, and its alone, is too large for a gradient in float16."""
    probe = None
    model: nn.Module = network()
    if engine.startswith("DDP"):
        model = DistributedDataParallel(model)
        if engine == "DDP, float16 hook":
            probe = CommHookProbe(model, hook=fp16_compress_hook)
    else:
        reduce = torch.float16 if engine == "FSDP2, reduced in float16" else torch.float32
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=reduce))
    optimizer = Adam(model.parameters(), lr=0.01, fused=engine == "DDP, fused")
    scaler = GradScaler("cpu", init_scale=2.0**10)
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(eta=0.5),
        micro_batch_size=4,
        limits=Limits(min=16, max=64),
        control=Control(memory=2, confidence=0.5),
        lr_rule="sqrt",
        probe=probe,
        engine=EngineOptions(gradient_sync="last" if engine == "FSDP2, last" else None, scaler=scaler),
        journal=journal,
    )
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=examples(1000))
    found: dict[str, list[Any]] = {name: [] for name in ("weights", "progress", "consumed", "averages", "lr", "scale")}
    for index, step in enumerate(batches.steps(GlobalOrder(regression(512)), until=steps(STEPS))):
        for x, y in step:
            step.backward(half_loss(model, x, y) * (1e9 if index in OVERFLOWS and rank == 1 else 1.0))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        found["weights"].append(whole(model))
        found["progress"].append(batches.progress)
        found["consumed"].append(batches.consumed.examples)
        found["averages"].append(batches.state_dict()["control"]["window"])
        found["lr"].append(schedule.get_lr())
        found["scale"].append(scaler.get_scale())
    batches.remove()
    return found


def run_all(rank: int, folder: str) -> dict[str, dict[str, list[Any]]]:
    return {engine: run(rank, engine, Path(folder) / engine) for engine in ENGINES}


def test_what_overflows_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(run_all, 2, tmp_path, str(tmp_path), timeout=150)
    for engine in ENGINES:
        mine, other = first[engine], second[engine]
        assert all(torch.equal(a, b) for a, b in zip(mine.pop("weights"), other["weights"], strict=True)), engine
        assert mine == {name: values for name, values in other.items() if name != "weights"}, engine
        assert mine["scale"] == [2.0**9] * 3 + [2.0**8] * 3, engine
        for index in range(1, STEPS):
            skipped = index in OVERFLOWS
            assert torch.equal(other["weights"][index], other["weights"][index - 1]) == skipped, engine
            for name in ("progress", "averages", "lr"):
                assert (mine[name][index] == mine[name][index - 1]) == skipped, (engine, name)
            assert mine["consumed"][index] > mine["consumed"][index - 1]
        assert mine["progress"][0].steps == 0
        journal = lines(tmp_path / engine)
        assert [line["applied"] for line in journal] == [index not in OVERFLOWS for index in range(STEPS)], engine
        assert [line["reason"] == "not finite" for line in journal] == [i in OVERFLOWS for i in range(STEPS)], engine


def unscaled(rank: int, folder: str) -> None:
    """Runs with and without a scale that is a power of two."""
    for engine in ("DDP", "DDP, hook", "FSDP2"):
        for name, scaler in (("plain", None), ("scaled", GradScaler("cpu", init_scale=2.0**14, growth_interval=3))):
            model: nn.Module = network(dtype=torch.float64)
            model = fully_shard(model) if engine == "FSDP2" else DistributedDataParallel(model)
            optimizer = SGD(model.parameters(), lr=0.05)
            batches = AdaptiveBatch(
                model,
                optimizer,
                NormTest(eta=0.5),
                micro_batch_size=4,
                limits=Limits(min=8, max=32),
                control=Control.direct(),
                probe=CommHookProbe(model) if engine == "DDP, hook" else None,
                engine=EngineOptions(scaler=scaler),
                journal=f"{folder}/{engine} {name}",
            )
            for step in batches.steps(GlobalOrder(regression(128, dtype=torch.float64)), until=steps(6)):
                for x, y in step:
                    step.backward(functional.mse_loss(model(x), y))
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
            batches.remove()


def test_the_journals_of_scaled_runs_are_those_of_plain_ones(tmp_path: Path) -> None:
    run_ranks(unscaled, 2, tmp_path, str(tmp_path))
    for engine in ("DDP", "DDP, hook", "FSDP2"):
        plain, scaled = (lines(tmp_path / f"{engine} {name}") for name in ("plain", "scaled"))
        assert len({line["next"] for line in plain}) > 1, engine
        assert scaled == plain, engine
