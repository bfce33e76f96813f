"""A model of any width, and data for it: the defaults of ``adabatch mup``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adabatch.recipes.digits import Digits
from adabatch.recipes.models import MLP

BATCH = 64


def mlp(width: int) -> nn.Module:
    """Two hidden layers of this width on the 64 pixels of the digits, with biases that start at zero.

    Weights start normal with standard deviation 1/sqrt(fan_in).
    """
    model = MLP((64, width, width, 10))
    for layer in model.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return model


def digits(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of 64 of scikit-learn's digits, in an order of this seed, each pixel with zero mean.

    A mean that is not zero would be the first eigenvalue of every statistic. Shapes (64, 64) and (64,).
    """
    images, labels = Digits(flatten=True).tensors
    images = (images - images.mean(0)) / images.std()
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        # What does not fill a batch is left out, so that all batches are equally large.
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield images[rows], labels[rows]
