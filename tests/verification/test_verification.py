"""The checks of a person's own training: each passes on a sound one, and each catches what it is for."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from adabatch import GlobalOrder, MicroBatchProbe, PerExampleProbe
from adabatch.adaptive.step import Step
from adabatch.batch import GradientMoments
from adabatch.verification import (
    Check,
    Training,
    all_checks,
    constant_policy,
    cost,
    drift,
    probe_agrees,
    resume,
)

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "double": lambda: network(dtype=torch.float64),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1)),
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": fully_shard}


def training(
    model: str = "plain",
    optimizer: str = "adam",
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    loader: Callable[[Any], Iterable[Any]] = lambda data: GlobalOrder(data, seed=2),
    num_examples: int = 96,
    **options: Any,
) -> Training:
    torch.manual_seed(7)
    net = wrap(MODELS[model]())
    dtype = next(net.parameters()).dtype
    return Training(
        model=net,
        optimizer=OPTIMIZERS[optimizer](net.parameters()),
        loader=loader(regression(num_examples, dtype=dtype)),
        loss=loss_of,
        micro_batch_size=4,
        **{"count": lambda batch: len(batch[0]), **options},
    )


def uneven(data: Any) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of 4 and of fewer examples, whose shares of a step are no powers of two."""
    sizes = [4, 2, 3, 4, 4, 1] * 4
    x, y = data[: sum(sizes)]
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def findings(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# --- a sound training passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_sound_training_passes(model: str, optimizer: str) -> None:
    found = findings(all_checks(lambda: training(model, optimizer), num_steps=4))
    assert list(found) == ["drift", "probe", "constant policy", "resume", "cost"]
    assert all(check.passed for check in found.values()), found
    assert all(found[name].measured == 0 for name in ("drift", "constant policy", "resume"))
    assert found["probe"].measured < 1e-5
    assert found["cost"].allowed is None
    assert found["cost"].measured > 0


@pytest.mark.parametrize("loader", [uneven, lambda data: DataLoader(data, batch_size=4)], ids=["uneven", "loader"])
def test_loaders_of_ones_own_pass(loader: Any) -> None:
    def make() -> Training:
        return training("dropout", loader=loader)

    assert constant_policy(make, num_steps=9).passed
    assert probe_agrees(make).passed
    assert cost(make, num_pairs=2).passed
    assert drift(lambda: training(loader=loader, num_examples=200)).passed


def sum_of_inputs(batch: Any) -> float:
    """Weights as unequal as the data."""
    return float(batch[0].abs().sum())


def every_check_on_ranks(rank: int, wrapper: str, model: str, weighed: bool) -> list[Check]:
    weigh = sum_of_inputs if weighed else None
    return list(all_checks(lambda: training(model, wrap=WRAPPERS[wrapper], weigh=weigh), num_steps=4))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("wrapper", "model", "weighed"),
    [
        ("ddp", "dropout", False),
        ("ddp", "batch norm", False),
        ("fsdp2", "dropout", False),
        ("ddp", "plain", True),
        ("fsdp2", "plain", True),
    ],
)
def test_ranks_pass_together(wrapper: str, model: str, weighed: bool, tmp_path: Path) -> None:
    first, second = run_ranks(every_check_on_ranks, 2, tmp_path, wrapper, model, weighed)
    assert all(check.passed for check in first), first
    assert first == second  # the times too: they are those of both


# --- drift ----------------------------------------------------------------------------------------------------------


def other_weights(training: Training, rank: int) -> None:
    with torch.no_grad():
        next(training.model.parameters())[0, 0] += 1e-6


def other_rate(training: Training, rank: int) -> None:
    """From the first update on: rates that differ at the beginning are refused there."""
    group = training.optimizer.param_groups[0]
    other = group["lr"] * 1.001
    training.optimizer.register_step_post_hook(lambda *_: group.update(lr=other))


DIFFERENCES = {"weights": other_weights, "rate": other_rate}


def drift_on_ranks(rank: int, odd: int, difference: str) -> Check:
    def make() -> Training:
        made = training(wrap=DistributedDataParallel)
        if rank == odd:
            DIFFERENCES[difference](made, rank)
        return made

    return drift(make)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "odd", "difference", "text"),
    [
        (2, 1, "weights", "rank 1 differed from the others before the first step"),
        (3, 0, "rate", "rank 0 drifted from the others in 7 steps, over a change from 1 to 4"),
    ],
)
def test_the_rank_that_drifts_is_named_on_all(size: int, odd: int, difference: str, text: str, tmp_path: Path) -> None:
    for found in run_ranks(drift_on_ranks, size, tmp_path, odd, difference):
        assert not found.passed
        assert found.measured == 1
        assert found.explanation == text


def drift_with_an_infinite_loss(rank: int) -> Check:
    calls = 0

    def once_infinite(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model, batch) * (math.inf if calls == 5 and rank == 1 else 1.0)

    return drift(lambda: Training(**{**vars(training(wrap=DistributedDataParallel)), "loss": once_infinite}))


@pytest.mark.distributed
def test_an_update_left_out_is_not_as_planned(tmp_path: Path) -> None:
    for found in run_ranks(drift_with_an_infinite_loss, 2, tmp_path):
        assert not found.passed
        assert found.measured == 0  # it was left out on both
        assert found.explanation.endswith("in 6 updates, but [1, 1, 1, 4, 4, 4, 4] in 7 were planned")


# --- the probe ------------------------------------------------------------------------------------------------------


class Sabotaged(MicroBatchProbe):
    """One of the moments 1 % too large."""

    field = "part_sq"

    def moments(self, totals: list[float]) -> GradientMoments:
        found = super().moments(totals)
        return found._replace(**{self.field: getattr(found, self.field) * 1.01})


def sabotaged(field: str, **options: Any) -> Training:
    made = training(**options)
    probe = Sabotaged(made.model.parameters())
    probe.field = field
    return Training(**{**vars(made), "probe": probe})


@pytest.mark.parametrize("field", ["part_sq", "grad_sq", "part_size", "num_examples"])
def test_a_probe_one_percent_off_is_caught(field: str) -> None:
    found = probe_agrees(lambda: sabotaged(field))
    assert not found.passed
    assert found.measured == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert found.explanation.startswith(f"{field} is off by")
    assert probe_agrees(lambda: sabotaged(field), allowed=0.02).passed


def half_sabotaged(rank: int) -> Check:
    def make() -> Training:
        field = "part_sq" if rank == 1 else "num_parts"
        made = sabotaged(field, wrap=DistributedDataParallel)
        if rank == 0:
            made = Training(**{**vars(made), "probe": MicroBatchProbe(made.model.parameters())})
        return made

    return probe_agrees(make)


@pytest.mark.distributed
def test_a_probe_that_is_off_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """Only the numbers that rank 1 reads are wrong; rank 0 fails with it."""
    for found in run_ranks(half_sabotaged, 2, tmp_path):
        assert not found.passed
        assert found.measured == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_a_probe_of_single_examples_is_refused() -> None:
    def make() -> Training:
        made = training()
        return Training(**{**vars(made), "probe": PerExampleProbe(made.model)})

    with pytest.raises(ValueError, match="the parts of PerExampleProbe are single examples"):
        probe_agrees(make)


# --- a constant policy, and the weighting ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["not divided", "not by size"])
def test_a_broken_weighting_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Step.backward

    def wrong(self: Step, loss: Tensor) -> None:
        shares = self._weights.total / self._weight
        right(self, loss * (shares if kind == "not divided" else shares / len(self.portion.sizes)))

    monkeypatch.setattr(Step, "backward", wrong)
    for check in (constant_policy, probe_agrees):
        found = check(lambda: training(optimizer="sgd", loader=uneven))
        assert not found.passed
        assert found.measured > 1e-3


def test_a_training_that_does_not_repeat_is_told_apart() -> None:
    calls = 0

    def never_the_same(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model, batch) * (1 + 1e-3 * calls)

    def make() -> Training:
        return Training(**{**vars(training()), "loss": never_the_same})

    for found in (constant_policy(make, num_steps=4), resume(make)):
        assert not found.passed
        assert "use_deterministic_algorithms" in found.explanation


# --- resume ---------------------------------------------------------------------------------------------------------


class Forgetful(SGD):
    """Loses its momentum when it is loaded."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


def test_an_optimizer_that_forgets_is_caught() -> None:
    def make() -> Training:
        made = training()
        return Training(**{**vars(made), "optimizer": Forgetful(made.model.parameters(), lr=0.05, momentum=0.9)})

    found = resume(make)
    assert not found.passed
    assert found.measured > 1e-4
    assert "two uninterrupted" not in found.explanation


def test_a_resume_needs_a_place_in_the_data() -> None:
    with pytest.raises(ValueError, match="with a GlobalOrder only: the place in a list"):
        resume(lambda: training(loader=uneven))


# --- cost -----------------------------------------------------------------------------------------------------------


class Slow(MicroBatchProbe):
    """Takes 20 ms a micro-batch, ten times a step of these networks or more."""

    def end_part(self, num_examples: int, weight: float) -> None:
        time.sleep(0.02)
        super().end_part(num_examples, weight)


def test_a_cost_above_the_largest_fails() -> None:
    def make() -> Training:
        made = training()
        return Training(**{**vars(made), "probe": Slow(made.model.parameters())})

    assert cost(make, num_pairs=4).passed
    found = cost(make, num_pairs=4, max_cost=1.5)
    assert not found.passed
    assert found.measured > 1.5
    assert cost(make, num_pairs=4, max_cost=1e9).passed


# --- what cannot be checked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [drift, probe_agrees, constant_policy, resume, cost])
def test_a_data_set_that_is_too_small_is_refused(check: Callable[..., Check]) -> None:
    with pytest.raises(ValueError, match=r"steps of 16 examples \(1 rank\(s\) x 4 micro-batches of 4\).*has 15"):
        check(lambda: training(num_examples=15))


def test_a_loader_that_ends_within_the_check_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass ended in step 5 of 7.*at least 19 micro-batches"):
        drift(lambda: training(loader=lambda data: DataLoader(data, batch_size=4), num_examples=36))


@pytest.mark.parametrize("check", [constant_policy, resume, cost])
def test_a_make_that_does_not_build_anew_is_refused(check: Callable[..., Check]) -> None:
    made = training()
    with pytest.raises(ValueError, match=r"make\(\) must build another model"):
        check(lambda: made)

    def unseeded() -> Training:
        other = nn.Linear(6, 1)
        nn.init.normal_(other.weight, generator=generator)
        return Training(**{**vars(training()), "model": other, "optimizer": SGD(other.parameters(), lr=0.1)})

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="the same weights: seed torch"):
        check(unseeded)


@pytest.mark.parametrize(
    ("options", "match"), [({"num_steps": 3}, "at least 4 steps, got 3"), ({"max_cost": 0.0}, "positive.*got 0")]
)
def test_settings_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        list(all_checks(training, **options))


def test_the_page_runs_as_it_stands(capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "verify.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" True ")[0] for line in said] == ["drift", "probe", "constant policy", "resume", "cost"]
