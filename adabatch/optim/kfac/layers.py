"""The kinds of layers that K-FAC supports, and how their inputs and output gradients become rows of factors."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adabatch.optim.products import gram


class Layer(Protocol):
    """What one kind of layer does with its weight, seen as a matrix of shape (d_out, d_in)."""

    def input_moment(self, value: Tensor, *, bfloat16: bool) -> Tensor:
        """Sum of ``h h^T`` over the rows ``h`` of a layer input, shape (d_in, d_in), or (d_in,) if it is diagonal."""
        ...

    def input_rows(self, value: Tensor) -> Tensor | None:
        """The rows ``h``, shape (num_rows, d_in); None if the moment is diagonal."""
        ...

    def output_rows(self, value: Tensor) -> Tensor:
        """The rows of a gradient with respect to the layer's output, shape (num_rows, d_out)."""
        ...

    def num_rows(self, value: Tensor) -> int:
        """The number of rows of an input: examples times positions."""
        ...

    def matrix(self, grad: Tensor) -> Tensor:
        """A gradient of the weight as a matrix of shape (d_out, d_in)."""
        ...

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``matrix``: the gradient in the shape of the weight ``like``."""
        ...


class LinearLayer:
    """``nn.Linear``; its input may have positions between the first and the last dimension."""

    def input_moment(self, value: Tensor, *, bfloat16: bool) -> Tensor:
        """Sum over examples and positions."""
        return gram(self.input_rows(value), bfloat16=bfloat16)

    def input_rows(self, value: Tensor) -> Tensor:
        """One row per example and position."""
        return _wide(value.flatten(0, -2))

    output_rows = input_rows

    def num_rows(self, value: Tensor) -> int:
        """Examples times positions."""
        return value.numel() // value.shape[-1]

    def matrix(self, grad: Tensor) -> Tensor:
        """The gradient itself."""
        return grad

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix


class Conv2dLayer:
    """``nn.Conv2d``: each output position is a row, and its input is the patch under the kernel.

    Args:
        module: the layer, with one group.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        self._module = module

    def input_moment(self, value: Tensor, *, bfloat16: bool) -> Tensor:
        """Sum over examples and output positions, shape (C k^2, C k^2)."""
        return gram(self.input_rows(value), bfloat16=bfloat16)

    def input_rows(self, value: Tensor) -> Tensor:
        """The patches, shape (examples * positions, C k^2)."""
        module = self._module
        value = _wide(value)
        around = module._reversed_padding_repeated_twice  # what Conv2d itself pads by, for every kind of padding
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = F.unfold(
            F.pad(value, around, mode=mode), module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)

    def output_rows(self, value: Tensor) -> Tensor:
        """One row per example and output position, shape (examples * positions, C_out)."""
        return _wide(value.flatten(2).transpose(1, 2).flatten(0, 1))

    def num_rows(self, value: Tensor) -> int:
        """Examples times output positions."""
        module = self._module
        around = module._reversed_padding_repeated_twice
        positions = 1
        for axis in (0, 1):
            length = value.shape[2 + axis] + around[2 - 2 * axis] + around[3 - 2 * axis]
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
            positions *= (length - reach) // module.stride[axis] + 1
        return value.shape[0] * positions

    def matrix(self, grad: Tensor) -> Tensor:
        """Shape (C_out, C k^2)."""
        return grad.flatten(1)

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Shape (C_out, C, k, k)."""
        return matrix.view(like.shape)


class EmbeddingLayer:
    """``nn.Embedding``: a linear layer on one-hot inputs, whose input moment is a diagonal matrix of token counts.

    Args:
        module: the layer, with dense gradients and without ``max_norm``.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._num_tokens = module.num_embeddings

    def input_moment(self, value: Tensor, *, bfloat16: bool) -> Tensor:
        """How often each token occurs, shape (num_embeddings,)."""
        # float64: counts above 2 ** 24 are no longer exact in float32
        return torch.bincount(value.flatten(), minlength=self._num_tokens).double()

    def input_rows(self, value: Tensor) -> None:
        """None: the moment is diagonal."""
        return

    def output_rows(self, value: Tensor) -> Tensor:
        """One row per looked-up token, shape (tokens, d)."""
        return _wide(value.flatten(0, -2))

    def num_rows(self, value: Tensor) -> int:
        """The number of looked-up tokens."""
        return value.numel()

    def matrix(self, grad: Tensor) -> Tensor:
        """Transposed: shape (d, num_embeddings)."""
        return grad.T

    def shaped(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Transposed back."""
        return matrix.T


def _wide(value: Tensor) -> Tensor:
    # factors are sums over very many rows, and no factorization runs in half precision
    return value if value.dtype is torch.float64 else value.float()


def layer_of(module: nn.Module) -> Layer | str:
    """The kind of a module with parameters, or the reason why K-FAC does not support it."""
    if isinstance(module, nn.Linear):
        return LinearLayer()
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"a convolution in {module.groups} groups has a factor for each of them"
        return Conv2dLayer(module)
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return "an embedding with sparse gradients; set sparse=False"
        if module.max_norm is not None:
            return "an embedding that renormalizes its weight (max_norm)"
        return EmbeddingLayer(module)
    return f"{type(module).__name__} is not a Linear, Conv2d or Embedding"
