"""Muon and AdamW as one optimizer: which parameters each of them takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adabatch.recipes import MLP
from adabatch.recipes.optimizers import MuonAndAdamW

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = MLP((6, 8, 7, 5, 2))
    model.layers[1].bias.requires_grad_(False)
    optimizer = MuonAndAdamW(model.parameters(), lr=0.1, muon_lr=0.3, momentum=0.8)
    muon, adamw = optimizer.each
    assert (type(muon).__name__, type(adamw).__name__) == ("Muon", "AdamW")
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(7, 8), (5, 7)]
    assert [tuple(p.shape) for p in adamw.param_groups[0]["params"]] == [(8, 6), (8,), (5,), (2, 5), (2,)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
    assert muon.param_groups[0]["momentum"] == 0.8


def test_models_without_a_hidden_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="none between its first and its last: use AdamW"):
        MuonAndAdamW(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).parameters())
    with pytest.raises(TypeError, match="lr must be"):
        MuonAndAdamW(MLP((6, 8, 7, 2)).parameters(), lr="fast")  # type: ignore[arg-type]
