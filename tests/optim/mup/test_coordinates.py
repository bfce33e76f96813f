"""The coordinate check: right laws pass, wrong ones fail, in the layers and by the powers that theory names.

The setting is that of ``benchmarks/coordinate_check.py``, which runs every row at larger widths: four weights without
bias, tanh, cross-entropy, 64 random inputs, one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adabatch.optim import KFAC, Shampoo, mup
from adabatch.optim.mup.coordinates import slope
from adabatch.recipes.models import NextTokenLoss, Transformer


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (32, width, width, width, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 32, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def check(optimizer: Any, *, make: Any = Net, **options: Any) -> mup.CoordinateCheck:
    options = {"observe": observe, "loss": F.cross_entropy, "widths": (128, 256, 512), "base": 64, **options}
    return mup.coordinate_check(make, optimizer, options.pop("data", data), **options)


def sgd(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.SGD(plan.groups(model, "sgd", lr=0.05))


def adam(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=0.05))


def muon(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.Muon(plan.groups(model, "muon", lr=0.05), momentum=0.0, nesterov=False)


def shampoo(law: mup.ShampooLaw, damping: float, **mistake: Any) -> Callable[[nn.Module, mup.Plan], Optimizer]:
    def make(model: nn.Module, plan: mup.Plan) -> Optimizer:
        groups = [{**group, **mistake} for group in plan.groups(model, law, lr=0.05, damping=damping)]
        return Shampoo(groups, refresh_every=1)

    return make


def kfac(form: Any, *, exponents: tuple[float, float] = (1.0, 1.0), **mistake: Any) -> Any:
    def make(model: nn.Module, plan: mup.Plan) -> Optimizer:
        groups = plan.groups(model, mup.KFACLaw(exponents), lr=0.05, damping=0.01)
        groups = [{**group, **mistake} for group in groups]
        # Without memory, matrices of the 64 examples stand for the factors: wide nets cost little.
        options: dict[str, Any] = {"fisher": "empirical", "memory": 1.0 if form == "kronecker" else 0.0}
        options["kl_clip"] = None  # it is one factor for all layers, and would spread the power of a wrong one
        return KFAC(groups, model, damping_form=form, exponents=exponents, **options)

    return make


def observe(optimizer: Optimizer, outputs: Tensor, targets: Tensor) -> None:
    if isinstance(optimizer, KFAC):
        optimizer.observe(outputs, targets)


UNSCALED = {"fan_in_ratio": 1.0, "fan_out_ratio": 1.0}  # the mistake: one constant at every width
ABSOLUTE = mup.ShampooLaw(relative=False)
HALF = mup.ShampooLaw(exponent=0.5)
LARGE = (512, 1024, 2048)  # what first-order methods do in no time, and where their slopes are nearer to the limit
SMALL = (128, 256)  # torch's Muon multiplies in bfloat16, which processors are slow at

# Slopes of input, hidden, hidden, output where the law is wrong; an empty tuple where it is right and all are zero.
# Ishikawa and Karakida (2024), Yang et al. (2021), Qiu et al. (2025).
ROWS: dict[str, tuple[Any, dict[str, Any], tuple[float, ...]]] = {
    "sgd": (sgd, {"widths": LARGE}, ()),
    "sgd, standard": (sgd, {"widths": LARGE, "parameterization": "standard"}, (-0.5, 0.5, 0.5, 1)),
    "adam": (adam, {"widths": LARGE}, ()),
    "adam, standard": (adam, {"widths": LARGE, "parameterization": "standard"}, (0, 1, 1, 1)),
    "muon": (muon, {"widths": SMALL}, ()),
    "muon, standard": (
        muon,
        {"widths": SMALL, "parameterization": "standard"},
        (0, 0, 0, 0.5),
    ),  # torch adds the input's root
    "shampoo": (shampoo(mup.ShampooLaw(), 1e-3), {}, ()),
    "shampoo, standard": (shampoo(mup.ShampooLaw(), 1e-3), {"parameterization": "standard"}, (-0.5, 0, 0, 0.5)),
    "shampoo, absolute": (shampoo(ABSOLUTE, 1e-3), {}, ()),
    "shampoo, one epsilon": (shampoo(ABSOLUTE, 1e-3, epsilon=1e-3), {}, (-0.25, 0, 0, 0)),
    "shampoo 1/2": (shampoo(HALF, 1e-3), {}, ()),
    "shampoo 1/2, standard": (shampoo(HALF, 1e-3), {"parameterization": "standard"}, (-0.55, -0.5, -0.45, 0)),
    "kfac": (kfac("trace"), {}, ()),
    "kfac, absolute with ratios": (kfac("absolute"), {}, ()),
    "kfac, input side only": (kfac("absolute", exponents=(0.0, 1.0)), {}, ()),
    "kfac, product with ratios": (kfac("kronecker"), {"widths": SMALL}, ()),
    "kfac, constant": (kfac("absolute", **UNSCALED), {}, (-0.85, -0.6, -0.5, 0)),
    "kfac, split": (kfac("split"), {}, (-0.85, 0, 0, 0.2)),
    "kfac, split, standard": (kfac("split"), {"parameterization": "standard"}, (-0.55, 0, 0, 0.2)),
    "shampoo in blocks of 32": (shampoo(mup.ShampooLaw(block_size=32), 1e-3), {}, ()),
    "shampoo in blocks, the rule of none": (
        shampoo(mup.ShampooLaw(), 1e-3, block_size=32),
        {},
        (0.5, 1, 1, 0.5),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_right_laws_pass_and_wrong_ones_fail_by_their_power(name: str) -> None:
    optimizer, options, expected = ROWS[name]
    if optimizer is muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    result = check(optimizer, **options)
    found = [result.own_slope(each) for each in result.coordinates]
    assert result.passed == (not expected), f"\n{result}"
    assert found == pytest.approx(expected or [0] * 4, abs=0.16), f"\n{result}"


def test_every_parameter_of_a_transformer_keeps_its_update() -> None:
    """Embeddings, gains, biases, a fused projection; heads of one width are added."""

    def make(width: int) -> nn.Module:
        model = Transformer(32, 16, width=width, depth=1, num_heads=width // 16)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        return model

    def tokens(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randint(0, 32, (2, 8, 16), generator=generator)
        return first, second

    options: dict[str, Any] = {"make": make, "data": tokens, "loss": NextTokenLoss(), "base": 32}
    result = check(adam, widths=(128, 256, 512), **options)
    assert result.passed, f"\n{result}"
    assert len(result.coordinates) == len(list(make(32).parameters()))
    result = check(shampoo(mup.ShampooLaw(), 1e-3), widths=(64, 128), seeds=(0,), **options)
    assert result.passed, f"\n{result}"
    control = check(
        shampoo(mup.ShampooLaw(), 1e-3), widths=(64, 128), seeds=(0,), parameterization="standard", **options
    )
    assert {each.name for each in control.failures} >= {"token.weight", "norm.bias", "blocks.0.expand.bias"}


def test_own_and_total_updates_are_those_written_out_by_hand() -> None:
    """One SGD step: own is RMS(dW h_old), total RMS of the change of the output."""
    result = check(sgd, widths=(8, 16), seeds=(3,), parameterization="standard", base=8)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Net(16)
    with torch.device("meta"):
        mup.init_(model, mup.plan(Net(32), Net(8)).at(model).standard())
    x, y = data(3)

    def forward() -> list[tuple[Tensor, Tensor]]:
        """Inputs and outputs of the layers."""
        pairs, h = [], x
        for layer in model.layers:
            pairs.append((h, layer(h)))
            h = torch.tanh(pairs[-1][1])
        return pairs

    old, before = [layer.weight.detach().clone() for layer in model.layers], forward()
    F.cross_entropy(before[-1][1], y).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    after = forward()
    for index, each in enumerate(result.coordinates):
        own = before[index][0] @ (model.layers[index].weight - old[index]).T
        total = after[index][1] - before[index][1]
        assert each.own[1] == pytest.approx(own.square().mean().sqrt().item(), rel=1e-4)
        assert each.total[1] == pytest.approx(total.square().mean().sqrt().item(), rel=1e-4)


def test_slopes() -> None:
    assert slope((64, 128, 512), [3.0, 6.0, 24.0]) == pytest.approx(1)
    assert slope((64, 256), [2.0, 1.0]) == pytest.approx(-0.5)
    assert math.isnan(slope((64, 128), [0.0, 1.0]))
    assert math.isnan(slope((64, 128), [math.inf, 1.0]))


def test_a_parameter_that_does_not_move_fails_and_a_frozen_one_is_left_out() -> None:
    class Idle(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.layers[0].weight.requires_grad_(False)

    def still(model: nn.Module, plan: mup.Plan) -> Optimizer:
        return torch.optim.SGD(plan.groups(model, "sgd", lr=0.0))

    result = check(still, make=Idle, widths=(8, 16))
    assert [each.name for each in result.failures] == [f"layers.{i}.weight" for i in (1, 2, 3)]
    assert "FAILED" in str(result)
    with pytest.raises(ValueError, match=r"layers\.1\.weight \+nan"):
        result.require()


def test_a_plan_with_roles_two_optimizers_and_generators_left_alone() -> None:
    def both(model: nn.Module, plan: mup.Plan) -> list[Optimizer]:
        first = plan.groups(model, "adamw", lr=0.05, only=["layers.0.weight", "layers.3.weight"])
        return [torch.optim.AdamW(first), torch.optim.SGD(plan.groups(model, "sgd", lr=0.05, only=["layers.[12].*"]))]

    with torch.device("meta"):
        plan = mup.plan(Net(128), Net(64), roles={"layers.3.weight": "output"})
    state = torch.get_rng_state()
    result = check(both, widths=LARGE, base=plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.passed, f"\n{result}"
    result.require()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64,)}, "two or more different"),
        ({"widths": (64, 64)}, "two or more different"),
        ({"seeds": ()}, "one seed"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"make": lambda width: Net(64)}, "same width as the model"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(sgd, **options)
