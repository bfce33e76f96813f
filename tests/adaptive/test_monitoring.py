"""``monitor``: the noise of a loop that stays as it is, which trains to the same bits."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import lines, loss_of, network, regression, train, weights
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, DistributedSampler

from adabatch import AdaptiveBatch, Limits, NoiseScale, monitor
from adabatch.adaptive import NoiseMonitor

MICRO = 4
CLIP = 0.5


def loop(
    model: nn.Module, optimizer: Any, data: Any, *, accumulation: int = 4, divide: bool = True, scaler: Any = None
) -> None:
    """A loop as people have it: accumulation, clipping, no word of adabatch."""
    for index, batch in enumerate(data):
        last = index % accumulation == accumulation - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        loss = loss_of(model, batch) / (accumulation if divide else 1)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if not last:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(regression(256), batch_size=MICRO, **options)


def measured_by_adaptive(journal: Path) -> AdaptiveBatch:
    """The same run around ``AdaptiveBatch``, which the monitor must agree with."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), CLIP) and None)
    batches = AdaptiveBatch(
        model, optimizer, NoiseScale(), micro_batch_size=MICRO, limits=Limits(min=16, max=16), journal=journal
    )
    train(batches, model, optimizer, loader())
    return batches


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_measures_and_changes_nothing(divide: bool, scaled: bool, tmp_path: Path) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6) if scaled else None

    plain, model = network(), network()
    loop(plain, AdamW(plain.parameters(), lr=0.01), loader(), divide=divide, scaler=scaler())
    optimizer = AdamW(model.parameters(), lr=0.01)
    its = scaler()
    found = monitor(model, optimizer, micro_batch_size=MICRO, journal=tmp_path / "run.jsonl", scaler=its)
    loop(model, optimizer, loader(), divide=divide, scaler=its)
    assert torch.equal(weights(model), weights(plain))
    assert found.consumed.steps == len(lines(tmp_path / "run.jsonl")) == 16
    assert found.consumed.examples == 256
    assert 0 < found.efficiency < 1
    assert found.efficiency == pytest.approx(1 / (1 + 16 / found.noise_scale))


def test_it_agrees_with_adaptive_batch(tmp_path: Path) -> None:
    batches = measured_by_adaptive(tmp_path / "adaptive.jsonl")
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    found = monitor(model, optimizer, micro_batch_size=MICRO, journal=tmp_path / "monitor.jsonl")
    loop(model, optimizer, loader())
    mine, theirs = lines(tmp_path / "monitor.jsonl"), lines(tmp_path / "adaptive.jsonl")
    for one, other in zip(mine, theirs, strict=True):
        assert one["moments"] == pytest.approx(other["moments"], rel=1e-5)
        assert one["averages"] == pytest.approx(other["averages"], rel=1e-5)
        assert one["wanted"] == pytest.approx(other["wanted"], rel=1e-5, nan_ok=True)
        for name in ("format", "step", "examples", "plan", "next", "reason", "lr", "applied"):
            assert one[name] == other[name], name
    assert found.noise_scale == pytest.approx(batches.noise_scale, rel=1e-5)


def test_it_lives_as_long_as_the_optimizer(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    monitor(model, optimizer, micro_batch_size=MICRO, journal=tmp_path / "run.jsonl")
    loop(model, optimizer, loader())
    assert len(lines(tmp_path / "run.jsonl")) == 16


def test_remove_takes_the_hooks_off() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    found = monitor(model, optimizer, micro_batch_size=MICRO)
    found.remove()
    loop(model, optimizer, loader())
    assert found.consumed.steps == 0
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_update_that_a_scaler_leaves_out_is_not_mixed_into_the_next() -> None:
    model = network()
    data = regression(64)
    data.tensors[0][20] = torch.inf
    optimizer = SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = monitor(model, optimizer, micro_batch_size=MICRO, scaler=scaler)
    loop(model, optimizer, DataLoader(data, batch_size=MICRO), scaler=scaler)
    assert found.consumed.examples == 48


def test_one_micro_batch_on_one_rank_has_no_spread(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    found = monitor(model, optimizer, micro_batch_size=MICRO)
    with caplog.at_level(logging.WARNING, "adabatch"):
        loop(model, optimizer, loader(), accumulation=1)
    assert [record.getMessage() for record in caplog.records] == [
        "the noise of the gradient is not measured: one micro-batch on one rank has no spread: accumulate two or more "
        "per step, or use more ranks"
    ]
    assert isinstance(found, NoiseMonitor)
    assert found.consumed.steps == 0


def test_bad_input() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    with pytest.raises(ValueError, match=r"micro_batch_size must be from 1 to .*, got 0"):
        monitor(model, optimizer, micro_batch_size=0)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        monitor(model, [], micro_batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        monitor(network(), optimizer, micro_batch_size=4)


def on_ranks(rank: int, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("without", "with"):
        model = DistributedDataParallel(network())
        optimizer = AdamW(model.parameters(), lr=0.01)
        if name == "with":
            watched = monitor(model, optimizer, micro_batch_size=MICRO, journal=Path(place, "run.jsonl"))
        loop(model, optimizer, loader(sampler=DistributedSampler(regression(256), shuffle=False)), accumulation=2)
        found[name] = weights(model).tolist()
    found["noise scale"] = watched.noise_scale
    model = DistributedDataParallel(network())
    optimizer = AdamW(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), CLIP) and None)
    limits = Limits(min=16, max=16)
    batches = AdaptiveBatch(model, optimizer, NoiseScale(), micro_batch_size=MICRO, limits=limits)
    train(batches, model, optimizer, loader(sampler=DistributedSampler(regression(256), shuffle=False)))
    found["adaptive"] = batches.noise_scale
    sharded = fully_shard(network())
    try:
        monitor(sharded, SGD(sharded.parameters(), lr=0.1), micro_batch_size=4)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    for rank in run_ranks(on_ranks, 2, tmp_path, str(tmp_path)):
        assert rank["with"] == rank["without"]
        assert rank["noise scale"] == pytest.approx(rank["adaptive"], rel=1e-5)
        assert "measure=Measure(monitor=True)" in rank["refused"]
    assert len(lines(tmp_path / "run.jsonl")) == 16


def test_a_second_monitor_replaces_the_first(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # a cell of a notebook that is run again
        found = monitor(model, optimizer, micro_batch_size=4, journal=tmp_path / "journal.jsonl")
    loop(model, optimizer, loader())
    assert [line["step"] for line in lines(tmp_path / "journal.jsonl")] == list(range(found.consumed.steps))
    assert found.consumed.steps > 1


def test_beside_an_adaptive_batch_it_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(model, optimizer, NoiseScale(), micro_batch_size=MICRO, limits=Limits(2 * MICRO, 2 * MICRO))
    with pytest.raises(ValueError, match=r"has an AdaptiveBatch.*read its noise_scale.*call its remove\(\) first"):
        monitor(model, optimizer, micro_batch_size=4)
    batches.remove()
    found = monitor(model, optimizer, micro_batch_size=4)
    loop(model, optimizer, loader())
    assert math.isfinite(found.noise_scale)


def test_an_adaptive_batch_takes_its_place_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    found = monitor(model, optimizer, micro_batch_size=4)
    batches = AdaptiveBatch(model, optimizer, NoiseScale(), micro_batch_size=MICRO, limits=Limits(2 * MICRO, 2 * MICRO))
    assert "the monitor() of this SGD is removed, since the AdaptiveBatch measures" in caplog.text
    train(batches, model, optimizer, loader())
    assert found.consumed.steps == 0
    assert batches.consumed.steps > 1
