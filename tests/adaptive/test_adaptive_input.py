"""Bad input to ``AdaptiveBatch`` and its loop, on one process: a clear error each, and nothing left behind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, train
from support.options import grouped
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Constant,
    GlobalOrder,
    Limits,
    LinearRamp,
    NoiseScale,
    NormTest,
    PerExampleProbe,
    Stage,
    Stages,
    examples,
    tokens,
)
from adabatch.adaptive.options import Measure
from adabatch.adaptive.step import Step
from adabatch.batch import AugmentedInnerProductTest, InnerProductTest, OrthogonalityTest
from adabatch.optim import mup


def adaptive(model: nn.Module | None = None, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    model = model or network()
    options = {"micro_batch_size": 4, "limits": Limits(min=8, max=64), **options}
    return AdaptiveBatch(model, SGD(model.parameters(), lr=0.1), criterion or NormTest(eta=0.5), **grouped(options))


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    on_steps = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return on_steps + sum(len(p._backward_hooks or {}) for p in model.parameters())


# --- the constructor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, -0.5, float("nan"), float("inf")])
def test_eta_must_be_positive(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta must be a positive number, got {eta}"):
        adaptive(criterion=NormTest(eta=eta))


def test_limits_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"limits must be Limits\(min=\.\.\., max=\.\.\.\), got 5"):
        adaptive(limits=5)


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
    with pytest.raises(ValueError, match=r"needs inner products, which MicroBatchProbe does not give.*NormTest"):
        adaptive(criterion=criterion)


def test_a_criterion_whose_needs_are_words() -> None:
    class Mine:
        needs = frozenset({"noise"})

        def wanted(self, observation: Any) -> float:
            return 8.0

    with pytest.raises(
        TypeError, match=r"needs of Mine must be an adabatch.batch.Needs.*Needs\(noise='euclidean'\), .*frozenset"
    ):
        adaptive(criterion=Mine())


def test_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match=r"lr_rule must be one of none, linear, .*, got 'cubic'"):
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
            AdaptiveBatch(model, optimizer, criterion, micro_batch_size=4, **grouped(options))
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


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 0},
        {"max_micro_batch_size": 0},
        {"max_micro_batch_size": 2},
        {"reference_batch_size": 0},
        {"reference_batch_size": -8},
        {"tokens_per_example": 0},
        {"tokens_per_example": -1},
    ],
    ids=str,
)
def test_sizes_that_cannot_be(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}.* got .*{value}"):
        adaptive(**options)


@pytest.mark.parametrize("criterion", ["norm test", NormTest, 0.5], ids=str)
def test_a_criterion_that_is_none(criterion: Any) -> None:
    with pytest.raises(TypeError, match=r"criterion must be .* such as NormTest\(eta=0.7\)"):
        adaptive(criterion=criterion)


@pytest.mark.parametrize("name", ["control", "measure", "guard", "local_sgd", "probe"])
@pytest.mark.parametrize("value", ["abc", 5, NormTest, Limits(min=8, max=64)], ids=str)
def test_a_group_of_options_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got .*{re.escape(repr(value))}"):
        adaptive(**{name: value})


def test_an_optimizer_that_is_none() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"a torch.optim.Optimizer, .* got a list with Parameter in it"):
        AdaptiveBatch(model, list(model.parameters()), Constant(8), micro_batch_size=4)  # type: ignore[arg-type]


# --- what is measured -----------------------------------------------------------------------------------------------


def test_only_what_the_optimizer_trains_is_measured() -> None:
    """The gradients of the rest are never zeroed: their sum over all steps would pass for one step's gradient."""
    model = network()
    data = DataLoader(regression(32), batch_size=4)
    optimizer = SGD(model[2].parameters(), lr=0.0)  # a body that was left out, as when fine-tuning a head
    batches = AdaptiveBatch(model, optimizer, Constant(16), micro_batch_size=4, measure=Measure(monitor=True))
    moments = []
    train(batches, model, optimizer, data, each=lambda step: moments.append(step.moments))

    frozen = network()
    frozen[0].requires_grad_(False)
    optimizer = SGD(frozen.parameters(), lr=0.0)
    batches = AdaptiveBatch(frozen, optimizer, Constant(16), micro_batch_size=4, measure=Measure(monitor=True))
    expected = []
    train(batches, frozen, optimizer, data, each=lambda step: expected.append(step.moments))
    assert moments == expected


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        AdaptiveBatch(
            network(), SGD(network().parameters(), lr=0.1), NormTest(eta=0.5), micro_batch_size=4,
            limits=Limits(min=8, max=64),
        )  # fmt: skip


def test_rates_that_a_scheduler_took_out_of_the_ratios_of_their_width_plan() -> None:
    def made(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

    model = made(16)
    optimizer = SGD(mup.plan(model, made(4)).groups(model, "sgd", lr=0.1))
    batches = AdaptiveBatch(
        model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=Limits(min=8, max=8), lr_rule="sqrt"
    )
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    step = next(batches.steps(DataLoader(torch.ones(8, 4), batch_size=4), until=examples(8)))
    for x in step:
        step.backward(model(x).mean())
    with pytest.raises(ValueError, match="undone the plan's ratios"):
        optimizer.step()


# --- the loop -------------------------------------------------------------------------------------------------------


def run(step: Step, model: nn.Module, *, backwards: int = 1, micro_batches: int | None = None) -> None:
    """The inner loop, or as much of it as ``micro_batches`` says."""
    for index, batch in enumerate(step):
        for _ in range(backwards):
            step.backward(loss_of(model, batch))
        if index + 1 == micro_batches:
            break


def data(num_examples: int = 64, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(regression(num_examples), batch_size=batch_size)


@pytest.mark.parametrize("criterion", [NormTest(eta=0.5), Constant(16)], ids=["probed", "not probed"])
def test_a_loss_must_be_a_scalar_tensor(criterion: Any) -> None:
    model = network()
    step = next(adaptive(model, criterion).steps(data()))
    for x, y in step:
        with pytest.raises(ValueError, match=r"a scalar tensor, got a tensor of shape \(4, 1\): average"):
            step.backward((model(x) - y).square())
        with pytest.raises(ValueError, match=r"a scalar tensor, got a float"):
            step.backward(0.5)
        with pytest.raises(ValueError, match=r"has no gradient: it was computed under torch\.no_grad\(\)"):
            step.backward(torch.zeros(()))
        break


@pytest.mark.parametrize("criterion", [NormTest(eta=0.5), Constant(16)], ids=["probed", "not probed"])
def test_a_forgotten_backward(criterion: Any) -> None:
    step = next(adaptive(criterion=criterion).steps(data()))
    with pytest.raises(RuntimeError, match=r"called once for each micro-batch: after micro-batch 1 of . .* 0 times"):
        run(step, network(), backwards=0)


@pytest.mark.parametrize("criterion", [NormTest(eta=0.5), Constant(16)], ids=["probed", "not probed"])
def test_a_second_backward(criterion: Any) -> None:
    model = network()
    step = next(adaptive(model, criterion).steps(data()))
    with pytest.raises(RuntimeError, match=r"after micro-batch 1 of . it had been called 2 times"):
        run(step, model, backwards=2)


def test_a_backward_outside_the_inner_loop() -> None:
    model = network()
    batches = adaptive(model)
    for step in batches.steps(data()):
        loss = loss_of(model, regression(4).tensors)
        with pytest.raises(RuntimeError, match="belongs inside `for batch in step`"):
            step.backward(loss)
        run(step, model)
        gradient = model[0].weight.grad.clone()
        with pytest.raises(RuntimeError, match="belongs inside `for batch in step`"):
            step.backward(loss)
        assert torch.equal(model[0].weight.grad, gradient)
        break


@pytest.mark.parametrize("loader", [data(), GlobalOrder(regression(64))], ids=["loader", "order"])
def test_an_inner_loop_that_is_broken_off(loader: Any) -> None:
    model = network()
    batches = adaptive(model)
    steps = batches.steps(loader)
    run(next(steps), model, micro_batches=1)
    with pytest.raises(RuntimeError, match=r"were not all run: finish `for batch in step`.*do not break out"):
        next(steps)
    assert batches.progress.steps == 0


@pytest.mark.parametrize("loader", [data(), GlobalOrder(regression(64))], ids=["loader", "order"])
def test_a_step_is_iterated_once(loader: Any) -> None:
    """A second time would count its examples, and decide, twice."""
    model = network()
    batches = adaptive(model, criterion=Constant(8))
    step = next(batches.steps(loader))
    run(step, model)
    consumed = batches.state_dict()["consumed"]
    with pytest.raises(RuntimeError, match="only once"):
        run(step, model)
    assert batches.state_dict()["consumed"] == consumed


def test_an_empty_step() -> None:
    """Passing over a step without running it is the same as breaking out of it."""
    steps = adaptive().steps(data())
    next(steps)
    with pytest.raises(RuntimeError, match="were not all run"):
        next(steps)


@pytest.mark.parametrize("loader", [data(), GlobalOrder(regression(64))], ids=["loader", "order"])
def test_until_carries_its_unit(loader: Any) -> None:
    with pytest.raises(TypeError, match=r"until must be a duration, such as adabatch.examples\(100\), got 100"):
        next(adaptive().steps(loader, until=100))
    with pytest.raises(ValueError, match="does not count tokens: pass tokens_per_example="):
        next(adaptive().steps(loader, until=tokens(100)))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_loader_of_another_micro_batch_size(batch_size: int) -> None:
    """All sizes would be off by a factor: the plan counts in micro_batch_size, the loader in its own."""
    with pytest.raises(ValueError, match=f"batch_size={batch_size}, but micro_batch_size=4: give both the same"):
        next(adaptive().steps(data(batch_size=batch_size)))


def test_a_loader_that_counts_in_another_unit_may_have_another_batch_size() -> None:
    step = next(adaptive().steps(data(batch_size=8), count=lambda batch: len(batch[0]) // 2))
    assert step.global_batch_size == 8


def test_a_batch_larger_than_planned() -> None:
    with pytest.raises(ValueError, match=r"a micro-batch of 8 examples came .* micro_batch_size=4: .*pass count="):
        next(adaptive().steps([tuple(regression(8).tensors)] * 4))


def test_a_micro_batch_without_examples() -> None:
    with pytest.raises(ValueError, match="a micro-batch without examples"):
        next(adaptive().steps([tuple(regression(4).tensors)] * 4, count=lambda batch: 0))


def test_a_micro_batch_that_should_grow_with_a_loader_that_cannot() -> None:
    with pytest.raises(ValueError, match="max_micro_batch_size needs a GlobalOrder: a DataLoader decides"):
        next(adaptive(max_micro_batch_size=8).steps(data()))


def test_an_empty_loader() -> None:
    with pytest.raises(ValueError, match="no micro-batch on at least one rank"):
        next(adaptive().steps([]))


def test_an_iterator_cannot_be_passed_over_twice() -> None:
    model = network()
    batches = adaptive(model, Constant(8))
    loader = iter(data(num_examples=16))
    steps = batches.steps(loader, until=examples(100))
    for _ in range(2):
        run(next(steps), model)
        batches.leave_out()
    with pytest.raises(ValueError, match=r"no micro-batch .* is an iterator, which can be passed over only once"):
        next(steps)


@pytest.mark.parametrize(
    ("criterion", "limits"),
    [
        (NormTest(eta=0.5), Limits(min=8, max=128)),
        (Constant(128), None),
        (Stages(8, [Stage(examples(32), 128)]), None),
        (LinearRamp(8, 128, examples(64)), Limits(min=8, max=128)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_data_set_smaller_than_the_largest_batch(criterion: Any, limits: Limits | None) -> None:
    order = GlobalOrder(regression(100))
    with pytest.raises(ValueError, match=r"128 is above the 100 examples of the data set.* use at most 100"):
        next(adaptive(criterion=criterion, limits=limits).steps(order))


def test_a_schedule_that_glides_past_the_data_set() -> None:
    """No limit says how far the ramp goes, so it shows when it gets there, before an example comes twice."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, LinearRamp(8, 128, examples(200)), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"is above the 100 examples of the data set"):
        train(batches, model, optimizer, GlobalOrder(regression(100)), until=examples(1000))
    assert batches.plan.global_batch_size > 100


def test_a_limit_that_a_constant_never_reaches_may_be_above_the_data_set() -> None:
    step = next(adaptive(criterion=Constant(8), limits=Limits(min=8, max=4096)).steps(GlobalOrder(regression(100))))
    assert step.global_batch_size == 8


def test_a_batch_as_large_as_the_data_set_is_the_data_set() -> None:
    model = network()
    seen: list[float] = []
    batches = adaptive(model, Constant(64))
    for step in batches.steps(GlobalOrder(regression(64))):
        for batch in step:
            step.backward(loss_of(model, batch))
            seen += batch[0][:, 0].tolist()
    assert len(seen) == len(set(seen)) == 64


def test_a_probe_of_something_else_than_what_trains() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"PerExampleProbe does not measure 0.weight, .* it belongs to another model"):
        adaptive(model, probe=PerExampleProbe(network()))
    with pytest.warns(RuntimeWarning, match=r"PerExampleProbe does not measure 2.weight, 2.bias, and the batch"):
        adaptive(model, probe=PerExampleProbe(model[0]))
    # frozen layers, and those that this optimizer does not train, are not missed
    model[2].requires_grad_(False)
    adaptive(model, probe=PerExampleProbe(model[0]))
