"""How far the updates of Muon and Shampoo are from the norm that their laws assume, at widths that can be run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from adabatch.optim import Shampoo

WIDTHS = (64, 256)
EXAMPLES = 64


def last_update(make: Callable[[nn.Parameter], Optimizer], width: int, steps: int = 10) -> torch.Tensor:
    """The last of some updates by gradients that are means over examples, divided by the learning rate of 1."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(width, width))
    optimizer = make(weight)
    before = weight.detach().clone()
    for _ in range(steps):
        weight.grad = torch.randn(width, EXAMPLES) @ torch.randn(EXAMPLES, width) / (EXAMPLES * width)
        before = weight.detach().clone()
        optimizer.step()
    return weight.detach() - before


def spectral_norms(make: Callable[[nn.Parameter], Optimizer]) -> list[float]:
    return [float(torch.linalg.matrix_norm(last_update(make, width), 2)) for width in WIDTHS]


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muons_update_has_the_same_norm_at_every_width(momentum: float) -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    found = spectral_norms(lambda p: muon([p], lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=0.0))
    # Five steps of its iteration leave singular values between 0.7 and 1.2.
    assert all(1.0 < norm < 1.25 for norm in found), found


def test_shampoos_update_grows_with_width_where_factors_are_averages() -> None:
    narrow, wide = spectral_norms(lambda p: Shampoo([p], lr=1.0, refresh_every=1, momentum=0.0))
    # The factors of one gradient give norm one; those of ten give more, the more so the lower the rank of each.
    assert 1.05 < wide / narrow < 1.4
