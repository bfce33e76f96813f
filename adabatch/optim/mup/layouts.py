"""Which dimensions of a parameter are fans, according to the module that owns it."""

from __future__ import annotations

from typing import NamedTuple, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from adabatch.optim.mup.entry import Dim, ParameterKind

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Use(NamedTuple):
    """What a module does with a parameter.

    Args:
        kind: the kind of the parameter.
        layout: its dimensions; None if the module's type does not determine them.
    """

    kind: ParameterKind
    layout: tuple[Dim, ...] | None


def use_of(module: nn.Module, key: str, parameter: Tensor) -> Use:
    """What ``module`` does with its parameter ``key``.

    This is known for torch's linear, bilinear, convolution, embedding, recurrent, attention and normalization layers.
    In other modules a parameter with at most one dimension is a vector, and the layout of others is unknown, since they
    may store weights as (out, in) or as (in, out).
    """
    dims = parameter.dim()
    if isinstance(module, _NORMS):
        # Before biases: the offset of a norm goes with its gain.
        return Use("norm", _repeated("out", dims))
    # Recurrent layers number theirs: bias_ih_l0.
    if key.startswith("bias") or dims == 0:
        return Use("bias", _last_out(dims))
    if isinstance(module, nn.Linear | nn.RNNBase | nn.RNNCellBase) and dims == 2:
        return Use("weight", ("out", "in"))
    if isinstance(module, nn.MultiheadAttention) and key in _PROJECTIONS:
        return Use("weight", ("out", "in"))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Use("embedding", ("in", "out"))
    if isinstance(module, nn.Bilinear):
        return Use("weight", ("out", "in", "in"))
    if isinstance(module, _ConvNd):
        return Use("conv", _convolution(module, dims))
    return Use("other", ("out",) if dims == 1 else None)


def _convolution(module: _ConvNd, dims: int) -> tuple[Dim, ...]:
    # Transposed convolutions store (in, out). In a depthwise one each filter is an output of its own, and the second
    # dimension is 1, so it is read like any other convolution.
    swapped = isinstance(module, _ConvTransposeNd) and module.groups < module.in_channels
    ends: tuple[Dim, Dim] = ("in", "out") if swapped else ("out", "in")
    return (*ends, *_repeated("kernel", dims - 2))


def _last_out(dims: int) -> tuple[Dim, ...]:
    """The layout of a bias, whose last dimension is the output; attention's bias has dimensions of size 1 before it."""
    return (*_repeated("stack", dims - 1), "out") if dims else ()


def _repeated(dim: Dim, times: int) -> tuple[Dim, ...]:
    return (dim,) * times


def parsed_layout(text: str) -> tuple[Dim, ...]:
    """A layout from text: ``"out in"``, ``"in out"``, ``"stack out in"``, ``"out in kernel kernel"``.

    Raises:
        ValueError: if it contains another word.
    """
    words = text.split()
    known = get_args(Dim)
    wrong = [word for word in words if word not in known]
    if wrong:
        raise ValueError(f"a layout names each dimension in, out, kernel or stack, such as 'out in'; got {text!r}")
    return tuple(known[known.index(word)] for word in words)
