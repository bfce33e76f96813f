"""Rules: what one call of a layer contributes to the per-example gradients of its parameters, per kind of layer.

A rule receives the module, its input and the gradient at its output, both with the examples along the first dimension,
and yields the contribution to each trainable parameter. It does not read the weights, so it also works for sharded
parameters. Rules apply to exactly these classes: a subclass may compute something else, and is replayed (`replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adabatch.runtime.per_example.contributions import Contribution, Correlation, Dense, Lookup, OuterProduct, wide


def _trains(module: nn.Module, name: str) -> bool:
    parameter = getattr(module, name)
    return parameter is not None and parameter.requires_grad


def _sum_between(values: Tensor, kept: int) -> Tensor:
    """Sums all but the first and the last ``kept`` dimensions: (n, ..., *kept) -> (n, *kept)."""
    middle = tuple(range(1, values.dim() - kept))
    return values.sum(middle) if middle else values


def _linear(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    # All dimensions between examples and features are positions, over which one weight is shared.
    rows = grad.reshape(grad.shape[0], -1, grad.shape[-1])
    if _trains(module, "weight"):
        yield "weight", OuterProduct(rows, inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]))
    if _trains(module, "bias"):
        yield "bias", Dense(wide(rows).sum(1))


def pads_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """How much a convolution pads, as F.pad takes it: beginning with the last dimension."""
    pads: list[int] = []
    for dim in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            span = module.dilation[dim] * (module.kernel_size[dim] - 1)
            total = span if module.padding == "same" else 0
            # As torch does for "same": an odd rest goes to the end.
            pads += [total // 2, total - total // 2]
        else:
            pads += [module.padding[dim]] * 2
    return tuple(pads)


def _conv(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if _trains(module, "weight"):
        yield (
            "weight",
            Correlation(
                grad,
                inputs,
                tuple(module.kernel_size),
                tuple(module.stride),
                tuple(module.dilation),
                module.groups,
                pads_of(module),
                # F.pad has another word for it.
                "constant" if module.padding_mode == "zeros" else module.padding_mode,
            ),
        )
    if _trains(module, "bias"):
        yield "bias", Dense(wide(grad).flatten(2).sum(2))


def _embedding(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.Embedding)
    index = inputs.reshape(inputs.shape[0], -1).long()
    values = grad.reshape(*index.shape, grad.shape[-1])
    if module.padding_idx is not None:
        # torch gives the padding row no gradient.
        values = values.masked_fill((index == module.padding_idx)[:, :, None], 0)
    yield "weight", Lookup(index, values, module.num_embeddings)


def _layer_norm(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)
    if _trains(module, "weight"):
        # Computed again from the input, without the weight, which may be sharded and which the rule must not read.
        normed = F.layer_norm(wide(inputs), shape, eps=module.eps)
        yield "weight", Dense(_sum_between(normed.mul_(wide(grad)), len(shape)))
    if _trains(module, "bias"):
        yield "bias", Dense(_sum_between(wide(grad), len(shape)))


def _rms_norm(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.RMSNorm)
    # The input's own precision, as torch takes it, and not that of the widened input.
    eps = torch.finfo(inputs.dtype).eps if module.eps is None else module.eps
    normed = F.rms_norm(wide(inputs), list(module.normalized_shape), eps=eps)
    yield "weight", Dense(_sum_between(normed.mul_(wide(grad)), len(module.normalized_shape)))


def _affine(
    module: nn.Module, normalise: Callable[[Tensor], Tensor], inputs: Tensor, grad: Tensor
) -> Iterator[tuple[str, Contribution]]:
    """One gain and one offset per channel, with the channels along the second dimension."""
    shape = (*grad.shape[:2], -1)
    if _trains(module, "weight"):
        yield "weight", Dense((normalise(wide(inputs)) * wide(grad)).reshape(shape).sum(2))
    if _trains(module, "bias"):
        yield "bias", Dense(wide(grad).reshape(shape).sum(2))


def _group_norm(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.GroupNorm)
    return _affine(module, partial(F.group_norm, num_groups=module.num_groups, eps=module.eps), inputs, grad)


def _instance_norm(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    # Tracked statistics do not couple examples: in training each example uses its own, in evaluation all use those of
    # earlier steps.
    if module.training or not module.track_running_stats:
        return _affine(module, partial(F.instance_norm, eps=module.eps), inputs, grad)
    return _frozen_batch_norm(module, inputs, grad)


def _frozen_batch_norm(module: nn.Module, inputs: Tensor, grad: Tensor) -> Iterator[tuple[str, Contribution]]:
    """Normalisation by running statistics, in evaluation mode. (`sites.refuse` raises in training mode.)"""
    assert isinstance(module, (*BATCH_NORMS, *_INSTANCE_NORMS))
    mean, var = wide(module.get_buffer("running_mean")), wide(module.get_buffer("running_var"))
    return _affine(module, partial(F.batch_norm, running_mean=mean, running_var=var, eps=module.eps), inputs, grad)


class Rule(NamedTuple):
    """How to compute the contributions of one kind of layer.

    Args:
        contributions: (module, input, gradient at the output) -> the name of each trainable parameter, and what the
            call adds to its gradients.
        item_dims: (module) -> the smallest number of dimensions of the input of one example.
        inputless: parameters whose contribution does not need the input. If only these train, the input is not kept,
            and ``contributions`` receives an empty tensor.
    """

    contributions: Callable[[nn.Module, Tensor, Tensor], Iterator[tuple[str, Contribution]]]
    item_dims: Callable[[nn.Module], int]
    inputless: frozenset[str] = frozenset({"bias"})


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _one(module: nn.Module) -> int:
    return 1


def _none(module: nn.Module) -> int:
    return 0


def _image_dims(module: nn.Module) -> int:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return len(module.kernel_size) + 1


def _normalized_dims(module: nn.Module) -> int:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return len(module.normalized_shape)


def _instance_dims(module: nn.Module) -> int:
    return 2 + next(i for i, kind in enumerate(_INSTANCE_NORMS) if isinstance(module, kind))


RULES: Mapping[type[nn.Module], Rule] = MappingProxyType(
    {
        nn.Linear: Rule(_linear, _one),
        nn.Conv1d: Rule(_conv, _image_dims),
        nn.Conv2d: Rule(_conv, _image_dims),
        nn.Conv3d: Rule(_conv, _image_dims),
        nn.Embedding: Rule(_embedding, _none),
        nn.LayerNorm: Rule(_layer_norm, _normalized_dims),
        nn.RMSNorm: Rule(_rms_norm, _normalized_dims),
        nn.GroupNorm: Rule(_group_norm, _one),
        nn.InstanceNorm1d: Rule(_instance_norm, _instance_dims),
        nn.InstanceNorm2d: Rule(_instance_norm, _instance_dims),
        nn.InstanceNorm3d: Rule(_instance_norm, _instance_dims),
        nn.BatchNorm1d: Rule(_frozen_batch_norm, _one),
        nn.BatchNorm2d: Rule(_frozen_batch_norm, _one),
        nn.BatchNorm3d: Rule(_frozen_batch_norm, _one),
        nn.SyncBatchNorm: Rule(_frozen_batch_norm, _one),
    }
)
