"""What follows the batch beside the learning rate: Adam's memory against an Adam by hand, eps, decay, Seesaw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from loops import loss_of, network, regression, weights
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, SparseAdam

from adabatch import AdaptiveBatch, GlobalOrder, Limits, Seesaw, Stage, Stages, examples, lr
from adabatch.runtime.scheduler import Moved, StepHooks

GROWING = Stages(8, [Stage(examples(24), 16), Stage(examples(56), 48), Stage(examples(152), 24)])
SIZES = [8, 8, 8, 16, 16, 48, 48, 24, 24]


class AdamByHand:
    """Adam as its paper writes it, in float64, with a ``beta_t`` of each update and ``1 - prod(beta_t)`` for its bias.

    Kingma and Ba 2015, Algorithm 1; decoupled decay: Loshchilov and Hutter 2019; AMSGrad: Reddi et al. 2018, with the
    maximum taken before the correction, as torch does.
    """

    def __init__(self, parameters: Iterable[Tensor], *, decoupled: bool = False, amsgrad: bool = False) -> None:
        self.parameters = list(parameters)
        self.decoupled = decoupled
        self.amsgrad = amsgrad
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.largest = [torch.zeros_like(p) for p in self.parameters]
        self.left = [(1.0, 1.0) for _ in self.parameters]  # what the averages still hold of their zero beginning

    @torch.no_grad()
    def step(self, *, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        for index, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            grad = p.grad
            if self.decoupled:
                p *= 1 - lr * weight_decay
            else:
                grad = grad + weight_decay * p
            beta1, beta2 = betas
            self.first[index] = beta1 * self.first[index] + (1 - beta1) * grad
            self.second[index] = beta2 * self.second[index] + (1 - beta2) * grad**2
            self.largest[index] = torch.maximum(self.largest[index], self.second[index])
            left1, left2 = self.left[index]
            self.left[index] = left1, left2 = left1 * beta1, left2 * beta2
            second = self.largest[index] if self.amsgrad else self.second[index]
            p -= lr * (self.first[index] / (1 - left1)) / ((second / (1 - left2)).sqrt() + eps)


def adaptive(model: nn.Module, optimizer: Optimizer, criterion: Any = GROWING, **options: Any) -> AdaptiveBatch:
    return AdaptiveBatch(model, optimizer, criterion, **{"micro_batch_size": 4, **options})


def of_double() -> nn.Module:
    return network(dtype=torch.float64)


def order() -> GlobalOrder:
    return GlobalOrder(regression(256, dtype=torch.float64), seed=3)


def apart(model: nn.Module, other: nn.Module) -> float:
    return float((weights(model) - weights(other)).abs().max())


# --- Adam's memory --------------------------------------------------------------------------------------------------


def with_betas(ratio: float, betas: tuple[float, float] = (0.9, 0.999)) -> tuple[float, float]:
    return betas[0] ** ratio, betas[1] ** ratio


def side_by_side(
    batches: AdaptiveBatch,
    model: nn.Module,
    optimizer: Optimizer,
    twin: nn.Module,
    oracle: AdamByHand,
    *,
    rate: float = 0.01,
    freeze: Callable[[int], Iterable[Tensor]] = lambda index: (),
    tolerance: float = 1e-7,
    **settings: Any,
) -> list[int]:
    """Steps of both on the same gradients, compared after each; the batch sizes."""
    sizes: list[int] = []
    for step in batches.steps(order(), until=examples(sum(SIZES))):
        for batch in step:
            step.backward(loss_of(model, batch))
        frozen = {id(p) for p in freeze(len(sizes))}
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = None if id(p) in frozen else p.grad
            q.grad = None if p.grad is None else p.grad.clone()
        size = step.global_batch_size
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(lr=rate, betas=with_betas(size / 8), **settings)
        sizes.append(size)
        # Both in float64, but for torch's step count, which is float32: relative 6e-8 of the correction's exponent.
        assert apart(model, twin) < tolerance
    return sizes


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize(
    ("kind", "options", "oracle"),
    [
        (Adam, {}, {}),
        (Adam, {"amsgrad": True, "weight_decay": 0.1}, {"amsgrad": True}),
        (AdamW, {"weight_decay": 0.1}, {"decoupled": True}),
        (AdamW, {"weight_decay": 0.1, "amsgrad": True}, {"decoupled": True, "amsgrad": True}),
    ],
    ids=["Adam", "AMSGrad", "AdamW", "AdamW-AMSGrad"],
)
def test_betas_that_follow_are_an_adam_by_hand(
    kind: Any, options: dict[str, Any], oracle: dict[str, bool], how: dict[str, bool]
) -> None:
    model, twin = of_double(), of_double()
    optimizer = kind(model.parameters(), lr=0.01, **options, **how)
    by_hand = AdamByHand(twin.parameters(), **oracle)
    batches = adaptive(model, optimizer, follow=("betas",))
    decay = {"weight_decay": options.get("weight_decay", 0.0)}
    assert side_by_side(batches, model, optimizer, twin, by_hand, **decay) == SIZES
    assert apart(model, of_double()) > 0.05


def test_an_optimizer_that_has_stepped_before_keeps_its_correction() -> None:
    """A run that goes on from another's optimizer: its averages are full already."""
    model, twin = of_double(), of_double()
    optimizer, oracle = Adam(model.parameters(), lr=0.01), AdamByHand(twin.parameters())
    data = regression(40, dtype=torch.float64)
    for index in range(5):
        for net in (model, twin):
            net.zero_grad()
            loss_of(net, data[8 * index : 8 * index + 8]).backward()
        optimizer.step()
        oracle.step(lr=0.01, betas=(0.9, 0.999))
    batches = adaptive(model, optimizer, follow=("betas",))
    assert side_by_side(batches, model, optimizer, twin, oracle) == SIZES


def test_a_parameter_without_a_gradient_keeps_its_own_count() -> None:
    """Frozen for a while, or not used in a step: its averages stand still, and so does their correction."""
    model, twin = of_double(), of_double()
    optimizer, oracle = Adam(model.parameters(), lr=0.01), AdamByHand(twin.parameters())
    batches = adaptive(model, optimizer, follow=("betas",))
    late = list(model[2].parameters())
    sizes = side_by_side(
        batches, model, optimizer, twin, oracle, freeze=lambda index: late if index in (0, 1, 2, 5) else ()
    )
    assert sizes == SIZES


def test_a_run_that_stops_following_keeps_its_correction() -> None:
    """The step counts are in updates of the reference batch size, so fixed betas go on from them."""
    model, twin = of_double(), of_double()
    optimizer, oracle = Adam(model.parameters(), lr=0.01), AdamByHand(twin.parameters())
    batches = adaptive(model, optimizer, follow=("betas",))
    side_by_side(batches, model, optimizer, twin, oracle)
    batches.remove()
    data = regression(24, dtype=torch.float64)
    for index in range(3):
        for net in (model, twin):
            net.zero_grad()
            loss_of(net, data[8 * index : 8 * index + 8]).backward()
        optimizer.step()
        oracle.step(lr=0.01, betas=(0.9, 0.999))
    assert apart(model, twin) < 1e-7
    for state in optimizer.state.values():
        assert float(state["step"]) == pytest.approx(sum(SIZES) / 8 + 3, rel=1e-6)


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=True, dtype=torch.float64)
        nn.init.constant_(self.table.weight, 1.0)


def test_a_step_count_that_is_a_plain_number() -> None:
    """SparseAdam's. Every row is read in every update, so that it is a dense Adam."""
    model, twin = Words(), nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer, oracle = SparseAdam(model.parameters(), lr=0.01), AdamByHand([twin])
    ratio = 1.0
    hooks = StepHooks(
        optimizer,
        moved=lambda: Moved(1.0, lambda group: {"betas": with_betas(ratio, group["betas"])}, ratio),
        skip=lambda: False,
        done=lambda *_: None,
    )
    for ratio in (1.0, 2.0, 2.0, 0.5, 4.0):
        optimizer.zero_grad()
        (model.table(torch.arange(3)) ** 2).sum().backward()
        twin.grad = 2 * twin.detach()
        optimizer.step()
        oracle.step(lr=0.01, betas=with_betas(ratio))
        assert torch.allclose(model.table.weight, twin, rtol=0, atol=1e-8)  # torch adds eps before the correction here
    hooks.remove()


def test_an_adam_whose_momentum_has_a_schedule_of_its_own_is_refused() -> None:
    model = of_double()
    with pytest.raises(ValueError, match=r"follow='betas' has no rule for NAdam.*use Adam or AdamW"):
        adaptive(model, NAdam(model.parameters()), follow=("betas",))


# --- Seesaw ---------------------------------------------------------------------------------------------------------

HALVINGS = lr.piecewise(milestones=[0.2, 0.4, 0.6, 0.8], factors=[0.5] * 4)


def in_force(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of the first group while each update ran; to be called before AdaptiveBatch puts its hooks on."""
    seen: list[dict[str, Any]] = []
    optimizer.register_step_post_hook(lambda *_: seen.append({**optimizer.param_groups[0]}))
    return seen


def run(optimizer: Optimizer, model: nn.Module, criterion: Any, until: int, **options: Any) -> list[dict[str, Any]]:
    """Settings of each update, with its batch size and the examples consumed before it."""
    seen = in_force(optimizer)
    batches = adaptive(model, optimizer, criterion, **options)
    at: list[tuple[int, int]] = []
    for step in batches.steps(order(), until=examples(until)):
        at.append((step.global_batch_size, batches.consumed.examples))
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    return [{**group, "size": size, "before": before} for group, (size, before) in zip(seen, at, strict=True)]


def test_seesaw_trades_every_halving_for_a_doubling() -> None:
    """Adam's invariant falls as the shape alone would have made it, and the rate and the batch are those of B05."""
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01)
    updates = run(optimizer, model, Seesaw(8, HALVINGS, examples(800)), 800, lr_rule="seesaw", follow=("betas", "eps"))
    sizes = {update["size"] for update in updates}
    assert sizes == {8, 16, 32, 64, 128}
    for update in updates:
        cuts = int(math.log2(update["size"] / 8))
        plain = 0.01 * HALVINGS(update["before"] / 800)
        assert plain == pytest.approx(0.01 * 0.5**cuts)
        assert update["lr"] == pytest.approx(0.01 * 2 ** (-cuts / 2), rel=1e-12)
        assert update["lr"] / math.sqrt(update["size"] / 8) == pytest.approx(plain, rel=1e-12)
        assert update["betas"] == pytest.approx(with_betas(2**cuts))
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("limit", [8, 16, 24])
def test_what_the_batch_cannot_trade_the_rate_decays(limit: int) -> None:
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01)
    updates = run(
        optimizer, model, Seesaw(8, lr.linear(), examples(800)), 800, lr_rule="seesaw", limits=Limits(min=8, max=limit)
    )
    assert max(update["size"] for update in updates) == limit
    for update in updates:
        plain = lr.linear()(update["before"] / 800)
        traded = update["lr"] / 0.01 / math.sqrt(update["size"] / 8)
        assert plain / (1 + 1e-9) <= traded < 2 * plain, "the shape in steps of a half"
    assert updates[-1]["lr"] < 0.01 / 16


def test_seesaw_for_sgd_leaves_the_rate_alone() -> None:
    """Its invariant is lr / b: the whole decay is the batch's."""
    model = of_double()
    updates = run(SGD(model.parameters(), lr=0.01), model, Seesaw(8, HALVINGS, examples(800)), 800)
    for update in updates:
        assert update["lr"] == 0.01
        assert 8 / update["size"] == pytest.approx(HALVINGS(update["before"] / 800))


@pytest.mark.parametrize("limit", [16, 128])
def test_decay_that_follows_a_seesaw_is_that_of_the_schedule_it_replaces(limit: int) -> None:
    """lr * wd per example falls as the learning rate would have, neither faster nor not at all."""
    model = of_double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seesaw, limits = Seesaw(8, HALVINGS, examples(800)), Limits(min=8, max=limit)
    updates = run(optimizer, model, seesaw, 800, lr_rule="seesaw", follow=("weight_decay",), limits=limits)
    for update in updates:
        plain = 0.01 * HALVINGS(update["before"] / 800) * 0.1 / 8
        assert update["lr"] * update["weight_decay"] / update["size"] == pytest.approx(plain, rel=1e-12)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_the_rule_seesaw_needs_the_schedule() -> None:
    model = of_double()
    with pytest.raises(ValueError, match=r"lr_rule='seesaw' goes with the criterion Seesaw.*got Stages"):
        adaptive(model, Adam(model.parameters()), lr_rule="seesaw")
