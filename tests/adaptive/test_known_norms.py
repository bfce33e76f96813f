"""AdaGradNorm takes the norm that a probe has measured of its gradients, and reads any others itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, weights
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

import adabatch
from adabatch import AdaptiveBatch, Control, GlobalOrder, Limits, NoiseScale, NormTest, examples
from adabatch.adaptive.options import EngineOptions, Measure
from adabatch.optim import AdaGradNorm
from adabatch.probes import CommHookProbe
from adabatch.runtime.optimizers.measured_norm import MeasuredNorm


class Watched(AdaGradNorm):
    """Counts the norms that are taken, and keeps what was added to the accumulator in each step."""

    taken = 0

    def _checked(self, known: Any) -> float | None:
        found = super()._checked(known)
        self.taken += found is not None
        return found

    def step(self, closure: Any = None) -> Any:
        before = self.accumulator.item()
        loss = super().step(closure)
        self.added = self.accumulator.item() - before
        return loss


Run = tuple[Watched, nn.Module, list[float], list[float]]


def run(
    between: Callable[[nn.Module], object] = lambda model: None,
    *,
    criterion: Any = None,
    model: nn.Module | None = None,
    optimizer: Callable[[nn.Module], Any] = lambda model: Watched(model.parameters(), lr=0.1),
    control: Control | None = None,
    **options: Any,
) -> Run:
    """A short run; ``between`` may change the gradients before the update. Norms as added, and as the gradients say."""
    model = network() if model is None else model
    made = optimizer(model)
    one: Watched = made[0] if isinstance(made, list) else made
    scaler = options["engine"].scaler if "engine" in options else None
    batches = AdaptiveBatch(
        model,
        made,
        criterion or NormTest(eta=0.4),
        micro_batch_size=4,
        limits=Limits(min=8, max=32),
        control=control or Control(),
        **options,
    )
    added, read = [], []
    for step in batches.steps(GlobalOrder(regression(160)), until=examples(160)):
        for batch in step:
            step.backward(loss_of(model, batch))
        between(model)
        held = [p for group in one.param_groups for p in group["params"]]
        read.append(sum(float(_whole(p.grad).double().square().sum()) for p in held if p.grad is not None))
        for each in made if isinstance(made, list) else [made]:
            each.step() if scaler is None else scaler.step(each)
            each.zero_grad()
        if scaler is not None:
            scaler.update()
        added.append(one.added)
    return one, model, added, read


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": NoiseScale(norm="sign")},
        {"measure": Measure(l1=True, layers="module")},
        {
            "model": nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(12, 1)).to(
                memory_format=torch.channels_last
            )
        },
    ],
    ids=["euclidean", "sign", "l1-layers", "channels-last"],
)
def test_the_norm_that_was_measured_is_taken(options: dict[str, Any]) -> None:
    if "model" in options:
        options = {**options, "model": _Pictures(options["model"])}
    optimizer, _, added, read = run(**options)
    assert optimizer.taken == len(added) > 4
    # b^2 grows to some 10^2, in float64; the norms are sums of some float32 squares.
    assert added == pytest.approx(read, rel=1e-6)


class _Pictures(nn.Module):
    """Six features as a picture of 2 x 3."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.view(-1, 1, 2, 3).contiguous(memory_format=torch.channels_last))
        return out


def test_a_run_with_known_norms_is_that_of_a_run_that_reads_them() -> None:
    """Equal weights to 1e-6, whether the norm is taken or not."""

    class Reads(Watched):
        def _checked(self, known: Any) -> float | None:
            return None

    fast, model, *_ = run()
    slow, other, *_ = run(optimizer=lambda model: Reads(model.parameters(), lr=0.1))
    assert (fast.taken > 0, slow.taken) == (True, 0)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fast.accumulator, slow.accumulator, rtol=1e-6, atol=0)


def doubled(grad: Tensor) -> None:
    grad.mul_(2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "clipped": lambda model: clip_grad_norm_(model.parameters(), 1e-2),
    "clipped in a loop": lambda model: clip_grad_norm_(model.parameters(), 1e-2, foreach=False),
    "one changed": lambda model: model[2].bias.grad.mul_(2),  # type: ignore[index, union-attr, operator]
    "replaced": lambda model: setattr(model[2].bias, "grad", 3 * model[2].bias.grad),  # type: ignore[index, operator]
    "dropped": lambda model: setattr(model[2].bias, "grad", None),  # type: ignore[index]
    "unscaled": lambda model: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad for p in model.parameters()], torch.zeros(1), torch.full((1,), 0.25)
    ),
    "by .data": lambda model: [p.grad.data.mul_(0.5) for p in model.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_gradients_are_read_again(change: str) -> None:
    optimizer, _, added, read = run(CHANGES[change])
    assert optimizer.taken == 0
    assert added == pytest.approx(read, rel=1e-6)


def test_steps_without_a_probe_read() -> None:
    optimizer, _, added, read = run(control=Control(interval=3))
    assert 0 < optimizer.taken < len(added)
    assert added == pytest.approx(read, rel=1e-6)


def test_an_optimizer_of_a_part_of_the_model_reads() -> None:
    def two(model: nn.Module) -> list[Any]:
        first, *rest = model.parameters()
        return [Watched([first], lr=0.1), SGD(rest, lr=0.01)]

    optimizer, _, added, read = run(optimizer=two)
    assert optimizer.taken == 0
    assert added == pytest.approx(read, rel=1e-6)


def test_a_gradient_scaler_and_a_reduction_of_ones_own_are_read() -> None:
    scaled, *_ = run(engine=EngineOptions(scaler=torch.amp.GradScaler("cpu", enabled=True)))
    assert scaled.taken == 0
    reduced, _, added, read = run(optimizer=lambda model: Watched(model.parameters(), lr=0.1, reduce=lambda x: x * 1))
    assert reduced.taken == 0
    assert added == pytest.approx(read, rel=1e-6)


def test_an_offer_is_for_one_step_and_holds_no_gradient_after_it() -> None:
    model = network()
    loss_of(model, regression(8)[:]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer = Watched(model.parameters(), lr=0.1)
    optimizer.take_norm(MeasuredNorm(100.0, grads))
    optimizer.step()
    assert optimizer.added == pytest.approx(100.0)
    assert optimizer._known is None
    optimizer.step()
    assert optimizer.taken == 1
    assert optimizer.added < 100.0
    zeros = [torch.zeros(3), torch.zeros(2)]
    assert not MeasuredNorm(0.0, zeros).is_of(zeros)


def test_resumed_to_the_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, AdaGradNorm, AdaptiveBatch, GlobalOrder]:
        model = network()
        optimizer, batches = adabatch.AdAdaGradNorm(model, lr=0.3, micro_batch_size=4, limits=Limits(min=8, max=64))
        return model, optimizer, batches, GlobalOrder(regression(160), seed=3)

    def go(parts: tuple[nn.Module, AdaGradNorm, AdaptiveBatch, GlobalOrder], until: int) -> None:
        model, optimizer, batches, order = parts
        for step in batches.steps(order, until=adabatch.steps(until)):
            for batch in step:
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    through, before, after = fresh(), fresh(), fresh()
    go(through, 12)
    go(before, 5)
    model, optimizer, batches, order = before
    adabatch.save(tmp_path / "c", model=model, optimizer=optimizer, batches=batches, order=order)
    model, optimizer, batches, order = after
    adabatch.load(tmp_path / "c", model=model, optimizer=optimizer, batches=batches, order=order)
    go(after, 12)
    assert torch.equal(weights(through[0]), weights(after[0]))
    assert torch.equal(through[1].accumulator, after[1].accumulator)


def on_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """DDP, with both of its probes, and FSDP2."""
    found: dict[str, Any] = {}
    for name, bucket in {"tensor hooks": None, "communication hook": True}.items():
        model = DistributedDataParallel(network())
        probe = CommHookProbe(model) if bucket else None
        optimizer, _, added, read = run(model=model, probe=probe)
        found[name] = {"taken": optimizer.taken, "added": added, "read": read, "weights": weights(model)}
    sharded = network()
    for part in sharded:
        fully_shard(part)
    fully_shard(sharded)
    optimizer, _, added, read = run(lambda model: clip_grad_norm_(model.parameters(), 1e-2), model=sharded)
    found["FSDP2, clipped"] = {"taken": optimizer.taken, "added": added, "read": read}
    return found


@pytest.mark.distributed
def test_replicas_take_the_norm_and_shards_are_read(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, tmp_path, tmp_path)
    for name in ("tensor hooks", "communication hook"):
        assert first[name]["taken"] == len(first[name]["added"]) > 4
        assert first[name]["added"] == pytest.approx(first[name]["read"], rel=1e-6)
        assert first[name]["added"] == second[name]["added"]  # the same bits on all ranks
        assert torch.equal(first[name]["weights"], second[name]["weights"])
    # Torch does not count what operations on lists do to sharded gradients, so their norms are never handed on.
    assert first["FSDP2, clipped"]["taken"] == 0
    assert first["FSDP2, clipped"]["added"] == pytest.approx(first["FSDP2, clipped"]["read"], rel=1e-6)
