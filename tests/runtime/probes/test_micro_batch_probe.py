"""The micro-batch probe against gradients computed part by part, on one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.hard_models import CASES, SPARSE, Case, CheckpointedByReentry, dense
from support.loops import network
from torch import Tensor, nn

from adabatch.batch.moments import GradientMoments, from_parts
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.norms import norms, sum_of_squares
from adabatch.runtime.probes.protocol import Probe

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


class Mixed(nn.Module):
    """Parameters in two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.float())).double())


class Spectral(nn.Module):
    """A complex weight between real inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


def length(grad: Tensor) -> float:
    return float(sum_of_squares([norms(grad)], grad.device).sqrt())


def measured(model: nn.Module, losses: Sequence[Callable[[], Tensor]], sizes: Sequence[int]) -> GradientMoments:
    """The probe's moments, by the calls that a step makes."""
    probe = MicroBatchProbe(model.parameters())
    probe.start(1)
    total = sum(sizes)
    for loss, size in zip(losses, sizes, strict=True):
        probe.begin_part()
        (loss() * (size / total)).backward()
        probe.end_part(size, size / total)
    moments = probe.moments(probe.collect().tolist())
    probe.remove()
    model.zero_grad()
    return moments


def part_by_part(model: nn.Module, losses: Sequence[Callable[[], Tensor]], sizes: Sequence[int]) -> GradientMoments:
    """The oracle: each part's gradient on its own, all in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = []
    for loss in losses:
        grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
        zipped = zip(grads, parameters, strict=True)
        parts.append(torch.cat([dense(torch.zeros_like(p) if g is None else g) for g, p in zipped]))
    stacked = torch.stack(parts)  # (num_parts, d)
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = (shares[:, None] * stacked).sum(0)
    return from_parts(stacked.abs().square().sum(1).numpy(), sizes, float(mean.abs().square().sum()))


def check(model: nn.Module, loss_of: Callable[..., Tensor], sizes: Sequence[int], dtype: torch.dtype) -> None:
    def drawn(seed: int, size: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            torch.manual_seed(seed)
            return loss_of(model, size, dtype)

        return loss

    losses = [drawn(seed, size) for seed, size in enumerate(sizes)]
    found, oracle = measured(model, losses, sizes), part_by_part(model, losses, sizes)
    tolerance = TOLERANCES[dtype]
    assert found.num_parts == oracle.num_parts == len(sizes)
    for name in ("part_sq", "part_size", "grad_sq", "num_examples"):
        assert getattr(found, name) == pytest.approx(getattr(oracle, name), rel=tolerance), name
    if len(sizes) > 1:
        # Noise and signal are differences of the two norms, so their error is relative to those.
        scale = oracle.part_sq * oracle.num_examples
        assert found.noise == pytest.approx(oracle.noise, rel=tolerance, abs=tolerance * scale)
        assert found.signal == pytest.approx(oracle.signal, rel=tolerance, abs=tolerance * oracle.part_sq)


@pytest.mark.parametrize("sizes", [[4], [4, 4], [3, 3, 3, 3], [2] * 8, [5, 1, 3], [1, 7]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", [*CASES.values(), SPARSE], ids=[*CASES, "sparse"])
def test_moments_are_those_of_the_parts_computed_one_by_one(
    case: Case, dtype: torch.dtype, sizes: Sequence[int]
) -> None:
    torch.manual_seed(1)
    check(case.make().to(dtype), case.loss, sizes, dtype)


@pytest.mark.parametrize("make", [Mixed, Spectral])
def test_parameters_of_two_precisions_or_complex_ones_are_measured(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    check(make(), CASES["network"].loss, [2, 4, 2], torch.float32)


def test_half_precision_gradients_are_squared_in_float32() -> None:
    """The square of 300 is above what float16 holds."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    probe = MicroBatchProbe([parameter])
    probe.start(1)
    for _ in range(2):
        probe.begin_part()
        (parameter * 300.0).sum().backward()
        probe.end_part(1, 0.5)
    moments = probe.moments(probe.collect().tolist())
    assert moments.part_sq == pytest.approx(4 * 600.0**2, rel=1e-5)  # of each part, before it was halved
    assert moments.grad_sq == pytest.approx(4 * 600.0**2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_large_gradient_keeps_its_digits(dtype: torch.dtype) -> None:
    """One float32 sum over 2e7 squares would lose the fourth digit: the terms fall below the last bit of the sum."""
    grad = (torch.rand(20_000_003, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    exact = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
    assert length(grad) == pytest.approx(exact, rel=1e-6 if dtype is torch.float32 else 1e-5)
    sparse = torch.sparse_coo_tensor(torch.arange(len(grad))[None], grad, check_invariants=False)
    assert length(sparse) == pytest.approx(exact, rel=1e-6 if dtype is torch.float32 else 1e-5)
    across = grad[:-3].view(1000, -1).t()  # not contiguous
    assert length(across) == pytest.approx(exact, rel=1e-5)


def test_a_gradient_that_comes_in_pieces_is_refused() -> None:
    """Squared norms of pieces do not add up; silence would measure something else."""
    model = CheckpointedByReentry()
    probe = MicroBatchProbe(model.parameters())
    probe.start(1)
    probe.begin_part()
    model(torch.ones(2, 6)).mean().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        probe.end_part(2, 1.0)


def test_gradients_outside_a_part_are_not_listened_to() -> None:
    model = network()
    probe = MicroBatchProbe(model.parameters())
    probe.start(1)
    probe.begin_part()
    (model(torch.ones(2, 6)).mean() / 2).backward()
    probe.end_part(2, 0.5)
    first = float(probe.collect()[0])
    model(torch.ones(2, 6)).sum().backward()  # a penalty of the user's own, say
    assert float(probe.collect()[0]) == first


def test_it_is_a_probe() -> None:
    assert isinstance(MicroBatchProbe(network().parameters()), Probe)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        MicroBatchProbe(network().requires_grad_(False).parameters())


def test_a_loss_of_another_model_is_refused() -> None:
    probe = MicroBatchProbe(network().parameters())
    probe.start(1)
    probe.begin_part()
    network(seed=1)(torch.ones(2, 6)).mean().backward()
    with pytest.raises(RuntimeError, match="reached no parameter"):
        probe.end_part(2, 1.0)


def hooks_on(model: nn.Module) -> int:
    return sum(len(p._backward_hooks or {}) for p in model.parameters())


def test_remove_leaves_nothing() -> None:
    model = network()
    assert hooks_on(model) == 0
    probe = MicroBatchProbe(model.parameters())
    assert hooks_on(model) == 4
    probe.remove()
    assert hooks_on(model) == 0
    probe.remove()  # a second time does nothing
    gone: Any = weakref.ref(probe)
    del probe
    gc.collect()
    assert gone() is None


def test_an_optimizer_that_steps_in_the_backward_is_refused() -> None:
    model = network()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    probe = MicroBatchProbe(model.parameters())
    probe.start(1)
    probe.begin_part()
    model(torch.ones(2, 6)).mean().backward()
    probe.end_part(2, 1.0)
    with pytest.raises(RuntimeError, match=r"no gradient is left .* let no optimizer step in the backward"):
        probe.collect()
