"""What the exact per-example tests cost: squared norms, and inner products with the mean gradient.

    python benchmarks/exact_tests.py            # the figures
    python benchmarks/exact_tests.py --tiny     # seconds: whether it runs from start to end

Goal, as ratios to a plain training step (forward, backward, SGD) on one thread: norms at most 2.0, norms and
inner products at most 3.0, peak memory at most 1.3; with ``fused=True``, which forms the weight gradients of
convolutions and of linear layers on long sequences as sums of the examples' gradients, 1.3, 1.5 and 1.1.
Every contender does a whole training step and leaves the numbers that its test needs, and all must agree on
them before they are timed. Rivals: per-example gradients by ``torch.func.vmap``, all at once and in chunks, and
Opacus where it is installed (``pip install opacus``), with stored gradients and with its ghost norms.

Peak memory is that of the tensors alive during a step, parameters and gradients and batch included and the
interpreter not, as torch's profiler sees the allocator; each contender is measured in a process of its
own."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _harness import Machine, Table, Timings, interleave, publish
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from adabatch.recipes.models import MnistCNN, Transformer
from adabatch.runtime.per_example import PerExampleNorms, products_by_jvp
from adabatch.runtime.random_state import random_state

QUESTION = (
    "What do exact per-example squared norms, and inner products with the mean gradient, cost next to a "
    "plain training step? Goal on one thread: 2.0 and 3.0 times its time, 1.3 times its memory; fused, 1.3, 1.5 and "
    "1.1 times."
)
PLAIN = "plain step"
NORMS, PRODUCTS, FORWARD, FUSED, FUSED_PRODUCTS = (
    "adabatch, norms",
    "adabatch, norms and products",
    "adabatch, norms, products by JVP",
    "adabatch fused, norms",
    "adabatch fused, norms and products",
)


class Goal(NamedTuple):
    """The largest ratios to a plain step."""

    time: float
    memory: float


GOALS = {
    NORMS: Goal(2.0, 1.3),
    PRODUCTS: Goal(3.0, 1.3),
    FORWARD: Goal(3.0, 1.3),
    FUSED: Goal(1.3, 1.1),
    FUSED_PRODUCTS: Goal(1.5, 1.1),
}


class Statistics(NamedTuple):
    """What a contender measured: squared norms, and inner products or None, each (num_examples,)."""

    squares: Tensor
    products: Tensor | None


@dataclass(frozen=True)
class Task:
    """A model with a batch, and the loss of each example."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of each example, a mean over its positions: (num_examples,)."""
        each = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
        return each.view(len(target), -1).mean(1)

    def backward(self, model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(self.x).flatten(0, -2), self.y.flatten()).backward()


def mnist_cnn(batch: int) -> Task:
    return Task(MnistCNN(), torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,)))


def transformer(batch: int, length: int, width: int, depth: int) -> Task:
    model = Transformer(vocab_size=512, block_size=length, width=width, depth=depth, num_heads=8)
    text = torch.randint(0, 512, (batch, length + 1))
    return Task(model, text[:, :-1].contiguous(), text[:, 1:].contiguous())


TASKS: Mapping[str, tuple[str, Callable[[], Task], int]] = {
    "cnn": ("MNIST CNN, batch 256", partial(mnist_cnn, 256), 32),
    "transformer": ("Transformer, 16 x 128 tokens", partial(transformer, 16, 128, 256, 6), 4),
    "tiny-cnn": ("MNIST CNN, batch 4", partial(mnist_cnn, 4), 2),
    "tiny-transformer": ("Transformer, 4 x 8 tokens", partial(transformer, 4, 8, 32, 1), 2),
}
TINY = ("tiny-cnn", "tiny-transformer")


def with_step(model: nn.Module, gradients: Callable[[], Statistics | None]) -> Callable[[], Statistics | None]:
    """A training step around what fills the gradients; the rate is too small to move the numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step() -> Statistics | None:
        found = gradients()
        optimizer.step()
        return found

    return step


def ours(
    task: Task, *, products: bool, forward_mode: bool = False, fused: bool = False
) -> Callable[[], Statistics | None]:
    # The micro-batch that is checked is not fused.
    norms = PerExampleNorms(task.model, products=products, fused=fused, check=not fused)
    parameters = dict(task.model.named_parameters())

    def losses(values: dict[str, Tensor]) -> Tensor:
        return task.losses(functional_call(task.model, values, (task.x,)), task.y)

    def gradients() -> Statistics:
        norms.start()
        state = random_state(task.x.device)
        task.backward(task.model)
        examples = norms.finish()
        if products:
            return Statistics(examples.examples_sq, examples.products())
        if not forward_mode:
            return Statistics(examples.examples_sq, None)
        mean = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        inner = products_by_jvp(losses, mean, parameters=parameters, random_state=state)
        return Statistics(examples.examples_sq, inner)

    return with_step(task.model, gradients)


def by_vmap(task: Task, chunk_size: int | None) -> Callable[[], Statistics | None]:
    """The step, and all examples' gradients by a second pass of vmap."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.losses(functional_call(task.model, parameters, (x[None],)), y[None])[0]

    transform = vmap(grad(loss), (None, 0, 0), randomness="different")

    def gradients() -> Statistics:
        task.backward(task.model)
        parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}
        squares, products = [], []
        for x, y in zip(task.x.split(chunk_size or len(task.x)), task.y.split(chunk_size or len(task.y)), strict=True):
            with sdpa_kernel(SDPBackend.MATH):
                examples = transform(parameters, x, y)
            found = reduce(
                {name: (examples[name], parameter.grad) for name, parameter in task.model.named_parameters()}
            )
            squares.append(found.squares)
            products.append(found.products)
        return Statistics(torch.cat(squares), torch.cat(products))

    return with_step(task.model, gradients)


def reduce(gradients: Mapping[str, tuple[Tensor, Tensor]]) -> Statistics:
    """Norms and products of stored gradients, from (every example's, their mean) of each parameter."""
    squares = sum(examples.flatten(1).square().sum(1) for examples, _ in gradients.values())
    products = sum(examples.flatten(1) @ mean.flatten() for examples, mean in gradients.values())
    return Statistics(squares, products)


def opacus_gradients(task: Task) -> Callable[[], Statistics | None]:
    from opacus import GradSampleModule

    model = GradSampleModule(task.model, loss_reduction="mean")

    def gradients() -> Statistics:
        task.backward(model)
        found = reduce({name: (p.grad_sample, p.grad) for name, p in model.named_parameters()})
        for parameter in model.parameters():
            parameter.grad_sample = None
        return found

    return with_step(model, gradients)


def opacus_ghost_norms(task: Task) -> Callable[[], Statistics | None]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    for module in task.model.modules():
        if isinstance(module, nn.Embedding):  # its rule needs contiguous indices
            module.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    model = GradSampleModuleFastGradientClipping(
        task.model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean"
    )

    def gradients() -> Statistics:
        task.backward(model)
        return Statistics(model.get_norm_sample().square(), None)

    return with_step(model, gradients)


def plain(task: Task) -> Callable[[], Statistics | None]:
    return with_step(task.model, lambda: task.backward(task.model))


def makers(chunk_size: int) -> dict[str, Callable[[Task], Callable[[], Statistics | None]]]:
    """How to make each contender of a task."""
    found: dict[str, Callable[[Task], Callable[[], Statistics | None]]] = {
        PLAIN: plain,
        NORMS: lambda task: ours(task, products=False),
        PRODUCTS: lambda task: ours(task, products=True),
        FORWARD: lambda task: ours(task, products=False, forward_mode=True),
        FUSED: lambda task: ours(task, products=False, fused=True),
        FUSED_PRODUCTS: lambda task: ours(task, products=True, fused=True),
        "vmap, norms and products": lambda task: by_vmap(task, None),
        f"vmap in chunks of {chunk_size}, norms and products": lambda task: by_vmap(task, chunk_size),
    }
    if importlib.util.find_spec("opacus") is not None:
        found["Opacus, norms and products"] = opacus_gradients
        found["Opacus ghost norms"] = opacus_ghost_norms
    return found


def agree(contenders: Mapping[str, Callable[[], Statistics | None]]) -> None:
    """Raises unless all contenders measure the same numbers; their first step warms them up as well."""
    reference: Statistics | None = None
    for name, step in contenders.items():
        found = step()
        if found is None:
            continue
        if reference is None or reference.products is None:
            reference = found if reference is None else Statistics(reference.squares, found.products)
        torch.testing.assert_close(found.squares, reference.squares, rtol=1e-4, atol=0, msg=name)
        if found.products is not None:
            size = float(found.products.abs().mean())
            torch.testing.assert_close(found.products, reference.products, rtol=1e-3, atol=1e-3 * size, msg=name)


def steps_of(key: str) -> dict[str, Callable[[], Statistics | None]]:
    """The contenders of a task, which agree on what they measure."""
    _, make, chunk_size = TASKS[key]
    steps = {}
    for name, maker in makers(chunk_size).items():
        torch.manual_seed(0)  # a model of its own for each, as some leave hooks on it
        steps[name] = maker(make())
    agree(steps)
    return steps


def peak_of(key: str, name: str) -> int:
    """Peak bytes of the tensors alive during one step of a contender, in this process."""
    _, make, chunk_size = TASKS[key]
    torch.manual_seed(0)
    task = make()
    step = makers(chunk_size)[name](task)
    step()
    task.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    resident = [*task.model.parameters(), *task.model.buffers(), task.x, task.y]
    return peak + sum(tensor.nbytes for tensor in resident)


def measure_peak(key: str, name: str, threads: int) -> int:
    """`peak_of` in a process of its own, where no rival has been."""
    command = [sys.executable, __file__, "--peak", key, name, "--threads", str(threads)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.splitlines()[-1])


def findings(title: str, timings: Timings, peaks: Mapping[str, int]) -> list[str]:
    told = []
    for name, goal in GOALS.items():
        ratio, memory = timings.ratio(name, PLAIN), peaks[name] / peaks[PLAIN]
        time_word = "met" if ratio.median <= goal.time else "missed"
        memory_word = "met" if memory <= goal.memory else "missed"
        told.append(
            f"{title}: {name}: {ratio.show()} times a plain step, goal {goal.time}: {time_word}; "
            f"peak memory {memory:.2f} times, goal {goal.memory}: {memory_word}."
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="samples of each contender in a trial")
    parser.add_argument("--trials", type=int, default=2, help="times that all is made anew")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[key for key in TASKS if key not in TINY])
    parser.add_argument("--tiny", action="store_true", help="tiny tasks, which show that it runs, and are not saved")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--peak", nargs=2, metavar=("TASK", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus uses hooks that torch warns of
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_of(*options.peak))
        return
    machine = Machine.here()
    tables, told, raw = [], [], {}
    for key in TINY if options.tiny else options.tasks:
        title, make, _ = TASKS[key]
        # The processor's time leaves out what other programs took of it, as long as there is one thread to count.
        clock = time.process_time if options.threads == 1 else time.perf_counter
        timings = interleave(
            partial(steps_of, key), trials=options.trials, rounds=options.rounds, warmup=1, clock=clock
        )
        peaks = {name: measure_peak(key, name, options.threads) for name in timings.seconds}
        count = sum(parameter.numel() for parameter in make().model.parameters())
        heading = f"{title}, {count:,} parameters, {options.threads} thread(s)"
        rows = [
            (
                name,
                timings.of(name).show(0, 1e3),
                timings.ratio(name, PLAIN).show(),
                f"{peaks[name] / 2**20:.0f}",
                f"{peaks[name] / peaks[PLAIN]:.2f}",
            )
            for name in timings.seconds
        ]
        tables.append(Table(heading, ("step", "ms", "of plain", "peak MB", "of plain"), rows))
        told += findings(title, timings, peaks)
        raw[heading] = {"seconds": timings.seconds, "peak_bytes": peaks}
    publish(
        "exact_tests",
        question=QUESTION,
        machine=machine,
        tables=tables,
        findings=told,
        data={"trials": options.trials, "rounds": options.rounds, "results": raw},
        save=not (options.no_save or options.tiny),
    )


if __name__ == "__main__":
    main()
