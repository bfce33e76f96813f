"""What does adabatch cost on each engine? A step around it, probed every time, against the same step without it.

    python benchmarks/engines.py

Two processes of one thread each train the same 4.8 M-parameter transformer with AdamW, once in the loop that a person
writes for the engine and once around ``AdaptiveBatch`` (``attach`` for DeepSpeed): on a plain model (one process), DDP,
FSDP2, DeepSpeed with ZeRO 0, 1, 2 and 3, all over gloo, and DDP over MPI. Limits hold the batch constant, so both do
the same work; they are made together, called in a shuffled order, the same on all ranks, and ratios are taken round by
round. Aim: at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import Machine, Table, Timings, interleave, publish, random_texts
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adabatch
from adabatch.recipes import NextTokenLoss, Transformer
from adabatch.runtime.launch.world import World, connected

LENGTH = 128
CASES = ((16, 1), (4, 4))  # micro-batch size, accumulation steps
AIM = 1.05
ENGINES = ("plain", "DDP", "FSDP2", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "DDP over MPI")
CPU = torch.device("cpu")


def ranks_of(engine: str) -> int:
    return 1 if engine == "plain" else 2


def made() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(width=256, depth=6, num_heads=8)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def wrapped(engine: str) -> nn.Module:
    model = made()
    if engine.startswith("DDP"):
        return DistributedDataParallel(model)
    if engine == "FSDP2":
        for module in model.modules():
            if type(module).__name__ == "Block":
                fully_shard(module)
        fully_shard(model)
    return model


def deepspeed_engine(stage: int, micro_batch_size: int, accumulation_steps: int) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, and inference alone uses it
    model = made()
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]


def steps_of(engine: str, case: tuple[int, int], rank: int) -> Mapping[str, Callable[[], None]]:
    """A step without adabatch, and one with it."""
    micro_batch_size, accumulation_steps = case
    size = micro_batch_size * accumulation_steps * ranks_of(engine)
    loss, criterion = NextTokenLoss(), adabatch.NormTest(eta=0.5)
    limits = adabatch.Limits(min=size, max=size)

    def around(batches: adabatch.AdaptiveBatch, forward: nn.Module, update: Callable[[], Any]) -> Callable[[], None]:
        steps = batches.steps(random_texts(micro_batch_size, LENGTH, rank=rank))

        def run() -> None:
            for x, y in (step := next(steps)):
                step.backward(loss(forward(x), y))
            update()

        return run

    if engine.startswith("ZeRO"):
        from adabatch.integrations.deepspeed import attach

        by_hand, attached = (deepspeed_engine(int(engine[-1]), *case) for _ in range(2))
        data = random_texts(micro_batch_size, LENGTH, rank=rank)

        def deepspeed_step() -> None:
            for _ in range(accumulation_steps):
                x, y = next(data)
                by_hand.backward(loss(by_hand(x), y))
                by_hand.step()

        return {
            "without": deepspeed_step,
            "with": around(attach(attached, criterion, limits=limits), attached, attached.step),
        }

    model, data = wrapped(engine), random_texts(micro_batch_size, LENGTH, rank=rank)
    optimizer = adamw(model)

    def torch_step() -> None:
        for index in range(accumulation_steps):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = index == accumulation_steps - 1
            x, y = next(data)
            (loss(model(x), y) / accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()

    other = wrapped(engine)
    its_optimizer = adamw(other)

    def update() -> None:
        its_optimizer.step()
        its_optimizer.zero_grad()

    batches = adabatch.AdaptiveBatch(other, its_optimizer, criterion, micro_batch_size=micro_batch_size, limits=limits)
    return {"without": torch_step, "with": around(batches, other, update)}


def timed(engine: str, case: tuple[int, int], rounds: int, rank: int, results: Path) -> None:
    def together() -> None:
        if dist.is_initialized():
            dist.barrier()

    timings = interleave(
        lambda: steps_of(engine, case, rank), trials=2, rounds=max(2, rounds // 2), synchronize=together
    )
    if rank == 0:
        results.write_text(json.dumps({name: list(values) for name, values in timings.seconds.items()}))


def work(rank: int, folder: str, engine: str, case: tuple[int, int], rounds: int) -> None:
    """A rank over gloo."""
    torch.set_num_threads(1)
    size = ranks_of(engine)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}  # for DeepSpeed
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    timed(engine, case, rounds, rank, Path(folder, "seconds.json"))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def work_over_mpi(folder: str, engine: str, case: tuple[int, int], rounds: int) -> None:
    """A rank that mpiexec started."""
    torch.set_num_threads(1)
    world = World.from_environment()
    with connected(world, device=CPU):
        timed(engine, case, rounds, world.rank, Path(folder, "seconds.json"))
        dist.barrier()


def measure(engine: str, case: tuple[int, int], rounds: int) -> Timings:
    with tempfile.TemporaryDirectory() as folder:
        if engine == "DDP over MPI":
            beside = Path(sys.executable).parent / "mpiexec"
            mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
            if mpiexec is None:
                raise SystemExit("DDP over MPI needs mpiexec: pip install mpich mpi4py, or leave it out with --only")
            command = [mpiexec, "-n", "2", sys.executable, __file__, "--worker", folder, "--rounds", str(rounds)]
            command += ["--case", *map(str, case)]
            subprocess.run(command, check=True, env={**os.environ, "ADABATCH_BACKEND": "mpi4py"})
        else:
            mp.spawn(work, args=(folder, engine, case, rounds), nprocs=ranks_of(engine))
        return Timings(json.loads(Path(folder, "seconds.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each loop in each case")
    parser.add_argument("--only", choices=ENGINES, nargs="+", default=ENGINES, help="engines")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work_over_mpi(options.worker, "DDP over MPI", tuple(options.case), options.rounds)
        return
    machine = Machine.here()
    rows, told, raw = [], [], {}
    for micro_batch_size, accumulation_steps in CASES:
        for engine in options.only:
            if engine == "plain" and accumulation_steps == 1:
                continue  # one micro-batch has no spread to measure
            case = f"{ranks_of(engine)} x {accumulation_steps} x {micro_batch_size} x {LENGTH} tokens"
            timings = measure(engine, (micro_batch_size, accumulation_steps), options.rounds)
            raw[f"{engine}, {case}"] = timings.seconds
            ratio = timings.ratio("with", "without")
            rows.append((engine, case, timings.of("without").show(1, 1e3), ratio.show(3)))
            verdict = "met" if ratio.median <= AIM else "missed"
            told.append(f"{engine}, {case}: {ratio.median:.3f}, aim {AIM}: {verdict}.")
    publish(
        "engines",
        question="What does a step around adabatch, probed every time, cost on each engine?",
        machine=machine,
        tables=[
            Table(
                "A step around adabatch against the same step without it: median (quartiles)",
                ("engine", "ranks x accumulation x micro-batch", "without, ms", "ratio"),
                rows,
            )
        ],
        findings=told,
        data={"rounds": options.rounds, "seconds": raw},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
