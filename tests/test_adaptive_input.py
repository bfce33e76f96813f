"""Bad input to ``AdaptiveBatch`` and its loop, on one process: a clear error each, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import network, regression, train
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    AugmentedInnerProductTest,
    Constant,
    InnerProductTest,
    Limits,
    LinearRamp,
    NoiseScale,
    NormTest,
    OrthogonalityTest,
    Stage,
    Stages,
    examples,
)


def adaptive(model: nn.Module | None = None, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    model = model or network()
    options = {"micro_batch_size": 4, "limits": Limits(min=8, max=64), **options}
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion or NormTest(eta=0.5), **options)


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    on_steps = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return on_steps + sum(len(p._backward_hooks or {}) for p in model.parameters())


# --- the constructor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, -0.5, float("nan"), float("inf")])
def test_eta_must_be_positive(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta must be a positive number, got {eta}"):
        adaptive(criterion=NormTest(eta=eta))


def test_crossed_limits() -> None:
    with pytest.raises(ValueError, match="limits are crossed: min=64 is above max=8"):
        adaptive(limits=Limits(min=64, max=8))


def test_a_micro_batch_above_the_limit() -> None:
    with pytest.raises(ValueError, match=r"limits.min=16 is below the smallest step.*micro_batch_size=8 or less"):
        adaptive(micro_batch_size=32, limits=Limits(min=16, max=16))
    with pytest.raises(ValueError, match=r"limits.max=16 is below the smallest step of 64"):
        adaptive(micro_batch_size=32, limits=Limits(min=LinearRamp(8, 16, examples(10)), max=16))


def test_limits_between_which_no_step_fits() -> None:
    with pytest.raises(ValueError, match=r"no batch of 1 rank.* lies between 17 and 19"):
        adaptive(limits=Limits(min=17, max=19))


def test_a_criterion_that_measures_needs_limits() -> None:
    with pytest.raises(ValueError, match="NormTest needs limits=Limits"):
        adaptive(limits=None)


def test_a_model_that_cannot_train() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
        AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), Constant(8), micro_batch_size=4)


@pytest.mark.parametrize(
    "criterion",
    [InnerProductTest(theta=0.9), OrthogonalityTest(nu=1.0), AugmentedInnerProductTest(theta=0.9, nu=1.0)],
    ids=lambda c: type(c).__name__,
)
def test_a_criterion_that_needs_more_than_the_probe_gives(criterion: Any) -> None:
    with pytest.raises(ValueError, match=r"needs inner_products, which MicroBatchProbe does not give.*NormTest"):
        adaptive(criterion=criterion)


def test_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="lr_rule must be one of none, linear, sqrt, gain, got 'cubic'"):
        adaptive(lr_rule="cubic")


def test_a_schedule_of_sizes_that_cannot_be_made_up() -> None:
    with pytest.raises(ValueError, match="Stages asks for batches of 18"):
        adaptive(criterion=Stages(8, [Stage(examples(100), 18)]), limits=None)


def test_a_failed_construction_leaves_no_hook_behind() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    for options in (
        {"limits": Limits(min=2, max=64)},
        {"limits": Limits(min=17, max=19)},
        {"limits": None},
        {"limits": Limits(min=8, max=64), "max_micro_batch_size": 2},
        {"limits": Limits(min=8, max=64), "criterion": InnerProductTest(theta=0.9)},
    ):
        criterion = options.pop("criterion", NoiseScale())
        with pytest.raises(ValueError):
            AdaptiveBatch(model, optimizer, criterion, micro_batch_size=4, **options)
        assert hooks_of(model, optimizer) == 0


def test_a_journal_that_cannot_be_written_leaves_no_hook_behind(tmp_path) -> None:
    (tmp_path / "file").touch()
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(OSError):
        AdaptiveBatch(
            model,
            optimizer,
            NormTest(eta=0.5),
            micro_batch_size=4,
            limits=Limits(min=8, max=64),
            journal=tmp_path / "file" / "journal.jsonl",
        )
    assert hooks_of(model, optimizer) == 0


# --- what is measured -----------------------------------------------------------------------------------------------


def test_only_what_the_optimizer_trains_is_measured() -> None:
    """The gradients of the rest are never zeroed: their sum over all steps would pass for one step's gradient."""
    model = network()
    data = DataLoader(regression(32), batch_size=4)
    optimizer = SGD(model[2].parameters(), lr=0.0)  # a body that was left out, as when fine-tuning a head
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, monitor=True)
    moments = []
    train(batches, model, optimizer, data, each=lambda step: moments.append(step.moments))

    frozen = network()
    frozen[0].requires_grad_(False)
    optimizer = SGD(frozen.parameters(), lr=0.0)
    batches = AdaptiveBatch(frozen, optimizer, Constant(16), micro_batch_size=4, monitor=True)
    expected = []
    train(batches, frozen, optimizer, data, each=lambda step: expected.append(step.moments))
    assert moments == expected


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        AdaptiveBatch(
            network(), SGD(network().parameters(), lr=0.1), NormTest(eta=0.5), micro_batch_size=4,
            limits=Limits(min=8, max=64),
        )  # fmt: skip
