"""What a step of AdaGradNorm costs next to torch's Adagrad and SGD.

    python benchmarks/optim_step.py

Goal: at most 1.0 times Adagrad and 1.5 times SGD, all with ``foreach=True``, and at most 1.1 times SGD where a
probe has just measured the norm. "norm known" packs the norm, hands it over, checks and uses it; "probe and"
has the probe's own read of the gradient in front, as the end of a probed step does. Every optimizer owns its
parameters and gradients, so each finds them outside the caches, as after a backward pass. ``read`` is the floor
under any method that must know the norm before it updates: one ``torch._foreach_norm`` over the gradient, and
nothing else. One thread is timed by its processor time, several by the wall clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from _harness import Machine, Table, Timings, interleave, publish
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.optim import AdaGradNorm
from adabatch.runtime.optimizers.measured_norm import MeasuredNorm
from adabatch.runtime.probes.norms import gradients_of, norms, sum_of_squares

QUESTION = (
    "What does a step of AdaGradNorm cost next to torch's Adagrad and SGD? "
    "Goal: at most 1.0 and 1.5 times, all with foreach=True; 1.1 times SGD if the norm is known from a probe."
)
OURS, KNOWN, ADAGRAD, SGD = "AdaGradNorm", "AdaGradNorm, norm known", "Adagrad", "SGD"
PROBED, PROBED_SGD = "probe and AdaGradNorm, norm known", "probe and SGD"
GOALS = ((OURS, ADAGRAD, 1.0), (OURS, SGD, 1.5), (KNOWN, SGD, 1.1), (PROBED, PROBED_SGD, 1.1))


def transformer() -> list[Tensor]:
    """5.0 million parameters: six layers 256 wide and a vocabulary of 1000."""
    layers = [nn.TransformerEncoderLayer(256, 4, 1024) for _ in range(6)]
    return [param for module in (nn.Embedding(1000, 256), *layers) for param in module.parameters()]


def resnet18() -> list[Tensor]:
    """11.2 million parameters in the shapes of ResNet-18 with a stem for small images and ten classes."""
    convolutions = [(64, 3, 3)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        convolutions += [(width, before, 3), *[(width, width, 3)] * 3]
        if width != before:
            convolutions.append((width, before, 1))
    shapes: list[tuple[int, ...]] = [(10, 512), (10,)]
    for out, into, side in convolutions:
        shapes += [(out, into, side, side), (out,), (out,)]
    return [nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes]


def ready(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters of one's own, with gradients."""
    mine: list[Tensor] = [nn.Parameter(param.detach().clone()) for param in params]
    for param in mine:
        param.grad = 1e-2 * torch.randn_like(param)
    return mine


def measured(params: list[Tensor], optimizer: Optimizer, *, hand_over: bool = False) -> Callable[[], object]:
    """The end of a probed step: the probe reads the gradient, and the optimizer steps, told the norm or not."""

    def end() -> None:
        pieces = [norms(grad) for _, grad in gradients_of(params)]
        square = sum_of_squares(pieces, torch.device("cpu")).item()
        known = MeasuredNorm.of(square, params) if hand_over else None
        if known is not None and isinstance(optimizer, AdaGradNorm):
            optimizer.take_norm(known)
        optimizer.step()

    return end


def with_norm(params: list[Tensor], lr: float) -> Callable[[], object]:
    """A step whose norm was measured, and all that it takes to hand the norm over."""
    optimizer = AdaGradNorm(params, lr, foreach=True)
    square = sum(float(param.grad.square().sum()) for param in params if param.grad is not None)

    def step() -> None:
        known = MeasuredNorm.of(square, params)
        assert known is not None
        optimizer.take_norm(known)
        optimizer.step()

    return step


def contenders(params: list[Tensor]) -> dict[str, Callable[[], object]]:
    lr = 1e-6  # the values must not drift while they are timed
    gradients = [1e-2 * torch.randn_like(param) for param in params]
    reads, knows, sgd = ready(params), ready(params), ready(params)
    return {
        OURS: AdaGradNorm(ready(params), lr, foreach=True).step,
        KNOWN: with_norm(ready(params), lr),
        "AdaGradNorm, loop": AdaGradNorm(ready(params), lr, foreach=False).step,
        ADAGRAD: torch.optim.Adagrad(ready(params), lr, foreach=True).step,
        SGD: torch.optim.SGD(ready(params), lr, foreach=True).step,
        "AdaGradNorm, momentum": AdaGradNorm(ready(params), lr, momentum=0.9, foreach=True).step,
        "SGD, momentum": torch.optim.SGD(ready(params), lr, momentum=0.9, foreach=True).step,
        "probe and AdaGradNorm, read again": measured(reads, AdaGradNorm(reads, lr, foreach=True)),
        PROBED: measured(knows, AdaGradNorm(knows, lr, foreach=True), hand_over=True),
        PROBED_SGD: measured(sgd, torch.optim.SGD(sgd, lr, foreach=True)),
        "read": lambda: torch._foreach_norm(gradients),
    }


def table(title: str, timings: Timings) -> Table:
    rows = [
        (
            name,
            timings.of(name).show(2, 1e3),
            timings.ratio(name, ADAGRAD).show(),
            timings.ratio(name, SGD).show(),
        )
        for name in timings.seconds
    ]
    return Table(title, ("step", "ms", f"of {ADAGRAD}", f"of {SGD}"), rows)


def findings(title: str, timings: Timings) -> list[str]:
    told = []
    for ours, rival, goal in GOALS:
        ratio = timings.ratio(ours, rival)
        word = "met" if ratio.median <= goal else "missed"
        told.append(f"{title}: {ours} {ratio.show()} times {rival}, goal {goal}: {word}.")
    floor = 1 + timings.ratio("read", SGD).median
    told.append(f"{title}: SGD and one read of the gradient, apart, come to {floor:.2f} times SGD.")
    heavy = timings.ratio("AdaGradNorm, momentum", "SGD, momentum")
    told.append(f"{title}: with momentum {heavy.show()} times SGD with momentum.")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="times that the optimizers are made anew")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each optimizer in a trial")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch threads, one table each")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    machine = Machine.here()
    tables, told, raw = [], [], {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for make in (transformer, resnet18):
            torch.manual_seed(0)
            params = make()
            count = sum(param.numel() for param in params)
            title = f"{make.__name__}, {count / 1e6:.1f} M in {len(params)} tensors, threads: {threads}"
            clock = time.process_time if threads == 1 else time.perf_counter
            timings = interleave(partial(contenders, params), trials=options.trials, rounds=options.rounds, clock=clock)
            tables.append(table(title, timings))
            told += findings(title, timings)
            raw[title] = {name: [round(time, 7) for time in times] for name, times in timings.seconds.items()}
    publish(
        "optim_step",
        question=QUESTION,
        machine=machine,
        tables=tables,
        findings=told,
        data={"trials": options.trials, "rounds": options.rounds, "seconds": raw},
        save=not options.no_save,
    )


if __name__ == "__main__":
    main()
