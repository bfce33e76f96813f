"""What do the probes cost on a GPU, and does measuring make the host wait? The 124M-parameter GPT in bfloat16.

    python benchmarks/probes_gpu.py                                  # one GPU
    torchrun --nproc-per-node=8 benchmarks/probes_gpu.py             # several, results of the first rank
    python benchmarks/probes_gpu.py --tiny --device cpu              # seconds: whether it runs from start to end

Each contender trains the same model in a hand-written loop or around ``AdaptiveBatch``, at a constant batch of two
micro-batches a rank. A sample is ten steps: with the probe at every step, or at every tenth (``Control(interval=10)``).
Steps between two probes are not looked through for what is not finite (``skip_nonfinite="probed"``), which would wait.
Aim: at most 1.01 times the loop by hand.

Then a profile counts the calls in which the host waits for the device, in one step of each kind; and on a GPU the steps
between two probes run once more under ``torch.cuda.set_sync_debug_mode("error")``, which raises where they would wait.
Aim: none beside those of the loop by hand, and one in a probed step.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _harness import Machine, Table, interleave, publish
from probes import ddp, fsdp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset

import adabatch
from adabatch.adaptive.options import Guard
from adabatch.batch.plan import BatchPlan
from adabatch.recipes import NextTokenLoss, Transformer
from adabatch.runtime.launch.world import World
from adabatch.runtime.probes.comm_hook import CommHookProbe

QUESTION = (
    "What do the probes cost a bfloat16 GPT on a GPU, and in which steps does the host wait? Aims: 1.01 times a loop "
    "without adabatch, one wait in a probed step, none in the others."
)
AIM = 1.01
INTERVAL = 10
ACCUMULATION = 2
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""What a profile shows where the host waits for the device, or reads a number from it."""


class Size(NamedTuple):
    """A model and its micro-batch."""

    vocabulary: int
    length: int
    width: int
    depth: int
    num_heads: int
    micro_batch_size: int


GPT = Size(50257, 1024, 768, 12, 12, 8)
TINY = Size(65, 16, 32, 1, 4, 2)


class Text(Dataset[Tensor]):
    """Random tokens in memory from which a device copies without a wait; it is asked for whole micro-batches."""

    def __init__(self, size: Size, *, pinned: bool) -> None:
        self.tokens = torch.randint(
            size.vocabulary, (1024, size.length + 1), generator=torch.Generator().manual_seed(0)
        )
        self.pinned = pinned

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        chosen = self.tokens[indices]
        return chosen.pin_memory() if self.pinned else chosen


def as_it_is(batch: Tensor) -> Tensor:
    """The data set has collated already."""
    return batch


class Contender(NamedTuple):
    """A loop: how the model is wrapped, and around ``AdaptiveBatch`` or by hand (``interval`` None)."""

    wrap: Callable[[nn.Module], nn.Module]
    interval: int | None = None
    probe: Callable[[nn.Module], Any] | None = None


BY_HAND = "by hand"
FAMILIES = {
    "DDP": {
        BY_HAND: Contender(ddp),
        "tensor hooks, every step": Contender(ddp, 1),
        f"tensor hooks, every {INTERVAL}th": Contender(ddp, INTERVAL),
        "communication hook, every step": Contender(ddp, 1, CommHookProbe),
        f"communication hook, every {INTERVAL}th": Contender(ddp, INTERVAL, CommHookProbe),
    },
    "FSDP2": {
        BY_HAND: Contender(fsdp),
        "reduce-scatter, every step": Contender(fsdp, 1),
        f"reduce-scatter, every {INTERVAL}th": Contender(fsdp, INTERVAL),
    },
}


def endless(order: adabatch.GlobalOrder, size: int, *, rank: int = 0, ranks: int = 1) -> Iterator[Any]:
    """The micro-batches of a rank, as a loop by hand takes them."""
    feed = order.feed(rank, ranks)
    plan = BatchPlan(micro_batch_size=size, accumulation_steps=1, dp_size=ranks)
    while True:
        portion = feed.take(plan)
        yield from portion.batches
        feed.consumed(portion)


class Loop:
    """A model, its optimizer and one step of it, named as it came: "by hand", "probed", or "not probed"."""

    def __init__(self, contender: Contender, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        model = Transformer(
            size.vocabulary, size.length, width=size.width, depth=size.depth, num_heads=size.num_heads, tied=True
        )
        self.device = device
        self.model = contender.wrap(model.to(device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.loss = NextTokenLoss()
        order = adabatch.GlobalOrder(Text(size, pinned=device.type == "cuda"), collate_fn=as_it_is)
        self.step = self.by_hand
        if contender.interval is None:
            self.batches = endless(order, size.micro_batch_size, rank=dist.get_rank(), ranks=dist.get_world_size())
            return
        total = size.micro_batch_size * ACCUMULATION * dist.get_world_size()
        batches = adabatch.AdaptiveBatch(
            self.model,
            self.optimizer,
            adabatch.NormTest(eta=0.5),
            micro_batch_size=size.micro_batch_size,
            limits=adabatch.Limits(min=total, max=total),
            control=adabatch.Control(interval=contender.interval),
            guard=Guard(skip_nonfinite="probed"),
            probe=None if contender.probe is None else contender.probe(self.model),
        )
        self.steps = batches.steps(order, until=adabatch.steps(2**31))
        self.step = self.adaptive

    def _backward(self, tokens: Tensor, backward: Callable[[Tensor], None]) -> None:
        text = tokens.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(self.model(text[:, :-1]), text[:, 1:])
        backward(loss)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def by_hand(self) -> str:
        for index in range(ACCUMULATION):
            if not isinstance(self.model, FSDPModule):  # which reduces each micro-batch
                self.model.require_backward_grad_sync = index == ACCUMULATION - 1
            self._backward(next(self.batches), lambda loss: (loss / ACCUMULATION).backward())
        self._update()
        return BY_HAND

    def adaptive(self) -> str:
        step = next(self.steps)
        for tokens in step:
            self._backward(tokens, step.backward)
        self._update()
        return "probed" if step.probed else "not probed"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits_in(loop: Loop) -> dict[str, list[int]]:
    """For each kind of step, the waits of two steps of it in the profile of each, after a warm-up."""
    found: dict[str, list[int]] = {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if loop.device.type == "cuda" else [])]
    for _ in range(3):
        loop.step()
    for _ in range(2 * INTERVAL):
        synchronize(loop.device)  # what is waited for in here belongs to the step before
        with profile(activities=activities) as profiler:
            kind = loop.step()
        counted = Counter(event.name for event in profiler.events())
        found.setdefault(kind, []).append(sum(counted[name] for name in WAITS))
    return found


def never_waits(loop: Loop) -> bool:
    """Whether steps between two probes run where a wait is an error. On a GPU only."""
    while loop.step() == "not probed":  # to the next probe
        pass
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(INTERVAL - 1):
            if loop.step() != "not probed":
                return False
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def connect(world: World, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="samples of ten steps of each loop in a trial")
    parser.add_argument("--trials", type=int, default=2, help="times that all is made anew")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; shows that it runs, and is not saved")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    world = World.from_environment()
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    connect(world, device)
    machine = Machine.here()
    size = TINY if options.tiny else GPT
    times, waits, told, raw = [], [], [], {}
    for family, contenders in FAMILIES.items():
        loops = {name: Loop(contender, size, device) for name, contender in contenders.items()}
        for name, loop in loops.items():
            counts = waits_in(loop)
            free = never_waits(loop) if device.type == "cuda" and contenders[name].interval == INTERVAL else None
            raw[f"{family}, {name}, waits"] = counts
            for kind, values in counts.items():
                shown = "-" if kind != "not probed" or free is None else "yes" if free else "NO"
                waits.append((family, name, kind, str(min(values)), str(max(values)), shown))
        del loops, loop

        def steps(contenders: dict[str, Contender] = contenders) -> dict[str, Callable[[], object]]:
            return {name: Loop(contender, size, device).step for name, contender in contenders.items()}

        timings = interleave(
            steps,
            trials=options.trials,
            rounds=options.rounds,
            warmup=1,
            calls=INTERVAL,
            synchronize=lambda: synchronize(device),
        )
        raw[f"{family}, seconds"] = timings.seconds
        for name in list(contenders)[1:]:
            ratio = timings.ratio(name, BY_HAND)
            times.append((family, timings.of(BY_HAND).show(1, 1e3), name, ratio.show(3)))
            told.append(
                f"{family}, {name}: {ratio.median:.3f}, aim {AIM}: {'met' if ratio.median <= AIM else 'missed'}."
            )
    if world.rank == 0:
        case = f"{world.size} rank(s) x {ACCUMULATION} x {size.micro_batch_size} x {size.length} tokens, {device.type}"
        publish(
            "probes_gpu",
            question=QUESTION,
            machine=machine,
            tables=[
                Table(f"Time of a step, {case}", ("wrapped in", "by hand, ms", "around AdaptiveBatch", "ratio"), times),
                Table(
                    "Waits of the host in a step",
                    ("wrapped in", "loop", "step", "fewest", "most", "runs where a wait is an error"),
                    waits,
                ),
            ],
            findings=told,
            data={"trials": options.trials, "rounds": options.rounds, "results": raw},
            save=not (options.no_save or options.tiny),
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
