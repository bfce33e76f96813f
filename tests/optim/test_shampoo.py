"""Shampoo against closed forms and against a slow one written out in numpy; and as an optimizer of torch's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples
from torch import Tensor, nn

from adabatch.optim import Shampoo, mup
from adabatch.optim.shampoo import roots, statistics

SHAPES = ((5, 3), (4,), (), (2, 3, 2, 2), (1, 1), (0, 4), (7, 9))


def parameters(dtype: torch.dtype = torch.float64, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        param.grad = (scale * torch.randn(param.shape, generator=generator, dtype=torch.float64)).to(param.dtype)


def run(optimizer: Shampoo, params: Sequence[Tensor], steps: Iterable[int], scale: float = 1.0) -> None:
    for step in steps:
        give_gradients(params, step, scale)
        optimizer.step()


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_one_example_moves_its_output_by_the_closed_form(exponent: float, epsilon: float) -> None:
    """G = delta h^T: the update on h is delta |h|^2 / (s (1 + epsilon))^(2e), s = |delta|^2 |h|^2."""
    generator = torch.Generator().manual_seed(0)
    delta, h = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (7, 11))
    weight = nn.Parameter(torch.zeros(7, 11, dtype=torch.float64))
    weight.grad = torch.outer(delta, h)
    Shampoo([weight], lr=1.0, exponent=exponent, epsilon=epsilon).step()
    s = delta.square().sum() * h.square().sum()
    expected = -delta * h.square().sum() / (s * (1 + epsilon)) ** (2 * exponent)
    torch.testing.assert_close(weight.detach() @ h, expected, rtol=1e-12, atol=1e-13)


def test_with_the_width_factor_the_output_moves_by_the_root_mean_square_of_the_input() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, h = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (48, 12))
    weight = nn.Parameter(torch.zeros(48, 12, dtype=torch.float64))
    weight.grad = torch.outer(delta, h)
    Shampoo([weight], lr=(48 / 12) ** 0.5, epsilon=0.0).step()
    moved = (weight.detach() @ h).square().mean().sqrt()
    assert moved.item() == pytest.approx(h.square().mean().sqrt().item(), rel=1e-12)


@pytest.mark.parametrize(("exponent", "power"), [(0.25, 0), (0.5, -1)])
def test_a_loss_times_c_multiplies_a_matrix_step_by_a_power_of_c(exponent: float, power: int) -> None:
    moved = []
    for c in (1.0, 100.0):
        (weight,) = parameters(shapes=((6, 5),))
        start = weight.detach().clone()
        run(Shampoo([weight], lr=0.1, exponent=exponent), [weight], range(4), scale=c)
        moved.append(weight.detach() - start)
    torch.testing.assert_close(moved[1], moved[0] * 100.0**power, rtol=1e-9, atol=0)


# --- the slow and obvious one -----------------------------------------------------------------------------------------


def inverse_root(matrix: np.ndarray, exponent: float, epsilon: float, relative: bool) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    if relative and values.max() <= 0:
        return np.zeros_like(matrix)
    rho = epsilon * values.max() if relative else epsilon
    return sum((value + rho) ** -exponent * np.outer(v, v) for value, v in zip(values, vectors.T, strict=True))


class Slow:
    """Shampoo of one parameter: a running mean with weights beta^age, blocks as slices, one step at a time."""

    def __init__(self, value: Tensor, option: dict[str, Any]) -> None:
        self.x = value.detach().numpy().copy()
        self.option = option
        self.grads: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        self.roots: dict[tuple[int, int], list[np.ndarray]] = {}
        self.velocity = np.zeros_like(self.x)
        self.count = self.latest = 0  # steps so far, and the step of the roots

    def step(self, grad: Tensor) -> None:
        option, rows = self.option, self.x.shape[0] if self.x.ndim else 1
        whole = grad.numpy().reshape(rows, -1)
        self.whole = whole.shape
        size = option["block_size"] or max(whole.shape)
        update = np.zeros_like(whole)
        self.count += 1
        age = self.count - self.latest
        due = self.count <= option["refresh_warmup"] or age >= min(option["refresh_every"], max(1, self.latest // 4))
        if due:
            self.latest = self.count
        for i in range(0, whole.shape[0], size):
            for j in range(0, whole.shape[1], size):
                block = whole[i : i + size, j : j + size]
                self.grads.setdefault((i, j), []).append((self.count, block))
                if due:
                    self.roots[i, j] = self._roots(self.grads[i, j])
                left, right = self.roots.get((i, j), [np.zeros((n, n)) for n in block.shape])
                update[i : i + size, j : j + size] = left @ block @ right
        self.velocity = option["momentum"] * self.velocity + update.reshape(self.x.shape)
        self.x = (1 - option["lr"] * option["weight_decay"]) * self.x - option["lr"] * self.velocity

    def _roots(self, grads: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        option = self.option
        weights = np.array([option["beta"] ** (self.count - step) for step, _ in grads])
        weights /= weights.sum()
        height, width = (min(side, option["block_size"] or side) for side in self.whole)
        left = sum(w * self._seen(g, width, step) for w, (step, g) in zip(weights, grads, strict=True))
        right = sum(w * self._seen(g.T, height, step) for w, (step, g) in zip(weights, grads, strict=True))
        if self.x.ndim < 2:
            return [inverse_root(left, 0.5, option["epsilon"], option["relative"]), np.eye(1)]
        return [inverse_root(side, option["exponent"], option["epsilon"], option["relative"]) for side in (left, right)]

    def _seen(self, grad: np.ndarray, columns: int, step: int) -> np.ndarray:
        """The product of the columns that a step sees, of blocks with so many columns."""
        parts = self.option["observe_parts"]
        if step <= self.option["refresh_warmup"] or columns < parts:
            return grad @ grad.T
        seen = [np.outer(grad[:, j], grad[:, j]) for j in range(grad.shape[1]) if j % parts == step % parts]
        return parts * sum(seen, np.zeros((len(grad), len(grad))))


OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1.0),
        "exponent": st.sampled_from([0.25, 0.5]),
        "epsilon": st.sampled_from([1e-3, 1e-2, 0.5]),
        "relative": st.booleans(),
        "beta": st.sampled_from([0.0, 0.5, 0.95]),
        "observe_parts": st.sampled_from([1, 2, 3]),
        "refresh_every": st.sampled_from([1, 2, 3]),
        "refresh_warmup": st.sampled_from([0, 1, 2]),
        "block_size": st.sampled_from([None, 2, 4]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
    }
)


@with_examples(40)
@given(first=OPTIONS, second=OPTIONS, cut=st.integers(0, len(SHAPES)), foreach=st.sampled_from([None, True, False]))
def test_equals_the_slow_one_with_groups_of_their_own_options(
    first: dict[str, Any], second: dict[str, Any], cut: int, foreach: bool | None
) -> None:
    params = parameters()
    slow = [Slow(param, first if index < cut else second) for index, param in enumerate(params)]
    groups = [{"params": params[:cut], **first}, {"params": params[cut:], **second}]
    optimizer = Shampoo(groups, foreach=foreach)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SHORTEST_PART", 1)
        for step in range(13):  # the intervals have grown to three steps in the last two refreshes
            give_gradients(params, step)
            for each, param in zip(slow, params, strict=True):
                if param.numel():
                    each.step(param.grad)
            optimizer.step()
    for each, param in zip(slow, params, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), each.x, rtol=1e-8, atol=1e-9)
    assert not any(optimizer.fallbacks.values())


def test_parts_of_a_gradient_add_up_to_all_of_it() -> None:
    """The averages of the same gradient, after each of its parts was seen once."""
    (whole,), (parted,) = (parameters(shapes=((96, 130),)) for _ in range(2))
    beta = 1 - 1e-9  # all steps weigh the same
    for param, num_parts in ((whole, 1), (parted, 3)):
        optimizer = Shampoo([param], lr=0.0, beta=beta, observe_parts=num_parts, refresh_warmup=0)
        run(optimizer, [param], [0, 0, 0])
        left, right = optimizer.state[param]["left"], optimizer.state[param]["right"]
        torch.testing.assert_close(left[0], param.grad @ param.grad.T, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(right[0], param.grad.T @ param.grad, rtol=1e-7, atol=1e-7)


def test_permuting_hidden_units_permutes_the_step() -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    with torch.no_grad():
        for mine, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
            mine.copy_(theirs)
        for tensor in (nets[1][0].weight, nets[1][0].bias):
            tensor.copy_(tensor[order].clone())
        nets[1][2].weight.copy_(nets[1][2].weight[:, order].clone())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for net in nets:
        optimizer = Shampoo(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(nets[1](x), nets[0](x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(nets[1][0].weight, nets[0][0].weight[order], rtol=1e-9, atol=1e-12)


# --- as an optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(momentum: float, dtype: torch.dtype) -> None:
    def made() -> tuple[list[nn.Parameter], Shampoo]:
        params = parameters(dtype)
        first, second = {"params": params[:2], "lr": 0.02}, {"params": params[2:], "block_size": 4}
        return params, Shampoo([first, second], lr=0.01, momentum=momentum, refresh_warmup=2, refresh_every=3)

    params, optimizer = made()
    run(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, other = made()
    with torch.no_grad():
        for mine, theirs in zip(resumed, params, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, range(4, 8))
    run(other, resumed, range(4, 8))
    assert_equal(resumed, params)
    for name in ("left", "right_root", "weight"):
        assert torch.equal(other.state[resumed[-1]][name], optimizer.state[params[-1]][name])
        assert other.state[resumed[-1]][name].dtype == optimizer.state[params[-1]][name].dtype


def test_copies_and_pickles_go_on_alike() -> None:
    params = parameters(torch.float32)
    optimizer = Shampoo(params, lr=0.01, momentum=0.9)
    run(optimizer, params, range(2))
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, range(2, 4))
    for twin in twins:
        theirs = twin.param_groups[0]["params"]
        run(twin, theirs, range(2, 4))
        assert_equal(theirs, params)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_foreach_and_a_rate_that_is_a_tensor_change_no_bit(dtype: torch.dtype, momentum: float) -> None:
    results = []
    for foreach, lr in ((True, 0.25), (False, 0.25), (None, torch.tensor(0.25)), (False, torch.tensor([0.25]))):
        params = parameters(dtype)
        run(Shampoo(params, lr=lr, foreach=foreach, momentum=momentum, weight_decay=0.1), params, range(3))
        results.append(params)
    for other in results[1:]:
        assert_equal(other, results[0])


def test_half_precision_is_rounded_once() -> None:
    low, high = parameters(torch.bfloat16), parameters(torch.float32)
    with torch.no_grad():
        for wide, narrow in zip(high, low, strict=True):
            wide.copy_(narrow)
    for params in (low, high):
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(index)
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        Shampoo(params, lr=0.3).step()
    assert_equal(low, [param.bfloat16() for param in high])


def test_closure_maximize_and_missing_gradients() -> None:
    up, down = parameters(), parameters()
    ascending, descending = Shampoo(up, lr=0.1, maximize=True), Shampoo(down, lr=0.1)
    for params, optimizer, sign in ((up, ascending, 1), (down, descending, -1)):

        def closure(params: list[nn.Parameter] = params, sign: int = sign) -> float:
            give_gradients(params, 0, float(-sign))
            params[0].grad = None
            return 3.5

        assert optimizer.step(closure) == 3.5
    assert_equal(up, down)
    assert torch.equal(up[0], parameters()[0])
    assert ascending.state[up[0]]["step"] == 0


def test_zero_gradients_move_nothing() -> None:
    params = parameters()
    optimizer = Shampoo(params, lr=0.1, momentum=0.9)
    give_gradients(params, 0, 0.0)
    optimizer.step()
    assert_equal(params, parameters())
    run(optimizer, params, range(3))
    assert all(torch.isfinite(param).all() for param in params)


def test_roots_are_refreshed_when_due_and_epsilon_follows_their_age() -> None:
    (weight,) = params = parameters(shapes=((4, 3),))
    optimizer = Shampoo(params, lr=0.1, refresh_warmup=2, refresh_every=4)
    fresh = []
    for step in range(29):
        before = optimizer.state[weight]["left_root"].clone()
        run(optimizer, params, [step])
        fresh.append(not torch.equal(before, optimizer.state[weight]["left_root"]))
    # Two steps of warm-up, then a quarter of the steps so far, and four steps in the end.
    assert [step for step, new in enumerate(fresh, 1) if new] == [*range(1, 9), 10, 12, 15, 18, 22, 26]

    def condition(refresh_every: int) -> float:
        """Of the root of a statistic of rank one: ((1 + epsilon) / epsilon)^e."""
        (weight,) = params = parameters(shapes=((4, 3),))
        optimizer = Shampoo(params, lr=0.1, refresh_every=refresh_every)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        values = torch.linalg.eigvalsh(optimizer.state[weight]["left_root"])[0]
        return float(values.max() / values.min())

    assert condition(1) == pytest.approx((1.001 / 0.001) ** 0.25)
    assert condition(10) == pytest.approx((1.01 / 0.01) ** 0.25)


def test_beta_may_change_in_mid_run() -> None:
    """The statistic is the mean with weights beta_1 ... beta_n each, whatever the factors were."""
    (weight,) = params = parameters(shapes=((3, 2),))
    optimizer = Shampoo(params, lr=0.1)
    betas, grads = [0.9, 0.5, 0.99], []
    for step, beta in enumerate(betas):
        optimizer.param_groups[0]["beta"] = beta
        run(optimizer, params, [step])
        grads.append(weight.grad.clone())
    weights = torch.tensor([0.5 * 0.99, 0.99, 1.0], dtype=torch.float64)
    expected = sum(w * g @ g.T for w, g in zip(weights / weights.sum(), grads, strict=True))
    torch.testing.assert_close(optimizer.state[weight]["left"][0], expected, rtol=1e-12, atol=1e-14)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torch's eigh fail that many times."""
    real, left = torch.linalg.eigh, [times]

    def eigh(matrix: Tensor) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise roots.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def test_float32_roots_are_checked_and_computed_in_float64_if_they_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    for spoiled in (False, True):
        (weight,) = params = parameters(torch.float32, shapes=((40, 30),))
        optimizer = Shampoo(params, lr=0.1)
        real = torch.linalg.eigh

        def eigh(matrix: Tensor, spoiled: bool = spoiled, real: Any = real) -> Any:
            values, vectors = real(matrix)
            if spoiled and matrix.dtype is torch.float32:
                values = values * 1.01  # off by 0.01 of the largest, which is the damping
            return values, vectors

        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", eigh)
            run(optimizer, params, [0])
        assert optimizer.fallbacks == {"float64": 2 * spoiled, "jittered": 0, "kept": 0}
        for side in ("left", "right"):
            state = optimizer.state[weight]
            expected = inverse_root(state[side][0].double().numpy(), 0.25, 1e-2, relative=True)
            np.testing.assert_allclose(state[f"{side}_root"][0].double().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_an_older_checkpoint_goes_on_with_whole_gradients_in_its_averages() -> None:
    old, new = parameters(), parameters()
    first, second = Shampoo(old, lr=0.1), Shampoo(new, lr=0.1)
    run(first, old, [0])
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        del group["observe_parts"], group["bfloat16_products"]  # they were no options
    second.load_state_dict(saved)
    assert second.param_groups[0]["observe_parts"] == 1
    assert second.param_groups[0]["bfloat16_products"] is False
    run(second, new, [1])


def test_where_eigenvalues_do_not_converge_a_small_number_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,), (plain,) = parameters(shapes=((4, 3),)), parameters(shapes=((4, 3),))
    optimizer = Shampoo([weight], lr=0.1)
    failing(2, monkeypatch)  # the stack's, and the one without anything added
    run(optimizer, [weight], [0])
    run(Shampoo([plain], lr=0.1), [plain], [0])
    assert optimizer.fallbacks == {"float64": 0, "jittered": 1, "kept": 0}
    torch.testing.assert_close(weight, plain, rtol=1e-9, atol=1e-12)


def test_where_they_never_converge_the_roots_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,) = params = parameters(shapes=((4, 3),))
    optimizer = Shampoo(params, lr=0.1)
    failing(8, monkeypatch)  # both sides: the stack, then three times with more added
    run(optimizer, params, [0])
    assert optimizer.fallbacks == {"float64": 0, "jittered": 0, "kept": 2}
    assert_equal(params, parameters(shapes=((4, 3),)))  # it had no roots yet: a raw gradient is not taken for one
    run(optimizer, params, [1])
    known = optimizer.state[weight]["left_root"].clone()
    failing(8, monkeypatch)
    run(optimizer, params, [2])
    assert optimizer.fallbacks["kept"] == 4
    assert torch.equal(optimizer.state[weight]["left_root"], known)


def test_one_block_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight,) = params = parameters(shapes=((4, 2),))
    optimizer = Shampoo(params, lr=0.1, block_size=2, refresh_warmup=2)
    run(optimizer, params, [0])
    before = optimizer.state[weight]["left_root"].clone()
    failing(4, monkeypatch)  # the stack of the left side, and its first block
    run(optimizer, params, [1])
    after = optimizer.state[weight]["left_root"]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert optimizer.fallbacks == {"float64": 0, "jittered": 0, "kept": 1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: Shampoo(p), ValueError, "no learning rate"),
        (lambda p: Shampoo(p, lr=-1.0), ValueError, "lr must be finite and not negative"),
        (lambda p: Shampoo(p, lr=torch.ones(2)), ValueError, "tensor of one element"),
        (lambda p: Shampoo(p, lr=0.1, exponent=1.0), ValueError, "exponent must be in"),
        (lambda p: Shampoo(p, lr=0.1, relative=False), ValueError, "absolute epsilon .* has no default"),
        (lambda p: Shampoo(p, lr=0.1, epsilon=float("inf")), ValueError, "epsilon must be finite"),
        (lambda p: Shampoo(p, lr=0.1, beta=1.0), ValueError, "beta must be in"),
        (lambda p: Shampoo(p, lr=0.1, refresh_every=0), ValueError, "refresh_every must be at least 1 step, got 0"),
        (lambda p: Shampoo(p, lr=0.1, observe_parts=0), ValueError, "observe_parts must be at least 1, got 0"),
        (lambda p: Shampoo(p, lr=0.1, block_size=0), ValueError, "block_size must be 1 or more"),
        (lambda p: Shampoo([torch.zeros(2, dtype=torch.complex64)], lr=0.1), ValueError, "complex"),
        (lambda p: Shampoo([torch.empty(50000, 2, device="meta")], lr=0.1), ValueError, "50000 squared.*block_size"),
        (
            lambda p: Shampoo(p, lr=0.1).load_state_dict(_other_state(p)),
            ValueError,
            "no statistics",
        ),
    ],
)
def test_mistakes_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(parameters())


def _other_state(params: list[nn.Parameter]) -> dict[str, Any]:
    optimizer = torch.optim.Adam(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    return optimizer.state_dict()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Shampoo(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_statistics_that_are_not_finite_are_refused_by_shape() -> None:
    params = parameters(shapes=((4, 3),))
    optimizer = Shampoo(params, lr=0.1)
    params[0].grad = torch.full_like(params[0], float("nan"))
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\) is not finite"):
        optimizer.step()


def test_a_scheduler_that_sets_rates_is_refused() -> None:
    def made(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))

    model = made(8)
    optimizer = Shampoo(mup.plan(model, made(2)).groups(model, "shampoo", lr=0.1, damping=0.05))
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05, 0.2}
    assert all(group["epsilon"] == 0.05 for group in optimizer.param_groups)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False)
    with pytest.raises(ValueError, match="undone the plan's ratios"):
        optimizer.step()
