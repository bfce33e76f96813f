"""Micro-batches weighed by their tokens: the gradient is the mean over all tokens of all ranks, on every engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from adabatch import AdaptiveBatch, Constant, GlobalOrder, GradientMoments
from adabatch.batch.moments import from_parts
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.per_example import PerExampleProbe

MICRO, LENGTH, VOCABULARY, IGNORED = 2, 5, 7, -100
Numbers = tuple[Any, ...]


def sequences(num_examples: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, shape (num_examples, LENGTH); a target that is ignored is padding."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(VOCABULARY, (num_examples, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (num_examples, 1), generator=generator)
    targets = torch.randint(VOCABULARY, (num_examples, LENGTH), generator=generator)
    return inputs, targets.where(torch.arange(LENGTH) < lengths, IGNORED)


def tokens_in(batch: Any) -> Tensor:
    return (batch[1] != IGNORED).sum()


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, VOCABULARY), nn.LogSoftmax(-1)
    ).double()


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def gradient(model: nn.Module) -> Tensor:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])


def gradient_of(batch: Any) -> Tensor:
    model = language_model()
    mean_loss(model, batch).backward()
    return gradient(model)


def oracle(parts: list[Any], joined: int) -> tuple[Tensor, GradientMoments, float]:
    """The gradient and loss of all tokens at once, and the moments of the parts, ``joined`` micro-batches each."""
    everything = [torch.cat(column) for column in zip(*parts, strict=True)]
    together = [
        [torch.cat(column) for column in zip(*parts[begin : begin + joined], strict=True)]
        for begin in range(0, len(parts), joined)
    ]
    weights = torch.stack([tokens_in(part) for part in together]).double()
    weights /= weights.sum()
    grads = torch.stack([gradient_of(part) for part in together])
    mean = gradient_of(everything)
    torch.testing.assert_close((weights[:, None] * grads).sum(0), mean, rtol=1e-10, atol=1e-12)
    num_examples = len(everything[0])
    moments = from_parts(
        grads.square().sum(1).numpy(),
        (weights * num_examples).numpy(),
        float(mean.square().sum()),
        weights=weights.numpy(),
    )
    return mean, moments, float(mean_loss(language_model(), everything).detach())


def check(found: list[tuple[Tensor, Numbers, float]], parts: list[list[Any]], joined: int = 1) -> None:
    """Every step against the oracle; ``parts``: the micro-batches of each step, rank after rank."""
    assert len(found) == len(parts)
    for (grad, numbers, loss), micro_batches in zip(found, parts, strict=True):
        mean, expected, mean_of_losses = oracle(micro_batches, joined)
        torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12)
        assert loss == pytest.approx(mean_of_losses, rel=1e-10)
        moments = GradientMoments(*numbers)
        assert moments.num_parts == expected.num_parts
        assert moments.num_examples == pytest.approx(sum(len(part[0]) for part in micro_batches), rel=1e-12)
        for name in ("part_sq", "part_size", "grad_sq", "noise", "signal"):
            assert getattr(moments, name) == pytest.approx(getattr(expected, name), rel=1e-9), name


def steps_of(model: nn.Module, loader: Any, size: int, **options: Any) -> list[tuple[Tensor, Numbers, float]]:
    batches = AdaptiveBatch(
        model, SGD(model.parameters(), lr=0.0), Constant(size), micro_batch_size=MICRO, monitor=True, **options
    )
    found = []
    for step in batches.steps(loader, weigh=tokens_in):
        for batch in step:
            step.backward(mean_loss(model, batch))
        assert step.moments is not None
        assert step.loss is not None
        found.append((gradient(model), tuple(step.moments), step.loss))
        model.zero_grad()
    batches.remove()
    return found


def in_steps(data: tuple[Tensor, Tensor], size: int) -> list[list[Any]]:
    """The micro-batches of each step of a single rank, in order; the last may be smaller."""
    columns = [column.split(size) for column in data]
    return [
        list(zip(inputs.split(MICRO), targets.split(MICRO), strict=True))
        for inputs, targets in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("source", ["loader", "order"])
def test_the_gradient_of_a_step_is_the_mean_over_its_tokens(source: str) -> None:
    data = sequences(24 if source == "order" else 21)  # the loader ends with a short step, and an example on its own
    loader: Any = (
        GlobalOrder(TensorDataset(*data), shuffle=False)
        if source == "order"
        else DataLoader(TensorDataset(*data), batch_size=MICRO)
    )
    check(steps_of(language_model(), loader, 6), in_steps(data, 6))


def test_single_examples_weigh_what_their_micro_batch_does() -> None:
    data = sequences(12)
    model = language_model()
    options = {"probe": PerExampleProbe(model)}
    for (grad, numbers, _), parts in zip(
        steps_of(model, DataLoader(TensorDataset(*data), batch_size=MICRO), 6, **options),
        in_steps(data, 6),
        strict=True,
    ):
        mean, _, _ = oracle(parts, 1)
        torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12)
        weights, squares = [], []
        for part in parts:
            for inputs, targets in zip(*part, strict=True):
                # An example's share of the micro-batch's mean loss, times the examples in it.
                scale = MICRO * int(tokens_in((inputs, targets))) / int(tokens_in(part))
                squares.append(float((scale * gradient_of((inputs[None], targets[None]))).square().sum()))
                weights.append(int(tokens_in(part)) / sum(int(tokens_in(each)) for each in parts) / MICRO)
        expected = from_parts(squares, 1.0, float(mean.square().sum()), weights=weights)
        moments = GradientMoments(*numbers)
        for name in ("part_sq", "part_size", "grad_sq", "num_examples", "noise", "signal"):
            assert getattr(moments, name) == pytest.approx(getattr(expected, name), rel=1e-9), name


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_a_micro_batch_that_weighs_nothing_is_refused(bad: float) -> None:
    model = language_model()
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(6), micro_batch_size=MICRO)
    with pytest.raises(ValueError, match="gave a micro-batch a weight that is not positive and finite"):
        next(batches.steps(GlobalOrder(TensorDataset(*sequences(12))), weigh=lambda _: bad))


# --- ranks ----------------------------------------------------------------------------------------------------------

ENGINES = {"DDP": 1, "DDP, hook": 3, "FSDP2, each": 1, "FSDP2, last": 3}
"""How many micro-batches of a rank are one part."""


def on_engines(rank: int) -> dict[str, list[tuple[Tensor, Numbers, float]]]:
    """Steps of 3 micro-batches on each of 2 ranks; the last one of rank 1 is smaller."""
    data = sequences(24)
    own = [column[rank * 12 : (rank + 1) * 12 - rank] for column in data]
    found = {}
    for engine in ENGINES:
        model = language_model()
        wrapped = fully_shard(model) if engine.startswith("FSDP2") else DistributedDataParallel(model)
        options: dict[str, Any] = {}
        if engine == "DDP, hook":
            options["probe"] = CommHookProbe(wrapped)
        if engine == "FSDP2, last":
            options["gradient_sync"] = "last"
        found[engine] = steps_of(
            wrapped, list(zip(*(column.split(MICRO) for column in own), strict=True)), 12, **options
        )
    return found


def uneven_weights(rank: int) -> str:
    model = DistributedDataParallel(language_model())
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(8), micro_batch_size=MICRO)
    with pytest.raises(ValueError, match="on at least one rank") as raised:
        next(batches.steps(GlobalOrder(TensorDataset(*sequences(12))), weigh=lambda _: 1 - rank))
    return str(raised.value)


@pytest.mark.distributed
def test_the_gradient_is_the_mean_over_the_tokens_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(on_engines, 2, tmp_path)
    data = sequences(24)
    ranks = [[column[:12] for column in data], [column[12:23] for column in data]]
    parts = [a + b for a, b in zip(*(in_steps(tuple(own), 6) for own in ranks), strict=True)]
    for engine, joined in ENGINES.items():
        check(first[engine], parts, joined)
        for (grad, *rest), (other, *others) in zip(first[engine], second[engine], strict=True):
            assert torch.equal(grad, other), engine
            assert rest == others, engine


@pytest.mark.distributed
def test_a_weight_that_cannot_be_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    first, second = run_ranks(uneven_weights, 2, tmp_path)
    assert first == second
