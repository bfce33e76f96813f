"""What follows the batch beside the learning rate: Adam's memory against an Adam by hand, eps, decay, Seesaw."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loops import loss_of, network, regression, train, weights
from support.options import grouped
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, SparseAdam

from adabatch import (
    AdaptiveBatch,
    Constant,
    GlobalOrder,
    Limits,
    NoiseScale,
    NormTest,
    Seesaw,
    Stage,
    Stages,
    examples,
    lr,
)
from adabatch.batch import CoordinateNormTest
from adabatch.batch.needs import Needs
from adabatch.lr.rules import Setting, followed
from adabatch.runtime.optimizers.step_hooks import StepHooks, StepOverrides

GROWING = Stages(8, [Stage(examples(24), 16), Stage(examples(56), 48), Stage(examples(152), 24)])
ALL: tuple[Setting, ...] = ("betas", "eps", "weight_decay")
NO_FLOORS = lr.Followers(ALL, beta1_floor=0, beta2_floor=0)
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
    return AdaptiveBatch(model, optimizer, criterion, **grouped({"micro_batch_size": 4, **options}))


def of_double() -> nn.Module:
    return network(dtype=torch.float64)


def order() -> GlobalOrder:
    return GlobalOrder(regression(256, dtype=torch.float64), seed=3)


def apart(model: nn.Module, other: nn.Module) -> float:
    return float((weights(model) - weights(other)).abs().max())


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
    optimizer.zero_grad()
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
        overrides=lambda: StepOverrides(
            1.0, lambda group: {"betas": with_betas(ratio, group["betas"])}, lambda group: ratio
        ),
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


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("at", [16, 40, 120])
def test_a_run_saved_in_its_middle_is_an_adam_by_hand_to_its_end(kind: Any, at: int) -> None:
    """Optimizer and batches through a file; the oracle never stops."""
    model, twin = of_double(), of_double()
    oracle = AdamByHand(twin.parameters(), decoupled=kind is AdamW)
    sizes: list[int] = []

    def part(until: int, states: Any = None) -> bytes:
        nonlocal model
        model = network(seed=7, dtype=torch.float64) if states else model
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.0)
        batches, data = adaptive(model, optimizer, follow=("betas",)), order()
        parts = (model, optimizer, batches, data)
        for each, state in zip(parts, states or (), strict=False):
            each.load_state_dict(state)
        for step in batches.steps(data, until=examples(until)):
            for batch in step:
                step.backward(loss_of(model, batch))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(lr=0.01, betas=with_betas(step.global_batch_size / 8))
            sizes.append(step.global_batch_size)
            assert apart(model, twin) < 1e-7
        file = io.BytesIO()
        torch.save([each.state_dict() for each in parts], file)
        return file.getvalue()

    saved = part(at)
    part(sum(SIZES), torch.load(io.BytesIO(saved), weights_only=True))
    assert sizes == SIZES


def test_no_state_of_the_optimizer_is_ever_reset() -> None:
    """The averages are the same tensors throughout, and the count of steps in reference batches never falls."""
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01, amsgrad=True)
    batches = adaptive(model, optimizer, follow=("betas", "eps"), lr_rule="sqrt")
    places: set[tuple[int, ...]] = set()
    counts: list[float] = []

    def look(step: Any) -> None:
        states = [optimizer.state[p] for p in model.parameters()]
        names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        places.add(tuple(state[name].data_ptr() for state in states for name in names))
        counts.append(float(states[0]["step"]))

    train(batches, model, optimizer, order(), until=examples(sum(SIZES)), each=look)
    assert len(places) == 1
    assert counts == pytest.approx([sum(SIZES[: index + 1]) / 8 for index in range(len(SIZES))], rel=1e-6)


# --- eps and decay, and all of it put back --------------------------------------------------------------------------


@given(st.floats(0.01, 100), st.floats(0.0, 0.9999), st.floats(0.0, 0.99999))
def test_the_memory_of_the_averages_is_the_same_in_examples(ratio: float, beta1: float, beta2: float) -> None:
    """After so many reference batches a gradient weighs the same, whatever the batches were; for every ratio, where
    1 - ratio (1 - beta) would be below zero from 1 / (1 - beta) on."""
    (moved,) = followed({"betas": (beta1, beta2)}, ("betas",), ratio=ratio, factor=1.0).values()
    for beta, new in zip((beta1, beta2), moved, strict=True):
        assert 0 <= new < 1
        assert new == pytest.approx(beta**ratio, rel=1e-12)
        # `steps` updates of `ratio` reference batches each
        for num in (1, 7):
            assert new**num == pytest.approx(beta ** (ratio * num), rel=1e-9, abs=1e-300)


def test_the_memory_at_published_values() -> None:
    """beta ** k: 0.9 becomes 0.81, 0.6561 and 0.185 at 2, 4 and 16 times the batch; 1 - k (1 - beta) is -0.6 there."""
    for ratio, expected in ((1, (0.9, 0.95)), (2, (0.81, 0.9025)), (4, (0.6561, 0.81450625))):
        moved = followed({"betas": (0.9, 0.95)}, ("betas",), ratio=ratio, factor=1.0)
        assert moved["betas"] == pytest.approx(expected, rel=1e-12)
    assert followed({"betas": (0.9, 0.0)}, ("betas",), ratio=16, factor=1.0)["betas"] == pytest.approx(
        (0.18530201888518416, 0.0), rel=1e-12
    )


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0, 10), st.floats(1e-12, 1))
def test_eps_and_decay_of_a_step(ratio: float, factor: float, decay: float, eps: float) -> None:
    moved = followed({"eps": eps, "weight_decay": decay}, ("eps", "weight_decay"), ratio=ratio, factor=factor)
    assert moved["eps"] * math.sqrt(ratio) == pytest.approx(eps, rel=1e-12)
    assert factor * moved["weight_decay"] / ratio == pytest.approx(decay, rel=1e-12, abs=1e-300)
    assert followed({"eps": eps}, (), ratio=ratio, factor=factor) == {}


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear", "gain", "sqrt_gain"])
def test_decay_is_constant_per_example_whatever_the_rate_does(rule: Any) -> None:
    model = of_double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-6)
    updates = run(optimizer, model, GROWING, sum(SIZES), lr_rule=rule, follow=("weight_decay", "eps"))
    assert [update["size"] for update in updates] == SIZES
    for update in updates:
        assert update["lr"] * update["weight_decay"] / update["size"] == pytest.approx(0.01 * 0.1 / 8, rel=1e-12)
        assert update["eps"] == pytest.approx(1e-6 / math.sqrt(update["size"] / 8), rel=1e-12)
        assert update["betas"] == (0.9, 0.999), "only what is asked for follows"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.01, 0.1, 1e-6)


def test_groups_follow_each_from_its_own_settings() -> None:
    model = of_double()
    groups = [
        {"params": model[0].parameters(), "betas": (0.8, 0.99), "weight_decay": 0.2},
        {"params": model[2].parameters(), "eps": 1e-4, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=0.01)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append([dict(group) for group in optimizer.param_groups]))
    batches = adaptive(model, optimizer, Constant(32), reference_batch_size=8, lr_rule="sqrt", follow=NO_FLOORS)
    train(batches, model, optimizer, order(), until=examples(32))
    ((first, second),) = seen
    assert (first["betas"], first["weight_decay"]) == (with_betas(4, (0.8, 0.99)), 0.4)
    assert (second["betas"], second["weight_decay"], second["eps"]) == (with_betas(4), 0.0, 5e-5)


class Failing(AdamW):
    """Fails after it has moved, once told to: the state is half new, and no hook runs after it."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")
        return out


class FailingBefore(AdamW):
    """Fails before it has moved."""

    fails = False

    def _init_group(self, *args: Any, **options: Any) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        return super()._init_group(*args, **options)


def settings_and_counts(optimizer: Optimizer) -> Any:
    names = ("lr", "betas", "eps", "weight_decay")
    return (
        [{name: group[name] for name in names} for group in optimizer.param_groups],
        [float(state["step"]) for state in optimizer.state.values()],
    )


def test_an_update_that_raises_leaves_settings_and_counts_as_they_were() -> None:
    """At the latest when the optimizer is saved or the loop goes on."""
    model = of_double()
    optimizer = FailingBefore(model.parameters(), lr=0.01, weight_decay=0.1)
    batches = adaptive(model, optimizer, Stages(8, [Stage(examples(8), 32)]), lr_rule="sqrt", follow=ALL)
    steps = batches.steps(order())

    for index in range(3):
        current = next(steps)
        for batch in current:
            current.backward(loss_of(model, batch))
        if index < 2:
            optimizer.step()
            optimizer.zero_grad()
    before = settings_and_counts(optimizer)
    assert before[1] == pytest.approx([5.0] * 4), "8 and 32 examples"
    optimizer.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        saved = optimizer.state_dict()
        assert settings_and_counts(optimizer) == before
        assert saved["param_groups"][0]["betas"] == (0.9, 0.999)
        assert float(saved["state"][0]["step"]) == pytest.approx(5.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    groups, counts = settings_and_counts(optimizer)
    assert groups == before[0]
    assert counts == pytest.approx([9.0] * 4), "32 more, once"
    batches.remove()


def test_an_optimizer_that_calls_its_parents_step_counts_once() -> None:
    AdamW(network().parameters())  # torch puts hooks on a class when its first instance is made
    model, twin = of_double(), of_double()
    optimizer = Failing(model.parameters(), lr=0.01, weight_decay=0.0)
    oracle = AdamByHand(twin.parameters())
    batches = adaptive(model, optimizer, follow=("betas",))
    assert side_by_side(batches, model, optimizer, twin, oracle) == SIZES


def test_an_update_that_is_left_out_moves_no_count() -> None:
    model = of_double()
    optimizer = AdamW(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer, GROWING, monitor=True, lr_rule="sqrt", follow=ALL)
    for index, step in enumerate(batches.steps(order(), until=examples(sum(SIZES)))):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.nan if index in (1, 4) else 1.0))
        before = settings_and_counts(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        after = settings_and_counts(optimizer)
        assert after[0] == before[0]
        if index in (1, 4):
            assert after == before
    assert after[1] == pytest.approx([(sum(SIZES) - SIZES[1] - SIZES[4]) / 8] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "follow", "words"),
    [
        (SGD, ("betas",), "follow='betas', but SGD has no betas: leave it out"),
        (SGD, ("weight_decay",), "follow='weight_decay' keeps a decoupled decay constant.*SGD.*use AdamW"),
        (Adam, ("weight_decay",), "follow='weight_decay' keeps a decoupled decay constant.*Adam.*use AdamW"),
        (Adam, ("momentum",), "follow takes betas, eps, weight_decay, got 'momentum'"),
    ],
    ids=str,
)
def test_what_cannot_follow_is_named(optimizer: Any, follow: Any, words: str) -> None:
    model = of_double()
    with pytest.raises(ValueError, match=words):
        adaptive(model, optimizer(model.parameters(), lr=0.1), follow=follow)
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_adam_with_decoupled_decay_is_an_adamw() -> None:
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    updates = run(optimizer, model, GROWING, sum(SIZES), lr_rule="sqrt", follow=("weight_decay",))
    assert [u["lr"] * u["weight_decay"] / u["size"] for u in updates] == pytest.approx([0.01 * 0.1 / 8] * len(SIZES))


# --- Seesaw ---------------------------------------------------------------------------------------------------------

HALVINGS = lr.piecewise(milestones=[0.2, 0.4, 0.6, 0.8], factors=[0.5] * 4)


def test_seesaw_trades_every_halving_for_a_doubling() -> None:
    """Adam's invariant falls as the shape alone would have made it, and the rate and the batch are those of B05."""
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01)
    follow = lr.Followers(("betas", "eps"), beta1_floor=0, beta2_floor=0)
    updates = run(optimizer, model, Seesaw(8, HALVINGS, examples(800)), 800, follow=follow)
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
    updates = run(optimizer, model, Seesaw(8, lr.linear(), examples(800)), 800, limits=Limits(min=8, max=limit))
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


@pytest.mark.parametrize("rule", ["sqrt", "linear"])
def test_rate_and_batch_of_a_seesaw_read_one_progress_where_updates_are_left_out(rule: str) -> None:
    """An update left out consumes its examples: the batch grows on, and the rate must fall with it, not later."""
    model = of_double()
    optimizer = Adam(model.parameters(), lr=0.01)
    seen = in_force(optimizer)
    seesaw = Seesaw(8, HALVINGS, examples(800))
    batches = adaptive(model, optimizer, seesaw, lr_rule=rule)
    for index, step in enumerate(batches.steps(order(), until=examples(800))):
        before, size = batches.consumed, step.global_batch_size
        assert size == seesaw.size(before)
        decay, ratio = seesaw.lr_decay(before), size / 8
        expected = 0.01 * decay * (ratio if rule == "linear" else math.sqrt(ratio))
        assert 0.01 * batches.lr_factor == pytest.approx(expected, rel=1e-12), "as announced"
        for batch in step:
            loss = loss_of(model, batch)
            step.backward(loss * math.nan if 5 <= index < 25 else loss)
        optimizer.step()
        optimizer.zero_grad()
        assert seen[-1]["lr"] == pytest.approx(expected, rel=1e-12), "as applied"
    assert batches.progress.examples < batches.consumed.examples


@pytest.mark.parametrize("limit", [16, 128])
def test_decay_that_follows_a_seesaw_is_that_of_the_schedule_it_replaces(limit: int) -> None:
    """lr * wd per example falls as the learning rate would have, neither faster nor not at all."""
    model = of_double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seesaw, limits = Seesaw(8, HALVINGS, examples(800)), Limits(min=8, max=limit)
    updates = run(optimizer, model, seesaw, 800, follow=("weight_decay",), limits=limits)
    for update in updates:
        plain = 0.01 * HALVINGS(update["before"] / 800) * 0.1 / 8
        assert update["lr"] * update["weight_decay"] / update["size"] == pytest.approx(plain, rel=1e-12)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_decay_that_follows_a_seesaw_to_zero_ends_with_it() -> None:
    """Past the end of a decay to zero there is no rate left for the weight decay to be a share of."""
    model = of_double()
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seesaw, limits = Seesaw(8, lr.linear(), examples(400)), Limits(min=8, max=16)
    updates = run(optimizer, model, seesaw, 480, follow=("weight_decay",), limits=limits)
    assert updates[-1]["before"] >= 400
    assert updates[-1]["lr"] == 0
    assert math.isfinite(updates[-1]["weight_decay"])


def test_the_rule_seesaw_of_old_is_refused_with_the_way_out() -> None:
    model = of_double()
    for criterion in (GROWING, Seesaw(8, HALVINGS, examples(800))):
        with pytest.raises(ValueError, match=r"lr_rule='seesaw' is now lr_rule='sqrt' \(or 'linear' with SGD\)"):
            adaptive(model, Adam(model.parameters()), criterion, lr_rule="seesaw")


def test_under_the_rule_none_nothing_moves_the_rate_not_even_a_seesaw() -> None:
    model = of_double()
    seesaw, limits = Seesaw(8, HALVINGS, examples(800)), Limits(min=8, max=16)
    updates = run(SGD(model.parameters(), lr=0.01), model, seesaw, 800, lr_rule="none", limits=limits)
    assert {update["lr"] for update in updates} == {0.01}


@pytest.mark.parametrize("limit", [16, 128])
def test_a_seesaw_for_sgd_decays_by_the_rate_what_the_batch_cannot(limit: int) -> None:
    """Its invariant lr / b falls as the shape says, at the limit of the batch too."""
    model = of_double()
    seesaw, limits = Seesaw(8, HALVINGS, examples(800)), Limits(min=8, max=limit)
    for update in run(SGD(model.parameters(), lr=0.01), model, seesaw, 800, limits=limits):
        assert update["lr"] / update["size"] == pytest.approx(0.01 / 8 * HALVINGS(update["before"] / 800), rel=1e-12)


class Halving:
    """A criterion of a user's own that brings a decay of the learning rate."""

    needs = Needs()
    least = 0.5

    def wanted(self, observation: Any) -> float:
        return 8.0

    def lr_decay(self, progress: Any) -> float:
        return 1.0 if progress.examples < 40 else self.least


def test_a_criterion_of_ones_own_may_bring_a_decay() -> None:
    model = of_double()
    updates = run(Adam(model.parameters(), lr=0.01), model, Halving(), 80, limits=Limits(min=8, max=8))
    assert [update["lr"] for update in updates] == [0.01] * 5 + [0.005] * 5


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_decay_that_is_no_factor_is_named(wrong: float) -> None:
    model, criterion = of_double(), Halving()
    criterion.least = wrong
    with pytest.raises(ValueError, match=r"lr_decay\(progress\) must be finite and not negative, got"):
        run(Adam(model.parameters(), lr=0.01), model, criterion, 80, limits=Limits(min=8, max=8))


# --- floors of the betas --------------------------------------------------------------------------------------------


def test_betas_stop_at_their_floors_and_the_journal_says_where(tmp_path: Path) -> None:
    model, path = of_double(), tmp_path / "run.jsonl"
    optimizer = AdamW(model.parameters(), lr=1e-3)
    stages = Stages(2, [Stage(examples(1040), 8), Stage(examples(1200), 128)])
    updates = run(optimizer, model, stages, 1456, micro_batch_size=2, follow=("betas",), journal=path)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for update, line in zip(updates, lines, strict=True):
        ratio = update["size"] / 2
        expected = {1: (0.9, 0.999), 4: (0.9**4, 0.999**4), 64: (0.5, 0.95)}[int(ratio)]
        assert update["betas"] == pytest.approx(expected, rel=1e-12)
        assert line.get("beta_floors") == ({"beta1": 0.5, "beta2": 0.95} if ratio == 64 else None)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("early", [3, 12, 30])
def test_the_bias_correction_stays_right_where_floors_bind_early(kind: Any, early: int) -> None:
    """While the first average remembers its beginning both betas take one exponent, which one count corrects."""
    model, twin = of_double(), of_double()
    optimizer, oracle = kind(model.parameters(), lr=0.01, weight_decay=0.0), AdamByHand(twin.parameters())
    seen = in_force(optimizer)
    stages = Stages(4, [Stage(examples(4 * early), 16), Stage(examples(4 * early + 32), 128)])
    batches = adaptive(model, optimizer, stages, follow=("betas",))
    for step in batches.steps(order(), until=examples(4 * early + 32 + 8 * 128)):
        for batch in step:
            step.backward(loss_of(model, batch))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(lr=0.01, betas=seen[-1]["betas"])
        assert apart(model, twin) < 1e-6
    assert seen[-1]["betas"] == pytest.approx((0.5, 0.999 ** (math.log(0.5) / math.log(0.9))))


def test_floors_that_bind_late_leave_the_bias_correction_as_it_is() -> None:
    """By then the first average remembers less than a thousandth of its beginning."""
    model, twin = of_double(), of_double()
    optimizer, oracle = Adam(model.parameters(), lr=0.01), AdamByHand(twin.parameters())
    seen = in_force(optimizer)
    batches = adaptive(model, optimizer, Stages(4, [Stage(examples(2080), 256)]), follow=("betas",))
    for step in batches.steps(order(), until=examples(2080 + 6 * 256)):
        for batch in step:
            step.backward(loss_of(model, batch))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(lr=0.01, betas=seen[-1]["betas"])
        assert apart(model, twin) < 1e-5  # of updates of about 0.01 each, a thousandth in one of them
    assert seen[-1]["betas"] == pytest.approx((0.5, 0.95))


def test_betas_without_room_are_warned_of_where_the_batch_may_grow() -> None:
    model = of_double()
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.95))
    with pytest.warns(
        UserWarning, match=r"cannot lower beta2=0\.95 of parameter group 0, which is at its floor of 0\.95"
    ):
        adaptive(model, optimizer, Constant(16), follow=("betas",)).remove()
    # none where the reference is the largest batch: smaller ones raise the betas
    limits = Limits(min=8, max=64)
    batches = adaptive(model, optimizer, Constant(16), limits=limits, follow=("betas",), reference_batch_size=64)
    batches.remove()
    followers = lr.Followers(("betas",), beta2_floor=0.5)
    adaptive(model, optimizer, Constant(16), limits=limits, follow=followers).remove()


# --- a rule that goes too far ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "rest"),
    [
        (NormTest(eta=0.5), r"\(about 3 times the noise scale at eta=0.5\)"),
        (CoordinateNormTest(eta=0.1, quantile=0.5), r"\(about 99 times"),
        (NormTest(eta=2.0), "no longer dominates. Runs"),
    ],
)
def test_the_linear_rule_with_a_norm_test_warns(criterion: Any, rest: str) -> None:
    model, limits = of_double(), Limits(min=8, max=64)
    with pytest.warns(UserWarning, match=f"lr_rule='linear' multiplies.*{rest}.*Use lr_rule='gain'"):
        adaptive(model, SGD(model.parameters(), lr=0.1), criterion, limits=limits, lr_rule="linear").remove()
    for quiet in ("gain", "sqrt", "none"):
        adaptive(model, SGD(model.parameters(), lr=0.1), criterion, limits=limits, lr_rule=quiet).remove()
    noise_scale = NoiseScale(0.25)
    adaptive(model, SGD(model.parameters(), lr=0.1), noise_scale, limits=limits, lr_rule="linear").remove()
