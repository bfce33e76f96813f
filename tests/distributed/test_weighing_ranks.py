"""Micro-batches weighed by their tokens: the gradient is the mean over all tokens of all ranks, on every engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.options import grouped
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from adabatch import AdaptiveBatch, Constant, GlobalOrder
from adabatch.batch import GradientMoments
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
    together = [part for part in together if tokens_in(part)]  # a part of nothing is none
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
            assert getattr(moments, name) == pytest.approx(getattr(expected, name), rel=1e-9, nan_ok=True), name


def steps_of(model: nn.Module, loader: Any, size: int, **options: Any) -> list[tuple[Tensor, Numbers, float]]:
    batches = AdaptiveBatch(
        model, SGD(model.parameters(), lr=0.0), Constant(size), micro_batch_size=MICRO, **grouped(options, monitor=True)
    )
    found = []
    for step in batches.steps(loader, weigh=tokens_in):
        for batch in step:
            step.backward(mean_loss(model, batch))
        assert step.moments is not None
        assert step.loss is not None
        found.append((gradient(model), tuple(step.moments), step.loss))
        model.zero_grad()
        batches.leave_out()
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


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_a_weight_that_cannot_be_is_refused(bad: float) -> None:
    model = language_model()
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(6), micro_batch_size=MICRO)
    with pytest.raises(ValueError, match="gave a micro-batch a weight that is negative or not finite"):
        next(batches.steps(GlobalOrder(TensorDataset(*sequences(12))), weigh=lambda _: bad))


def masked(data: tuple[Tensor, Tensor], *micro_batches: int) -> tuple[Tensor, Tensor]:
    """The same without a single token in some of the micro-batches, whose mean loss is then NaN."""
    inputs, targets = data
    targets = targets.clone()
    for index in micro_batches:
        targets[index * MICRO : (index + 1) * MICRO] = IGNORED
    return inputs, targets


@pytest.mark.parametrize("probe", [None, PerExampleProbe], ids=["micro-batches", "examples"])
def test_a_micro_batch_of_weight_0_counts_for_nothing(probe: Any) -> None:
    data = masked(sequences(18), 1, 5, 6)  # in the middle, at the end and at the beginning of a step
    model = language_model()
    options = {} if probe is None else {"probe": probe(model)}
    found = steps_of(model, DataLoader(TensorDataset(*data), batch_size=MICRO), 6, **options)
    if probe is None:
        check(found, in_steps(data, 6))
    for (grad, numbers, loss), parts in zip(found, in_steps(data, 6), strict=True):
        mean, _, mean_of_losses = oracle(parts, 1)
        torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12)
        assert loss == pytest.approx(mean_of_losses, rel=1e-10)
        assert GradientMoments(*numbers).is_finite


def passing_over(batches: AdaptiveBatch, model: nn.Module, data: Any, optimizer: Any, **options: Any) -> list[Any]:
    """The loop that leaves out what has no token; which steps were applied, and their gradients."""
    found = []
    for step in batches.steps(DataLoader(TensorDataset(*data), batch_size=MICRO), **options):
        for batch in step:
            if tokens_in(batch) == 0:
                continue
            step.backward(mean_loss(model, batch))
        found.append((str(step.decision.reason), [p.grad for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("monitor", [False, True], ids=["not probed", "probed"])
def test_a_micro_batch_of_weight_0_may_be_passed_over(monitor: bool) -> None:
    data = masked(sequences(18), 2, 3)
    model = language_model()
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(6), micro_batch_size=MICRO, **grouped(monitor=monitor))
    found = passing_over(batches, model, data, optimizer, weigh=tokens_in)
    for (_, grads), parts in zip(found, in_steps(data, 6), strict=True):
        grad = torch.cat([grad.flatten() for grad in grads])
        torch.testing.assert_close(grad, oracle(parts, 1)[0], rtol=1e-10, atol=1e-12)
    assert batches.progress.examples == 18


def test_a_micro_batch_that_weighs_its_examples_may_not_be_passed_over() -> None:
    model = language_model()
    optimizer = SGD(model.parameters(), lr=0.0)
    batches = AdaptiveBatch(model, optimizer, Constant(6), micro_batch_size=MICRO)
    with pytest.raises(RuntimeError, match="must be called once for each micro-batch"):
        passing_over(batches, model, masked(sequences(18), 2), optimizer)


@pytest.mark.parametrize("skip_nonfinite", [True, False])
@pytest.mark.parametrize("passes_over", [True, False])
def test_a_step_of_nothing_is_left_out_and_said(passes_over: bool, skip_nonfinite: bool, caplog: Any) -> None:
    data = masked(sequences(18), 3, 4, 5)
    model = language_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(6),
        micro_batch_size=MICRO,
        **grouped(monitor=True, skip_nonfinite=skip_nonfinite),
    )
    weights, reasons = [], []
    for step in batches.steps(DataLoader(TensorDataset(*data), batch_size=MICRO), weigh=tokens_in):
        for batch in step:
            if not (passes_over and tokens_in(batch) == 0):
                step.backward(mean_loss(model, batch))
        reasons.append(str(step.decision.reason))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert reasons[1] == "weighs nothing"
    assert "weighs nothing" not in (reasons[0], reasons[2])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.isfinite(weights[2]).all()
    assert (batches.progress.examples, batches.consumed.examples) == (12, 18)
    assert [record.getMessage() for record in caplog.records] == [
        "step 1 is left out: all of its micro-batches have weight 0"
    ]


class WithLoss(nn.Module):
    """Gives its loss, as models of Hugging Face do: among its predictions, or alone."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.inner, self.alone = language_model(), alone

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.inner(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return {"loss": loss} if self.alone else {"loss": loss, "logits": logits}


@pytest.mark.parametrize("alone", [False, True])
def test_a_loss_that_the_model_itself_gives_is_not_read_either(alone: bool) -> None:
    data = masked(sequences(6), 1)
    model = WithLoss(alone)
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(6), micro_batch_size=MICRO)
    step = next(batches.steps(DataLoader(TensorDataset(*data), batch_size=MICRO), weigh=tokens_in))
    for batch in step:
        step.backward(model(*batch)["loss"])
    torch.testing.assert_close(gradient(model), oracle(in_steps(data, 6)[0], 1)[0], rtol=1e-10, atol=1e-12)


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


def with_nothing(rank: int) -> dict[str, list[tuple[Tensor, Numbers, float]]]:
    """The same where some micro-batches are empty: on rank 0 the last of a step, on rank 1 all of one step."""
    data = masked(sequences(24), 2, 9, 10, 11)
    own = [column[rank * 12 : (rank + 1) * 12] for column in data]
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


def passed_over(rank: int) -> tuple[str, ...]:
    """The first step: rank 1 has nothing in it, and passes it over, but for the last one, for which rank 0 waits.

    What is said of passing that over, of a loss without a forward, of one beside which nothing is returned, and of one
    that is run as any other.
    """
    data = masked(sequences(12), 3, 4, 5)
    own = [column[rank * 6 : (rank + 1) * 6] for column in data]
    model = DistributedDataParallel(language_model())
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(12), micro_batch_size=MICRO)
    step = next(batches.steps(DataLoader(TensorDataset(*own), batch_size=MICRO), weigh=tokens_in))
    said = []

    def tried(call: Any, *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))

    for index, batch in enumerate(step):
        if rank == 1 and index < 2:
            continue
        if rank == 1:
            tried(step._pass_over, last=True)
            tried(step.backward, torch.tensor(math.nan))
            step._tools.empty_parts._outputs.append(torch.tensor(math.nan, requires_grad=True))
            tried(step.backward, torch.tensor(math.nan))
            step._tools.empty_parts._outputs.clear()
        tried(step.backward, mean_loss(model, batch))
    torch.testing.assert_close(gradient(model), gradient_of(tuple(column[:6] for column in data)))
    return tuple(said) if rank else ("", *said)


def uneven_weights(rank: int) -> str:
    model = DistributedDataParallel(language_model())
    batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(8), micro_batch_size=MICRO)
    with pytest.raises(ValueError, match="on at least one rank") as raised:
        next(batches.steps(GlobalOrder(TensorDataset(*sequences(12))), weigh=lambda _: -rank))
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
def test_micro_batches_of_weight_0_count_for_nothing_on_any_rank(tmp_path: Path) -> None:
    first, second = run_ranks(with_nothing, 2, tmp_path)
    data = masked(sequences(24), 2, 9, 10, 11)
    ranks = [tuple(column[:12] for column in data), tuple(column[12:] for column in data)]
    parts = [a + b for a, b in zip(*(in_steps(own, 6) for own in ranks), strict=True)]
    for engine, joined in ENGINES.items():
        check(first[engine], parts, joined)
        for (grad, *rest), (other, *others) in zip(first[engine], second[engine], strict=True):
            assert torch.equal(grad, other), engine
            assert rest == others, engine


@pytest.mark.distributed
def test_what_another_rank_waits_for_may_not_be_passed_over(tmp_path: Path) -> None:
    first, second = run_ranks(passed_over, 2, tmp_path)
    assert first == ("", "", "", "")
    assert "the other ranks wait for its backward: run its forward all the same" in second[0]
    for said in second[1:3]:
        assert "no gradient of zero could be sent through its forward" in said
    assert second[3] == ""


@pytest.mark.distributed
def test_a_weight_that_cannot_be_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    first, second = run_ranks(uneven_weights, 2, tmp_path)
    assert first == second


class BadOnRankOne(TensorDataset):
    """Its examples cannot be read on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(*sequences(12))
        self._rank = rank

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if self._rank == 1:
            raise OSError(f"example {index} cannot be read")
        return super().__getitem__(index)


def failing_on_one(rank: int) -> list[str]:
    def weigh(batch: Any) -> float:
        if rank == 1:
            raise KeyError("mask")
        return float(tokens_in(batch))

    said = []
    good, bad = TensorDataset(*sequences(12)), BadOnRankOne(rank)
    for data, function in ((good, weigh), (bad, tokens_in)):
        model = DistributedDataParallel(language_model())
        batches = AdaptiveBatch(model, SGD(model.parameters(), lr=0.0), Constant(8), micro_batch_size=MICRO)
        try:
            next(batches.steps(GlobalOrder(data), weigh=function))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_weight_that_fails_on_one_rank_is_named_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(failing_on_one, 2, tmp_path)
    assert second[0] == "KeyError: 'mask'"
    assert first[0] == "RuntimeError: the micro-batches of rank 1 could not be fetched or weighed: KeyError: 'mask'"
    assert second[1].startswith("OSError: example ")
    assert first[1].endswith(f"of rank 1 could not be fetched or weighed: {second[1]}")
