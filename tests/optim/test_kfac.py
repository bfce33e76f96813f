"""K-FAC against closed forms and a slow one written out example by example; and as an optimizer of torch's."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adabatch.optim import KFAC, mup
from adabatch.optim.kfac import Damping, FactorPair
from adabatch.optim.kfac.roots import inverse, power, power_of_rows
from adabatch.optim.placement import Alone

CLASSES = 3


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(width: int = 6, inputs: int = 4, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width, bias), nn.Tanh(), nn.Linear(width, CLASSES, bias))


def digits(num: int, inputs: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, inputs, generator=generator), torch.randint(CLASSES, (num,), generator=generator)


def run_step(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor, parts: int = 1, scale: float = 1.0) -> None:
    """One step, its batch in so many micro-batches, its loss times ``scale``, whose gradient is divided by it again."""
    optimizer.zero_grad()
    for each, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
        outputs = model(each)
        optimizer.observe(outputs, target)
        (F.cross_entropy(outputs, target) / parts * scale).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale
    optimizer.step()


def moved(model: nn.Module, step: Callable[[], None]) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


# --- closed forms: one example, G = delta h^T, the update on h -------------------------------------------------------


@pytest.mark.parametrize("form", ["trace", "split", "kronecker", "absolute"])
def test_one_example_moves_its_output_by_the_closed_form(form: Any) -> None:
    damping, layer = 0.03, nn.Linear(7, 5, bias=False)
    x, y = torch.randn(1, 7), torch.randn(1, 5)
    optimizer = KFAC(
        layer.parameters(),
        layer,
        lr=1,
        kl_clip=None,
        damping=damping,
        damping_form=form,
        fisher="empirical",
        likelihood="gaussian",
    )

    def step() -> None:
        outputs = layer(x)
        optimizer.observe(outputs, y)
        (0.5 * (outputs - y).square().sum()).backward()
        optimizer.step()

    delta, h = (layer(x) - y).detach()[0], x[0]
    delta_sq, h_sq = float(delta @ delta), float(h @ h)
    own = moved(layer, step)["weight"] @ h
    pi = math.sqrt((h_sq / 7) / (delta_sq / 5))
    expected = {
        "trace": delta / (delta_sq * (1 + damping) ** 2),
        "split": delta * h_sq / ((h_sq + damping**0.5 * pi) * (delta_sq + damping**0.5 / pi)),
        "kronecker": delta * h_sq / (h_sq * delta_sq + damping),
        "absolute": delta * h_sq / ((h_sq + damping) * (delta_sq + damping)),
    }
    torch.testing.assert_close(own, expected[form], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exponents", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.0, 0.0)])
def test_exponents_are_the_powers_of_the_damped_factors(exponents: tuple[float, float]) -> None:
    """(0, 1) is the input side only, (1, 0) the output side only, (0, 0) gradient descent."""
    model = mlp(bias=False)
    x, y = digits(9)
    optimizer = KFAC(
        model.parameters(), model, lr=1, kl_clip=None, damping=0.1, exponents=exponents, fisher="empirical"
    )
    change = moved(model, lambda: run_step(optimizer, model, x, y))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert p.grad is not None
        a, b = state["input_moment"], state["output_moment"]
        left, right = power_by_eigenvalues(b, -exponents[0], 0.1), power_by_eigenvalues(a, -exponents[1], 0.1)
        torch.testing.assert_close(change[name], left @ p.grad @ right, rtol=1e-9, atol=1e-12)


def power_by_eigenvalues(moment: Tensor, exponent: float, damping: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag((values + damping * values.sum()) ** exponent) @ vectors.T


# --- the slow one: factors written out example by example ------------------------------------------------------------


class Sequences(nn.Module):
    """Tokens to classes, with positions in between; each layer kind once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1)
        self.same = nn.Conv2d(3, 2, (2, 3), padding="same", padding_mode="circular", bias=False)
        self.head = nn.Linear(2 * 9, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu_(self.same(torch.relu_(self.conv(images)))).flatten(1))


def example_rows(model: nn.Module, layer: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a layer for one example, shape (positions, d); for a convolution by looking at
    what its weight's gradient becomes for one position of one output channel at a time."""
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    outputs = model(x)
    handle.remove()
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight
        again = F.conv2d(
            F.pad(
                seen["x"].detach(),
                layer._reversed_padding_repeated_twice,
                mode="circular" if layer.padding_mode == "circular" else "constant",
            ),
            weight,
            layer.bias,
            layer.stride,
        )
        rows = [torch.autograd.grad(v, weight, retain_graph=True)[0][0].flatten() for v in again[0, 0].flatten()]
        outputs, delta = differentiated(model, layer, x)
        (grad,) = torch.autograd.grad(outputs, delta, cotangent)
        return torch.stack(rows), grad[0].flatten(1).T
    outputs, delta = differentiated(model, layer, x)
    (grad,) = torch.autograd.grad(outputs, delta, cotangent)
    h = seen["x"].detach()[0]
    if isinstance(layer, nn.Embedding):
        h = F.one_hot(h, layer.num_embeddings).double()
    return h.reshape(-1, h.shape[-1]), grad[0].reshape(-1, grad.shape[-1])


def differentiated(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The model's output, and a zero added to the layer's output, with respect to which it can be differentiated."""
    zeros: list[Tensor] = []

    def add(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(out, requires_grad=True))
        return out + zeros[0]

    handle = layer.register_forward_hook(add)
    outputs = model(x)
    handle.remove()
    return outputs, zeros[0]


def slow_factors(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors of the empirical Fisher at targets y, or, without targets, of the exact Fisher, class by class."""
    a, b, num_rows = 0.0, 0.0, 0
    for index in range(len(x)):
        probabilities = model(x[index : index + 1]).detach().softmax(-1)[0]
        for label in range(CLASSES) if y is None else [int(y[index])]:
            chance = 1.0 if y is not None else float(probabilities[label])
            cotangent = (probabilities - F.one_hot(torch.tensor(label), CLASSES)).unsqueeze(0)
            inputs, deltas = example_rows(model, layer, x[index : index + 1], cotangent)
            b = b + chance * deltas.T @ deltas
        a = a + inputs.T @ inputs
        num_rows += len(inputs)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return a / num_rows, b / len(x)


@pytest.mark.parametrize("fisher", ["empirical", "gauss-newton"])
@pytest.mark.parametrize("kind", [Sequences, Images])
def test_factors_and_step_equal_those_written_out_example_by_example(kind: type[nn.Module], fisher: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randint(11, (5, 6)) if kind is Sequences else torch.randn(5, 2, 6, 6)
    y = torch.randint(CLASSES, (5,))
    optimizer = KFAC(model.parameters(), model, lr=1, kl_clip=None, damping=0.1, fisher=fisher)
    layers = {name: layer for name, layer in model.named_children()}
    slow = {name: slow_factors(model, layer, x, y if fisher == "empirical" else None) for name, layer in layers.items()}
    change = moved(model, lambda: run_step(optimizer, model, x, y))
    for name, layer in layers.items():
        a, b = slow[name]
        state = optimizer.state[layer.get_parameter("weight")]
        measured = state["input_moment"]
        torch.testing.assert_close(measured, a.diagonal() if measured.dim() == 1 else a, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(state["output_moment"], b, rtol=1e-10, atol=1e-14)
        left = torch.linalg.inv(b + 0.1 * b.trace() * torch.eye(len(b)))
        right = torch.linalg.inv(a + 0.1 * a.trace() * torch.eye(len(a)))
        grad = layer.get_parameter("weight").grad
        assert grad is not None
        matrix = grad.T if isinstance(layer, nn.Embedding) else grad.flatten(1)
        expected = left @ matrix @ right
        got = change[f"{name}.weight"]
        got = got.T if isinstance(layer, nn.Embedding) else got.flatten(1)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        bias = getattr(layer, "bias", None)
        if bias is not None:  # a block of its own, with A = 1
            torch.testing.assert_close(change[f"{name}.bias"], left @ bias.grad, rtol=1e-9, atol=1e-12)


def test_drawn_targets_give_the_fisher_matrix_in_expectation() -> None:
    model = mlp()
    x, y = digits(4)
    exact = KFAC(model.parameters(), model, fisher="gauss-newton", lr=0)
    run_step(exact, model, x, y)
    other = copy.deepcopy(model)
    drawn = KFAC(other.parameters(), other, lr=0, seed=3)
    total = torch.zeros(6, 6)
    for _ in range(600):
        outputs = other(x)
        drawn.observe(outputs)
        total += drawn._capture.take().layers["0"].output_sum
    mean, expected = total / 600 / 4, exact.state[model[0].weight]["output_moment"]
    assert (mean - expected).norm() < 0.1 * expected.norm()


# --- the batch --------------------------------------------------------------------------------------------------------


def test_how_a_batch_is_cut_or_scaled_changes_nothing() -> None:
    x, y = digits(64)
    factors, steps = [], []
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    for parts, scale, index in ((1, 1.0, torch.arange(64)), (4, 1.0, torch.arange(64)), (8, 2.0**14, order)):
        model = mlp()
        optimizer = KFAC(model.parameters(), model, fisher="gauss-newton")
        steps.append(moved(model, lambda: run_step(optimizer, model, x[index], y[index], parts, scale)))  # noqa: B023
        factors.append(optimizer.state[model[0].weight]["output_moment"])
    twice = mlp()
    optimizer = KFAC(twice.parameters(), twice, fisher="gauss-newton")
    steps.append(moved(twice, lambda: run_step(optimizer, twice, torch.cat([x, x]), torch.cat([y, y]))))
    for other in steps[1:]:
        for name, change in steps[0].items():
            torch.testing.assert_close(other[name], change, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(factors[0], factors[1], rtol=1e-10, atol=0)


def test_the_step_does_not_grow_with_the_batch() -> None:
    """Where the output factor is made of the gradient of the mean loss, it grows with the square: by 256 times here."""

    def first_layer(num: int, naive: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 128, False), nn.Tanh(), nn.Linear(128, CLASSES, False))
        x, y = digits(num, 32)
        form = (
            (lambda pair, group: Damping(0.01 * pair.input.trace, 0.01 * pair.output.trace / num**2)) if naive else None
        )
        optimizer = KFAC(model.parameters(), model, lr=1, kl_clip=None, damping_form="trace")
        if form is not None:
            optimizer.observe(model(x))
            for layer in optimizer._capture._sums.layers.values():
                assert layer.output_sum is not None
                layer.output_sum /= num**2
            F.cross_entropy(model(x), y).backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            change = before - model[0].weight.detach()
        else:
            change = moved(model, lambda: run_step(optimizer, model, x, y))["0.weight"]
        return float((x @ change.T).square().mean().sqrt())

    ratio = first_layer(64, False) / first_layer(1024, False)
    assert 0.25 < ratio < 4
    assert first_layer(1024, True) / first_layer(64, True) > 64


def test_memory_and_refresh_are_in_examples() -> None:
    model = mlp()
    optimizer = KFAC(model.parameters(), model, memory=100, refresh=64, warmup_refreshes=2, fisher="gauss-newton")
    refreshed = []
    x, y = digits(64)
    for step in range(1, 29):
        before = optimizer._clock.refreshes
        run_step(optimizer, model, x[:16], y[:16])
        if optimizer._clock.refreshes > before:
            refreshed.append(step)
    # Two steps of warm-up; then each interval is a quarter longer, up to 64 examples or four steps.
    assert refreshed == [1, 2, 4, 6, 8, 11, 15, 19, 23, 27]
    before = optimizer._clock.refreshes
    run_step(optimizer, model, x[:32], y[:32])
    assert optimizer._clock.refreshes == before + 1  # the batch has changed
    old = optimizer.state[model[0].weight]["input_moment"].clone()
    run_step(optimizer, model, x, y)
    new = x.T @ x / 64
    keep = math.exp(-64 / 100)
    torch.testing.assert_close(optimizer.state[model[0].weight]["input_moment"], keep * old + (1 - keep) * new)


def test_only_the_last_examples_before_a_refresh_are_observed() -> None:
    model = mlp()
    optimizer = KFAC(model.parameters(), model, refresh=128, warmup_refreshes=1, observed=32, fisher="gauss-newton")
    x, y = digits(16)
    due, refreshed = [], []
    for step in range(1, 41):
        if optimizer.due:
            due.append(step)
        before = optimizer._clock.refreshes
        run_step(optimizer, model, x, y)
        if optimizer._clock.refreshes > before:
            refreshed.append(step)
    late = [step for step in refreshed if step > 24]  # the intervals are 8 steps long from there
    assert [b - a for a, b in itertools.pairwise(late)] == [8]
    assert [step for step in due if step > late[0]] == [late[1] - 1, late[1]]
    assert optimizer.state[model[0].weight]["observed"] == len(due)


def test_of_a_large_batch_a_share_is_observed_without_bias() -> None:
    """A share of 1/16, spread over batches whose first dimension is examples: 32 of 512."""
    x, y = digits(512)
    factors = []
    for observed in (math.inf, 32):
        model = mlp()
        optimizer = KFAC(model.parameters(), model, lr=0, fisher="gauss-newton", observed=observed)
        run_step(optimizer, model, x, y)  # the first step has no step before it, and observes everything
        taken = []
        for _ in range(100):
            optimizer.observe(model(x))
            sums = optimizer._capture.take()
            layer = sums.layers["0"]
            assert layer.input_sum is not None
            assert layer.output_sum is not None
            assert sums.num_examples == 512
            assert layer.num_rows == (512 if observed == math.inf else 32)
            taken.append((layer.input_sum / layer.num_rows, layer.output_sum / 512))
        factors.append([torch.stack(side).mean(0) for side in zip(*taken, strict=True)])
    for exact, drawn in zip(*factors, strict=True):
        assert (drawn - exact).norm() < 0.05 * exact.norm()  # five standard errors of 100 draws of 32


def test_few_rows_take_the_short_way_to_the_same_step() -> None:
    """Without a memory, 5 examples in a layer of width 40: a matrix of 5 x 5 is decomposed instead of 40 x 40."""
    x, y = digits(5, 30)
    results = []
    for reduce in (None, lambda values: values):
        model = mlp(40, 30)
        optimizer = KFAC(model.parameters(), model, memory=0, reduce=reduce, fisher="empirical")
        results.append(moved(model, lambda: run_step(optimizer, model, x, y)))  # noqa: B023
        rows = optimizer.state[model[0].weight].get("input_rows")
        assert (rows is not None and rows.shape == (5, 30)) == (reduce is None)
    for name, change in results[0].items():
        torch.testing.assert_close(change, results[1][name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_roots_of_rows_are_roots_of_their_moment(exponent: float) -> None:
    rows, grad = torch.randn(4, 9), torch.randn(9, 3)
    moment = rows.T @ rows
    long = power(moment, exponent, damping=0.3, trace=float(moment.trace())).of_rows(grad)
    torch.testing.assert_close(power_of_rows(rows, exponent, damping=0.3).of_rows(grad), long, rtol=1e-10, atol=1e-12)


# --- what users do around a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(7)
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inner, x, use_reentrant=reentrant) if self.again else self.inner(x))

    x, y = digits(8)
    x.requires_grad_()
    changes = []
    for again in (False, True):
        torch.manual_seed(2)
        model = Checkpointed()
        model.again = again
        optimizer = KFAC(model.parameters(), model, fisher="empirical")
        if reentrant and again:
            with pytest.raises(RuntimeError, match=r"no curvature was observed in inner.0.*use_reentrant=False"):
                run_step(optimizer, model, x, y)
            return
        changes.append(moved(model, lambda: [run_step(optimizer, model, x, y) for _ in range(3)] and None))  # noqa: B023
    for name, change in changes[0].items():
        assert torch.equal(change, changes[1][name])


# Where the hooks break the graph, the compiler looks at gradients of what flows through it, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_observe_eagerly() -> None:
    x, y = digits(8)
    changes = []
    for compiled in (False, True):
        model = mlp()
        run: Any = torch.compile(model, backend="eager") if compiled else model
        optimizer = KFAC(model.parameters(), run, refresh=16, warmup_refreshes=1, observed=1, fisher="empirical")

        def steps() -> None:
            for _ in range(4):
                torch.compiler.set_stance("force_eager" if optimizer.due else "default")  # noqa: B023
                run_step(optimizer, run, x, y)  # noqa: B023
            torch.compiler.set_stance("default")

        changes.append(moved(model, steps))
    for name, change in changes[0].items():
        torch.testing.assert_close(change, changes[1][name], rtol=1e-10, atol=1e-13)


def test_bfloat16_autocast_and_float16_scaling() -> None:
    torch.set_default_dtype(torch.float32)
    x, y = digits(16)
    model = mlp()
    optimizer = KFAC(model.parameters(), model, damping=1.0, fisher="empirical")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        optimizer.observe(outputs, y)
        loss = F.cross_entropy(outputs, y)
    scaler.scale(loss).backward()
    change = moved(model, lambda: scaler.step(optimizer) and None)
    plain = mlp()
    other = KFAC(plain.parameters(), plain, damping=1.0, fisher="empirical")
    expected = moved(plain, lambda: run_step(other, plain, x, y))
    for name in change:
        assert (change[name] - expected[name]).norm() < 0.1 * expected[name].norm()


def test_state_is_restored_bit_for_bit() -> None:
    def made(model: nn.Module) -> KFAC:
        return KFAC(
            model.parameters(),
            model,
            momentum=0.9,
            weight_decay=0.1,
            memory=50,
            refresh=40,
            warmup_refreshes=1,
            observed=16,  # of the 24: a resumed run must draw the same ones
            lr=0.02,
        )

    x, y = digits(24)
    model = mlp()
    optimizer = made(model)
    for _ in range(3):
        run_step(optimizer, model, x, y)
    again = copy.deepcopy(model)
    for module in again.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    resumed = made(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        run_step(optimizer, model, x, y)
        run_step(resumed, again, x, y)
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


class Second(Alone):
    """Of two ranks, the one with number 1."""

    rank = 1


def test_drawn_targets_repeat_with_the_seed_and_differ_between_ranks() -> None:
    x, _ = digits(32)

    def drawn(**options: Any) -> Tensor:
        model = mlp()
        optimizer = KFAC(model.parameters(), model, **options)
        optimizer.observe(model(x))
        found = optimizer._capture.take().layers["2"].output_sum
        assert found is not None
        return found

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(owner=Second()))
    assert not torch.equal(drawn(), drawn(seed=1))


def test_momentum_decay_and_clip_act_on_the_direction() -> None:
    x, y = digits(32)
    model = mlp(bias=False)
    optimizer = KFAC(
        model.parameters(), model, lr=0.5, momentum=0.5, weight_decay=0.2, kl_clip=None, fisher="empirical", refresh=1e9
    )
    weight, buffer = model[0].weight, torch.zeros_like(model[0].weight)
    for _ in range(3):
        before = weight.detach().clone()
        run_step(optimizer, model, x, y)
        assert weight.grad is not None
        buffer = 0.5 * buffer + optimizer.precondition(weight, weight.grad)
        torch.testing.assert_close(weight.detach(), before * (1 - 0.5 * 0.2) - 0.5 * buffer)
    clipped = mlp(bias=False)
    limited = KFAC(clipped.parameters(), clipped, lr=10, kl_clip=1e-3, fisher="empirical")
    change = moved(clipped, lambda: run_step(limited, clipped, x, y))
    product = sum(float((change[name] / 10 * p.grad).sum()) for name, p in clipped.named_parameters())
    unclipped = sum(
        float((limited.precondition(p, p.grad) * p.grad).sum()) for p in clipped.parameters() if p.grad is not None
    )
    assert product == pytest.approx(math.sqrt(1e-3 / (100 * unclipped)) * unclipped)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_clip_bounds_the_change_that_a_direction_makes_in_all_steps(momentum: float) -> None:
    """One gradient, and then none: momentum moves the weights by lr / (1 - momentum) times the direction."""
    x, y = digits(32)
    model, lr, limit = mlp(bias=False), 3.0, 1e-3
    optimizer = KFAC(
        model.parameters(), model, lr=lr, momentum=momentum, kl_clip=limit, fisher="empirical", refresh=1e9
    )
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_step(optimizer, model, x, y)
    first = {name: (p.grad.clone(), optimizer.precondition(p, p.grad)) for name, p in model.named_parameters()}
    for _ in range(300 if momentum else 0):  # 0.9^300 is 2e-14
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    whole = {name: start[name] - p.detach() for name, p in model.named_parameters()}
    unclipped = sum(float((direction * grad).sum()) for grad, direction in first.values())
    moved_by = sum(float((whole[name] * grad).sum()) for name, (grad, _) in first.items())
    assert (lr / (1 - momentum)) ** 2 * unclipped > limit, "nothing was clipped"
    assert moved_by == pytest.approx(math.sqrt(limit * unclipped), rel=1e-9)


def test_the_default_clips_and_none_does_not() -> None:
    x, y = digits(8)
    changes = []
    for option in ({}, {"kl_clip": 0.03}, {"kl_clip": None}, {"kl_clip": 1e9}):
        model = mlp()
        optimizer = KFAC(model.parameters(), model, lr=10, fisher="gauss-newton", **option)
        changes.append(moved(model, lambda: run_step(optimizer, model, x, y))["0.weight"])  # noqa: B023
    assert torch.equal(changes[0], changes[1])
    assert torch.equal(changes[2], changes[3])
    assert changes[0].norm() < changes[2].norm()


def test_groups_of_a_width_plan_are_taken() -> None:
    with torch.device("meta"):
        base = mlp(4)
    model = mlp(16)
    plan = mup.plan(model, base)
    optimizer = KFAC(plan.groups(model, "kfac", lr=0.1, damping=0.2), model, damping_form="absolute")
    x, y = digits(8)
    run_step(optimizer, model, x, y)
    weight = model[2].weight  # the readout: four times the fan-in of the base model
    state = optimizer.state[weight]
    expected = torch.linalg.inv(state["input_moment"] + 0.8 * torch.eye(16))
    torch.testing.assert_close(state["input_root"], expected, rtol=1e-8, atol=1e-12)


# --- what it cannot take ----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_layers_it_cannot_take_are_named_or_trained_by_a_first_order_method() -> None:
    torch.manual_seed(0)
    model = Mixed()
    with pytest.raises(ValueError, match=r"norm.weight: LayerNorm is not a Linear.*norm.bias.*others='adamw'"):
        KFAC(model.parameters(), model)
    x, y = digits(8)
    for others, torchs in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        model, reference = Mixed(), Mixed()
        reference.load_state_dict(model.state_dict())
        optimizer = KFAC(model.parameters(), model, others=others, others_lr=0.01, weight_decay=0.0)
        alone = torchs(reference.norm.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(2):
            run_step(optimizer, model, x, y)
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                theirs.grad = None if mine.grad is None else mine.grad.clone()
            alone.step()
        for mine, theirs in zip(model.norm.parameters(), reference.norm.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    model = mlp()
    optimizer = KFAC(model.parameters(), model, exclude=["2*"], others="sgd")
    assert [len(group["params"]) for group in optimizer.param_groups if group["method"] == "sgd"] == [2]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES, bias=False))
    model[1].weight = model[0].weight
    return model


def zero_readout() -> nn.Module:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (tied, {}, r"0.weight and 1.weight are one tied parameter"),
        (zero_readout, {}, r"the weight of 2 is all zeros.*regression on frozen features"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {}, r"convolution in 2 groups"),
        (lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True)), {}, r"sparse gradients"),
        (mlp, {"damping": -1.0}, r"damping must be zero or positive and finite, got -1.0"),
        (mlp, {"damping_form": "trase"}, r"damping_form must be one of trace, absolute, kronecker, split"),
        (mlp, {"fisher": "true"}, r"fisher must be one of monte-carlo, empirical, gauss-newton"),
        (mlp, {"likelihood": "poisson"}, r"likelihood must be one of categorical, gaussian"),
        (mlp, {"exponents": (2, 1)}, r"exponents \(e_B, e_A\) must be in \[0, 1\]"),
        (mlp, {"exponents": (0, 1), "damping_form": "kronecker"}, r"must be \(1, 1\)"),
        (mlp, {"memory": 0, "damping_form": "kronecker"}, r"memory must be positive, got 0"),
        (mlp, {"memory": -1}, r"in examples and cannot be negative"),
        (mlp, {"observed": 0}, r"observed must be at least 1 example, or math.inf for all, got 0"),
        (mlp, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (mlp, {"kl_clip": 0.0}, r"kl_clip must be positive, or None"),
        (mlp, {"others": "adam"}, r"others must be one of adamw, sgd or None"),
    ],
)
def test_bad_models_and_options(make: Callable[[], nn.Module], options: Mapping[str, Any], words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=words):
        KFAC(model.parameters(), model, **options)


def test_parameters_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 4\) in the groups is not one of the model's"):
        KFAC(mlp().parameters(), mlp())


def test_forgotten_and_wrong_observations() -> None:
    model = mlp()
    x, y = digits(4)
    optimizer = KFAC(model.parameters(), model, fisher="empirical")
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.observe\(outputs\)"):
        optimizer.step()
    outputs = model(x)
    with pytest.raises(ValueError, match=r"fisher='empirical' is made of the gradients at the true targets"):
        optimizer.observe(outputs)
    outputs = model(x)
    with pytest.raises(ValueError, match=r"targets must have the shape \(4,\)"):
        optimizer.observe(outputs, y[:3])
    outputs = model(x)
    with pytest.raises(ValueError, match=r"outputs in their graph"):
        optimizer.observe(outputs.detach(), y)
    optimizer.observe(outputs, y)
    with pytest.raises(RuntimeError, match=r"found no forward of the model"):
        optimizer.observe(outputs, y)


def test_parameters_that_were_replaced() -> None:
    model = mlp()
    optimizer = KFAC(model.parameters(), model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(9))]
    with pytest.raises(RuntimeError, match=r"DeepSpeed flattens them from ZeRO 1 on"):
        optimizer.step()


def test_observations_that_are_not_finite_are_left_out_and_counted() -> None:
    x, y = digits(8)
    model = mlp()
    optimizer = KFAC(model.parameters(), model, refresh=0)
    run_step(optimizer, model, x, y)
    before = optimizer.state[model[0].weight]["output_moment"].clone()
    bad = x.clone()
    bad[3] = math.inf
    optimizer.observe(model(bad))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["output_moment"], before)
    assert optimizer.fallbacks["not finite"] >= 1
    fresh = mlp()
    other = KFAC(fresh.parameters(), fresh)
    other.observe(fresh(bad))
    F.cross_entropy(fresh(x), y).backward()
    with pytest.raises(RuntimeError, match=r"every observation of these layers was not finite: 0, 2"):
        other.step()


def test_float32_inverses_that_fail_are_done_in_float64_and_counted() -> None:
    torch.set_default_dtype(torch.float32)
    rows = torch.randn(3, 40)
    moment = rows.T @ rows
    trace = float(moment.trace())
    assert int(inverse(moment, damping=1e-12 * trace, trace=trace, dtype=torch.float32).info) != 0
    model = mlp(40)
    x, y = digits(3)
    optimizer = KFAC(model.parameters(), model, damping=1e-9, fisher="empirical")
    run_step(optimizer, model, x, y)
    assert optimizer.fallbacks["float64 inverse"] > 0


def test_a_layer_without_curvature_takes_no_step_and_is_counted() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    x, y = digits(8)
    optimizer = KFAC(model.parameters(), model, allow_zero_weights=True, fisher="empirical")
    change = moved(model, lambda: run_step(optimizer, model, x, y))
    assert float(change["0.weight"].abs().max()) == 0
    assert float(change["2.weight"].abs().max()) > 0
    assert optimizer.fallbacks["no curvature"] == 2


def test_a_form_of_ones_own_is_a_function() -> None:
    def largest(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
        top = [float(torch.linalg.eigvalsh(factor.values)[-1]) if factor.dim > 1 else 1.0 for factor in pair]
        return Damping(group["damping"] * top[0], group["damping"] * top[1])

    model = mlp()
    x, y = digits(8)
    optimizer = KFAC(model.parameters(), model, damping_form=largest)
    run_step(optimizer, model, x, y)
    state = optimizer.state[model[0].weight]
    a = state["input_moment"]
    expected = torch.linalg.inv(a + 0.01 * torch.linalg.eigvalsh(a)[-1] * torch.eye(len(a)))
    torch.testing.assert_close(state["input_root"], expected, rtol=1e-9, atol=1e-12)
