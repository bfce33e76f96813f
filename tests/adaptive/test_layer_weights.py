"""Noise measured so that it compares across widths: weights of layers, and the metric of K-FAC."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.options import grouped
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from adabatch import (
    AdaptiveBatch,
    GlobalOrder,
    Limits,
    MicroBatchProbe,
    NoiseScale,
    NormTest,
    across_ranks,
    examples,
)
from adabatch.batch import AugmentedInnerProductTest
from adabatch.batch.moments import GradientMoments
from adabatch.optim import KFAC, Shampoo, mup


def net(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def plan_of(width: int) -> tuple[nn.Sequential, mup.Plan]:
    model = net(width)
    with torch.device("meta"):
        plan = mup.plan(net(64), net(16)).at(model)
    mup.init_(model, plan)
    return model, plan


def data(num: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(num, 8, generator=generator), torch.randint(3, (num,), generator=generator))


def journal_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, criterion: Any = None, num: int = 64, **options: Any
) -> list[dict[str, Any]]:
    batches = AdaptiveBatch(
        model,
        optimizer,
        criterion or NormTest(eta=0.9),
        micro_batch_size=8,
        limits=Limits(min=32, max=32),
        journal=path,
        **grouped(options),
    )
    for step in batches.steps(GlobalOrder(data(), seed=0), until=examples(num)):
        for x, y in step:
            outputs = model(x)
            if isinstance(optimizer, KFAC):
                optimizer.observe(outputs)
            step.backward(F.cross_entropy(outputs, y))
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_weights_multiply_the_squares_of_their_layers() -> None:
    layers = {"a": GradientMoments(3.0, 2, 1.0, 8, 4), "b": GradientMoments(10.0, 2, 4.0, 8, 4)}
    whole = GradientMoments(13.0, 2, 5.0, 8, 4, layers=layers)
    weighted = whole.weighted({"a": 0.5, "b": 2.0})
    assert (weighted.part_sq, weighted.grad_sq) == (21.5, 8.5)
    assert weighted.noise == pytest.approx(0.5 * layers["a"].noise + 2 * layers["b"].noise)


def test_equal_weights_change_nothing(tmp_path: Path) -> None:
    found = []
    for name, weights in (("plain", None), ("ones", {n: 1.0 for n, _ in net(16).named_parameters()})):
        model = net(16)
        found.append(
            journal_of(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / name, layer_weights=weights)
        )
    for plain, ones in zip(*found, strict=True):
        for name in ("noise", "signal"):
            assert ones["averages"][name] == pytest.approx(plain["averages"][name], rel=1e-9)
        assert ones["next"] == plain["next"]


def test_the_weighted_norm_keeps_its_balance_at_every_width(tmp_path: Path) -> None:
    """The readout's share of the plain squared norm grows with width; of the weighted one it stays."""
    shares: dict[bool, list[float]] = {True: [], False: []}
    for width in (16, 1024):
        model, plan = plan_of(width)
        weights = plan.layer_weights()
        F.cross_entropy(model(data().tensors[0]), data().tensors[1]).backward()
        for weighted in (True, False):
            squares = {
                name: float(p.grad.square().sum()) * (weights[name] if weighted else 1.0)
                for name, p in model.named_parameters()
                if p.grad is not None and p.dim() == 2
            }
            shares[weighted].append(squares["4.weight"] / sum(squares.values()))
    assert shares[False][1] > 0.85 > 0.6 > shares[False][0]
    assert abs(shares[True][1] - shares[True][0]) < 0.15


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({"0.weight": 1.0}, {}, r"0.bias, 2.bias, 2.weight missing, none unknown"),
        ({"nothing": 1.0}, {}, r"nothing unknown"),
        (dict.fromkeys(dict(net(4).named_parameters()), 0.0), {}, r"positive and finite, got 0.weight=0.0"),
        (
            dict.fromkeys(dict(net(4).named_parameters()), 1.0),
            {"per_layer": "module"},
            r"layers='module' groups them otherwise",
        ),
        (
            dict.fromkeys(dict(net(4).named_parameters()), 1.0),
            {"criterion": AugmentedInnerProductTest(theta=0.9, nu=1.0)},
            r"not with a test of inner products",
        ),
    ],
)
def test_bad_weights(weights: Mapping[str, float], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = net(4)
    with pytest.raises(ValueError, match=words):
        journal_of(
            model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "journal", layer_weights=weights, **options
        )


def test_a_given_probe_has_its_layers_already(tmp_path: Path) -> None:
    model = net(4)
    weights = dict.fromkeys(dict(model.named_parameters()), 1.0)
    with pytest.raises(ValueError, match=r"which a probe must know when it is made"):
        journal_of(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            tmp_path / "journal",
            layer_weights=weights,
            probe=MicroBatchProbe(model.parameters()),
        )


# --- the metric of K-FAC ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"damping_form": "kronecker"}, {"memory": 0}, {"exponents": (0.5, 1)}])
def test_a_whitened_gradient_has_the_norm_of_the_metric(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    optimizer = KFAC(model.parameters(), model, **options)
    outputs = model(torch.randint(7, (5, 2)))
    optimizer.observe(outputs)
    F.cross_entropy(outputs, torch.randint(3, (5,))).backward()
    assert not optimizer.whitens
    optimizer.step()
    assert optimizer.whitens
    for p in model.parameters():
        grad = torch.randn_like(p)
        expected = (grad * optimizer.precondition(p, grad)).sum()
        torch.testing.assert_close(optimizer.whiten(p, grad).square().sum(), expected, rtol=1e-8, atol=1e-12)


def test_noise_in_the_metric_of_kfac(tmp_path: Path) -> None:
    """Each step's moments against gradients taken part by part under the inverses of the step before."""
    model = net(16).double()
    optimizer = KFAC(model.parameters(), model, lr=0.01)
    batches = AdaptiveBatch(
        model, optimizer, NoiseScale(norm="kfac"), micro_batch_size=8, limits=Limits(min=32, max=32)
    )
    seen = 0
    for step in batches.steps(GlobalOrder(data(), seed=0), until=examples(96)):
        known, parts = optimizer.whitens, []
        for x, y in step:
            outputs = model(x.double())
            grads = torch.autograd.grad(F.cross_entropy(outputs, y), list(model.parameters()), retain_graph=True)
            whitened = [optimizer.whiten(p, grad).flatten() for p, grad in zip(model.parameters(), grads, strict=True)]
            parts.append(torch.cat(whitened))
            outputs = model(x.double())
            optimizer.observe(outputs)
            step.backward(F.cross_entropy(outputs, y))
        optimizer.step()
        optimizer.zero_grad()
        assert step.moments is not None
        if known:
            stacked = torch.stack(parts)
            assert step.moments.norm == "kfac"
            assert step.moments.part_sq == pytest.approx(float(stacked.square().sum(1).mean()), rel=1e-6)
            assert step.moments.grad_sq == pytest.approx(float(stacked.mean(0).square().sum()), rel=1e-6)
            seen += 1
        else:
            assert step.decision is not None
            assert step.decision.plan == step.plan
    assert seen == 2


def on_rank(rank: int, wrap: str) -> Any:
    model = net(16)
    if wrap == "fsdp2":
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    optimizer = KFAC(wrapped.parameters(), wrapped, lr=0.01, **across_ranks(wrapped))
    try:
        batches = AdaptiveBatch(
            wrapped, optimizer, NoiseScale(norm="kfac"), micro_batch_size=8, limits=Limits(min=32, max=64)
        )
    except ValueError as error:
        return str(error)
    sizes = []
    for step in batches.steps(GlobalOrder(data(), seed=0), until=examples(256)):
        for x, y in step:
            outputs = wrapped(x)
            optimizer.observe(outputs)
            step.backward(F.cross_entropy(outputs, y))
        optimizer.step()
        optimizer.zero_grad()
        assert step.moments is not None
        sizes.append((step.global_batch_size, step.moments.norm, round(step.moments.noise, 6)))
    return sizes


@pytest.mark.distributed
def test_ranks_measure_the_same_in_the_metric_of_kfac(tmp_path: Path) -> None:
    first, second = run_ranks(on_rank, 2, tmp_path, "ddp")
    assert repr(first) == repr(second)  # the first step's noise is not a number: there is no curvature yet
    assert len(first) > 3
    (refused, _) = run_ranks(on_rank, 2, tmp_path, "fsdp2")
    assert "norm='kfac' mixes coordinates" in refused


def test_an_optimizer_without_curvature_is_refused() -> None:
    model = net(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"norm='kfac' reads the curvature of adabatch.optim.KFAC, which SGD does not"):
        AdaptiveBatch(model, optimizer, NoiseScale(norm="kfac"), micro_batch_size=8, limits=Limits(min=32, max=64))


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda model: KFAC(model.parameters(), model), 2.0),
        (lambda model: Shampoo(model.parameters(), 0.1), 2.0),
        (lambda model: torch.optim.SGD(model.parameters(), 0.1), 1.0),
    ],
)
def test_second_order_methods_follow_the_square_root_of_the_batch_by_default(
    make: Callable[[nn.Module], torch.optim.Optimizer], factor: float
) -> None:
    model = net(4)
    batches = AdaptiveBatch(
        model,
        make(model),
        NormTest(eta=0.5),
        micro_batch_size=8,
        limits=Limits(min=64, max=64),
        reference_batch_size=16,
    )
    assert batches.lr_factor == pytest.approx(factor)
    batches.remove()
