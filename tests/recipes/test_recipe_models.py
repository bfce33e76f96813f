"""The shared models: their sizes to the parameter, and what every probe relies on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adabatch.recipes import MLP, DigitsCNN, LogisticRegression, MnistCNN, NextTokenLoss, Transformer


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "model, expected",
    [
        (LogisticRegression, 7_850),
        (MnistCNN, 28_938),
        (DigitsCNN, 21_386),
        (MLP, 9_610),
        (lambda: MLP((784, 1024, 1024, 10)), 784 * 1024 + 1024 + 1024**2 + 1024 + 10_250),
        (Transformer, 826_368),
        (lambda: Transformer(width=256, depth=6, num_heads=8), 4_805_120),
        # The smallest GPT-2, whose size is published.
        (lambda: Transformer(50257, 1024, width=768, depth=12, num_heads=12, tied=True), 124_439_808),
    ],
)
def test_number_of_parameters(model, expected):
    with torch.device("meta"):
        assert num_parameters(model()) == expected


def small_transformer(tied: bool = False) -> Transformer:
    return Transformer(11, 6, width=8, depth=2, num_heads=2, tied=tied)


def inputs_for(model: nn.Module, num: int) -> torch.Tensor:
    if isinstance(model, Transformer):
        return torch.randint(11, (num, 6))
    side = 8 if isinstance(model, MLP | DigitsCNN) else 28
    return torch.rand(num, 1, side, side)


MODELS = [
    LogisticRegression,
    MnistCNN,
    DigitsCNN,
    MLP,
    small_transformer,
    lambda: small_transformer(tied=True),
]


@pytest.mark.parametrize("make", MODELS)
def test_the_seed_fixes_every_weight(make):
    torch.manual_seed(3)
    first = make().state_dict()
    torch.manual_seed(3)
    again = make().state_dict()
    torch.manual_seed(4)
    other = make().state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("make", MODELS)
def test_examples_do_not_depend_on_their_batch(make):
    """Float32 kernels may sum in another order for another batch size, hence 1e-5 and not equality."""
    torch.manual_seed(0)
    model = make()
    batch = inputs_for(model, 5)
    alone = torch.cat([model(example[None]) for example in batch])
    torch.testing.assert_close(model(batch), alone, rtol=1e-5, atol=1e-5)
    assert not list(model.buffers())


@pytest.mark.parametrize("make", MODELS)
def test_every_parameter_has_a_gradient_and_examples_have_their_own(make):
    torch.manual_seed(0)
    model = make()
    batch = inputs_for(model, 3)

    def total(parameters: dict[str, torch.Tensor], example: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (example[None],)).square().sum()

    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        per_example = vmap(grad(total), in_dims=(None, 0))(parameters, batch)
    model(batch).square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(per_example[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_transformer_does_not_look_ahead():
    torch.manual_seed(0)
    model = small_transformer()
    tokens = torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 6, 11)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_the_transformer_knows_positions():
    torch.manual_seed(0)
    logits = small_transformer()(torch.full((1, 6), 7))
    assert not torch.allclose(logits[:, 0], logits[:, 5])


def test_a_tied_head_is_the_embedding():
    model = small_transformer(tied=True)
    assert model.head.weight is model.token.weight
    assert num_parameters(small_transformer()) - num_parameters(model) == 11 * 8


def test_a_new_transformer_knows_nothing():
    """Its loss is the logarithm of the vocabulary: the logits start small beside one."""
    torch.manual_seed(0)
    tokens = torch.randint(65, (4, 129))
    loss = NextTokenLoss()(Transformer()(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(torch.log(torch.tensor(65.0)).item(), abs=0.15)


def test_next_token_loss_is_the_mean_over_all_places():
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(NextTokenLoss()(logits, targets), expected)


def test_what_the_models_refuse():
    with pytest.raises(ValueError, match=r"multiple of num_heads, got 10 and 4"):
        Transformer(width=10)
    with pytest.raises(ValueError, match=r"block_size=6 tokens, got 7"):
        small_transformer()(torch.zeros(1, 7, dtype=torch.int64))
    for widths in ([], [64], [64, 0, 10]):
        with pytest.raises(ValueError, match="at least two positive numbers"):
            MLP(widths)
