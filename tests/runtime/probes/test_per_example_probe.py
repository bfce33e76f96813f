"""The exact probe in the loop: every example is a part, whatever the micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import adabatch
from adabatch.batch.moments import GradientMoments, from_examples
from adabatch.recipes import DigitsCNN

N = 12


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(N, 1, 8, 8, generator=generator), torch.randint(10, (N,), generator=generator)


def model() -> nn.Module:
    torch.manual_seed(0)
    return DigitsCNN().double()


def brute_force(network: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """The gradient of each example, shape (num_examples, num_parameters)."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(functional.cross_entropy(network(x[i : i + 1]), y[i : i + 1]), network.parameters())
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).numpy()


def measured(micro_batch_size: int, *, products: bool = True, leave_one_out: bool = False) -> GradientMoments:
    network = model()
    x, y = data()
    x = x.double()
    loader = [(x[i : i + micro_batch_size], y[i : i + micro_batch_size]) for i in range(0, N, micro_batch_size)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batches = adabatch.AdaptiveBatch(
        network,
        optimizer,
        adabatch.batch.AugmentedInnerProductTest(theta=0.9, nu=5.0) if products else adabatch.NormTest(eta=0.5),
        micro_batch_size=micro_batch_size,
        limits=adabatch.Limits(min=N, max=N),
        probe=adabatch.PerExampleProbe(network, products=products, leave_one_out=leave_one_out),
    )
    (step,) = [step for step in batches.steps(loader) if [step.backward(loss_of(network, b)) for b in step]]
    assert step.moments is not None
    batches.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return step.moments


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_one_example_has_no_noise_along_the_gradient(leave_one_out: bool) -> None:
    network = nn.Linear(3, 1)
    probe = adabatch.PerExampleProbe(network, products=True, leave_one_out=leave_one_out)
    probe.start(1)
    probe.begin_part(1)
    network(torch.ones(1, 3)).mean().backward()
    probe.end_part(1, 1.0)
    found = probe.moments(probe.collect().tolist())
    assert found.noise_along is not None
    assert math.isnan(found.noise_along)
    assert math.isnan(found.noise)
    assert found.grad_sq == pytest.approx(4.0)


def loss_of(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(network(batch[0]), batch[1])


@pytest.mark.parametrize("micro_batch_size", [12, 6, 3])
def test_the_moments_are_those_of_the_examples(micro_batch_size: int) -> None:
    x, y = data()
    grads = brute_force(model(), x.double(), y)
    expected = from_examples((grads**2).sum(1), grads @ grads.mean(0))
    found = measured(micro_batch_size)
    assert found.num_parts == N
    assert found.noise == pytest.approx(expected.noise, rel=1e-10)
    assert found.signal == pytest.approx(expected.signal, rel=1e-9)
    assert found.noise_along == pytest.approx(expected.noise_along, rel=1e-9)


def test_a_fused_probe_measures_the_same_and_trains_the_same() -> None:
    """The first micro-batch of a run is checked against autograd's gradient; the five after it are not."""
    found = []
    for fused in (False, True):
        network = model()
        x, y = data()
        loader = [(x[i : i + 4].double(), y[i : i + 4]) for i in (0, 4, 8)] * 2
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        batches = adabatch.AdaptiveBatch(
            network,
            optimizer,
            adabatch.batch.AugmentedInnerProductTest(theta=0.9, nu=5.0),
            micro_batch_size=4,
            limits=adabatch.Limits(min=N, max=N),
            probe=adabatch.PerExampleProbe(network, products=True, fused=fused),
        )
        for step in batches.steps(loader):
            for batch in step:
                step.backward(loss_of(network, batch))
            optimizer.step()
            optimizer.zero_grad()
            found.append(step.moments)
        batches.remove()
        found.append([p.detach() for p in network.parameters()])
    first, second, weights, *fused_found = found
    assert first != second
    for moments, fused_moments in zip((first, second), fused_found[:2], strict=True):
        for name in ("noise", "signal", "noise_along"):
            assert getattr(fused_moments, name) == pytest.approx(getattr(moments, name), rel=1e-9)
    for mine, other in zip(fused_found[2], weights, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def test_leaving_one_out_compares_with_the_mean_of_the_others() -> None:
    x, y = data()
    grads = brute_force(model(), x.double(), y)
    others = (grads.sum(0) - grads) / (N - 1)
    products = (grads * others).sum(1)
    found = measured(4, leave_one_out=True)
    assert found.noise_along == pytest.approx(products.var(ddof=1) / products.mean(), rel=1e-9)


def test_one_rank_without_accumulation_has_a_spread() -> None:
    assert math.isfinite(measured(N, products=False).noise)
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"at least two micro-batches"):
        adabatch.AdaptiveBatch(
            network,
            optimizer,
            adabatch.NormTest(eta=0.5),
            micro_batch_size=N,
            limits=adabatch.Limits(min=N, max=N),
        )


def test_inner_products_are_asked_for_by_name() -> None:
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"inner products.*PerExampleProbe\(model, products=True\)"):
        adabatch.AdaptiveBatch(
            network,
            optimizer,
            adabatch.batch.InnerProductTest(theta=0.9),
            micro_batch_size=4,
            limits=adabatch.Limits(min=8, max=16),
        )
    with pytest.raises(ValueError, match="products=True"):
        adabatch.PerExampleProbe(network, leave_one_out=True)


def test_batch_normalization_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"BatchNorm1d.*GroupNorm"):
        adabatch.PerExampleProbe(network)
