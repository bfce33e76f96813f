"""Statistics from products in bfloat16, against float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adabatch.optim import KFAC, Shampoo
from adabatch.optim.products import check_bfloat16, gram

UNIT = 2.0**-8
"""Largest relative error of one rounding to bfloat16."""
LARGEST = 2 * UNIT + UNIT**2 + UNIT * (1 + UNIT) ** 2
"""Largest error of a product in units of its trace, by the roundings of both factors and of the sums."""


def rows(kind: str, num: int = 300, side: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num, side, generator=generator)
    if kind == "one sign":
        return values.relu()
    if kind == "steep":
        return values * torch.logspace(0, -4, side)
    return values[:40] if kind == "few" else values


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


@pytest.mark.parametrize("kind", ["normal", "one sign", "steep", "few"])
def test_a_product_is_off_by_its_roundings_at_most(kind: str) -> None:
    given = rows(kind)
    found, exact = gram(given, bfloat16=True), given.double().T @ given.double()
    assert found.dtype is torch.float32
    assert spectral(found - exact) <= LARGEST * float(exact.trace())
    # Of the rounded rows only the sums are off: each entry by one rounding, and by its sum in float32.
    rounded = given.bfloat16().double()
    sums = len(given) * 2.0**-24 * rounded.abs().T @ rounded.abs()
    assert bool(((found - rounded.T @ rounded).abs() <= UNIT * (rounded.T @ rounded).abs() + sums).all())
    assert float(torch.linalg.eigvalsh(found.double())[0]) >= -UNIT * float((rounded.T @ rounded).norm()) - float(
        sums.norm()
    )
    assert not torch.equal(found, gram(given, bfloat16=False)), "nothing was rounded"


@pytest.mark.parametrize("bfloat16", [True, False])
def test_whole_numbers_of_a_few_bits_are_exact(bfloat16: bool) -> None:
    """For stacks of matrices too."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-2, 3, (3, 40, 8), generator=generator).float()  # sums of at most 160
    assert torch.equal(gram(whole, bfloat16=bfloat16), whole.mT @ whole)


def test_what_cannot_multiply_in_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    double, single = nn.Linear(3, 2).double(), nn.Linear(3, 2)
    for model in (double, single):
        made = (
            lambda model=model: Shampoo(model.parameters(), lr=0.1, bfloat16_products=True),
            lambda model=model: KFAC(model.parameters(), model, bfloat16_products=True),
        )
        for make in made:
            with pytest.raises(ValueError, match="float64 parameters") if model is double else nullcontext():
                make()
    with pytest.raises(ValueError, match="is on mps"):
        check_bfloat16(torch.float32, torch.device("mps"), "Shampoo")
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    for supported in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, found=supported: found)
        with nullcontext() if supported else pytest.raises(ValueError, match=r"compute capability 8\.0.*on cuda"):
            check_bfloat16(torch.float32, torch.device("cuda"), "K-FAC")


def test_rows_without_products_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="memory must be positive, got 0"):
        KFAC(model.parameters(), model, memory=0, bfloat16_products=True)


@pytest.mark.parametrize("block_size", [None, 64])
def test_shampoo_averages_as_it_does_in_float32(block_size: int | None) -> None:
    """Gradients of a few bits, whose products are exact, before and after the steps that see a part of them."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randint(-1, 2, (6, 96, 130), generator=generator).float()
    states = []
    for bfloat16 in (True, False):
        weight = nn.Parameter(torch.zeros(96, 130))
        optimizer = Shampoo(
            [weight],
            lr=0.0,
            beta=0.5,
            observe_parts=2,
            refresh_warmup=3,
            block_size=block_size,
            bfloat16_products=bfloat16,
        )
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        states.append(optimizer.state[weight])
    for side in ("left", "right"):
        assert states[0][side].dtype is torch.float32
        # Some ten sums in float32, in another order.
        torch.testing.assert_close(states[0][side], states[1][side], rtol=1e-5, atol=1e-5)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 20), nn.ReLU(), nn.Linear(20, 4)
    return nn.Sequential(*layers).to(dtype)


def factors(dtype: torch.dtype, *, bfloat16: bool) -> list[Tensor]:
    model = network(dtype)
    optimizer = KFAC(model.parameters(), model, fisher="empirical", bfloat16_products=bfloat16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(64, 2, 5, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(4, (64,), generator=generator)
        outputs = model(x.to(dtype))
        optimizer.observe(outputs, labels)
        F.cross_entropy(outputs, labels).backward()
        with torch.no_grad():  # the same weights in all runs
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.step()
    states = [optimizer.state[p] for name, p in model.named_parameters() if name.endswith("weight")]
    return [state[f"{side}_moment"] for state in states for side in ("input", "output")]


def test_factors_of_kfac_are_off_by_the_roundings_of_their_products() -> None:
    exact, rounded = factors(torch.float64, bfloat16=False), factors(torch.float32, bfloat16=True)
    for found, right in zip(rounded, exact, strict=True):
        assert found.dtype is torch.float32
        # An average of products is off by the average of what they are off by; gradients in float32 by 1e-5 more.
        assert 1e-5 < spectral(found - right) / float(right.trace()) <= LARGEST + 1e-5
