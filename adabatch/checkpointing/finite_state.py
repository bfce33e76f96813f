"""Weights and optimizer states that are not finite: resuming from them would be of no use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from adabatch.checkpointing.files import CheckpointError
from adabatch.runtime.nested import leaves
from adabatch.runtime.wrappers.fsdp2 import own_piece

NamedTensor = tuple[str, Tensor]
"""A tensor, and what it is called in an error."""


def trained_weights(model: nn.Module) -> Iterator[NamedTensor]:
    """The trained parameters of a model."""
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def optimizer_states(optimizer: Optimizer, model: nn.Module) -> Iterator[NamedTensor]:
    """The tensors in an optimizer's state, such as Adam's averages, by the names of the model's parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for path, value in leaves(state):
            if isinstance(value, Tensor):
                place = "".join(f"[{key!r}]" for key in path)
                yield f"the optimizer's state{place} of {names.get(id(parameter), 'a parameter')}", value


def check_finite(named: Iterable[NamedTensor]) -> None:
    """Checks this rank's pieces of tensors, so that a useless checkpoint does not take the place of a good one.

    Raises:
        CheckpointError: if one is not finite; names it.
    """
    pieces = [(name, own_piece(tensor)[0]) for name, tensor in named]
    pieces = [(name, each) for name, each in pieces if each.numel() and (each.is_floating_point() or each.is_complex())]
    # The largest absolute value: one host sync for all of them.
    if not pieces or torch.isfinite(get_total_norm([each for _, each in pieces], norm_type=math.inf)):
        return
    bad = next((name for name, each in pieces if not torch.isfinite(each).all()), "a tensor")
    raise CheckpointError(
        f"{bad} holds numbers that are not finite, and resuming from them would be useless: the existing checkpoints "
        f"are kept; resume from the newest one with a smaller learning rate"
    )
