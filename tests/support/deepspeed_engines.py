"""DeepSpeed engines for the tests, and two ways to start their processes: the real launcher, and forks."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from support.hosts import rank_variables
from support.launched import start, surroundings
from support.loops import network
from support.ports import free_port
from support.ranks import WITHOUT_MLFLOW

OPTIMIZERS = Callable[[Iterable[Any]], Optimizer]


def run_deepspeed(size: int, function: Callable[..., Any], *arguments: str, timeout: float = 280) -> list[Any]:
    """What ``function(*arguments)`` returned on each rank of the ``deepspeed`` launcher; skips where there is none."""
    beside = Path(sys.executable).parent / "deepspeed"
    launcher = str(beside) if beside.exists() else shutil.which("deepspeed")
    if launcher is None:
        pytest.skip("no DeepSpeed: pip install deepspeed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    modules = os.pathsep.join([str(WITHOUT_MLFLOW), surroundings({})["PYTHONPATH"]])
    command = [launcher, "--num_gpus", str(size), "--master_port", str(free_port()), "--no_local_rank"]
    variables = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "PATH": path, "PYTHONPATH": modules}
    variables["PYTHONWARNINGS"] = "ignore::FutureWarning"
    return start(command, function, *arguments, variables=variables, timeout=timeout).results()


def as_launched(function: Callable[..., Any], rank: int, size: int, port: int, *arguments: str) -> Any:
    """What ``function(*arguments)`` returns in a fork of ``run_ranks(..., connect=False)``, in JSON's types.

    The fork has torch already, which takes the launcher, the one that it starts and each rank seconds to import.
    """
    warnings.resetwarnings()
    warnings.simplefilter("ignore", FutureWarning)
    rank_variables(rank, size, port)
    return json.loads(json.dumps(function(*arguments)))


@cache
def _deepspeed() -> Any:
    import deepspeed

    # To make an engine of ZeRO 3 it collects garbage, and a search through all that is imported takes half a second.
    gc.freeze()
    return deepspeed


def connect() -> None:
    """The process group, without the operator for inference that DeepSpeed would compile first."""
    deepspeed = _deepspeed()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def engine_of(
    stage: int,
    optimizer_of: OPTIMIZERS,
    *,
    managed: bool = True,
    model: nn.Module | None = None,
    groups: Callable[[nn.Module], Iterable[Any]] = nn.Module.parameters,
    **config: Any,
) -> Any:
    """An engine with a ZeRO stage around a small network, and a config as a person would write it."""
    model = network() if model is None else model
    zero = {"stage": stage, "reduce_bucket_size": 64, **config.pop("zero_optimization", {})}
    whole = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 otherwise
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **({} if managed else {"managed_gradient_accumulation": False}),
        **config,
    }
    return _deepspeed().initialize(model=model, optimizer=optimizer_of(groups(model)), config=whole)[0]


def whole(engine: Any) -> Tensor:
    """All weights of the model in one vector, gathered where they are sharded."""
    parameters = list(engine.module.parameters())
    with _deepspeed().zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return torch.cat([p.detach().float().flatten() for p in parameters]).clone()
