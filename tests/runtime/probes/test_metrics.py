"""Adam's metric against its formula, and what happens where it is not known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.utils._python_dispatch import TorchDispatchMode

from adabatch import MicroBatchProbe, PerExampleProbe
from adabatch.batch.needs import Needs
from adabatch.runtime.probes.gauge import Gauge
from adabatch.runtime.probes.layers import layers_of
from adabatch.runtime.probes.metrics import AdamMetric, norm_of


def stepped(optimizer: Optimizer, parameter: nn.Parameter, steps: int = 3) -> list[Tensor]:
    """The gradients of a few updates."""
    grads = [torch.randn_like(parameter) for _ in range(steps)]
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return grads


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {}), (AdamW, {"betas": (0.5, 0.75)}), (Adam, {"amsgrad": True}), (NAdam, {}), (Adam, {"fused": True})],
)
def test_the_image_is_the_gradient_over_the_root_of_the_second_moments(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = kind([parameter], lr=1e-3, eps=1e-4, **options)
    grads = stepped(optimizer, parameter)
    beta, second = options.get("betas", (0.9, 0.999))[1], torch.zeros_like(parameter)
    largest = second
    for grad in grads:
        second = beta * second + (1 - beta) * grad.square()
        largest = torch.maximum(largest, second)
    seen = largest if options.get("amsgrad") else second
    expected = grads[0] / ((seen / (1 - beta ** len(grads))).sqrt() + 1e-4)
    metric = AdamMetric(optimizer)
    assert metric.begin([parameter])
    for grad in (grads[0], grads[0].flatten(), grads[0].to_sparse()):
        torch.testing.assert_close(metric(parameter, grad).view(4, 3), expected.detach(), rtol=1e-12, atol=0)


def test_what_adam_would_step_is_its_image() -> None:
    """Without momentum, a step along the gradient of the step before is its image: the mean of its square stays."""
    parameter = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = Adam([parameter], lr=0.1, betas=(0.0, 1 - 1e-9), eps=1e-3)
    (grad,) = stepped(optimizer, parameter, 1)
    metric, before = AdamMetric(optimizer), parameter.detach().clone()
    assert metric.begin([parameter])
    image = metric(parameter, grad)
    optimizer.step()
    torch.testing.assert_close((before - parameter) / 0.1, image, rtol=1e-6, atol=0)


def test_half_precision_and_complex_gradients_have_images() -> None:
    for dtype in (torch.bfloat16, torch.complex64):
        parameter = nn.Parameter(torch.ones(5, dtype=dtype))
        optimizer = Adam([parameter], lr=1e-3)
        (grad,) = stepped(optimizer, parameter, 1)
        metric = AdamMetric(optimizer)
        assert metric.begin([parameter])
        image = metric(parameter, grad)
        assert image.dtype is torch.float32
        assert image.abs().flatten().tolist() == pytest.approx([1.0] * image.numel(), rel=1e-2)  # g over its own size


def test_parameters_without_a_state_have_no_image() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = Adam([first, second])
    metric = AdamMetric(optimizer)
    assert not metric.begin([first, second])
    stepped(optimizer, first, 1)
    assert metric.begin([first, second])
    assert not metric.begin([second])
    assert metric(second, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="none of the measured parameters in the Adam, which updates copies or shards"):
        metric.begin([nn.Parameter(torch.ones(2))])


def test_optimizers_without_second_moments_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    for optimizer in (SGD([parameter], lr=0.1), RAdam([parameter])):
        with pytest.raises(
            ValueError, match=f"norm='adam' .*{type(optimizer).__name__} does not have: use norm='euclid"
        ):
            norm_of("adam", optimizer)
    assert norm_of("euclidean", Adam([parameter])) is None
    assert norm_of("sign", SGD([parameter], lr=0.1)) == "sign"


class Mixing:
    """A metric that is not diagonal: the sum of all coordinates."""

    name = "mixing"
    diagonal = False

    def begin(self, parameters: Any) -> bool:
        return True

    def __call__(self, parameter: Tensor, grad: Tensor) -> Tensor:
        return grad.sum().view(1)


def test_a_metric_of_ones_own_is_measured_where_parts_are_seen_whole() -> None:
    model = nn.Linear(3, 1)
    probe = MicroBatchProbe(model.parameters(), norm=Mixing())
    assert probe.gives == Needs(noise="mixing")
    probe.start(1)
    rows = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, -1.0]])
    for row in rows:
        probe.begin_part()
        (model(row).sum() / 2).backward()
        probe.end_part(1, 0.5)
    moments = probe.moments(probe.collect().tolist())
    assert moments.part_sq == pytest.approx((36 + 1) / 2 + 1)  # the bias adds 1
    assert moments.grad_sq == pytest.approx(3.5**2 + 1)
    assert moments.grad_l2 == pytest.approx(math.sqrt(1.5**2 + 1 + 1 + 1))
    with pytest.raises(ValueError, match="norm='mixing' mixes coordinates, of which PerExampleProbe knows the squares"):
        PerExampleProbe(model, norm=Mixing())


def test_squares_on_several_ranks_need_collectives() -> None:
    probe = MicroBatchProbe(nn.Linear(2, 1).parameters(), quantile=0.9)
    with pytest.raises(ValueError, match=r"over 2 ranks.*over 1: use MicroBatchProbe\(..., collectives=collectives_of"):
        probe.start(2)


def test_squares_are_held_in_a_probed_step_only() -> None:
    parameter = nn.Parameter(torch.ones(1000))
    options: dict[str, Any] = {"owner": "test", "device": torch.device("cpu"), "whole_parts": True}
    assert Gauge([parameter], **options).coordinates is None
    gauge = Gauge([parameter], quantile=0.5, **options)
    assert gauge.coordinates is not None
    assert gauge.coordinates.num_bytes == 0
    gauge.start(1)
    assert gauge.coordinates.num_bytes == 4000
    gauge.sums.join(1, 1.0)
    gauge.close([])
    gauge.collect([(0, torch.ones(1000))], holders=1)
    assert gauge.coordinates.num_bytes == 0


class Reads(TorchDispatchMode):
    """Notes every operation whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.def")
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", ["adam", "sign", "quantile", "layers"])
def test_nothing_is_read_by_the_host_until_all_is_collected(asked: str) -> None:
    model = network()
    optimizer = Adam(model.parameters())
    loss_of(model, regression(4).tensors).backward()
    optimizer.step()
    norm: Any = AdamMetric(optimizer) if asked == "adam" else asked if asked == "sign" else None
    layers = layers_of(model, optimizer, "module") if asked == "layers" else None
    quantile = 0.9 if asked == "quantile" else None
    probe = MicroBatchProbe(model.parameters(), norm=norm, quantile=quantile, layers=layers, record_l1=True)
    with Reads() as reads:
        for _ in range(2):
            optimizer.zero_grad()
            probe.start(1)
            for seed in range(2):
                probe.begin_part()
                (loss_of(model, regression(4, seed=seed).tensors) / 2).backward()
                probe.end_part(4, 0.5)
            numbers = probe.collect()
        assert reads.found == []
        assert float(numbers[0]) > 0
        assert len(reads.found) == 1  # that one
