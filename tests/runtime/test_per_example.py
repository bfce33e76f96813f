"""Per-example norms and products against one backward an example, the slow and obvious way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adabatch import AdaptiveBatch, Constant, PerExampleProbe
from adabatch.runtime.per_example import (
    Dense,
    ExampleGradients,
    OuterProduct,
    PerExampleNorms,
    Rule,
    example_moments,
    products_by_jvp,
    without_own_share,
)
from adabatch.runtime.random_state import random_state

# Rounding of a float32 gradient is 6e-8 a number, and a squared norm doubles the relative error of what all
# its numbers share; an order of magnitude is left for another order of sums. In float64, 1e-10 is far above
# rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
NUM_EXAMPLES = 6
Loss = Callable[[Tensor, Tensor], Tensor]


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1).mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions: a mean over examples, as they have equally many."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def looped_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """One backward an example: (num_examples, num_parameters) in float64, zero where there is no gradient."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=torch.float64)
                    if p.grad is None
                    else p.grad.to_dense().double().flatten()
                    for p in model.parameters()
                    if p.requires_grad
                ]
            )
        )
    return torch.stack(rows)


def assert_close(examples_sq: Tensor, products: Tensor, gradients: Tensor, tolerance: float) -> None:
    """Norms relative to themselves, products relative to the lengths of the two vectors."""
    squares = gradients.square().sum(1)
    mean = gradients.mean(0)
    assert torch.all((examples_sq.double() - squares).abs() <= tolerance * squares)
    lengths = squares.sqrt() * mean.norm()
    assert torch.all((products.double() - gradients @ mean).abs() <= tolerance * lengths)


def assert_coordinates(model: nn.Module, examples: ExampleGradients, gradients: Tensor, tolerance: float) -> None:
    """Sums of squares of each coordinate, relative to the largest of the parameter."""
    assert examples.coordinates_sq is not None
    found = {examples.parameter(name): squares for name, squares in examples.coordinates_sq.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    pieces = gradients.square().sum(0).split([p.numel() for p in trained])
    for p, expected in zip(trained, pieces, strict=True):
        squares = found.get(p, torch.zeros_like(p)).double().flatten()
        assert torch.all((squares - expected).abs() <= 4 * tolerance * expected.max())


def assert_fused(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, gradients: Tensor, tolerance: float) -> None:
    """Fused, everything is as otherwise, the gradient up to rounding relative to the examples' gradients."""
    model.zero_grad()
    loss(model(x), y).backward()
    plain = [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
    model.zero_grad()
    norms = PerExampleNorms(model, products=True, coordinates=True, fused=True, check=False)
    norms.start()
    loss(model(x), y).backward()
    examples = norms.finish()
    assert_close(examples.examples_sq, examples.products(), gradients, tolerance)
    assert_coordinates(model, examples, gradients, tolerance)
    size = gradients.square().sum(1).mean().sqrt()
    for p, expected in zip(model.parameters(), plain, strict=True):
        assert (p.grad is None) == (expected is None)
        if p.grad is not None and expected is not None:
            assert p.grad.dtype == expected.dtype
            assert (p.grad.to_dense() - expected).norm() <= tolerance * size
    model.zero_grad()


def measure_and_compare(model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = mean_square, tolerance: float) -> None:
    norms = PerExampleNorms(model, products=True)
    # May take the norms another way where it need not hold anything.
    alone = PerExampleNorms(model, coordinates=True)
    for num_examples in (len(x), len(x) - 1):  # a changed batch on the same hooks
        batch, targets = x[:num_examples], y[:num_examples]
        gradients = looped_gradients(model, batch, targets, loss)
        assert_fused(model, batch, targets, loss, gradients, tolerance)
        alone.start()
        loss(model(batch), targets).backward()
        found = alone.finish()
        squares = found.examples_sq
        assert_coordinates(model, found, gradients, tolerance)
        model.zero_grad()
        norms.start()
        loss(model(batch), targets).backward()
        examples = norms.finish()
        products = examples.products()
        assert_close(examples.examples_sq, products, gradients, tolerance)
        assert_close(squares, products, gradients, tolerance)
        grads = [p.grad.to_dense().double() for p in model.parameters() if p.grad is not None]
        total = sum(grad.square().sum() for grad in grads)
        assert products.double().mean() == pytest.approx(float(total), rel=10 * tolerance)


class Calls(nn.Module):
    """A module called with more than one argument, and the first of what it returns."""

    def __init__(self, module: nn.Module, *more: Callable[[Tensor], object], **options: object) -> None:
        super().__init__()
        self.module, self.more, self.options = module, more, options

    def forward(self, x: Tensor) -> Tensor:
        result = self.module(x, *(make(x) for make in self.more), **self.options)
        return result[0] if isinstance(result, tuple) else result


class Recurrent(nn.Module):
    """Uses the outputs and the last state, whose examples lie along the second dimension."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.module(x)
        last = state[0] if isinstance(state, tuple) else state
        return torch.cat([outputs.flatten(1), last.transpose(0, 1).flatten(1)], 1)


class HeldDirectly(nn.Module):
    """Parameters of its own, in lists too, around a child with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5))
        self.offsets = nn.ParameterList([torch.randn(5), torch.randn(3)])
        self.named = nn.ParameterDict({"end": torch.randn(3)})
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x * self.gain + self.offsets[0])) * self.offsets[1] + self.named["end"]


def floats(*shape: int) -> Tensor:
    return torch.randn(NUM_EXAMPLES, *shape)


def indices(*shape: int) -> Tensor:
    return torch.randint(0, 10, (NUM_EXAMPLES, *shape))


def same(x: Tensor) -> Tensor:
    return x


def head_masks(x: Tensor) -> Tensor:
    return torch.triu(torch.full((x.shape[1], x.shape[1]), -1.0, dtype=x.dtype), 1).repeat(2 * len(x), 1, 1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: floats(7)),
    "linear_short_sequence": (lambda: nn.Linear(70, 50), lambda: floats(4, 70)),
    "linear_long_sequence": (lambda: nn.Linear(3, 4), lambda: floats(40, 3)),
    "linear_of_many_dimensions": (lambda: nn.Linear(7, 5, bias=False), lambda: floats(2, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: floats(4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: floats(3, 6, 6)),
    "conv2d_few_positions": (lambda: nn.Conv2d(32, 32, 3), lambda: floats(32, 4, 4)),
    "conv2d_groups_few_positions": (lambda: nn.Conv2d(64, 64, 3, groups=2), lambda: floats(64, 4, 4)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
        lambda: floats(3, 6, 5),
    ),
    "conv2d_circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        lambda: floats(3, 6, 5),
    ),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same", dilation=2), lambda: floats(3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2, padding=1), lambda: floats(2, 3, 4, 3)),
    "conv_transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2), lambda: floats(2, 4, 4)),
    "embedding": (lambda: nn.Embedding(10, 4), lambda: indices(9)),
    "embedding_padded": (lambda: nn.Embedding(10, 4, padding_idx=3), lambda: indices(9)),
    "embedding_of_one": (lambda: nn.Embedding(10, 4), lambda: torch.tensor([3, 3, 1, 9, 0, 2])),
    "embedding_sparse": (lambda: nn.Embedding(40, 4, sparse=True), lambda: indices(3, 2)),
    "embedding_bag": (lambda: nn.EmbeddingBag(10, 4), lambda: indices(7)),
    "layer_norm": (lambda: nn.LayerNorm(7), lambda: floats(7)),
    "layer_norm_of_sequence": (lambda: nn.LayerNorm((5, 7)), lambda: floats(3, 5, 7)),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(7, bias=False), lambda: floats(5, 7)),
    "rms_norm": (lambda: nn.RMSNorm(7), lambda: floats(5, 7)),
    "rms_norm_eps": (lambda: nn.RMSNorm((5, 7), eps=0.1), lambda: floats(5, 7)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), lambda: floats(6, 3, 4)),
    "group_norm_without_positions": (lambda: nn.GroupNorm(2, 6), lambda: floats(6)),
    "instance_norm": (lambda: nn.InstanceNorm1d(3, affine=True), lambda: floats(3, 5)),
    "instance_norm_tracking": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        lambda: floats(3, 5, 4),
    ),
    "instance_norm_tracked": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(),
        lambda: floats(3, 5, 4),
    ),
    "batch_norm_evaluating": (lambda: nn.BatchNorm2d(3).eval(), lambda: floats(3, 5, 4)),
    "prelu": (lambda: nn.PReLU(3), lambda: floats(3, 4)),
    "bilinear": (lambda: Calls(nn.Bilinear(4, 4, 3), torch.sin), lambda: floats(2, 4)),
    "attention": (
        lambda: Calls(nn.MultiheadAttention(8, 2, batch_first=True), same, same),
        lambda: floats(5, 8),
    ),
    "attention_masked": (
        lambda: Calls(
            nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, add_bias_kv=True),
            torch.sin,
            torch.cos,
            lambda x: None,
            lambda x: False,
            head_masks,
        ),
        lambda: floats(5, 8),
    ),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: floats(5, 8),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 4, 2, batch_first=True)), lambda: floats(5, 3)),
    "gru": (lambda: Recurrent(nn.GRU(3, 4, bidirectional=True, batch_first=True)), lambda: floats(5, 3)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), lambda: floats(5, 4)),
    "held_directly": (HeldDirectly, lambda: floats(2, 5)),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_agrees_with_the_loop(layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, draw = LAYERS[layer]
    model, x = make().to(dtype), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    target = torch.randn_like(model(x))
    measure_and_compare(model, x, target, tolerance=TOLERANCE[dtype])


@with_examples(60)
@given(data=st.data())
def test_convolutions_of_any_shape_agree_with_the_loop(data: st.DataObject) -> None:
    draw = data.draw
    dims = draw(st.integers(1, 2), label="dims")
    groups = draw(st.integers(1, 3), label="groups")

    def per_dim(low: int, high: int, label: str) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims), label=label))

    kernel, dilation = per_dim(1, 3, "kernel"), per_dim(1, 2, "dilation")
    stride, padding = per_dim(1, 3, "stride"), per_dim(0, 2, "padding")
    size = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    channels = [groups * draw(st.integers(1, 5)) for _ in range(2)]
    bias = draw(st.booleans(), label="bias")
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1](
        channels[0], channels[1], kernel, stride, padding, dilation, groups, bias, dtype=torch.float64
    )
    x = torch.randn(3, channels[0], *size, dtype=torch.float64)
    measure_and_compare(conv, x, torch.randn_like(conv(x)), tolerance=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_uneven_same_padding_agrees_with_the_loop() -> None:
    conv = nn.Conv2d(2, 3, (4, 2), padding="same", dtype=torch.float64)
    x = floats(2, 6, 5).double()
    measure_and_compare(conv, x, torch.randn_like(conv(x)), tolerance=1e-10)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_in(x)).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_out(x)))))


class Transformer(nn.Module):
    """A language model whose head is its embedding, and whose blocks share a layer."""

    def __init__(self, *, tied: bool = True, dropout: float = 0.0, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 12), nn.Embedding(9, 12)
        self.blocks = nn.ModuleList([Block(12, dropout), Block(12, dropout)])
        self.blocks[1].up = self.blocks[0].up
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.checkpointing = checkpointing  # reentrant or not; None without

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1])[None])
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(self.norm(x))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def with_group_norms() -> nn.Module:
    shared = nn.Conv2d(6, 6, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.GroupNorm(3, 6),
        nn.ReLU(inplace=True),
        shared,
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        shared,  # called twice: its two gradients meet before the norm
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )


def images() -> tuple[Tensor, Tensor]:
    return floats(1, 8, 8), torch.randint(0, 10, (NUM_EXAMPLES,))


def tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 11, (NUM_EXAMPLES, 10))
    return text[:, :-1], text[:, 1:]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Loss]] = {
    "perceptron": (perceptron, lambda: (floats(12), torch.randint(0, 4, (NUM_EXAMPLES,))), cross_entropy),
    "convolutional": (convolutional, images, cross_entropy),
    "group_norms": (with_group_norms, images, cross_entropy),
    "transformer": (partial(Transformer, tied=False), tokens, cross_entropy),
    "transformer_tied": (Transformer, tokens, cross_entropy),
    "transformer_checkpointed": (
        partial(Transformer, tied=False, checkpointing=False),
        tokens,
        cross_entropy,
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_agree_with_the_loop(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    make, draw, loss = MODELS[name]
    model = make().to(dtype)
    x, y = draw()
    x = x.to(dtype) if x.is_floating_point() else x
    measure_and_compare(model, x, y, loss=loss, tolerance=TOLERANCE[dtype])


def measured(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, **options: bool) -> tuple[Tensor, Tensor]:
    norms = PerExampleNorms(model, products=True, **options)
    norms.start()
    loss(model(x), y).backward()
    examples = norms.finish()
    return examples.examples_sq, examples.products()


class TiedWithHeld(nn.Module):
    """One weight used by an embedding, by a linear layer and by a module without a rule."""

    class Raw(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x @ self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.linear = nn.Linear(5, 7)
        self.linear.weight = self.table.weight
        self.raw = self.Raw(self.table.weight)

    def forward(self, index: Tensor) -> Tensor:
        return self.linear(self.raw(self.linear(self.table(index))))


def test_a_weight_tied_in_every_way_is_summed_before_the_norm() -> None:
    torch.manual_seed(2)
    model = TiedWithHeld().double()
    x = torch.randint(0, 7, (NUM_EXAMPLES, 4))
    measure_and_compare(model, x, torch.randn(NUM_EXAMPLES, 4, 7).double(), tolerance=1e-10)


def test_two_forwards_of_a_model_under_one_loss_are_summed_before_the_norm() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), Calls(nn.Bilinear(6, 6, 3), torch.sin)).double()
    x, y = floats(5).double(), floats(3).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * self.model(x.flip(-1))

    measure_and_compare(Twice(), x, y, tolerance=1e-10)


def gradients_of_shares(model: nn.Module, losses: Tensor) -> Tensor:
    """One backward an example through one forward of the batch: the oracle that shares its random numbers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([grad.flatten() for grad in row]).double() for row in rows])


def position_means(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each example."""
    losses = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(len(target), -1).mean(1)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_dropout_masks_are_those_of_the_step(checkpointing: bool | None) -> None:
    torch.manual_seed(4)
    model = Transformer(tied=checkpointing is not True, dropout=0.3, checkpointing=checkpointing).double()
    if checkpointing:
        model.blocks[1].up = nn.Linear(12, 24).double()
    x, y = tokens()
    torch.manual_seed(5)
    squares, products = measured(model, x, y, cross_entropy)
    torch.manual_seed(5)
    model.checkpointing = None
    gradients = gradients_of_shares(model, position_means(model(x), y))
    assert_close(squares, products, gradients, 1e-10)


def test_reentrant_checkpointing_of_tied_weights_is_refused() -> None:
    model = Transformer(checkpointing=True)  # its blocks share a layer: two backwards meet in it
    norms = PerExampleNorms(model)
    norms.start()
    x, y = tokens()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.\w+ was reached by two.*use_reentrant=False"):
        cross_entropy(model(x), y).backward()
    norms.remove()


def test_checkpointed_inputs_are_recomputed_and_not_held() -> None:
    """The measurement keeps nothing of the block that checkpointing lets go."""
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    inputs: list[weakref.ref[Tensor]] = []
    block[1].register_forward_hook(lambda module, args, output: inputs.append(weakref.ref(output)))
    norms = PerExampleNorms(block)
    norms.start()
    output = checkpoint(block, floats(4), use_reentrant=False)
    assert inputs[0]() is None
    output.sum().backward()
    norms.finish()


def test_accumulated_micro_batches_give_products_with_the_whole_gradient() -> None:
    torch.manual_seed(6)
    model = perceptron().double()
    x, y = torch.randn(8, 12).double(), torch.randint(0, 4, (8,))
    norms = PerExampleNorms(model, products=True)
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        norms.start()
        (cross_entropy(model(x[part]), y[part]) / 2).backward()
        parts.append(norms.finish(loss_scale=1 / 2))
    squares = torch.cat([part.examples_sq for part in parts])
    products = torch.cat([part.products() for part in parts])
    assert_close(squares, products, looped_gradients(model, x, y, cross_entropy), 1e-10)


def test_a_loss_scale_is_undone() -> None:
    torch.manual_seed(7)
    model, (x, y) = convolutional(), images()
    squares, _ = measured(model, x, y, cross_entropy)
    norms = PerExampleNorms(model)
    norms.start()
    (cross_entropy(model(x), y) * 2.0**16).backward()
    assert torch.equal(norms.finish(loss_scale=2.0**16).examples_sq, squares)


def test_a_mean_over_valid_tokens_is_shared_out_by_example() -> None:
    """With n examples, g_i is n times the gradient of example i's share; their mean is the gradient."""
    torch.manual_seed(24)
    model, (x, y) = Transformer().double(), tokens()
    y = y.masked_fill(torch.rand(y.shape) < 0.4, -100)
    squares, products = measured(model, x, y, cross_entropy)
    each = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    shares = NUM_EXAMPLES * each.sum(1) / (y != -100).sum()
    assert_close(squares, products, gradients_of_shares(model, shares), 1e-10)


@pytest.mark.parametrize("products", [True, False])
def test_a_gradient_that_is_not_finite_is_told_and_not_raised(products: bool) -> None:
    model, (x, y) = convolutional(), images()
    x[2, 0, 3, 3] = float("inf")
    norms = PerExampleNorms(model, products=products)
    norms.start()
    cross_entropy(model(x), y).backward()
    examples = norms.finish()
    assert examples.examples_sq.isfinite().tolist() == [i != 2 for i in range(NUM_EXAMPLES)]
    if products:
        assert not examples.moments().is_finite


def test_parameters_share_out_the_squared_norm() -> None:
    torch.manual_seed(8)
    model, (x, y) = Transformer().double(), tokens()
    norms = PerExampleNorms(model)
    norms.start()
    cross_entropy(model(x), y).backward()
    examples = norms.finish()
    assert examples.parameters_sq.keys() == dict(model.named_parameters()).keys()
    gradients = looped_gradients(model, x, y, cross_entropy)
    sizes = [parameter.numel() for parameter in model.parameters()]
    for part, name in zip(gradients.split(sizes, 1), dict(model.named_parameters()), strict=True):
        torch.testing.assert_close(examples.parameters_sq[name], part.square().sum(1), rtol=1e-9, atol=1e-25)


def test_frozen_and_unused_parameters_count_for_nothing() -> None:
    torch.manual_seed(9)

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.partly, self.used = nn.Linear(5, 5), nn.Linear(5, 5), nn.GroupNorm(1, 5)
            self.unused = nn.Linear(5, 5)
            self.frozen.requires_grad_(False)
            self.partly.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.partly(self.frozen(x)))

    model = Partial().double()
    measure_and_compare(model, floats(5).double(), floats(5).double(), tolerance=1e-10)
    norms = PerExampleNorms(model)
    norms.start()
    mean_square(model(floats(5).double()), floats(5).double()).backward()
    assert set(norms.finish().parameters_sq) == {"partly.bias", "used.weight", "used.bias"}
    model.partly.requires_grad_(False)  # freezing later is noticed at the next start
    norms.start()
    mean_square(model(floats(5).double()), floats(5).double()).backward()
    assert set(norms.finish().parameters_sq) == {"used.weight", "used.bias"}


def test_inputs_that_need_a_gradient_do_not_matter() -> None:
    torch.manual_seed(10)
    model, (x, y) = convolutional().double(), images()
    x = x.double()
    plain = measured(model, x, y, cross_entropy)
    model.zero_grad()
    assert torch.equal(measured(model, x.requires_grad_(), y, cross_entropy)[0], plain[0])


def test_an_output_hook_of_the_users_own_does_not_mislead() -> None:
    torch.manual_seed(11)
    model = perceptron().double()
    model[2].register_forward_hook(lambda module, args, output: output * 3)
    x, y = floats(12).double(), torch.randint(0, 4, (NUM_EXAMPLES,))
    measure_and_compare(model, x, y, loss=cross_entropy, tolerance=1e-10)


def with_attention() -> nn.Module:
    """Attention without a rule: its replay must run under the autocast of the step."""
    return nn.Sequential(
        nn.Embedding(11, 12),
        Calls(nn.MultiheadAttention(12, 2, batch_first=True), same, same, need_weights=False),
        nn.Linear(12, 11),
    )


@pytest.mark.parametrize("make, tolerance", [(Transformer, 2**-8), (with_attention, 2**-6)])
def test_autocast_takes_norms_in_float32_of_what_the_step_computed(
    make: Callable[[], nn.Module], tolerance: float
) -> None:
    torch.manual_seed(12)
    model, (x, y) = make(), tokens()
    norms = PerExampleNorms(model, products=True)
    norms.start()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(model(x), y)
    loss.backward()
    examples = norms.finish()
    assert examples.examples_sq.dtype == torch.float32
    gradients = []
    for i in range(NUM_EXAMPLES):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        loss.backward()
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    # A bfloat16 gradient is rounded to 2^-9; a squared norm of many keeps less than 2^-8. A replayed
    # attention runs in another kernel, whose intermediate results are rounded elsewhere.
    squares = torch.stack(gradients).square().sum(1)
    assert torch.all((examples.examples_sq - squares).abs() <= tolerance * squares)


def test_bfloat16_contractions_are_exact() -> None:
    """The norm of signals that the backward delivers in bfloat16 is taken without another rounding."""
    torch.manual_seed(13)
    layer = nn.Linear(70, 50, bias=False, dtype=torch.bfloat16)
    x, upstream = floats(4, 70).bfloat16(), floats(4, 50).bfloat16()
    norms = PerExampleNorms(layer)
    norms.start()
    (layer(x) * upstream).sum().backward()
    examples = norms.finish(loss_scale=NUM_EXAMPLES)
    exact = torch.einsum("nto,nti->noi", upstream.double(), x.double()).flatten(1).square().sum(1)
    assert torch.all((examples.examples_sq - exact).abs() <= 1e-6 * exact)


def test_a_compiled_model_is_measured_eagerly() -> None:
    torch.manual_seed(14)
    model, (x, y) = convolutional().double(), images()
    x = x.double()
    compiled = torch.compile(model, backend="aot_eager")
    cross_entropy(compiled(x), y).backward()
    squares, products = measured(compiled, x, y, cross_entropy)
    assert_close(squares, products / 2, looped_gradients(model, x, y, cross_entropy), 1e-10)
    torch._dynamo.reset()


def test_a_model_compiled_in_place_is_measured_eagerly() -> None:
    torch.manual_seed(14)
    model, (x, y) = perceptron().double(), (floats(12).double(), torch.randint(0, 4, (NUM_EXAMPLES,)))
    model[2].compile(backend="aot_eager")
    cross_entropy(model(x), y).backward()
    measure_and_compare(model, x, y, loss=cross_entropy, tolerance=1e-10)
    torch._dynamo.reset()


# Fused layers: their weight gradient is the sum of the examples' gradients.


class WeightGradients(TorchDispatchMode):
    """Counts the weight gradients of convolutions: those of the whole batch, and those of single examples."""

    def __init__(self) -> None:
        super().__init__()
        self.of_batch = self.of_examples = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and (args[-1][1] or args[-1][2]):
            self.of_examples += args[1].shape[0] == 1
            self.of_batch += args[1].shape[0] != 1
        return func(*args, **(kwargs or {}))


def weight_gradients(norms: PerExampleNorms | None, model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int]:
    if norms is not None:
        norms.start()
    with WeightGradients() as counted:
        cross_entropy(model(x), y).backward()
    if norms is not None:
        norms.finish()
    return counted.of_batch, counted.of_examples


def test_a_fused_convolution_forms_its_weight_gradient_once() -> None:
    model, (x, y) = convolutional(), images()
    assert weight_gradients(None, model, x, y) == (2, 0)
    norms = PerExampleNorms(model, fused=True)
    # The first is checked against autograd's own gradient; a later one has none. (The check also takes products.)
    assert weight_gradients(norms, model, x, y)[0] == 2
    assert weight_gradients(norms, model, x, y) == (0, 2)
    assert weight_gradients(PerExampleNorms(model, check=False), model, x, y) == (2, 2)


def test_a_fused_backward_asks_for_inputs_as_ever() -> None:
    torch.manual_seed(40)
    model, (x, y) = convolutional().double(), images()
    x = x.double().requires_grad_()
    cross_entropy(model(x), y).backward()
    expected, x.grad = x.grad, None
    norms = PerExampleNorms(model, fused=True, check=False)
    norms.start()
    cross_entropy(model(x), y).backward()
    norms.finish()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=0)


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.square(), self.bias, padding=1)


@pytest.mark.parametrize(
    "layer",
    [
        OwnConv(1, 3, 3),
        parametrizations.weight_norm(nn.Conv2d(1, 3, 3)),
        nn.Conv2d(1, 3, 3).requires_grad_(False),
        nn.Conv2d(1, 64, 7),  # of 4 positions: its norm comes from Gram matrices
    ],
    ids=["subclass", "parametrized", "frozen", "few positions"],
)
def test_what_is_not_fused_has_the_gradient_of_autograd_to_the_bit(layer: nn.Module) -> None:
    torch.manual_seed(41)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(10))
    x, y = images()
    cross_entropy(model(x), y).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    norms = PerExampleNorms(model, fused=True, check=False)
    norms.start()
    cross_entropy(model(x), y).backward()
    norms.finish()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is grad is None or torch.equal(p.grad, grad)


def test_a_convolution_of_which_a_part_is_frozen_is_fused_as_far_as_it_trains() -> None:
    torch.manual_seed(42)
    model, (x, y) = convolutional().double(), images()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    measure_and_compare(model, x.double(), y, loss=cross_entropy, tolerance=1e-10)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False, True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_fused_layers_are_recomputed_under_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(43)
    model, (x, y) = convolutional().double(), images()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(model[:3], x.clone().requires_grad_(), use_reentrant=reentrant)
            return model[6:](checkpoint(model[3:6], hidden, use_reentrant=reentrant))

    measure_and_compare(Checkpointed(), x.double(), y, loss=cross_entropy, tolerance=1e-10)


def test_fused_gradients_accumulate() -> None:
    torch.manual_seed(44)
    model, (x, y) = convolutional().double(), images()
    x = x.double()
    cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    norms = PerExampleNorms(model, products=True, fused=True, check=False)
    parts = []
    for part in (slice(0, 3), slice(3, 6)):
        norms.start()
        (cross_entropy(model(x[part]), y[part]) / 2).backward()
        parts.append(norms.finish(loss_scale=1 / 2))
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-14)
    squares = torch.cat([part.examples_sq for part in parts])
    products = torch.cat([part.products() for part in parts])
    assert_close(squares, products, looped_gradients(model, x, y, cross_entropy), 1e-10)


def test_under_autocast_a_fused_gradient_is_summed_in_float32() -> None:
    torch.manual_seed(45)
    model, (x, y) = convolutional(), images()
    found = []
    for fused in (False, True):
        model.zero_grad()
        norms = PerExampleNorms(model, products=True, fused=fused, check=False)
        norms.start()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(x), y)
        loss.backward()
        examples = norms.finish()
        found.append((examples.examples_sq, [p.grad for p in model.parameters()]))
    (squares, grads), (fused_squares, fused_grads) = found
    # The same signals were contracted, in the same precision.
    torch.testing.assert_close(fused_squares, squares, rtol=1e-6, atol=0)
    for grad, fused_grad in zip(grads, fused_grads, strict=True):
        assert fused_grad.dtype == torch.float32
        # Autograd rounds the gradient to bfloat16, by 2^-9 of each number.
        assert (fused_grad - grad).norm() <= 2**-8 * grad.norm()


def test_a_checked_micro_batch_has_the_gradients_of_fused_ones() -> None:
    """Under autocast, where autograd's own are far from these."""
    found = []
    for check in (True, False):
        torch.manual_seed(45)
        model, (x, y) = convolutional(), images()
        norms = PerExampleNorms(model, products=True, fused=True, check=check)
        norms.start()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y)
        loss.backward()
        squares = norms.finish().examples_sq
        found.append([squares, *(parameter.grad for parameter in model.parameters())])
    for checked, fused in zip(*found, strict=True):
        torch.testing.assert_close(checked, fused, rtol=1e-5, atol=1e-7)


def test_parameters_ask_for_gradients_again_after_a_fused_forward_that_failed() -> None:
    model, (x, y) = convolutional(), images()
    norms = PerExampleNorms(model, fused=True, check=False)
    norms.start()
    with pytest.raises(RuntimeError, match="channels"):
        model(x.expand(-1, 2, -1, -1))
    assert all(p.requires_grad for p in model.parameters())
    norms.remove()

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    norms.start()
    handle = model[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    norms.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert num_hooks(model) == 0
    measure_and_compare(model, x, y, loss=cross_entropy, tolerance=TOLERANCE[torch.float32])


def test_weights_in_the_place_of_the_parameters_are_not_fused() -> None:
    """A forward by ``functional_call`` differentiates other tensors, which keep autograd's gradient."""
    torch.manual_seed(46)
    model, (x, y) = convolutional(), images()
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(
        cross_entropy(torch.func.functional_call(model, values, (x,)), y), list(values.values())
    )
    norms = PerExampleNorms(model, fused=True, check=False)
    norms.start()
    found = torch.autograd.grad(
        cross_entropy(torch.func.functional_call(model, values, (x,)), y), list(values.values())
    )
    norms.remove()
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_two_backwards_through_a_fused_forward_are_refused() -> None:
    model, (x, y) = convolutional(), images()
    norms = PerExampleNorms(model, fused=True, check=False)
    norms.start()
    loss = cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="two backwards"):
        loss.backward()
    norms.remove()


def test_a_compiled_model_is_fused_eagerly() -> None:
    torch.manual_seed(47)
    model, (x, y) = convolutional().double(), images()
    x = x.double()
    compiled = torch.compile(model, backend="aot_eager")
    cross_entropy(compiled(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    norms = PerExampleNorms(compiled, products=True, fused=True, check=False)
    assert weight_gradients(norms, compiled, x, y) == (0, 2)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2 by layer"])
def test_a_wrapped_model_is_fused(engine: str, tmp_path: Path) -> None:
    """The sum goes the way of every gradient, through DDP's buckets and FSDP2's reduction."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(48)
        model, (x, y) = convolutional().double(), images()
        x = x.double()
        gradients = looped_gradients(model, x, y, cross_entropy)
        model.zero_grad()
        if engine == "fsdp2 by layer":
            for layer in (model[0], model[3]):
                fully_shard(layer)
        wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
        norms = PerExampleNorms(wrapped, products=True, fused=True, check=False)
        for _ in range(2):
            wrapped.zero_grad()
            norms.start()
            with WeightGradients() as counted:
                cross_entropy(wrapped(x), y).backward()
            assert (counted.of_batch, counted.of_examples) == (0, 2)
            examples = norms.finish()
            grads = [p.grad.full_tensor() if engine != "ddp" else p.grad for p in wrapped.parameters()]
            mean = torch.cat([grad.flatten() for grad in grads])
            torch.testing.assert_close(mean, gradients.mean(0), rtol=1e-10, atol=1e-14)
            assert_close(examples.examples_sq, examples.products(), gradients, 1e-10)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_wrapped_model_is_measured_before_its_reduction(engine: str, tmp_path: Path) -> None:
    """One rank: the hooks see whole inputs and output gradients, wherever the weights are."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(15)
        model, (x, y) = Transformer().double(), tokens()
        gradients = looped_gradients(model, x, y, cross_entropy)
        model.zero_grad()
        wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
        norms = PerExampleNorms(wrapped, products=True)
        norms.start()
        cross_entropy(wrapped(x), y).backward()
        examples = norms.finish()
        grads = {name: parameter.grad for name, parameter in wrapped.named_parameters()}
        if engine == "fsdp2":
            grads = {name: grad.full_tensor() for name, grad in grads.items()}
        assert_close(examples.examples_sq, examples.products(grads), gradients, 1e-10)
    finally:
        dist.destroy_process_group()


# What is refused, and with what advice.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
    ],
    ids=repr,
)
def test_batch_normalisation_in_training_is_refused_by_name(module: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), module).train(training)
    if not training:
        PerExampleNorms(model)
        return
    kind = type(module).__name__
    with pytest.raises(ValueError, match=rf"through 1: {kind} .*GroupNorm or LayerNorm.*micro-batches"):
        PerExampleNorms(model)


def test_batch_normalisation_that_begins_to_train_is_refused_at_the_next_start() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    norms = PerExampleNorms(model)
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d"):
        norms.start()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "module, advice",
    [
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "statistics of the whole batch"),
        (nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.EmbeddingBag(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.MultiheadAttention(4, 2), "batch_first=True"),
        (nn.LSTM(4, 2), "batch_first=True"),
        (nn.TransformerEncoderLayer(4, 2), "batch_first=True"),
        (nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), "other random numbers"),
        (nn.LSTM(4, 2, 2, dropout=0.1, batch_first=True), "other random numbers"),
    ],
)
def test_modules_without_gradients_of_single_examples_are_refused(module: nn.Module, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        PerExampleNorms(module)


class DropsOut(HeldDirectly):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.dropout = nn.Dropout(0.0 if functional else 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training) if self.functional else self.dropout(x)
        return super().forward(x)


def test_a_replay_never_draws_other_random_numbers() -> None:
    with pytest.raises(ValueError, match=r"the model \(DropsOut\).*Dropout dropout in it.*gain.*of their own"):
        PerExampleNorms(DropsOut(functional=False))
    PerExampleNorms(DropsOut(functional=False).eval())
    model = DropsOut(functional=True)
    norms = PerExampleNorms(model)
    norms.start()
    with pytest.raises(RuntimeError, match=r"DropsOut has no rule.*randomness"):
        model(floats(5)).sum().backward()
    norms.remove()


def test_a_module_that_vmap_cannot_run_is_refused_by_name() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain if x.sum() > 0 else x - self.gain

    model = Branches()
    norms = PerExampleNorms(model)
    norms.start()
    with pytest.raises(RuntimeError, match=r"Branches has no rule.*rules="):
        model(floats(3)).sum().backward()
    norms.remove()


class Misused(nn.Module):
    """A head that borrows the embedding's weight without calling a module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(7, 5), nn.Linear(5, 5)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(F.linear(self.table(index), self.other.weight), self.table.weight)


def test_parameters_used_outside_their_module_are_found() -> None:
    torch.manual_seed(16)
    model = Misused()
    norms = PerExampleNorms(model)
    norms.start()
    model(torch.randint(0, 7, (NUM_EXAMPLES, 4))).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"other\.weight, table\.weight.*outside of their forward"):
        norms.finish()
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_of_modules_that_never_ran_are_found_without_a_check() -> None:
    model = Misused()
    norms = PerExampleNorms(model, check=False)
    norms.start()
    model(torch.randint(0, 7, (NUM_EXAMPLES, 4))).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"the gradient of other\.weight is not"):
        norms.finish()


def test_inputs_without_examples_are_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(x.shape[1]))

    model = Positions()
    norms = PerExampleNorms(model)
    for length, message in (
        (5, r"table \(Embedding\).*\(5,\).*6 examples"),
        (6, r"shape \(1, num_positions\)"),
    ):
        norms.start()
        with pytest.raises(ValueError, match=message):
            model(floats(length, 4))
        norms.remove()
    norms = PerExampleNorms(nn.Linear(6, 2))
    norms.start(num_examples=6)
    with pytest.raises(ValueError, match=r"the model \(Linear\).*\(6,\)"):
        norms._model(torch.randn(6))
    norms.remove()


def test_the_order_of_calls_is_checked() -> None:
    model = perceptron()
    norms = PerExampleNorms(model)
    with pytest.raises(RuntimeError, match=r"call start\(\)"):
        norms.finish()
    norms.start()
    with pytest.raises(RuntimeError, match="is being measured"):
        norms.start()
    with pytest.raises(RuntimeError, match="no backward reached the model"):
        norms.finish()
    norms.start()
    with pytest.raises(ValueError, match="num_examples="):
        model[0](floats(12))
    norms.remove()
    norms.start()
    model(floats(12)).sum().backward()
    with pytest.raises(RuntimeError, match="products=True"):
        norms.finish().products()
    norms.start()
    loss = model(floats(12)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="two backwards"):
        loss.backward()
    norms.remove()


# What it leaves behind: nothing.


def num_hooks(model: nn.Module) -> int:
    on_modules = sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    return on_modules + sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_hooks_are_on_only_while_measuring_and_leave_nothing(products: bool, fused: bool) -> None:
    model, (x, y) = Transformer(), tokens()
    norms = PerExampleNorms(model, products=products, fused=fused, check=not fused)
    assert num_hooks(model) == 0
    norms.start()
    assert num_hooks(model) > 0
    loss = cross_entropy(model(x), y)
    loss.backward()
    examples = norms.finish()
    assert num_hooks(model) == 0
    norms.start()
    abandoned = cross_entropy(model(x), y)
    norms.remove()
    norms.remove()
    assert num_hooks(model) == 0
    dead = [weakref.ref(norms), weakref.ref(examples)]
    del norms, examples
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    watched = weakref.ref(model)
    del model, loss, abandoned
    gc.collect()
    assert watched() is None


def test_measuring_changes_neither_loss_nor_gradient() -> None:
    results = []
    for measuring in (False, True):
        torch.manual_seed(17)
        model, (x, y) = Transformer(dropout=0.2), tokens()
        norms = PerExampleNorms(model, products=True)
        if measuring:
            norms.start()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if measuring:
            norms.finish().products()
        results.append([loss, *(p.grad for p in model.parameters()), torch.rand(1)])
    for plain, with_norms in zip(*results, strict=True):
        assert torch.equal(plain, with_norms)


# Rules of the user's own, products in forward mode, moments.


def test_a_rule_of_the_users_own_takes_the_place_of_the_replay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 4))
            self.gain = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.matrix.T) * self.gain

    used = []

    def contributions(module: nn.Module, inputs: Tensor, grad: Tensor):
        used.append(module)
        yield "matrix", OuterProduct((grad * module.gain)[:, None], inputs[:, None])
        yield "gain", Dense(grad * (inputs @ module.matrix.T))

    torch.manual_seed(18)
    model = Scaled().double()
    x, y = floats(4).double(), floats(3).double()
    norms = PerExampleNorms(model, products=True, rules={Scaled: Rule(contributions, lambda module: 1)})
    norms.start()
    mean_square(model(x), y).backward()
    examples = norms.finish()
    assert used == [model]
    products = examples.products()
    assert_close(examples.examples_sq, products, looped_gradients(model, x, y, mean_square), 1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_mode_agrees_with_the_backward(dropout: float) -> None:
    torch.manual_seed(19)
    model, (x, y) = Transformer(dropout=dropout).double(), tokens()
    state = random_state(torch.device("cpu"))
    _, products = measured(model, x, y, cross_entropy)
    after = torch.get_rng_state()
    parameters = dict(model.named_parameters())
    again = products_by_jvp(
        lambda values: position_means(torch.func.functional_call(model, values, (x,)), y),
        {name: parameter.grad for name, parameter in parameters.items()},
        parameters=parameters,
        random_state=state,
    )
    torch.testing.assert_close(again, products, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)


def test_forward_mode_says_what_it_needs() -> None:
    model = perceptron()
    parameters = dict(model.named_parameters())
    grads = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    x = floats(12)
    with pytest.raises(ValueError, match="reduction='none'"):
        products_by_jvp(
            lambda values: torch.func.functional_call(model, values, (x,)).sum(), grads, parameters=parameters
        )
    grads.pop("0.bias")
    with pytest.raises(ValueError, match=r"0\.bias"):
        products_by_jvp(lambda values: x, grads, parameters=parameters)


def test_moments_of_examples_satisfy_the_identity_of_the_three_tests() -> None:
    """eta^2 b_norm = theta^2 b_ip + nu^2 b_orth, whatever the tolerances, as noise = along + across."""
    torch.manual_seed(20)
    model, (x, y) = convolutional().double(), images()
    x = x.double()
    norms = PerExampleNorms(model, products=True)
    norms.start()
    cross_entropy(model(x), y).backward()
    examples = norms.finish()
    moments = examples.moments()
    gradients = looped_gradients(model, x, y, cross_entropy)
    mean = gradients.mean(0)
    grad_sq = float(mean.square().sum())
    along = float((gradients @ mean).var()) / grad_sq
    across = gradients - (gradients @ mean)[:, None] * mean / grad_sq
    assert moments.noise == pytest.approx(float(gradients.var(0).sum()), rel=1e-10)
    assert moments.grad_sq == pytest.approx(grad_sq, rel=1e-10)
    assert moments.noise_along == pytest.approx(along, rel=1e-8)
    assert moments.noise_across == pytest.approx(float(across.square().sum()) / (NUM_EXAMPLES - 1), rel=1e-8)


def test_leaving_one_out_compares_an_example_with_the_others() -> None:
    torch.manual_seed(21)
    gradients = torch.randn(5, 30, dtype=torch.float64) + 1
    squares, products = gradients.square().sum(1), gradients @ gradients.mean(0)
    others = (gradients.sum(0) - gradients) / 4
    expected = (gradients * others).sum(1)
    torch.testing.assert_close(without_own_share(products, squares), expected)
    plain = example_moments(squares, products)
    corrected = example_moments(squares, products, leave_one_out=True)
    assert corrected._replace(noise_along=None) == plain._replace(noise_along=None)
    assert corrected.noise_along == pytest.approx(float(expected.var() / expected.mean()))
    opposed = example_moments(torch.ones(2), torch.zeros(2), leave_one_out=True)
    assert opposed.noise_along != opposed.noise_along  # no direction to lie along
    with pytest.raises(ValueError, match="at least 2"):
        without_own_share(torch.ones(1), torch.ones(1))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
@with_examples(20)
def test_scaling_the_loss_scales_norms_and_products_by_its_square(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = perceptron().double()
    x, y = floats(12).double(), torch.randint(0, 4, (NUM_EXAMPLES,))
    squares, products = measured(model, x, y, cross_entropy)
    model.zero_grad()
    scaled = measured(model, x, y, lambda output, target: scale * cross_entropy(output, target))
    torch.testing.assert_close(scaled[0], squares * scale**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled[1], products * scale**2, rtol=1e-9, atol=1e-12 * scale**2)


def test_equal_examples_have_equal_gradients() -> None:
    torch.manual_seed(22)
    model, (x, y) = convolutional().double(), images()
    x, y = x[:1].double().repeat(5, 1, 1, 1), y[:1].repeat(5)
    squares, products = measured(model, x, y, cross_entropy)
    assert example_moments(squares, products).noise == pytest.approx(0, abs=1e-12 * float(squares.mean()))


# Opacus computes the same norms from the gradients themselves; it has a formula of its own for each of these.
# Not compared: an embedding with padding, whose padding row Opacus 1.6.0 counts and the loop above does not.
OPACUS_LAYERS = [
    "linear",
    "linear_short_sequence",
    "linear_long_sequence",
    "conv1d",
    "conv2d",
    "conv2d_few_positions",
    "conv2d_groups_few_positions",
    "conv3d",
    "embedding",
    "layer_norm",
    "layer_norm_of_sequence",
    "rms_norm",
    "group_norm",
    "instance_norm",
]


@pytest.mark.filterwarnings("ignore")  # Opacus uses hooks that torch warns of
@pytest.mark.parametrize("layer", OPACUS_LAYERS)
def test_opacus_agrees_on_every_layer_that_it_knows(layer: str) -> None:
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: pip install opacus")
    torch.manual_seed(23)
    make, draw = LAYERS[layer]
    model, x = make().double(), draw()
    x = x.double() if x.is_floating_point() else x
    y = torch.randn_like(model(x))
    norms = PerExampleNorms(model)
    norms.start()
    mean_square(model(x), y).backward()
    squares = norms.finish().parameters_sq
    model.zero_grad()
    sampled = opacus.GradSampleModule(model, loss_reduction="mean")
    mean_square(sampled(x), y).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.grad_sample.flatten(1).square().sum(1)
        torch.testing.assert_close(squares[name], expected, rtol=1e-10, atol=1e-25)


# What is taken for an example.


class TimeMajor(nn.Module):
    """A layer in it has times first, of which there may be as many as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 4)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self.head(torch.tanh(F.dropout(self.first(x.transpose(0, 1)), 0.5)).mean(0))


class Relative(nn.Module):
    """Features of positions, as many as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.positions = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(0, 1, x.shape[1])[:, None]
        return (self.first(x) + self.positions(torch.cat([places, places**2], 1))).mean(1)


@pytest.mark.parametrize(
    "model, layer", [(TimeMajor(), "first"), (Relative(), "positions")], ids=["time-major", "positions"]
)
def test_times_and_positions_are_not_taken_for_examples(model: nn.Module, layer: str) -> None:
    norms = PerExampleNorms(model)
    norms.start()
    with pytest.raises(
        ValueError, match=rf"{layer} \(Linear\) gets 6 rows for 5 examples too, so they are not examples"
    ):
        model(torch.randn(NUM_EXAMPLES, NUM_EXAMPLES, 3))
    norms.remove()
    assert not any(module._forward_hooks for module in model.modules())


class BatchFirst(nn.Module):
    """A sequence as long as the micro-batch, examples first; random numbers, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, index: Tensor, mask: Tensor) -> Tensor:
        self.num_calls += 1
        hidden = self.first(self.table(index))
        if self.training:
            hidden = F.dropout(hidden, 0.5)
        return self.head((mask @ hidden).mean(1))


def test_a_sequence_as_long_as_the_micro_batch_is_measured() -> None:
    """And the trial of its layout leaves nothing behind: no other random numbers, no count in a buffer."""
    torch.manual_seed(30)
    model = BatchFirst().double()
    model.gain.requires_grad_(False)  # held by the model itself, which would run again
    index, y = torch.randint(0, 9, (NUM_EXAMPLES, NUM_EXAMPLES)), torch.randint(0, 4, (NUM_EXAMPLES,))
    mask = torch.tril(torch.ones(NUM_EXAMPLES, NUM_EXAMPLES)).double()  # the same for all, and as square
    norms = PerExampleNorms(model)
    torch.manual_seed(31)
    cross_entropy(model(index, mask), y).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(31)
    norms.start()
    cross_entropy(model(index, mask), y).backward()
    norms.finish()
    assert all(
        torch.equal(mine, other)
        for mine, other in zip([p.grad for p in model.parameters() if p.grad is not None], plain, strict=True)
    )
    assert model.num_calls == 2
    model.eval()
    norms = PerExampleNorms(model)
    norms.start()
    cross_entropy(model(index, mask), y).backward()
    squares = norms.finish().examples_sq
    for i in range(NUM_EXAMPLES):
        grads = torch.autograd.grad(
            cross_entropy(model(index[i : i + 1], mask), y[i : i + 1]),
            [p for p in model.parameters() if p.requires_grad],
        )
        assert float(squares[i]) == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-10)


def test_attention_under_a_mask_as_wide_as_the_micro_batch_is_measured() -> None:
    torch.manual_seed(32)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.triu(torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype), 1)
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1)

    model = Attends().double()
    x, y = torch.randn(NUM_EXAMPLES, NUM_EXAMPLES, 4).double(), torch.randint(0, 4, (NUM_EXAMPLES,))
    norms = PerExampleNorms(model)
    norms.start()
    cross_entropy(model(x), y).backward()
    squares = norms.finish().examples_sq
    for i in range(NUM_EXAMPLES):
        grads = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        assert float(squares[i]) == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-10)


def test_what_cannot_be_tried_is_refused_where_shapes_do_not_tell() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != NUM_EXAMPLES:
                raise ValueError("made for one size")
            return self.first(x).mean(1)

    model, y = Fixed(), torch.randint(0, 4, (NUM_EXAMPLES,))
    for length, is_sure in ((5, False), (NUM_EXAMPLES, True)):
        norms = PerExampleNorms(model, examples_first=is_sure)
        norms.start()
        cross_entropy(model(torch.randn(NUM_EXAMPLES, length, 3)), y).backward()
        norms.finish()
    norms = PerExampleNorms(model)
    norms.start()
    with pytest.raises(ValueError, match=r"which dimension holds them cannot be told.*examples_first=True"):
        model(torch.randn(NUM_EXAMPLES, NUM_EXAMPLES, 3))
    norms.remove()


def test_forwards_without_a_gradient_are_ignored() -> None:
    torch.manual_seed(33)
    model, x, y = perceptron(), floats(12), torch.randint(0, 4, (NUM_EXAMPLES,))
    expected = measured(model, x, y, cross_entropy)[0]
    model.zero_grad()
    norms = PerExampleNorms(model)
    for _ in range(2):  # with the check and without
        norms.start()
        with torch.no_grad():
            model(floats(12).repeat(3, 1))
        with torch.inference_mode():
            model(floats(12)[:1])
        model(floats(12).repeat(2, 1))  # a metric that forgot it: nothing of it is in the loss
        loss = cross_entropy(model(x), y)
        with torch.no_grad():
            model(floats(12).repeat(3, 1))
        loss.backward()
        torch.testing.assert_close(norms.finish().examples_sq, expected)
        model.zero_grad()


def test_two_forwards_of_other_sizes_in_one_loss_are_refused() -> None:
    model = perceptron()
    norms = PerExampleNorms(model)
    norms.start()
    loss = model(floats(12)).sum() + model(floats(12)[:2]).sum()
    with pytest.raises(ValueError, match=r"forwards of . and of 2 examples, which cannot be told apart"):
        loss.backward()
    norms.remove()


@pytest.mark.parametrize("way", ["views", "tokens", "positions first"])
def test_what_the_model_is_called_with_must_be_what_the_loader_gave(way: str) -> None:
    model = nn.Linear(3, 2)
    batches = AdaptiveBatch(
        model, SGD(model.parameters(), lr=0.0), Constant(4), micro_batch_size=4, probe=PerExampleProbe(model)
    )
    step = next(batches.steps([torch.randn(4, 5, 3)]))
    for x in step:
        called = {"views": torch.cat([x, x]), "tokens": x.flatten(0, 1), "positions first": x.transpose(0, 1)}[way]
        loss = model(called).square().mean()
        with pytest.raises(ValueError, match=r"holds 4 examples, and the model was called with a first dimension of"):
            step.backward(loss)
        break


class Scaled(nn.Module):
    """A parameter without dimensions, beside one of one number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(8, 4), nn.Parameter(torch.full(shape, 1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale.exp()


def test_a_parameter_without_dimensions_is_as_one_of_one_number() -> None:
    x, y = torch.randn(NUM_EXAMPLES, 8), torch.randint(0, 4, (NUM_EXAMPLES,))
    found = []
    for shape in ((), (1,)):
        torch.manual_seed(34)
        model = Scaled(shape)
        squares, products = measured(model, x, y, cross_entropy)
        model.zero_grad()
        norms = PerExampleNorms(model, coordinates=True)
        norms.start()
        cross_entropy(model(x), y).backward()
        examples = norms.finish()
        assert examples.coordinates_sq is not None
        assert examples.coordinates_sq["scale"].shape == shape
        found.append((squares, products, examples.coordinates_sq["scale"].view(())))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


class Keys(nn.Module):
    """Attention as BERT, RoBERTa and ViT write it: the bias of its keys shifts all scores of a query alike."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)).mean(1)


class Convolves(nn.Module):
    """A bias that the mean over an image takes off again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["keys", "keys, bfloat16", "convolution"])
def test_parameters_whose_true_gradient_is_zero_are_measured(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    model: nn.Module = Convolves() if kind == "convolution" else Keys()
    x = torch.randn(NUM_EXAMPLES, 2, 9, 9) if kind == "convolution" else torch.randn(NUM_EXAMPLES, 11, 8)
    y = torch.randint(0, 8, (NUM_EXAMPLES,))
    norms = PerExampleNorms(model)
    norms.start()
    with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in kind):
        loss = cross_entropy(model(x), y)
    loss.backward()
    squares = norms.finish().parameters_sq
    name = "conv.bias" if kind == "convolution" else "key.bias"
    assert float(squares[name].sum()) < (1e-2 if "bfloat16" in kind else 1e-9) * sum(
        float(each.sum()) for each in squares.values()
    )


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_bias_that_cancels_is_still_found_when_it_is_used_elsewhere(share: float) -> None:
    class Elsewhere(Keys):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + share * self.key.bias

    torch.manual_seed(35)
    model = Elsewhere()
    norms = PerExampleNorms(model)
    norms.start()
    cross_entropy(model(torch.randn(NUM_EXAMPLES, 11, 8)), torch.randint(0, 8, (NUM_EXAMPLES,))).backward()
    with pytest.raises(RuntimeError, match=r"the gradient of key\.bias is not what"):
        norms.finish()
