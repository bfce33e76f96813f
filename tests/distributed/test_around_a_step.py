"""What people do around a step, on every engine: the table of docs/around_a_step.md, cell by cell.

Each cell trains two steps around ``AdaptiveBatch`` beside an oracle: a plain copy of the model, the gradient of each
part in a backward of its own, and the same update by hand. Moments and weights must agree, or the cell be refused in
the words that ``REFUSED`` has for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hard_models import (
    Batch,
    Checkpointed,
    CheckpointedByReentry,
    Tied,
    Unused,
    cross_entropies,
    dense,
    real,
    squared_errors,
    tokens,
)
from support.loops import network
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer, SparseAdam
from torch.utils.checkpoint import checkpoint

from adabatch import AdaptiveBatch, Constant
from adabatch.adaptive.options import EngineOptions, Measure
from adabatch.batch import GradientMoments
from adabatch.batch.moments import from_parts
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.per_example import PerExampleProbe

GUIDE = Path(__file__).parents[2] / "docs" / "around_a_step.md"
ENGINES = ["plain", "DDP", "`CommHookProbe`", "FSDP2", "`PerExampleProbe`"]
ALONE = {"plain", "`PerExampleProbe`"}
STEPS = 2

# Why a cell is "no"; every other is "yes".
REFUSED = {
    ("the same, of a layer used twice", "plain"): "came in several pieces .* use_reentrant=False",
    ("the same, of a layer used twice", "DDP"): "came in several pieces .* use_reentrant=False",
    ("the same, of a layer used twice", "`CommHookProbe`"): "came in several pieces .* use_reentrant=False",
    ("the same, of a layer used twice", "`PerExampleProbe`"): "two backwards .* use_reentrant=False",
    ("sparse embeddings, SGD", "`CommHookProbe`"): "does not measure sparse gradients: use MicroBatchProbe",
    ("sparse embeddings, SGD", "FSDP2"): "cannot reduce the sparse gradient of embedding: .* sparse=False",
    ("sparse embeddings, `SparseAdam`", "`CommHookProbe`"): "does not measure sparse gradients: use MicroBatchProbe",
    ("sparse embeddings, `SparseAdam`", "FSDP2"): "cannot reduce the sparse gradient of table: .* sparse=False",
    ("BatchNorm in training", "`PerExampleProbe`"): "BatchNorm1d normalises by statistics .* Use GroupNorm",
}


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


@dataclass(frozen=True, kw_only=True)
class Habit:
    """Something that people do around a step.

    Args:
        make: the model.
        losses, draw: the losses of examples, and a micro-batch of them.
        optimizer: parameters -> optimizer.
        inside, outside: what is done to the model before it is wrapped, and after.
        context: around the forward.
        clip: the largest norm of the gradient.
        scaled: with a ``GradScaler``.
        unused: some parameters get no gradient.
        sizes: examples in the micro-batches of each rank.
        tolerance: of moments and weights.
    """

    make: Callable[[], nn.Module] = network
    losses: Callable[[nn.Module, Batch], Tensor] = squared_errors
    draw: Callable[[int, torch.dtype], Batch] = real
    optimizer: Callable[[Any], Optimizer] = adamw
    inside: Callable[[nn.Module], nn.Module] = lambda model: model
    outside: Callable[[nn.Module], nn.Module] = lambda model: model
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    clip: float = math.inf
    scaled: bool = False
    unused: bool = False
    sizes: Sequence[Sequence[int]] = ((4, 4), (4, 4))
    tolerance: float = 1e-5


class Reentrant(Checkpointed):
    """Each layer is recomputed once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x.clone().requires_grad_(), use_reentrant=True))


class Table(nn.Module):
    """A sparse table, and nothing else that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, sparse=True)
        self.output = nn.Linear(5, 11).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.table(x))


class Frozen(nn.Module):
    """The first layer does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 7).requires_grad_(False)
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(x)))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))


def compiled(model: nn.Module) -> nn.Module:
    module: Any = torch.compile(model, backend="aot_eager")
    assert isinstance(module, nn.Module)
    return module


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def two_groups(parameters: Any) -> Optimizer:
    matrices, vectors = [], []
    for p in parameters:
        (matrices if p.dim() > 1 else vectors).append(p)
    return AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.03}], lr=0.01)


def trained(make: Callable[..., Optimizer], **options: Any) -> Callable[[Any], Optimizer]:
    """An optimizer of what trains, for those that do not pass over the rest by themselves."""
    return lambda parameters: make([p for p in parameters if p.requires_grad], **options)


bfloat16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
float16 = partial(torch.autocast, "cpu", dtype=torch.float16)
sparse = {"losses": cross_entropies, "draw": tokens}

HABITS = {
    "bf16 autocast": Habit(context=bfloat16),
    "fp16 autocast, `GradScaler`": Habit(context=float16, scaled=True, tolerance=2e-3),
    "clipping by norm": Habit(clip=0.1),
    "checkpointing, `use_reentrant=False`": Habit(make=Checkpointed),
    "checkpointing, `use_reentrant=True`": Habit(make=Reentrant),
    "the same, of a layer used twice": Habit(make=CheckpointedByReentry),
    "`torch.compile(model)`, then wrapped": Habit(inside=compiled),
    "wrapped, then `torch.compile`": Habit(outside=compiled),
    "wrapped, then `model.compile()`": Habit(outside=compiled_in_place),
    "frozen parameters": Habit(make=Frozen),
    "unused parameters": Habit(make=Unused, unused=True),
    "tied weights": Habit(make=Tied, losses=cross_entropies, draw=tokens),
    "sparse embeddings, SGD": Habit(make=partial(Tied, sparse=True), optimizer=partial(SGD, lr=0.1), **sparse),
    "sparse embeddings, `SparseAdam`": Habit(make=Table, optimizer=trained(SparseAdam, lr=0.01), **sparse),
    "several parameter groups": Habit(optimizer=two_groups),
    "unequal last micro-batches": Habit(sizes=((4, 3), (4, 1))),
    "BatchNorm in training": Habit(make=normalised, optimizer=partial(SGD, lr=0.1)),
}


def made(habit: Habit) -> nn.Module:
    torch.manual_seed(1)
    return habit.make()


def drawn(habit: Habit, step: int, rank: int) -> list[Batch]:
    torch.manual_seed(100 * step + rank)
    return [habit.draw(size, torch.float32) for size in habit.sizes[rank]]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()]).clone()


# --- around AdaptiveBatch, and by hand ------------------------------------------------------------------------------


def wrapped(habit: Habit, engine: str) -> nn.Module:
    model = habit.inside(made(habit))
    if engine in ("DDP", "`CommHookProbe`"):
        model = DistributedDataParallel(model, find_unused_parameters=habit.unused)
    elif engine == "FSDP2":
        model = fully_shard(model)
    return habit.outside(model)


def adaptive(rank: int, habit: Habit, engine: str) -> tuple[list[GradientMoments], Tensor]:
    """The moments of each step and the weights after the last."""
    model = wrapped(habit, engine)
    optimizer = habit.optimizer(model.parameters())
    scaler = GradScaler("cpu", init_scale=2.0**8) if habit.scaled else None
    probes: dict[str, Callable[[Any], Any]] = {"`CommHookProbe`": CommHookProbe, "`PerExampleProbe`": PerExampleProbe}
    ranks = 1 if engine in ALONE else 2
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(8 * ranks),
        micro_batch_size=4,
        measure=Measure(monitor=True),
        engine=EngineOptions(scaler=scaler),
        probe=probes[engine](model) if engine in probes else None,
    )
    loader = [batch for step in range(STEPS) for batch in drawn(habit, step, rank)]
    found = []
    for step in batches.steps(loader, count=lambda batch: len(batch[0])):  # the last of each step may be smaller
        for batch in step:
            with habit.context():
                losses = habit.losses(model, batch)
            step.backward(losses.mean())
        assert step.moments is not None
        found.append(step.moments)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if habit.clip < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), habit.clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    batches.remove()
    return found, weights(model)


def parts(habit: Habit, engine: str, model: nn.Module, step: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Of each rank, the parts: their sizes, and the gradients of their mean losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for rank in range(1 if engine in ALONE else 2):
        own = []
        for batch in drawn(habit, step, rank):
            with habit.context():
                losses = habit.losses(model, batch)
            each = list(losses) if engine == "`PerExampleProbe`" else [losses.mean()]
            for loss in each:
                loss.backward(retain_graph=True)  # not autograd.grad, which reentrant checkpoints do not allow
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                own.append((len(losses) // len(each), torch.cat([dense(grad) for grad in grads]).real))
                model.zero_grad()
        if engine == "`CommHookProbe`":
            total = sum(size for size, _ in own)
            own = [(total, sum((size / total * grad for size, grad in own), start=torch.zeros_like(own[0][1])))]
        yield own


def by_hand(habit: Habit, engine: str) -> tuple[list[GradientMoments], Tensor]:
    model = made(habit)
    optimizer = habit.optimizer(model.parameters())
    moments = []
    for step in range(STEPS):
        sizes, grads = zip(*(part for own in parts(habit, engine, model, step) for part in own), strict=True)
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        mean = (shares[:, None] * torch.stack(grads)).sum(0)
        squares = torch.stack(grads).square().sum(1)
        moments.append(from_parts(squares.numpy(), sizes, float(mean.square().sum()), weights=shares.numpy()))
        begin = 0
        for p in model.parameters():
            if p.requires_grad:
                grad = mean[begin : begin + p.numel()].view_as(p).to(p.dtype)
                begin += p.numel()
                is_table = isinstance(optimizer, SparseAdam)
                p.grad = grad.to_sparse(1) if is_table else grad if bool(grad.any()) else None
        if habit.clip < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), habit.clip)
        optimizer.step()
        optimizer.zero_grad()
    return moments, weights(model)


def outcome(rank: int, habit: Habit, engine: str) -> str:
    """ "yes", or the error that the cell ends with, or what is wrong with it."""
    torch._dynamo.reset()
    try:
        found, after = adaptive(rank, habit, engine)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    expected, right = by_hand(habit, engine)
    tolerance = habit.tolerance
    if habit.context is bfloat16 and engine == "`PerExampleProbe`":
        tolerance = 5e-3  # gradients of single examples, rounded each, do not add up to the rounded one of all
    for mine, other in zip(found, expected, strict=True):
        for name in ("part_sq", "part_size", "grad_sq", "num_examples", "num_parts"):
            if getattr(mine, name) != pytest.approx(getattr(other, name), rel=tolerance):
                return f"WRONG {name}: {getattr(mine, name)}, not {getattr(other, name)}"
    apart = float((after - right).abs().max())
    return "yes" if apart <= tolerance else f"WRONG weights, by {apart}"


def on_two_ranks(rank: int) -> dict[str, dict[str, str]]:
    return {
        name: {engine: outcome(rank, habit, engine) for engine in ENGINES if engine not in ALONE}
        for name, habit in HABITS.items()
    }


def table() -> dict[tuple[str, str], str]:
    """The guide's table: (habit, engine) -> "yes" or "no"."""
    lines = [line.strip("| ") for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in re.split(r"\s*\|\s*", line)] for line in lines)
    assert header[1:] == ENGINES
    return {(row[0], engine): cell for row in rows for engine, cell in zip(ENGINES, row[1:], strict=True)}


def check(found: dict[tuple[str, str], str]) -> None:
    for cell, said in found.items():
        if cell in REFUSED:
            assert re.search(REFUSED[cell], said), (cell, said)
        else:
            assert said == "yes", (cell, said)


def test_the_guide_has_a_row_for_each_habit() -> None:
    cells = table()
    assert {habit for habit, _ in cells} == HABITS.keys()
    assert {cell for cell, word in cells.items() if word == "no"} == REFUSED.keys()
    assert set(cells.values()) == {"yes", "no"}


@pytest.mark.parametrize("habit", HABITS)
def test_one_process(habit: str) -> None:
    check({(habit, engine): outcome(0, HABITS[habit], engine) for engine in ENGINES if engine in ALONE})


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, 2, tmp_path, timeout=300)
    assert first.keys() == HABITS.keys()
    for result in (first, second):
        check({(habit, engine): said for habit, cells in result.items() for engine, said in cells.items()})
