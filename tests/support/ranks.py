"""Runs a function on several gloo processes; imported by the tests that need real ranks.

A rank that fails shows its traceback, a rank that hangs shows where it stood, and either ends the others.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork of a process that has torch already starts in a tenth of a second, an import of torch takes seconds.
_PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "adabatch", "adabatch.cli.main",
    "pytest", "sklearn.datasets", "adabatch.report.picture",
]  # fmt: skip
_PROCESSES.set_forkserver_preload(PRELOADED)
WITHOUT_MLFLOW = Path(__file__).parent / "hidden"
"""Stands on the path of ranks and of DeepSpeed's processes."""
_GRACE_S = 3.0


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung; the message holds the traceback of each."""


def run_ranks(
    function: Callable[..., Any],
    size: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 60.0,
    connect: bool = True,
) -> list[Any]:
    """``function(rank, *arguments)`` on ``size`` processes in one gloo group; what each returned, by rank.

    Args:
        function: at the top level of a module; it is loaded anew from its file in every process.
        size: how many processes.
        folder: where they meet and leave their results, such as ``tmp_path``.
        arguments: picklable, and of no class that a test module defines; the same holds for what is returned.
        timeout: seconds until all ranks must be done; a collective waits as long at most.
        connect: make the process group; False leaves that to the function.

    Raises:
        RanksFailed: see there.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    target = (inspect.getsourcefile(function), function.__qualname__)
    processes = [
        _PROCESSES.Process(target=_rank_main, args=(target, rank, size, place, arguments, timeout, connect))
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()  # the first one waits for the fork server to import torch
        _await(processes, time.monotonic() + timeout)
    finally:
        if alive := [process for process in processes if process.is_alive()]:
            _end(alive)
    if any(process.exitcode for process in processes):
        raise RanksFailed("\n".join(_account(place, rank, p.exitcode or 0) for rank, p in enumerate(processes)))
    return [pickle.loads((place / f"{rank}.result").read_bytes()) for rank in range(size)]


def _await(processes: list[Any], deadline: float) -> None:
    """Until all have ended; a little longer than the first that failed, or than the deadline, at most."""
    running = list(processes)
    while running and time.monotonic() < deadline:
        ended = wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
        running = [process for process in running if process.sentinel not in ended]
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)


def _end(processes: list[Any]) -> None:
    """Has each write down where it stands, then kills it."""
    for process in processes:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    wait([process.sentinel for process in processes], timeout=0.5)
    for process in processes:
        process.kill()
        process.join()


def _account(place: Path, rank: int, code: int) -> str:
    for suffix in ("error", "hang"):
        path = place / f"{rank}.{suffix}"
        if path.exists() and path.stat().st_size:
            return f"--- rank {rank} ({suffix}) ---\n{path.read_text()}"
    return f"--- rank {rank}: {'done' if code == 0 else f'ended with code {code} and left no traceback'} ---"


def _rank_main(
    target: tuple[str, str],
    rank: int,
    size: int,
    place: Path,
    arguments: tuple[Any, ...],
    timeout: float,
    connect: bool,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the fork server imported is not searched for garbage by each rank
    warnings.simplefilter("error")
    sys.path.insert(0, str(WITHOUT_MLFLOW))
    with (place / f"{rank}.hang").open("w") as hang:
        faulthandler.register(signal.SIGUSR1, file=hang)
        try:
            if connect:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{place}/store",
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout),
                )
            result = _load(*target)(rank, *arguments)
            (place / f"{rank}.result").write_bytes(pickle.dumps(result))
        except BaseException:
            (place / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # without waiting for the ranks that may wait for this one
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)


def _load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]
