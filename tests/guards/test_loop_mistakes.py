"""What a ported loop does wrong around a step is an error at the first step in which it happens, with the way out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import loss_of, network, regression, weights
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer, SparseAdam
from torch.utils.data import DataLoader

import adabatch
from adabatch import AdaptiveBatch, Constant, GlobalOrder, NormTest
from adabatch.guards.loop_mistakes import SAMPLE

Run = tuple[AdaptiveBatch, nn.Module, Optimizer]


def loader(num_batches: int = 12) -> DataLoader[Any]:
    return DataLoader(regression(4 * num_batches), batch_size=4)


def constant(accumulation: int = 3, model: nn.Module | None = None, **options: Any) -> Run:
    """Steps of so many micro-batches that are not measured, so that no probe says anything."""
    model = model or network()
    optimizer = SGD(model.parameters(), lr=0.01)
    return (
        AdaptiveBatch(model, optimizer, Constant(4 * accumulation), micro_batch_size=4, **options),
        model,
        optimizer,
    )


def measured() -> Run:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    limits = adabatch.Limits(min=12, max=12)
    return AdaptiveBatch(model, optimizer, NormTest(eta=0.5), micro_batch_size=4, limits=limits), model, optimizer


def nothing() -> None:
    pass


def loop(run: Run, inner: Callable[[int], Any], outer: Callable[[], Any] = nothing, *, before: bool = False) -> int:
    """Two steps; ``inner`` runs in each micro-batch, after its backward or before; returns the micro-batches run."""
    batches, model, optimizer = run
    ran = 0
    for number, step in enumerate(batches.steps(loader())):
        for index, batch in enumerate(step):
            if before:
                inner(index)
            step.backward(loss_of(model, batch))
            if not before:
                inner(index)
            ran += 1
        optimizer.step()
        outer()
        if number == 1:
            return ran
    return ran


BOTH = pytest.mark.parametrize("make", [constant, measured])


# --- an update in the inner loop ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("zeroed", [False, True])
def test_an_update_in_the_inner_loop_is_refused_before_it_runs(make: Callable[[], Run], zeroed: bool) -> None:
    run = make()
    before = weights(run[1])
    ran: list[int] = []

    def inner(index: int) -> None:
        ran.append(index)
        run[2].step()
        if zeroed:
            run[2].zero_grad()

    with pytest.raises(
        RuntimeError, match=r"optimizer\.step\(\) of the SGD was called while .* after `for batch in st"
    ):
        loop(run, inner)
    assert ran == [0]
    assert torch.equal(weights(run[1]), before)


def test_of_a_step_of_one_micro_batch_too() -> None:
    run = constant(1)
    with pytest.raises(RuntimeError, match="belongs after `for batch in step`"):
        loop(run, lambda _: run[2].step())


def test_a_scalers_step_and_one_of_several_optimizers_are_updates() -> None:
    scaler = GradScaler("cpu")
    run = constant(engine=adabatch.EngineOptions(scaler=scaler))
    with pytest.raises(RuntimeError, match="belongs after `for batch in step`"):
        loop(run, lambda _: scaler.step(run[2]))
    model = network()
    first, second = SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters())
    batches = AdaptiveBatch(model, [first, second], Constant(12), micro_batch_size=4)
    with pytest.raises(RuntimeError, match=r"of the SGD and AdamW was called while"):
        loop((batches, model, first), lambda _: second.step())


def test_another_networks_update_in_the_inner_loop_is_its_own_affair() -> None:
    run = constant()
    other = network()
    theirs = SGD(other.parameters(), lr=0.1)

    def inner(_: int) -> None:
        loss_of(other, regression(4).tensors).backward()
        theirs.step()
        theirs.zero_grad()

    assert loop(run, inner, run[2].zero_grad) == 6


# --- gradients that are touched between two backwards ----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("before", [True, False])
def test_zero_grad_in_the_inner_loop(make: Callable[[], Run], before: bool) -> None:
    run = make()
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.weight was cleared .* after optimizer\.step\(\)"):
        loop(run, lambda _: run[2].zero_grad(), before=before)


def test_zero_grad_behind_the_only_backward_of_a_step() -> None:
    run = constant(1)
    with pytest.raises(RuntimeError, match="was cleared"):
        loop(run, lambda _: run[2].zero_grad())


CHANGES: dict[str, Callable[[Run], Any]] = {
    "zeros": lambda run: run[2].zero_grad(set_to_none=False),
    "clipped": lambda run: nn.utils.clip_grad_norm_(run[1].parameters(), 1e9),
    "by value": lambda run: nn.utils.clip_grad_value_(run[1].parameters(), 1e9),
    "another loss": lambda run: loss_of(run[1], regression(4).tensors).backward(),
}


@BOTH
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_change_between_micro_batches(make: Callable[[], Run], change: str) -> None:
    run = make()
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.weight was changed while .* belong after `for batch"):
        loop(run, lambda index: CHANGES[change](run) if index < 2 else None)


def test_what_belongs_behind_the_inner_loop_may_stand_there() -> None:
    run = measured()

    def outer() -> None:
        nn.utils.clip_grad_norm_(run[1].parameters(), 1e-3)
        run[2].zero_grad()

    assert loop(run, lambda _: None, outer) == 6


def clamped(parameter: Tensor) -> None:
    parameter.grad.clamp_(-1, 1)  # type: ignore[union-attr]


def test_hooks_on_tensors_may_change_gradients_in_the_backward() -> None:
    run = measured()
    for parameter in run[1].parameters():
        parameter.register_hook(lambda grad: grad * 0.5)
        parameter.register_post_accumulate_grad_hook(clamped)
    assert loop(run, lambda _: None, run[2].zero_grad) == 6


def test_a_parameter_is_looked_at_again_after_a_few_steps() -> None:
    """A loop that touches a single gradient of many is found too, by turns."""
    model = nn.Sequential(nn.Linear(6, 6), *[nn.Linear(6, 6) for _ in range(2 * SAMPLE)], nn.Linear(6, 1))
    batches, model, optimizer = constant(2, model=model)

    def run() -> None:
        for number, step in enumerate(batches.steps(GlobalOrder(regression(64)), until=adabatch.steps(12))):
            for batch in step:
                step.backward(loss_of(model, batch))
                if number:
                    model[7].bias.grad.mul_(0.5)
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(RuntimeError, match=r"the gradient of 7\.bias was changed"):
        run()


def test_sparse_gradients_are_looked_at() -> None:
    def run(*, cleared: bool) -> int:
        model = nn.EmbeddingBag(10, 3, sparse=True)
        optimizer = SparseAdam(list(model.parameters()), lr=0.1)
        batches = AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
        data = [torch.randint(10, (4, 2)) for _ in range(4)]
        for step in batches.steps(data):
            for x in step:
                step.backward(model(x).square().mean())
                if cleared:
                    optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return batches.progress.steps

    assert run(cleared=False) == 2
    with pytest.raises(RuntimeError, match="was changed"):
        run(cleared=True)


# --- gradients that are there when a step begins ---------------------------------------------------------------------


@BOTH
def test_zero_grad_that_is_forgotten(make: Callable[[], Run]) -> None:
    run = make()
    with pytest.raises(
        RuntimeError, match=r"gradients from before the step .* among them that of 0\.weight.*zero_grad\(\)"
    ):
        loop(run, lambda _: None)
    assert run[0].progress.steps == 1


@BOTH
@pytest.mark.parametrize("at", ["behind", "before", "first micro-batch"])
def test_zeros_and_other_places_of_zero_grad_are_fine(make: Callable[[], Run], at: str) -> None:
    batches, model, optimizer = make()
    loss_of(model, regression(4).tensors).backward()
    if at == "behind":
        optimizer.zero_grad(set_to_none=False)
    for step in batches.steps(loader(6)):
        if at == "before":
            optimizer.zero_grad()
        for index, batch in enumerate(step):
            if at == "first micro-batch" and index == 0:
                optimizer.zero_grad()
            step.backward(loss_of(model, batch))
        optimizer.step()
        if at == "behind":
            optimizer.zero_grad(set_to_none=False)
    assert batches.progress.steps == 2


@pytest.mark.parametrize("value", [1e-30, float("nan")])
def test_tiny_and_nan_gradients_are_no_zeros(value: float) -> None:
    run = constant()
    for parameter in run[1].parameters():
        parameter.grad = torch.zeros_like(parameter)
    next(run[1].parameters()).grad.fill_(value)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="gradients from before the step"):
        loop(run, lambda _: None)


def test_a_gan_whose_generator_fills_the_gradients_of_the_discriminator() -> None:
    generator, critic = nn.Linear(4, 6), network()
    of_generator, of_critic = SGD(generator.parameters(), lr=0.01), SGD(critic.parameters(), lr=0.01)

    def play(*, cleared: bool) -> int:
        runs = [
            AdaptiveBatch(model, optimizer, Constant(8), micro_batch_size=4)
            for model, optimizer in ((generator, of_generator), (critic, of_critic))
        ]
        fake = runs[0].steps([torch.randn(4, 4) for _ in range(6)])
        for step in runs[1].steps([torch.randn(4, 6) for _ in range(6)]):
            if cleared:
                of_critic.zero_grad()
            for x in step:
                step.backward(critic(x).square().mean())
            of_critic.step()
            of_critic.zero_grad()
            second = next(fake)
            for z in second:
                second.backward(-critic(generator(z)).mean())
            of_generator.step()
            of_generator.zero_grad()
        return runs[1].progress.steps

    assert play(cleared=True) == 3
    with pytest.raises(RuntimeError, match="the other network of a GAN"):
        play(cleared=False)


@pytest.mark.parametrize("how", ["leave_out", "not finite"])
def test_the_gradients_of_a_step_that_is_left_out_are_dropped(how: str) -> None:
    batches, model, optimizer = constant()
    for number, step in enumerate(batches.steps(loader(9))):
        for batch in step:
            loss = loss_of(model, batch)
            step.backward(loss * float("nan") if how == "not finite" and number == 0 else loss)
        if number == 0:
            if how == "leave_out":
                batches.leave_out()
            continue
        optimizer.step()
        optimizer.zero_grad()
    assert (batches.progress.steps, batches.consumed.steps) == (2, 3)


# --- other ways out of a step ----------------------------------------------------------------------------------------


def test_a_plain_backward_is_named() -> None:
    batches, model, _ = constant()

    def run() -> None:
        for step in batches.steps(loader()):
            for batch in step:
                loss_of(model, batch).backward()

    with pytest.raises(RuntimeError, match=r"step\.backward\(loss\) must be called once .* \(not loss\.backward\(\)\)"):
        run()


def test_nothing_is_kept_of_gradients_once_a_step_is_over() -> None:
    batches, model, optimizer = constant(1)
    held: list[weakref.ref[Tensor]] = []
    for step in batches.steps(loader(2)):
        for batch in step:
            step.backward(loss_of(model, batch))
        held += [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert held
        assert all(reference() is None for reference in held)


def test_an_update_after_a_loop_that_was_broken_off_is_the_users() -> None:
    batches, model, optimizer = constant()
    for step in batches.steps(loader()):
        for batch in step:
            step.backward(loss_of(model, batch))
            break
        break
    del step
    optimizer.step()
    assert batches.progress.steps == 0
