"""Small models: images to classes, and a decoder-only transformer over characters.

They are initialized with torch's generator only, so ``torch.manual_seed`` before the constructor fixes every
weight. None of them couples the examples of a batch (there is no BatchNorm), and every layer sees the batch as
its first dimension: per-example gradients exist and have layer rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adabatch.arguments import checked, require, whole

MOST_SIZE = 2**20
"""The largest width, vocabulary, length or depth: enough for any model that these recipes are for."""


class LogisticRegression(nn.Module):
    """One linear layer on the flattened input: 7,850 parameters for MNIST.

    Args:
        in_features: numbers in one example, however shaped.
        num_classes: width of the logits, shape (batch, num_classes).
    """

    @checked
    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            whole(name, size, at_least=1, at_most=MOST_SIZE)
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class MnistCNN(nn.Module):
    """Two 5x5 convolutions (16 and 32 channels) and a linear layer on 28x28 images: 28,938 parameters.

    The convolutions keep the size (padding 2), each is followed by ReLU and a 2x2 max-pool, and the linear
    layer reads 32 x 7 x 7. Channels and kernels are those of the MNIST experiments of AdAdaGrad (Lau, Liu,
    Kolar 2024); padding and pooling are the ones that give their number of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=5, padding=2)
        self.linear = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (batch, 16, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (batch, 32, 7, 7)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class DigitsCNN(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels) and a linear layer on 8x8 images: 21,386 parameters.

    As ``MnistCNN``, each convolution keeps the size and is followed by ReLU and a 2x2 max-pool; the linear
    layer reads 64 x 2 x 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.linear = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (batch, 32, 4, 4)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (batch, 64, 2, 2)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        widths: numbers in an example, the hidden widths, and the width of the logits; the default suits the
            handwritten digits (8x8 images, ten classes) with one hidden layer.

    Raises:
        ValueError: if there are fewer than two widths, or one is below 1.
    """

    @checked
    def __init__(self, widths: Sequence[int] = (64, 128, 10)) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                "widths must be at least two positive numbers, input first and logits last, "
                f"such as [64, 128, 10]; got {list(widths)}"
            )
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x.flatten(1))
        for layer in self.layers[1:]:
            x = layer(F.relu(x))
        return x


class Attention(nn.Module):
    """Causal self-attention with ``num_heads`` heads; (batch, length, width) to the same shape.

    It runs torch's fused kernels. Those have no forward-mode derivative and no rule for ``vmap`` (torch
    2.13): take both inside ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (batch, length, 3 * width) -> three of (batch, num_heads, length, width / num_heads)
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerBlock(nn.Module):
    """A pre-norm residual block: attention, then a two-layer network four times as wide."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        change: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + change


class Transformer(nn.Module):
    """A decoder-only language model in the form of GPT-2 (Radford et al. 2019), without dropout.

    ============================================================================  ===========
    configuration                                                                 parameters
    ============================================================================  ===========
    ``Transformer()``: 65 characters, 128 positions, width 128, depth 4, 4 heads      826,368
    ``Transformer(width=256, depth=6, num_heads=8)``                                4,805,120
    ``Transformer(50257, 1024, width=768, depth=12, num_heads=12, tied=True)``    124,439,808
    ============================================================================  ===========

    Weights start normal with standard deviation 0.02, those that write into the residual stream with
    ``0.02 / sqrt(2 * depth)``, and biases at zero.

    Args:
        vocab_size: number of tokens.
        block_size: longest sequence.
        width: numbers that represent a token; divisible by ``num_heads``.
        depth: number of blocks.
        tied: whether the head shares the weight of the token embedding.

    Raises:
        ValueError: if ``num_heads`` does not divide the width; in ``forward``, if a sequence is longer than
            ``block_size``.
    """

    @checked
    def __init__(
        self,
        vocab_size: int = 65,
        block_size: int = 128,
        *,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "block_size": block_size, "width": width, "depth": depth}
        for name, size in sizes.items():
            whole(name, size, at_least=1, at_most=MOST_SIZE)
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {width} and {num_heads}")
        self.block_size = block_size
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        # Before the weights are tied, so that the same numbers are drawn either way.
        self._initialize(depth)
        if tied:
            self.head.weight = self.token.weight

    def _initialize(self, depth: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Each block adds two of these to the residual stream, whose variance would grow with the depth.
                into_residual = name.endswith((".out", ".contract"))
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if into_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each, (batch, length, vocab_size), for ``tokens``, (batch, length)."""
        length = tokens.shape[-1]
        require(length <= self.block_size, f"sequences may have up to block_size={self.block_size} tokens", length)
        # One row of positions per example, although all rows are equal: a layer without a batch dimension would
        # have no per-example gradient.
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class NextTokenLoss(nn.Module):
    """Mean cross-entropy in nats of logits (batch, length, vocab_size) against tokens (batch, length)."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
