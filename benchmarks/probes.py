"""What do the probes of DDP and FSDP2 cost? A step with each, against the same step without adabatch.

    python benchmarks/probes.py
    python benchmarks/probes.py --tiny --rounds 4    # whether it runs from start to end

Two gloo processes of one thread each train the same 4.8 M-parameter transformer side by side, once in a hand-written
loop and once around ``AdaptiveBatch`` for each probe, which then measures every step. Limits hold the batch constant,
so all do the same work; a run around ``AdaptiveBatch`` with a constant schedule, which needs no probe, shows how much
of the difference is not the probe's. The order is shuffled in every round, the same on both ranks, and ratios are
taken round by round. Aims: at most 1.02 with the communication hook and the reduce-scatter, at most 1.05 with tensor
hooks. Noise in the norms of optimizers, coordinates and layers have families of their own, without an aim: they are
off by default.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import Machine, Table, Timings, interleave, publish, random_texts
from support.options import grouped
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import adabatch
from adabatch.recipes import NextTokenLoss, Transformer
from adabatch.runtime.probes.comm_hook import CommHookProbe

RANKS = 2
LENGTH = 128
SIZE = {"width": 256, "depth": 6, "num_heads": 8}
TINY = {"width": 32, "depth": 1, "num_heads": 4}
CASES = ((16, 1), (4, 4))  # micro-batch size, accumulation steps


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "Block":
            fully_shard(module)
    return fully_shard(model)


class Contender(NamedTuple):
    """A loop: how the model is wrapped, and what ``AdaptiveBatch`` is told; nothing for a loop written by hand."""

    wrap: Callable[[nn.Module], nn.Module]
    options: Callable[[nn.Module], dict[str, Any]] | None = None
    last: bool = True  # reduces in the last micro-batch only
    measures: bool = True


FAMILIES: dict[str, dict[str, Contender]] = {
    "DDP": {
        "by hand": Contender(ddp),
        "without a probe": Contender(ddp, lambda model: {}, measures=False),
        "tensor hooks": Contender(ddp, lambda model: {}),
        "communication hook": Contender(ddp, lambda model: {"probe": CommHookProbe(model)}),
    },
    "DDP, in other norms": {
        "by hand": Contender(ddp),
        "adam": Contender(ddp, lambda model: {"criterion": adabatch.NoiseScale(norm="adam")}),
        "sign": Contender(ddp, lambda model: {"criterion": adabatch.NoiseScale(norm="sign")}),
        "quantile": Contender(ddp, lambda model: {"criterion": adabatch.batch.CoordinateNormTest(0.5, quantile=0.9)}),
        "layers": Contender(ddp, lambda model: {"per_layer": "module"}),
    },
    "FSDP2, in other norms": {
        "by hand": Contender(fsdp, last=False),
        "adam": Contender(fsdp, lambda model: {"criterion": adabatch.NoiseScale(norm="adam")}, last=False),
        "sign": Contender(fsdp, lambda model: {"criterion": adabatch.NoiseScale(norm="sign")}, last=False),
        "quantile": Contender(
            fsdp, lambda model: {"criterion": adabatch.batch.CoordinateNormTest(0.5, quantile=0.9)}, last=False
        ),
        "layers": Contender(fsdp, lambda model: {"per_layer": "module"}, last=False),
    },
    "FSDP2, reducing each micro-batch": {
        "by hand": Contender(fsdp, last=False),
        "without a probe": Contender(fsdp, lambda model: {}, last=False, measures=False),
        "reduce-scatter": Contender(fsdp, lambda model: {}, last=False),
    },
    "FSDP2, reducing the last micro-batch": {
        "by hand": Contender(fsdp),
        "without a probe": Contender(fsdp, lambda model: {"gradient_sync": "last"}, measures=False),
        "reduce-scatter": Contender(fsdp, lambda model: {"gradient_sync": "last"}),
    },
}
AIMS = {"tensor hooks": 1.05, "communication hook": 1.02, "reduce-scatter": 1.02}


class Loop:
    """A model, its optimizer and one step of it."""

    def __init__(
        self, contender: Contender, micro_batch_size: int, accumulation_steps: int, size: dict[str, int]
    ) -> None:
        torch.manual_seed(0)
        self.model = contender.wrap(Transformer(**size))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loss = NextTokenLoss()
        self.data = random_texts(micro_batch_size, LENGTH, rank=dist.get_rank())
        self.accumulation_steps = accumulation_steps
        self.last = contender.last
        self.step: Callable[[], None] = self.by_hand
        if contender.options is not None:
            examples = micro_batch_size * accumulation_steps * RANKS
            plain = adabatch.NormTest(eta=0.5) if contender.measures else adabatch.Constant(examples)
            batches = adabatch.AdaptiveBatch(
                self.model,
                self.optimizer,
                micro_batch_size=micro_batch_size,
                limits=adabatch.Limits(min=examples, max=examples),
                **grouped({"criterion": plain, **contender.options(self.model)}),
            )
            self.steps = batches.steps(self.data)
            self.step = self.adaptive

    def by_hand(self) -> None:
        for index in range(self.accumulation_steps):
            self._sync(not self.last or index == self.accumulation_steps - 1)
            x, y = next(self.data)
            (self.loss(self.model(x), y) / self.accumulation_steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _sync(self, on: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(on)
        else:
            self.model.require_backward_grad_sync = on

    def adaptive(self) -> None:
        step = next(self.steps)
        for x, y in step:
            step.backward(self.loss(self.model(x), y))
        self.optimizer.step()
        self.optimizer.zero_grad()


def work(
    rank: int, store: str, family: str, case: tuple[int, int], size: dict[str, int], rounds: int, results: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)

    def steps() -> dict[str, Callable[[], None]]:
        return {name: Loop(contender, *case, size).step for name, contender in FAMILIES[family].items()}

    timings = interleave(steps, trials=2, rounds=rounds // 2, synchronize=dist.barrier)
    if rank == 0:
        results.put(dict(timings.seconds))
    dist.barrier()
    dist.destroy_process_group()


def measure(family: str, case: tuple[int, int], size: dict[str, int], rounds: int) -> Timings:
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(work, args=(store, family, case, size, rounds, results), nprocs=RANKS)
    return Timings(results.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each loop in each case")
    parser.add_argument("--only", choices=FAMILIES, nargs="+", default=list(FAMILIES), help="ways to wrap the model")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, which shows that it runs, and is not saved")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    rows, told, raw = [], [], {}
    for micro_batch_size, accumulation_steps in CASES:
        case = f"{RANKS} ranks x {accumulation_steps} x {micro_batch_size} x {LENGTH} tokens"
        for family in options.only:
            # With one micro-batch the first is the last.
            skipped = accumulation_steps == 1 and family == "FSDP2, reducing the last micro-batch"
            if skipped:
                continue
            timings = measure(
                family, (micro_batch_size, accumulation_steps), TINY if options.tiny else SIZE, options.rounds
            )
            raw[f"{case}, {family}"] = timings.seconds
            for name in list(FAMILIES[family])[1:]:
                ratio = timings.ratio(name, "by hand")
                rows.append((case, family, timings.of("by hand").show(1, 1e3), name, ratio.show(3)))
                if name in AIMS:
                    verdict = "met" if ratio.median <= AIMS[name] else "missed"
                    told.append(f"{case}, {family}, {name}: {ratio.median:.3f}, aim {AIMS[name]}: {verdict}.")
    publish(
        "probes",
        question="What do the probes of DDP and FSDP2, measuring every step, cost a loop?",
        machine=machine,
        tables=[
            Table(
                "A step around AdaptiveBatch against the same step without it: median (quartiles)",
                ("case", "wrapped in", "by hand, ms", "around AdaptiveBatch, with", "ratio"),
                rows,
            )
        ],
        findings=told,
        data={"rounds": options.rounds, "seconds": raw},
        save=not (options.no_save or options.tiny),
    )


if __name__ == "__main__":
    main()
