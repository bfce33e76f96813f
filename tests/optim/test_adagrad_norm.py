"""AdaGradNorm against algorithm 1 written out in float64, and against itself: loops, restarts, ranks."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adabatch.optim import AdaGradNorm

SHAPES = ((5, 3), (3,), (), (2, 3, 4), (1, 1), (0, 4))


def parameters(
    seed: int = 0, *, dtype: torch.dtype = torch.float64, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """The same gradients for the same seed, whatever the grouping."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (scale * noise).to(param.dtype)


def reference_step(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray | None],
    velocities: list[np.ndarray],
    total: float,
    options: Sequence[dict[str, Any]],
) -> tuple[list[np.ndarray], float]:
    """Algorithm 1 of Ward, Wu and Bottou (2020) with decay and heavy ball; options for each parameter."""
    total += sum(float(value) ** 2 for grad in grads if grad is not None for value in grad.flat)
    moved = []
    for index, (x, g, option) in enumerate(zip(params, grads, options, strict=True)):
        if g is None:
            moved.append(x)
            continue
        b = math.sqrt(total) + option.get("eps", 1e-10)
        lr, decay = option.get("lr", 1.0), option.get("weight_decay", 0.0)
        velocities[index] = option.get("momentum", 0.0) * velocities[index] + g / b
        sign = 1 if option.get("maximize", False) else -1
        moved.append((1 - lr / b * decay) * x + sign * lr * velocities[index])
    return moved, total


def run_reference(
    params: Sequence[Tensor],
    options: Sequence[dict[str, Any]],
    *,
    steps: int,
    start: float,
    scale: float = 1.0,
) -> tuple[list[np.ndarray], float]:
    values = [param.detach().double().numpy().copy() for param in params]
    velocities = [np.zeros_like(value) for value in values]
    total = start
    shadow = [param.detach().clone() for param in params]
    for step in range(steps):
        give_gradients(shadow, step, scale)
        grads = [param.grad.double().numpy() for param in shadow]
        values, total = reference_step(values, grads, velocities, total, options)
    return values, total


def run(optimizer: AdaGradNorm, params: Sequence[Tensor], *, steps: Iterable[int], scale: float = 1.0) -> None:
    for step in steps:
        give_gradients(params, step, scale)
        optimizer.step()


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 3.0),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 1e-3, 0.02]),
        "eps": st.sampled_from([0.0, 1e-10, 0.1]),
        "maximize": st.booleans(),
    }
)


# The formula


@settings(deadline=None, max_examples=60)
@given(
    first=OPTIONS,
    second=OPTIONS,
    cut=st.integers(0, len(SHAPES)),
    start=st.sampled_from([1e-4, 1e-2, 4.0]),
    foreach=st.sampled_from([None, True, False]),
)
def test_matches_the_reference_with_groups(
    first: dict[str, Any], second: dict[str, Any], cut: int, start: float, foreach: bool | None
) -> None:
    params = parameters()
    options = [first] * cut + [second] * (len(params) - cut)
    expected, total = run_reference(params, options, steps=4, start=start)
    groups = [{"params": params[:cut], **first}, {"params": params[cut:], **second}]
    optimizer = AdaGradNorm(groups, initial_accumulator_value=start, foreach=foreach)
    run(optimizer, params, steps=range(4))
    # float64 against float64: only the order of additions differs.
    assert optimizer.accumulator.item() == pytest.approx(total, rel=1e-12)
    for param, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)])
def test_one_step_in_lower_precision_is_rounded_once(dtype: torch.dtype, digits: int, momentum: float) -> None:
    params = parameters(dtype=dtype)
    options = {"lr": 0.3, "momentum": momentum}
    expected, total = run_reference(params, [options] * len(params), steps=1, start=1e-2)
    optimizer = AdaGradNorm(params, **options)
    run(optimizer, params, steps=range(1))
    assert optimizer.accumulator.item() == pytest.approx(total, rel=1e-6)  # float32 sums of exact squares
    # Half a unit in the last place of the result; with momentum the stored update is rounded as well.
    roundings = 1 if momentum == 0 else 2
    for param, value in zip(params, expected, strict=True):
        unit = 2.0**-digits * np.maximum(np.abs(value), 1.0)
        assert np.all(np.abs(param.detach().double().numpy() - value) <= roundings * 1.01 * unit)


def test_a_step_size_below_the_smallest_float16_is_kept() -> None:
    # lr / b = 1e-9 is zero in float16, but times the gradient it is not.
    param = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    param.grad = torch.full((4,), 6e4, dtype=torch.float16)
    AdaGradNorm([param], lr=1e-3, initial_accumulator_value=1e12).step()
    np.testing.assert_allclose(param.detach().double().numpy(), -6e-5, rtol=1e-2)


@settings(deadline=None, max_examples=40)
@given(options=OPTIONS, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]))
def test_foreach_equals_the_loop_bitwise(options: dict[str, Any], dtype: torch.dtype) -> None:
    ended = []
    for foreach in (True, False, None):
        params = parameters(dtype=dtype)
        optimizer = AdaGradNorm(params, foreach=foreach, **options)
        run(optimizer, params, steps=range(3))
        ended.append([*params, optimizer.accumulator])
    assert_equal(ended[0], ended[1])
    assert_equal(ended[0], ended[2])


@settings(deadline=None, max_examples=40)
@given(
    scale=st.floats(1e-6, 1e6),
    lr=st.floats(1e-4, 10.0),
    start=st.sampled_from([0.0, 1e-2]),
)
def test_no_step_is_longer_than_lr(scale: float, lr: float, start: float) -> None:
    params = parameters()
    optimizer = AdaGradNorm(params, lr=lr, initial_accumulator_value=start)
    for step in range(3):
        before = torch.cat([param.detach().flatten().clone() for param in params])
        run(optimizer, params, steps=[step], scale=scale)
        after = torch.cat([param.detach().flatten() for param in params])
        assert torch.linalg.vector_norm(after - before) <= lr * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaling_all_gradients_changes_nothing_without_a_start(momentum: float) -> None:
    ended = []
    for scale in (1.0, 2.0**20):  # a power of two, so that nothing is rounded differently
        params = parameters()
        optimizer = AdaGradNorm(params, momentum=momentum, initial_accumulator_value=0.0, eps=1e-300)
        run(optimizer, params, steps=range(5), scale=scale)
        ended.append(params)
    assert_equal(*ended)


def test_maximize_is_descent_on_the_negative() -> None:
    up, down = parameters(), parameters()
    climber = AdaGradNorm(up, momentum=0.9, weight_decay=0.01, maximize=True)
    walker = AdaGradNorm(down, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        run(climber, up, steps=[step])
        run(walker, down, steps=[step], scale=-1.0)
    assert_equal(up, down)


def test_decay_and_gradient_balance_whatever_b_is() -> None:
    # The minimum of 0.5 a (x - 1)^2 + 0.5 decay x^2 is a / (a + decay); b keeps growing on the way there.
    param = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    optimizer = AdaGradNorm([param], lr=1.0, weight_decay=0.5)
    for _ in range(600):
        optimizer.zero_grad()
        (0.5 * 2.0 * (param - 1) ** 2).sum().backward()
        optimizer.step()
    assert param.item() == pytest.approx(2.0 / 2.5, abs=1e-6)


def test_it_minimizes_from_any_start() -> None:
    for start in (1e-8, 1e-2, 1e4):
        param = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = AdaGradNorm([param], lr=2.0, initial_accumulator_value=start)
        for _ in range(500):
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
        assert param.detach().abs().max() < 1e-3


# The norm


def test_the_norm_of_large_tensors_is_not_short() -> None:
    # torch.linalg.vector_norm is off by 7e-4 (squared) on a million equal float32 numbers, blocks are not.
    large = nn.Parameter(torch.zeros(3, 1 << 20, dtype=torch.float32))
    strided = nn.Parameter(torch.zeros(1 << 20, 3, dtype=torch.float32))
    large.grad = torch.full_like(large, 0.1)
    strided.grad = torch.full((3, 1 << 20), 0.1).t()
    optimizer = AdaGradNorm([large, strided], initial_accumulator_value=0.0)
    optimizer.step()
    exact = 6 * (1 << 20) * float(torch.tensor(0.1, dtype=torch.float32)) ** 2
    assert optimizer.accumulator.item() == pytest.approx(exact, rel=2e-5)


def test_squares_that_overflow_float16_are_summed() -> None:
    param = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    param.grad = torch.full_like(param, 1000.0)
    optimizer = AdaGradNorm([param], initial_accumulator_value=0.0)
    optimizer.step()
    assert optimizer.accumulator.item() == pytest.approx(1e8, rel=1e-6)


def test_small_norms_are_not_lost_behind_a_large_one() -> None:
    # In float32, 1e6 + 0.01 is 1e6.
    param = nn.Parameter(torch.zeros(1))
    optimizer = AdaGradNorm([param], initial_accumulator_value=1e6)
    for _ in range(100):
        param.grad = torch.full((1,), 0.1)
        optimizer.step()
    assert optimizer.accumulator.item() == pytest.approx(1e6 + 1.0, abs=1e-6)


# Groups


def test_splitting_into_groups_changes_nothing() -> None:
    together, apart = parameters(), parameters()
    whole = AdaGradNorm(together, lr=0.5, momentum=0.9)
    split = AdaGradNorm([{"params": [param]} for param in apart], lr=0.5, momentum=0.9)
    run(whole, together, steps=range(4))
    run(split, apart, steps=range(4))
    # Equal but for the order in which the norms of the tensors are added.
    for left, right in zip(together, apart, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


def test_groups_of_different_dtype_share_the_accumulator() -> None:
    params = [*parameters(dtype=torch.float32), *parameters(1, dtype=torch.bfloat16)]
    expected = 1e-2
    optimizer = AdaGradNorm(params)
    give_gradients(params, 0)
    expected += sum(float(param.grad.double().square().sum()) for param in params)
    optimizer.step()
    assert optimizer.accumulator.item() == pytest.approx(expected, rel=1e-6)


def test_a_later_group_joins_the_accumulator() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params[:2])
    run(optimizer, params[:2], steps=range(3))
    seen = optimizer.accumulator.item()
    optimizer.add_param_group({"params": params[2:], "lr": 0.1, "momentum": 0.9})
    assert all(optimizer.state[param]["sum"] is optimizer.accumulator for param in params)
    give_gradients(params, 3)
    optimizer.step()
    grown = sum(float(param.grad.square().sum()) for param in params)
    assert optimizer.accumulator.item() == pytest.approx(seen + grown, rel=1e-12)


def test_named_parameters_are_taken() -> None:
    model = nn.Linear(2, 2)
    optimizer = AdaGradNorm(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


# Gradients that are not there, not dense, not real, not finite


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    still = params[1].detach().clone()
    optimizer = AdaGradNorm(params, momentum=0.9, weight_decay=0.1)
    give_gradients(params, 0)
    params[1].grad = None
    expected = 1e-2 + sum(float(param.grad.square().sum()) for param in params if param.grad is not None)
    optimizer.step()
    assert torch.equal(params[1], still)
    assert optimizer.accumulator.item() == pytest.approx(expected, rel=1e-12)


def test_without_any_gradient_nothing_happens() -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = AdaGradNorm(params, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert_equal(params, before)
    assert optimizer.accumulator.item() == 1e-2


def test_a_zero_gradient_moves_nothing() -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = AdaGradNorm(params, initial_accumulator_value=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_equal(params, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(math.nan, torch.float32), (math.inf, torch.float32), (3e38, torch.float32), (math.inf, torch.bfloat16)],
)
def test_a_norm_that_is_not_finite_shows_at_once(value: float, dtype: torch.dtype, momentum: float) -> None:
    params = parameters(dtype=dtype, shapes=((3,), (2, 2)))
    optimizer = AdaGradNorm(params, momentum=momentum)
    give_gradients(params, 0)
    params[0].grad[1] = value
    optimizer.step()
    assert not optimizer.accumulator.isfinite()
    assert all(param.isnan().all() for param in params)


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, 3, dtype=torch.complex128, generator=generator)
    whole = nn.Parameter(values[0].clone())
    pairs = nn.Parameter(torch.view_as_real(values[0]).clone())
    optimizers = [AdaGradNorm([param], lr=0.3, momentum=0.9, weight_decay=0.1) for param in (whole, pairs)]
    for _ in range(3):
        whole.grad, pairs.grad = values[1].clone(), torch.view_as_real(values[1]).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(whole), pairs)
    assert optimizers[0].accumulator.dtype == torch.float64


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = AdaGradNorm(layer.parameters())
    layer(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.accumulator.item() == 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"foreach": False}])
def test_off_the_cpu_no_number_is_read(dtype: torch.dtype, lr: float | Tensor, options: dict[str, Any]) -> None:
    # Tensors on the meta device have no values: reading one, as a host sync does, raises.
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = AdaGradNorm(params, lr=lr, **options)
    optimizer.step()
    assert optimizer.accumulator.device.type == "meta"


# The step, schedulers and hooks


def test_the_closure_is_called_with_gradients_on() -> None:
    param = nn.Parameter(torch.tensor([1.0]))
    optimizer = AdaGradNorm([param])

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.no_grad():
        assert optimizer.step(closure) == 1.0
    assert optimizer.accumulator.item() == pytest.approx(4.01)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_tensor_lr_is_a_number_that_a_scheduler_may_fill(shape: tuple[int, ...], momentum: float) -> None:
    ended = []
    for lr in (0.5, torch.full(shape, 0.5)):
        params = parameters()
        optimizer = AdaGradNorm(params, lr, momentum=momentum, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            run(optimizer, params, steps=[step])
            schedule.step()
        ended.append(params)
    assert_equal(*ended)


def test_a_scheduler_that_cycles_momentum_works() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    used = []
    for step in range(5):
        used.append(dict(optimizer.param_groups[0]))
        run(optimizer, params, steps=[step])
        schedule.step()
    fresh = parameters()
    values = [param.detach().numpy().copy() for param in fresh]
    velocities, total = [np.zeros_like(value) for value in values], 1e-2
    for step, group in enumerate(used):
        give_gradients(fresh, step)
        options = [{"lr": group["lr"], "momentum": group["momentum"]}] * len(fresh)
        grads = [param.grad.numpy() for param in fresh]
        values, total = reference_step(values, grads, velocities, total, options)
    for param, value in zip(params, values, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-11, atol=1e-12)


def test_momentum_turned_on_later_starts_from_rest() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params)
    run(optimizer, params, steps=[0])
    optimizer.param_groups[0]["momentum"] = 0.9
    run(optimizer, params, steps=[1])
    same = parameters()
    other = AdaGradNorm(same)
    run(other, same, steps=[0, 1])
    # From rest the first momentum step is a plain one, up to rounding.
    for left, right in zip(params, same, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-15)


# State


def rebuilt(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_and_loaded_equals_uninterrupted_bitwise(tmp_path: Path, dtype: torch.dtype, momentum: float) -> None:
    def make(params: Sequence[Tensor]) -> AdaGradNorm:
        groups = [{"params": params[:3], "lr": 0.3}, {"params": params[3:], "weight_decay": 0.1}]
        return AdaGradNorm(groups, momentum=momentum)

    params = parameters(dtype=dtype)
    optimizer = make(params)
    run(optimizer, params, steps=range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = rebuilt(params)
    resumed = make(fresh)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(optimizer, params, steps=range(3, 6))
    run(resumed, fresh, steps=range(3, 6))
    assert_equal(fresh, params)
    assert resumed.accumulator.dtype == torch.float64
    assert torch.equal(resumed.accumulator, optimizer.accumulator)
    assert all(resumed.state[param]["sum"] is resumed.accumulator for param in fresh)


def test_what_was_loaded_is_not_the_saver_s() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params)
    fresh = rebuilt(params)
    other = AdaGradNorm(fresh)
    other.load_state_dict(optimizer.state_dict())
    run(other, fresh, steps=[0])
    assert optimizer.accumulator.item() == 1e-2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_goes_on_alone(copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = AdaGradNorm(params, momentum=0.9, reduce=torch.clone)
    run(optimizer, params, steps=range(2))
    twins, twin = copied((params, optimizer))
    run(optimizer, params, steps=range(2, 4))
    run(twin, twins, steps=range(2, 4))
    assert_equal(twins, params)
    assert all(twin.state[param]["sum"] is twin.accumulator for param in twins)
    assert twin.accumulator is not optimizer.accumulator
    assert twin._reduce is torch.clone


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
)
def test_the_checkpoint_api_round_trips(options: dict[str, bool], momentum: float) -> None:
    def make() -> tuple[nn.Module, AdaGradNorm]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1}]
        return model, AdaGradNorm(groups, momentum=momentum)

    model, optimizer = make()
    run(optimizer, list(model.parameters()), steps=range(2))
    choice = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=choice))
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    calls = []
    resumed.register_step_pre_hook(lambda *_: calls.append(1))
    set_optimizer_state_dict(other, resumed, saved, options=choice)
    assert not calls  # an optimizer with empty state would have been stepped
    run(optimizer, list(model.parameters()), steps=range(2, 4))
    run(resumed, list(other.parameters()), steps=range(2, 4))
    assert_equal(other.parameters(), model.parameters())
    assert torch.equal(resumed.accumulator, optimizer.accumulator)


def test_a_parameter_that_the_checkpoint_did_not_know_takes_its_accumulator() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params)
    run(optimizer, params, steps=range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]
    state["state"][0]["sum"] = torch.tensor([1e-2], dtype=torch.float64)
    fresh = rebuilt(params)
    resumed = AdaGradNorm(fresh)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.accumulator, optimizer.accumulator)
    assert all(resumed.state[param]["sum"] is resumed.accumulator for param in fresh)


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adagrad])
def test_the_state_of_another_optimizer_is_refused(other: Callable[..., torch.optim.Optimizer]) -> None:
    params = parameters()
    optimizer = AdaGradNorm(params)
    run(optimizer, params, steps=range(2))
    before = optimizer.accumulator.clone()
    with pytest.raises(ValueError, match="AdaGradNorm"):
        optimizer.load_state_dict(other(rebuilt(params), lr=0.1).state_dict())
    assert torch.equal(optimizer.accumulator, before)
    run(optimizer, params, steps=[2])


def test_a_nan_in_the_state_stays_one() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params)
    optimizer.accumulator.fill_(math.nan)
    resumed = AdaGradNorm(rebuilt(params))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.accumulator.isnan()


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must"),
        ({"lr": math.nan}, "lr must"),
        ({"lr": math.inf}, "lr must"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"momentum": 1.0}, "momentum must"),
        ({"momentum": -0.1}, "momentum must"),
        ({"weight_decay": -1e-3}, "weight_decay must"),
        ({"initial_accumulator_value": -1.0}, "initial_accumulator_value must"),
        ({"eps": -1e-8}, "eps must"),
        ({"eps": 0.0, "initial_accumulator_value": 0.0}, "divide by zero"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaGradNorm(parameters(), **options)


def test_a_bad_group_is_refused_and_leaves_no_trace() -> None:
    params = parameters()
    optimizer = AdaGradNorm(params[:2])
    with pytest.raises(ValueError, match="one accumulator"):
        optimizer.add_param_group({"params": params[2:], "initial_accumulator_value": 1.0})
    with pytest.raises(ValueError, match="momentum must"):
        optimizer.add_param_group({"params": params[2:], "momentum": 2.0})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 2


def test_differentiable_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="differentiate"):
        AdaGradNorm(parameters(), differentiable=True)


# Several processes


def test_reduce_is_called_once_a_step_even_without_gradients() -> None:
    sums = []

    def reduce(local: Tensor) -> Tensor:
        assert local.dim() == 0
        sums.append(local.item())
        return local + 3.0  # what the other ranks have

    params = parameters()
    optimizer = AdaGradNorm([{"params": params[:2]}, {"params": params[2:]}], reduce=reduce)
    optimizer.step()
    assert sums == [0.0]
    assert optimizer.accumulator.item() == pytest.approx(3.01)
    run(optimizer, params, steps=[0])
    mine = sum(float(param.grad.square().sum()) for param in params)
    assert sums[1:] == pytest.approx([mine])
    assert optimizer.accumulator.item() == pytest.approx(6.01 + mine)


def network() -> nn.Module:
    """Rows that two ranks cannot share evenly: 5, 3 and 1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def examples(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return inputs, inputs.sum(1, keepdim=True).sin()


def train(model: nn.Module, optimizer: AdaGradNorm, *, steps: Iterable[int], part: slice = slice(None)) -> None:
    for step in steps:
        inputs, targets = examples(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[part]), targets[part]).backward()
        optimizer.step()


def optimizer_for(model: nn.Module, momentum: float = 0.9) -> AdaGradNorm:
    return AdaGradNorm(model.parameters(), lr=0.3, momentum=momentum, weight_decay=0.01)


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Float64: the ranks add the halves of the batch in another order than one process does."""
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-11, atol=1e-12)


def same_on_both_ranks(value: Tensor) -> bool:
    values = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(values, value)
    return torch.equal(*values)


def ddp_worker(rank: int) -> None:
    half = slice(4 * rank, 4 * rank + 4)
    alone = network()
    single = optimizer_for(alone)
    train(alone, single, steps=range(5))
    model = DistributedDataParallel(network())
    optimizer = optimizer_for(model)
    train(model, optimizer, steps=range(5), part=half)
    assert_close(model.parameters(), alone.parameters())
    assert_close([optimizer.accumulator], [single.accumulator])
    assert same_on_both_ranks(optimizer.accumulator)

    # Each rank updates half of the tensors, as ZeRO and pipelines do: now the sum needs a reduce.
    def reduce(local: Tensor) -> Tensor:
        dist.all_reduce(local)
        return local

    model = DistributedDataParallel(network())
    mine = list(model.parameters())[rank::2]
    pieces = AdaGradNorm(mine, lr=0.3, momentum=0.9, weight_decay=0.01, reduce=reduce)
    for step in range(5):
        inputs, targets = examples(step)
        model.zero_grad()
        nn.functional.mse_loss(model(inputs[half]), targets[half]).backward()
        pieces.step()
        for index, param in enumerate(model.parameters()):
            dist.broadcast(param.data, src=index % 2)
    assert_close(model.parameters(), alone.parameters())
    assert_close([pieces.accumulator], [single.accumulator])
    assert same_on_both_ranks(pieces.accumulator)


@pytest.mark.distributed
def test_ddp_and_pieces_equal_one_process(tmp_path: Path) -> None:
    run_ranks(ddp_worker, 2, tmp_path)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_worker(rank: int) -> None:
    half = slice(4 * rank, 4 * rank + 4)
    for momentum in (0.0, 0.9):
        alone = network()
        single = optimizer_for(alone, momentum)
        train(alone, single, steps=range(5))
        for shape, names in (((2,), ("shard",)), ((1, 2), ("copy", "shard")), ((2, 1), ("copy", "shard"))):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            model = network()
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
            optimizer = optimizer_for(model, momentum)
            train(model, optimizer, steps=range(5), part=half)
            assert all(isinstance(param, DTensor) for param in model.parameters())
            assert_close(map(full, model.parameters()), alone.parameters())
            assert_close([optimizer.accumulator], [single.accumulator])
            assert same_on_both_ranks(optimizer.accumulator)

        # From the last of these a full checkpoint goes on in one process, and a sharded one on its mesh.
        choice = StateDictOptions(full_state_dict=True)
        whole = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=choice))
        piece = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        resumed, sharded, from_full = network(), network(), network()
        with torch.no_grad():
            for copies in (resumed, sharded, from_full):
                for target, source in zip(copies.parameters(), model.parameters(), strict=True):
                    target.copy_(full(source))
        for copies in (sharded, from_full):
            for layer in (copies[0], copies[2], copies):
                fully_shard(layer, mesh=mesh)
        optimizers = [optimizer_for(copies, momentum) for copies in (resumed, sharded, from_full)]
        set_optimizer_state_dict(resumed, optimizers[0], whole, options=choice)
        set_optimizer_state_dict(sharded, optimizers[1], piece)
        set_optimizer_state_dict(from_full, optimizers[2], whole, options=choice)
        train(resumed, optimizers[0], steps=range(5, 8))
        train(sharded, optimizers[1], steps=range(5, 8), part=half)
        train(from_full, optimizers[2], steps=range(5, 8), part=half)
        train(model, optimizer, steps=range(5, 8), part=half)
        assert_close(resumed.parameters(), map(full, model.parameters()))
        for copies in (sharded, from_full):
            assert_equal(map(full, copies.parameters()), map(full, model.parameters()))

    # A shard of uneven size, a replica, a partial sum and a plain parameter, each counted once.
    mesh = init_device_mesh("cpu", (2,))
    values = parameters(shapes=((5, 3), (4,), (3, 3), (2,)))
    placements = (Shard(0), Replicate(), Shard(1), None)
    params = [
        nn.Parameter(value.detach() if place is None else distribute_tensor(value.detach(), mesh, [place]))
        for value, place in zip(values, placements, strict=True)
    ]
    mixed, plain = (AdaGradNorm(tensors, momentum=0.9) for tensors in (params, values))
    for step in range(3):
        give_gradients(values, step)
        for param, value, place in zip(params, values, placements, strict=True):
            param.grad = value.grad if place is None else distribute_tensor(value.grad, mesh, [place])
        params[2].grad = params[2].grad.redistribute(mesh, [Replicate()])  # not as its parameter is placed
        mixed.step()
        plain.step()
    assert_close(map(full, params), values)
    assert_close([mixed.accumulator], [plain.accumulator])


@pytest.mark.distributed
def test_fully_sharded_equals_one_process(tmp_path: Path) -> None:
    run_ranks(sharded_worker, 2, tmp_path)
