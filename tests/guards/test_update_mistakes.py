"""Mistakes around the update: schedules that are not stepped or not alone, updates that are made twice, closures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, weights
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

import adabatch
from adabatch import AdaptiveBatch, Constant, EngineOptions, GlobalOrder, Measure, ProgressLR, lr
from adabatch.runtime.optimizers.joined import JoinedOptimizers


class Loop:
    """A loop of two micro-batches a step, whose parts a test can leave out or do twice."""

    def __init__(self, make: Callable[..., Optimizer] = SGD, rate: Any = 0.1, **options: Any) -> None:
        self.model = network()
        self.optimizer = make(self.model.parameters(), lr=rate)
        self.batches = AdaptiveBatch(self.model, self.optimizer, Constant(8), micro_batch_size=4, **options)

    def schedule(self, shape: Any = None, total: int = 10) -> ProgressLR:
        return ProgressLR(self.optimizer, shape or lr.linear(), self.batches, total=adabatch.steps(total))

    def run(
        self,
        number: int,
        *,
        inner: Callable[[], Any] = lambda: None,
        update: Callable[[], Any] | None = None,
        after: Callable[[], Any] = lambda: None,
    ) -> int:
        until = adabatch.steps(self.batches.consumed.steps + number)
        for step in self.batches.steps(GlobalOrder(regression(64)), until=until):
            for batch in step:
                step.backward(loss_of(self.model, batch))
                inner()
            (update or self.optimizer.step)()
            self.optimizer.zero_grad()
            after()
        return self.batches.progress.steps


# --- a schedule that is not stepped ----------------------------------------------------------------------------------

NOT_STEPPED = (
    r"the learning rate is still 0\.1, which ProgressLR set 1 update\(s\) ago, and should be 0\.09 by now: "
    r"call step\(\) of the ProgressLR after each optimizer\.step\(\), not once per epoch"
)


def test_a_schedule_that_is_never_stepped_is_said_at_the_second_update() -> None:
    loop = Loop()
    schedule = loop.schedule()
    with pytest.raises(RuntimeError, match=NOT_STEPPED):
        loop.run(3)
    assert loop.batches.progress.steps == 1
    loop.batches.leave_out()
    schedule.step()
    assert loop.run(2, after=schedule.step) == 3


def test_a_schedule_without_batches_too() -> None:
    optimizer = SGD(network().parameters(), lr=0.1)
    schedule = ProgressLR(optimizer, lr.linear(), total=adabatch.steps(10))
    optimizer.step()
    with pytest.raises(RuntimeError, match=NOT_STEPPED):
        optimizer.step()
    copied = copy.deepcopy(schedule)
    with pytest.raises(RuntimeError, match=NOT_STEPPED):
        copied.optimizer.step()
    schedule.step()
    optimizer.step()


def test_a_schedule_that_may_wait() -> None:
    """A constant shape has nothing to say, an update that is left out moves nothing, and a replaced one is silent."""
    loop = Loop()
    constant = loop.schedule(lr.constant())
    assert loop.run(3) == 3
    constant.step()
    schedule = loop.schedule(total=100)
    loop.run(1, after=schedule.step)
    loop.run(1, update=loop.batches.leave_out)
    loop.run(1, after=schedule.step)
    before = loop.schedule(total=100)  # in the order of torch before 1.1
    assert loop.run(2, update=lambda: (before.step(), loop.optimizer.step())) == 7


@pytest.mark.parametrize("order", [["batches"], ["batches", "schedule"], ["schedule", "batches"]])
def test_batches_that_are_loaded_give_their_schedule_its_rates(order: list[str]) -> None:
    """Whether the schedule is loaded too, before or after; torchft loads it first."""
    first = Loop()
    saved = first.schedule()
    first.run(4, after=saved.step)
    states = {"batches": first.batches.state_dict(), "schedule": saved.state_dict()}
    second = Loop()
    schedule = second.schedule()
    for name in order:
        {"batches": second.batches, "schedule": schedule}[name].load_state_dict(states[name])
        if name == "batches":
            assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    assert second.run(2, after=schedule.step) == 6
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.4)


# --- a schedule that is not alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_torch_scheduler_beside_the_schedule(rate: Any) -> None:
    loop = Loop(rate=rate)
    other = ExponentialLR(loop.optimizer, gamma=0.5)
    schedule = loop.schedule()

    def both() -> None:
        schedule.step()
        other.step()

    with pytest.raises(
        RuntimeError,
        match=r"of parameter group 0 is 0\.045, but ProgressLR has set it to 0\.09: something else changes it too, "
        r"such as a torch scheduler on the same optimizer",
    ):
        loop.run(3, after=both)
    assert loop.batches.progress.steps == 1


def test_a_rate_that_the_loop_writes_itself_beside_one_schedule_per_optimizer() -> None:
    model = network()
    optimizers = [SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters(), lr=0.01)]
    batches = AdaptiveBatch(model, optimizers, Constant(8), micro_batch_size=4)
    schedules = [ProgressLR(one, lr.linear(), batches, total=adabatch.steps(10)) for one in optimizers]

    def run(number: int, written: float | None = None) -> None:
        for step in batches.steps(GlobalOrder(regression(64)), until=adabatch.steps(number)):
            for batch in step:
                step.backward(loss_of(model, batch))
            for one in optimizers:
                one.step()
                one.zero_grad()
            for schedule in schedules:
                schedule.step()
            if written is not None:
                optimizers[1].param_groups[0]["lr"] = written

    run(2)
    schedules[1].set_base_lrs([0.02])
    run(4)
    with pytest.raises(RuntimeError, match=r"group 0 is 0\.5, but ProgressLR has set it to 0\.01: .* set_base_lrs\(\)"):
        run(6, written=0.5)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_scheduler_in_the_inner_loop_is_said_at_the_first_step(rate: Any) -> None:
    loop = Loop(rate=rate)
    scheduler = CosineAnnealingLR(loop.optimizer, T_max=100)
    assert loop.run(2, after=scheduler.step) == 2
    before = weights(loop.model)
    with pytest.raises(
        RuntimeError, match=r"rate of the SGD was changed while .* the scheduler's step\(\) belongs after"
    ):
        loop.run(1, inner=scheduler.step)
    assert torch.equal(weights(loop.model), before)


def test_a_schedule_of_progress_in_the_inner_loop_too() -> None:
    loop = Loop()
    with pytest.raises(RuntimeError, match="belongs after `for batch in step`, once for each step"):
        loop.run(3, inner=loop.schedule().step)
    assert loop.batches.progress.steps == 1


# --- updates that are made twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_second_update_of_one_gradient_is_refused_before_it_runs(make: Callable[..., Optimizer]) -> None:
    loop = Loop(make)
    after_one: list[Tensor] = []

    def twice() -> None:
        loop.optimizer.step()
        after_one.append(weights(loop.model))
        loop.optimizer.step()

    with pytest.raises(RuntimeError, match=r"of the (SGD|AdamW) was called a second time in one step and on the same"):
        loop.run(1, update=twice)
    assert torch.equal(weights(loop.model), after_one[0])
    assert loop.batches.progress.steps == 1
    loop.optimizer.zero_grad()
    assert loop.run(2) == 3


def test_a_scaler_and_a_call_of_the_loops_own_are_two() -> None:
    scaler = GradScaler("cpu")
    loop = Loop(engine=adabatch.EngineOptions(scaler=scaler))

    def both() -> None:
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.step()

    with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer\) and wrappers of frameworks call it too"):
        loop.run(1, update=both)


def test_one_of_several_optimizers_twice_and_each_of_them_once() -> None:
    model = network()
    one, two = SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters(), lr=0.01)
    batches = AdaptiveBatch(model, [one, two], Constant(8), micro_batch_size=4)

    def run(*updates: Callable[[], Any]) -> int:
        until = adabatch.steps(batches.consumed.steps + 2)
        for step in batches.steps(GlobalOrder(regression(64)), until=until):
            for batch in step:
                step.backward(loss_of(model, batch))
            for update in updates:
                update()
            model.zero_grad()
        return batches.progress.steps

    assert run(two.step, one.step) == 2
    with pytest.raises(RuntimeError, match="of the SGD was called a second time"):
        run(one.step, one.step, two.step)


def test_another_gradient_in_the_same_step_is_the_loops_own_affair() -> None:
    loop = Loop()

    def with_another() -> None:
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.optimizer.step()  # moves nothing
        loss_of(loop.model, regression(4).tensors).backward()
        loop.optimizer.step()

    assert loop.run(2, update=with_another) == 2


class Nested(SGD):
    """Calls its parent's step, whose hooks run inside its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_calls_its_parents_step_makes_one_update() -> None:
    assert Loop(Nested).run(2) == 2


# --- closures --------------------------------------------------------------------------------------------------------


def closure_of(model: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, regression(4).tensors)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_is_refused_before_it_runs(named: bool) -> None:
    loop = Loop()
    closure = closure_of(loop.model, loop.optimizer)
    before = weights(loop.model)
    call = (lambda: loop.optimizer.step(closure=closure)) if named else (lambda: loop.optimizer.step(closure))
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(closure\) of the SGD: a closure computes a gradient of"):
        loop.run(1, update=call)
    assert torch.equal(weights(loop.model), before)
    loop.optimizer.step(closure)  # outside of steps() it is nobody's affair


def test_a_closure_of_several_optimizers_is_refused() -> None:
    model = network()
    joint = JoinedOptimizers([SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())])
    batches = AdaptiveBatch(model, joint, Constant(8), micro_batch_size=4)

    def run() -> None:
        for step in batches.steps(GlobalOrder(regression(64))):
            for batch in step:
                step.backward(loss_of(model, batch))
            joint.step(closure_of(model, joint))

    with pytest.raises(RuntimeError, match=r"optimizer\.step\(closure\) of the SGD and AdamW"):
        run()
    batches.remove()
    assert not joint._optimizer_step_pre_hooks
    joint.step(closure_of(model, joint))


def test_lbfgs_is_refused_by_name() -> None:
    model = network()
    with pytest.raises(ValueError, match="LBFGS computes gradients itself, several times per step, by a closure"):
        AdaptiveBatch(model, LBFGS(model.parameters()), Constant(8), micro_batch_size=4)


# --- a scaler --------------------------------------------------------------------------------------------------------


def scaled_loop(given: GradScaler | None, **options: Any) -> Loop:
    return Loop(engine=EngineOptions(scaler=given), **options)


def test_a_scaler_that_was_not_given_is_said_at_its_first_update() -> None:
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    loop = scaled_loop(None, measure=Measure(monitor=True))
    with pytest.raises(RuntimeError, match=r"a GradScaler steps the SGD, and AdaptiveBatch was not given it"):
        loop.run(2, update=lambda: scaler.step(loop.optimizer))
    disabled = GradScaler("cpu", enabled=False)
    loop.optimizer.zero_grad()
    assert loop.run(2, update=lambda: disabled.step(loop.optimizer)) == 2
    loop = scaled_loop(None)  # which measures nothing that could be wrong
    assert loop.run(1, update=lambda: scaler.step(loop.optimizer)) == 1


@pytest.mark.parametrize("make", [SGD, lambda params, lr: AdamW(params, lr=lr, fused=True)])
def test_gradients_that_are_still_scaled_are_not_stepped(make: Any) -> None:
    scaler = GradScaler("cpu", init_scale=8.0)
    loop = scaled_loop(scaler, make=make)

    def by_itself() -> None:
        scaler.unscale_(loop.optimizer)
        loop.optimizer.step()
        scaler.update()

    def by_scaler(unscale: bool) -> None:
        if unscale:
            scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()

    assert loop.run(1, update=lambda: by_scaler(True)) == 1
    assert loop.run(1, update=lambda: by_scaler(False)) == 2
    assert loop.run(1, update=by_itself) == 3
    with pytest.raises(RuntimeError, match=r"while its gradients are still scaled.* call scaler\.step\(optimizer\)"):
        loop.run(1)


def test_a_loss_is_not_scaled_twice() -> None:
    scaler = GradScaler("cpu", init_scale=8.0)
    loop = scaled_loop(scaler)
    step = next(loop.batches.steps(GlobalOrder(regression(64))))
    loss = loss_of(loop.model, next(iter(step)))
    with pytest.raises(RuntimeError, match=r"the loss is scaled twice: give step\.backward the loss as it is"):
        step.backward(scaler.scale(loss))


# --- another optimizer, loop or schedule ------------------------------------------------------------------------------


def test_an_update_that_every_other_step_lacks_is_said_at_the_second() -> None:
    loop, updates = Loop(), iter([True, False, True, False, True])
    with pytest.warns(RuntimeWarning, match=r"the update never came for 2 steps: optimizer\.step\(\) of the SGD"):
        assert loop.run(5, update=lambda: next(updates) and loop.optimizer.step()) == 3


def test_steps_inside_a_step_do_not_lose_its_update() -> None:
    loop = Loop()
    with pytest.raises(
        RuntimeError, match=r"another step was requested before the update of step 0, which would be lost"
    ):
        loop.run(2, update=lambda: loop.run(1))
    assert loop.run(1) == 1  # the loop was left by an error, and goes on
    # Two loaders that are taken in turn are no mistake.
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
    both = [batches.steps(GlobalOrder(regression(64, seed=seed))) for seed in range(2)]
    for steps in both * 2:
        step = next(steps)
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert batches.progress.steps == 4


def test_a_schedule_of_another_optimizer_of_the_same_parameters() -> None:
    loop = Loop()
    with pytest.raises(ValueError, match="of a AdamW that is not the SGD of the AdaptiveBatch"):
        ProgressLR(AdamW(loop.model.parameters()), lr.linear(), loop.batches, total=adabatch.steps(10))
    other = ProgressLR(SGD(network().parameters(), lr=0.1), lr.linear(), loop.batches, total=adabatch.steps(10))
    assert loop.run(1, after=other.step) == 1  # of another network, whose rate follows this run
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(0.09)


def test_another_schedule_is_seen_also_where_it_is_stepped_first() -> None:
    loop = Loop()
    other = ExponentialLR(loop.optimizer, 0.5)
    schedule = loop.schedule()
    with pytest.raises(RuntimeError, match="something else changes it too, such as a torch scheduler"):
        loop.run(2, after=lambda: (other.step(), schedule.step()))
    assert loop.batches.progress.steps == 1


def test_a_step_that_reaches_no_parameter_of_the_optimizer() -> None:
    loop = Loop()
    assert loop.run(1) == 1
    state = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    loop.model.load_state_dict(state, assign=True)  # other parameters than those of the optimizer
    with pytest.raises(RuntimeError, match="no parameter of the SGD has a gradient after the step's last backward"):
        loop.run(1)
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        AdaptiveBatch(network(), SGD(network().parameters(), lr=0.1), Constant(8), micro_batch_size=4)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_run_is_not_copied_with_its_hooks(copied: Any) -> None:
    with pytest.raises(TypeError, match=r"an AdaptiveBatch cannot be copied or pickled.* save its state_dict\(\)"):
        copied(Loop().batches)
