"""One optimizer, one owner: predecessors give way, dropped objects leave nothing, steps inside steps count once."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.loops import network, regression
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from adabatch import (
    AdaptiveBatch,
    Constant,
    EngineOptions,
    Guard,
    Limits,
    LocalSGD,
    MicroBatchProbe,
    NormTest,
    PerExampleProbe,
    ProgressLR,
    lr,
    steps,
)
from adabatch.local_sgd import Quadratic
from adabatch.optim import KFAC
from adabatch.runtime.optimizers.step_hooks import StepHooks, StepOverrides


def adaptive(model: nn.Module, optimizer: Any, criterion: Any = None, **options: Any) -> AdaptiveBatch:
    options = {"micro_batch_size": 4, "limits": Limits(min=16, max=16), **options}
    return AdaptiveBatch(model, optimizer, criterion or NormTest(eta=0.5), **options)


def linear(model: nn.Module, optimizer: Any, **options: Any) -> AdaptiveBatch:
    """A run whose factor is 4 in every step."""
    return adaptive(model, optimizer, lr_rule="sqrt", reference_batch_size=1, **options)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def run(batches: AdaptiveBatch, model: nn.Module, optimizer: Optimizer, num_steps: int = 3) -> list[float]:
    """The rates that the updates of a plain SGD had."""
    applied = []
    for step in batches.steps(DataLoader(regression(16 * num_steps), batch_size=4)):
        for batch in step:
            step.backward(loss_of(model, batch))
        held = (p for group in optimizer.param_groups for p in group["params"])
        parameter = next(p for p in held if p.grad is not None and p.grad.abs().max() > 0)
        before, grad = parameter.detach().clone(), parameter.grad
        assert grad is not None
        grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        at = grad.abs().flatten().argmax()
        applied.append(((before - parameter) / grad).flatten()[at].item())
    return applied


def hooks_of(model: nn.Module, optimizer: Optimizer) -> int:
    on_optimizer = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        optimizer._optimizer_state_dict_pre_hooks,
    )
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return sum(map(len, on_optimizer)) + sum(len(p._backward_hooks or {}) for p in model.parameters()) + sum(modules)


# --- a successor ----------------------------------------------------------------------------------------------------


def test_a_cell_that_is_run_again_works_and_the_older_object_says_so() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    first = linear(model, optimizer)
    assert run(first, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)
    hooks = hooks_of(model, optimizer)
    second = linear(model, optimizer)
    assert hooks_of(model, optimizer) == hooks
    second.load_state_dict(first.state_dict())
    assert run(second, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert second.progress.steps == 6
    with pytest.raises(RuntimeError, match="this AdaptiveBatch was replaced by a newer one on the same SGD"):
        next(first.steps(DataLoader(regression(16), batch_size=4)))
    second.remove()
    assert hooks_of(model, optimizer) == 0
    with pytest.raises(RuntimeError, match=r"was removed by remove\(\)"):
        next(second.steps(DataLoader(regression(16), batch_size=4)))


def test_a_new_optimizer_of_the_same_parameters_is_a_new_run() -> None:
    model = network()
    optimizer, other = SGD(model.parameters(), lr=0.01), SGD(model.parameters(), lr=0.01)
    first = linear(model, optimizer)
    second = linear(model, other)
    assert hooks_of(nn.Linear(1, 1), optimizer) == 0
    assert run(second, model, other) == pytest.approx([0.04] * 3, rel=1e-4)
    with pytest.raises(RuntimeError, match="was replaced"):
        next(first.steps(DataLoader(regression(16), batch_size=4)))


def test_optimizers_of_other_parameters_of_one_model_keep_their_owners() -> None:
    model = network()
    first, *others = model.parameters()
    optimizers = SGD([first], lr=0.01), SGD(others, lr=0.01)
    both = [linear(model, optimizer) for optimizer in optimizers]
    for batches, optimizer in zip(both, optimizers, strict=True):
        assert run(batches, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)
        model.zero_grad()


def test_a_loop_under_way_ends_when_its_object_is_replaced() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    loop = batches.steps(DataLoader(regression(64), batch_size=4))
    step = next(loop)
    for batch in step:
        step.backward(loss_of(model, batch))
    newer = linear(model, optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="was replaced"):
        next(loop)
    assert (newer.progress.steps, optimizer.param_groups[0]["lr"]) == (0, 0.01)


@pytest.mark.parametrize("how", ["replaced by a newer one on the same SGD", r"removed by remove\(\)"])
def test_a_schedule_of_an_object_that_is_gone_says_so(how: str) -> None:
    """A cell that makes the AdaptiveBatch is run again, and that of its schedule is not: the rate would stand still."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer)
    schedule = ProgressLR(optimizer, lr.linear(), batches, total=steps(8))
    run(batches, model, optimizer, 1)
    state = schedule.state_dict()
    if "newer" in how:
        newer = adaptive(model, optimizer)
    else:
        batches.remove()
        newer = adaptive(model, optimizer)
    with pytest.raises(RuntimeError, match=f"this ProgressLR reads was {how}.* would stand still: make a new Prog"):
        schedule.step()
    with pytest.raises(RuntimeError, match=f"this AdaptiveBatch was {how}"):
        ProgressLR(optimizer, lr.linear(), batches, total=steps(8))
    newer.load_state_dict(batches.state_dict())
    again = ProgressLR(optimizer, lr.linear(), newer, total=steps(8))
    again.load_state_dict(state)
    assert again.get_last_lr() == pytest.approx([0.01 * 7 / 8], rel=1e-12)


def test_a_schedule_that_is_loaded_without_its_batches_says_so() -> None:
    """The order in which the two are loaded does not matter, but one without the other would begin again."""

    def made() -> tuple[nn.Module, Optimizer, AdaptiveBatch, ProgressLR]:
        model = network()
        optimizer = SGD(model.parameters(), lr=0.01)
        batches = adaptive(model, optimizer)
        return model, optimizer, batches, ProgressLR(optimizer, lr.linear(), batches, total=steps(8))

    model, optimizer, batches, schedule = made()
    run(batches, model, optimizer, 1)
    saved = batches.state_dict(), schedule.state_dict()
    for first, second in ((2, 3), (3, 2)):
        parts = made()
        parts[first].load_state_dict(saved[first - 2])
        parts[second].load_state_dict(saved[second - 2])
        assert run(parts[2], parts[0], parts[1], 1) == pytest.approx([0.01 * 7 / 8], rel=1e-5)
    model, optimizer, batches, schedule = made()
    schedule.load_state_dict(saved[1])
    with pytest.raises(RuntimeError, match="loaded from a run of 1 updates, and its AdaptiveBatch has made 0, so that"):
        run(batches, model, optimizer, 1)


@pytest.mark.parametrize("make", [lambda m: MicroBatchProbe(m.parameters()), PerExampleProbe], ids=["micro", "example"])
def test_a_probe_that_was_given_to_both_goes_on(make: Any) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    probe = make(model)
    for _ in range(2):
        batches = linear(model, optimizer, probe=probe)
        run(batches, model, optimizer)
        assert batches.progress.steps == 3
        assert not math.isnan(batches.noise_scale)


def test_the_thaw_of_the_guide() -> None:
    """docs/around_a_step.md: after a thaw a new AdaptiveBatch goes on from the old one's state."""
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.01)
    old = linear(model, optimizer)
    run(old, model, optimizer)
    for p in model[0].parameters():
        p.requires_grad_(True)
    new = linear(model, optimizer)
    new.load_state_dict(old.state_dict())
    for step in new.steps(DataLoader(regression(48), batch_size=4)):
        for batch in step:
            step.backward(loss_of(model, batch))
        whole = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        assert step.moments is not None
        assert step.moments.grad_sq == pytest.approx(whole, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert new.progress.steps == 6


def test_a_second_schedule_takes_the_place_of_the_first() -> None:
    optimizer = SGD(network().parameters(), lr=0.1)
    first = ProgressLR(optimizer, lr.linear(), total=steps(10))
    optimizer.step()
    first.step()
    second = ProgressLR(optimizer, lr.linear(), total=steps(4))
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    optimizer.step()
    second.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 3 / 4)
    for use in (first.step, lambda: first.set_total(steps(20)), lambda: first.load_state_dict(first.state_dict())):
        with pytest.raises(RuntimeError, match="this ProgressLR was replaced by a newer one on the same SGD"):
            use()
    del second
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_second_local_sgd_takes_the_place_of_the_first() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    first = LocalSGD(model, optimizer, sync_every=2)
    second = LocalSGD(model, optimizer, sync_every=2)
    for _ in range(2):
        loss_of(model, regression(4).tensors).backward()
        optimizer.step()
    assert (first.steps, second.steps, second.rounds) == (0, 2, 1)
    with pytest.raises(RuntimeError, match="this LocalSGD was replaced"):
        first.synchronize()
    with pytest.raises(RuntimeError, match="this LocalSGD was replaced"):
        adaptive(model, optimizer, Constant(8), limits=None, local_sgd=first)
    del first, second
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_second_kfac_takes_the_place_of_the_first() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    first = KFAC(model.parameters(), model, lr=0.1, damping=0.1)
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    second = KFAC(model.parameters(), model, lr=0.1, damping=0.1)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == count
    outputs = model(torch.ones(8, 4))
    with pytest.raises(RuntimeError, match="this KFAC was replaced by a newer one"):
        first.observe(outputs)
    second.observe(outputs)
    del first, second, outputs
    gc.collect()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


# --- dropped, broken off, raised ------------------------------------------------------------------------------------


def test_an_object_that_is_dropped_leaves_nothing_behind() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    schedule = ProgressLR(optimizer, lr.constant(), batches, total=steps(10))
    run(batches, model, optimizer)
    del batches, schedule
    gc.collect()
    assert hooks_of(model, optimizer) == 0
    probe = MicroBatchProbe(model.parameters())
    del probe
    gc.collect()
    assert hooks_of(model, optimizer) == 0


class Failing(SGD):
    """Raises in its update."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError("out of memory")
        return super().step(closure)


def test_an_update_that_raises_leaves_no_factor_once_its_loop_is_left() -> None:
    model = network()
    optimizer = Failing(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    run(batches, model, optimizer)
    optimizer.fails = True
    with pytest.raises(MemoryError):
        run(batches, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    optimizer.fails = False
    optimizer.zero_grad()
    assert run(batches, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)


def test_an_update_that_raised_and_is_tried_again_counts_and_has_the_factor_once() -> None:
    model = network()
    optimizer = Failing(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    for step in batches.steps(DataLoader(regression(32), batch_size=4)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.fails = True
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.fails = False
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 0.01
    assert batches.progress.steps == 2


class Breaking(nn.Module):
    """Raises in its backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        y.register_hook(lambda grad: 1 / 0)  # type: ignore[no-untyped-call]
        return y


def test_a_loop_that_is_broken_off_touches_no_later_update_of_the_user() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    for step in batches.steps(DataLoader(regression(64), batch_size=4)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        break
    del step
    with pytest.raises(ZeroDivisionError):
        run(batches, Breaking(model), optimizer)
    optimizer.zero_grad()
    weight = next(model.parameters())
    loss_of(model, regression(4).tensors).backward()
    assert weight.grad is not None
    expected = weight.detach() - 0.01 * weight.grad
    optimizer.step()
    assert torch.equal(weight, expected)
    assert batches.progress.steps == 1
    assert not batches._probe._listening  # type: ignore[union-attr]


# --- steps inside steps ---------------------------------------------------------------------------------------------


class DecayedAfter(SGD):
    """Calls its parent's step, and decays by the group's rate afterwards."""

    rates: list[float]

    def step(self, closure: Any = None) -> Any:
        self.rates = [self.param_groups[0]["lr"]]
        loss = super().step(closure)
        self.rates.append(self.param_groups[0]["lr"])
        return loss


def test_a_step_that_calls_its_parents_has_the_factor_to_its_end_and_counts_once() -> None:
    model = network()
    optimizer = DecayedAfter(model.parameters(), lr=0.01)
    batches, schedule = linear(model, optimizer), None
    assert run(batches, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)
    assert optimizer.rates == pytest.approx([0.04, 0.04])
    assert (batches.progress.steps, optimizer.param_groups[0]["lr"]) == (3, 0.01)
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(10))
    optimizer.step()
    schedule.step()
    assert schedule.state_dict()["steps"] == 1


class Twice(SGD):
    """Raises inside its parent's step, at the first try."""

    tries = 0

    def step(self, closure: Any = None) -> Any:
        self.tries += 1
        return super().step(closure if self.tries > 1 else self._fail)

    def _fail(self) -> float:
        raise MemoryError("out of memory")


def test_an_inner_step_that_raises_is_no_step_under_way() -> None:
    model = network()
    optimizer = Twice(model.parameters(), lr=0.01)
    told: list[Any] = []
    hooks = StepHooks(
        optimizer,
        overrides=lambda: StepOverrides(4.0),
        skip=lambda: False,
        done=lambda _, rates, ok: told.append(rates),
    )
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.step()
    optimizer.step()
    assert told == [[pytest.approx(0.04)]] * 2
    assert optimizer.param_groups[0]["lr"] == 0.01
    hooks.remove()


def test_closures_that_evaluate_again_run_under_one_factor() -> None:
    model = network()
    optimizer = LBFGS(model.parameters(), lr=0.01, max_iter=5)
    rates: list[float] = []
    told: list[Any] = []
    hooks = StepHooks(
        optimizer,
        overrides=lambda: StepOverrides(4.0),
        skip=lambda: False,
        done=lambda _, rates, ok: told.append(rates),
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        loss = loss_of(model, regression(8).tensors)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(rates) > 1
    assert rates == pytest.approx([0.04] * len(rates))
    assert (told, optimizer.param_groups[0]["lr"]) == ([[pytest.approx(0.04)]], 0.01)
    hooks.remove()


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_one_tensor_for_the_rates_of_all_groups_is_multiplied_once(kind: Any, options: Any) -> None:
    results = []
    for rate in (0.01, torch.tensor(0.01)):
        if options == {"foreach": True} and isinstance(rate, Tensor) and kind is not SGD:
            rate = 0.01  # torch refuses it without capturable, which needs an accelerator
        model = network()
        groups = [{"params": [p]} for p in model.parameters()]
        optimizer = kind(groups, lr=rate, **options)
        batches = linear(model, optimizer)
        schedule = ProgressLR(optimizer, lr.linear(), batches, total=steps(10))
        for step in batches.steps(DataLoader(regression(48), batch_size=4)):
            for batch in step:
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.007] * len(groups))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rate", [np.float64(0.01), np.float32(0.01)], ids=["float64", "float32"])
def test_a_rate_of_numpys(rate: Any) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=rate)
    batches = linear(model, optimizer)
    schedule = ProgressLR(optimizer, lr.constant(), batches, total=steps(10))
    assert run(batches, model, optimizer) == pytest.approx([0.04] * 3, rel=1e-4)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == rate


class OwnRate(SGD):
    """Sets its rate itself, as transformers' Adafactor does with relative steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=0.01)


def test_an_optimizer_without_a_rate_works_where_nothing_reads_it(tmp_path: Any) -> None:
    model = network()
    optimizer = OwnRate(model.parameters())
    batches = adaptive(model, optimizer, journal=tmp_path / "journal.jsonl", guard=Guard(check_every=1))
    assert run(batches, model, optimizer) == pytest.approx([0.01] * 3, rel=1e-4)
    assert batches.progress.steps == 3
    local = LocalSGD(model, optimizer, sync_every=2)
    loss_of(model, regression(4).tensors).backward()
    optimizer.step()
    assert local.steps == 1
    with pytest.raises(ValueError, match=r"lr_rule='sqrt' multiplies the learning rate, but OwnRate sets its own"):
        adaptive(model, optimizer, lr_rule="sqrt")
    with pytest.raises(ValueError, match=r"OwnRate sets its learning rate itself \(lr=None\)"):
        ProgressLR(optimizer, lr.constant(), total=steps(10))
    with pytest.raises(ValueError, match=r"OwnRate sets its learning rate itself \(lr=None\), but the period"):
        LocalSGD(model, optimizer, sync_every=Quadratic(alpha=0.1, base=1))


# --- parameters that join or leave ----------------------------------------------------------------------------------


def changed(model: nn.Sequential, optimizer: Optimizer, change: Any) -> None:
    """A run of three steps, in which ``change`` comes after the second."""
    for number, step in enumerate(adaptive(model, optimizer).steps(DataLoader(regression(48), batch_size=4)), 1):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            change(model, optimizer)


def thaw(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[0].requires_grad_(True)


def freeze(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2].requires_grad_(False)


def thaw_and_add(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.001})


def replace_head(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2] = nn.Linear(8, 1)


def replace_head_and_add(model: nn.Sequential, optimizer: Optimizer) -> None:
    replace_head(model, optimizer)
    optimizer.add_param_group({"params": model[2].parameters()})


@pytest.mark.parametrize(
    ("frozen", "held", "change", "words"),
    [
        ([0], [0, 2], thaw, r"0\.weight, 0\.bias joined"),
        ([0], [2], thaw_and_add, r"0\.weight, 0\.bias joined"),
        ([], [0, 2], freeze, r"2\.weight, 2\.bias left"),
        ([], [0, 2], replace_head, r"2\.weight, 2\.bias left"),
        ([], [0, 2], replace_head_and_add, r"2\.weight, 2\.bias joined and 2\.weight, 2\.bias left"),
    ],
    ids=["thaw", "thaw and add", "freeze", "replace", "replace and add"],
)
def test_parameters_that_join_or_leave_are_refused_at_that_step(
    frozen: Any, held: Any, change: Any, words: str
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    for place in frozen:
        model[place].requires_grad_(False)
    optimizer = SGD([p for place in held for p in model[place].parameters()], lr=0.01)
    with pytest.raises(RuntimeError, match=rf"this AdaptiveBatch was made for \({words}\): make a new AdaptiveBatch"):
        changed(model, optimizer, change)
    changed(model, optimizer, lambda *_: None)  # the way out


def test_parameters_that_another_player_freezes_for_a_while_stay() -> None:
    """GANs freeze one network while the other trains, and thaw it before its own step's micro-batches."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer)
    for step in batches.steps(DataLoader(regression(64), batch_size=4)):
        for p in model.parameters():
            p.requires_grad_(True)
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        for p in model.parameters():
            p.requires_grad_(False)
    assert batches.progress.steps == 4


def test_local_sgd_names_what_it_would_not_average() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = SGD(model[2].parameters(), lr=0.01)
    local = LocalSGD(model, optimizer, sync_every=2)
    optimizer.add_param_group({"params": model[0].parameters()})
    loss_of(model, regression(4).tensors).backward()
    with pytest.raises(RuntimeError, match=r"this LocalSGD was made for \(0\.weight, 0\.bias joined\)"):
        optimizer.step()
    local.remove()


@pytest.mark.parametrize("tensor", [False, True])
def test_a_group_that_is_added_later_follows_the_shape_from_its_own_rate(tensor: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = SGD(model[2].parameters(), lr=0.1)
    schedule = ProgressLR(optimizer, lr.linear(), total=steps(10))
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": model[0].parameters(), "lr": torch.tensor(0.01) if tensor else 0.01})
    schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.09, 0.009])
    optimizer.step()
    schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.08, 0.008])
    assert schedule.state_dict()["base_lrs"] == pytest.approx([0.1, 0.01])
    assert len(schedule.get_last_lr()) == 2
    del optimizer.param_groups[1]
    with pytest.raises(RuntimeError, match="SGD had 2 parameter groups and has 1 now"):
        schedule.step()


# --- updates that never come ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [NormTest(eta=0.5), Constant(16)], ids=["probed", "not probed"])
def test_an_update_that_never_comes_is_said_at_the_second_such_step(criterion: Any) -> None:
    model = network()
    optimizer, other = SGD(model.parameters(), lr=0.01), SGD(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer, criterion)
    loop = batches.steps(DataLoader(regression(160), batch_size=4))
    for number in range(5):
        step = next(loop)
        for batch in step:
            step.backward(loss_of(model, batch))
        (optimizer if number in (0, 2) else other).step()
        other.zero_grad()
    # The second step had no update of ours, and neither had the fourth and the fifth.
    with pytest.raises(RuntimeError, match=r"never came for 2 steps in a row: optimizer.step\(\) of the SGD was not"):
        next(loop)


def test_a_loop_that_only_measures_or_forgot_its_update_is_warned_once() -> None:
    model = network()
    loop = adaptive(model, SGD(model.parameters(), lr=0.01)).steps(DataLoader(regression(80), batch_size=4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number, step in enumerate(loop, 1):
            for batch in step:
                step.backward(loss_of(model, batch))
            model.zero_grad()
            assert len(told) == (number > 2)
    assert "never came for 2 steps in a row: optimizer.step() of the SGD was not called" in str(told[0].message)
    assert told[0].filename == __file__  # the user's loop, not the library


def test_a_constructor_that_raises_leaves_the_optimizer_to_the_next() -> None:
    model, other = network(), network()
    optimizer = SGD(model.parameters(), lr=0.01)
    hooks = _hooks(model, optimizer)
    failures: list[Exception] = []  # an error keeps the half-built object alive
    for arguments, message in (
        ((other, optimizer), "none of the model's parameters"),  # no probe
        ((model, optimizer, NormTest(eta=0.5)), "trial"),  # the probe is there
    ):
        with pytest.raises(ValueError, match=message) as caught:
            adaptive(*arguments, guard=Guard(trial=lambda batch: loss_of(model, batch)))
        failures.append(caught.value)
        assert _hooks(model, optimizer) == hooks
    assert len(run(adaptive(model, optimizer), model, optimizer)) == 3


def _hooks(model: nn.Module, optimizer: Optimizer) -> list[int]:
    """How many hooks stand on an optimizer, on each module and on each parameter."""
    modules = [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    own = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return [*own, *modules, *(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())]


def test_it_is_said_in_a_run_of_two_steps() -> None:
    model = network()
    batches = adaptive(model, SGD(model.parameters(), lr=0.01))
    with pytest.raises(RuntimeError, match="never came for 2 steps in a row"):
        run(batches, model, SGD(model.parameters(), lr=0.01), num_steps=2)


def test_steps_that_are_left_out_rightly_are_none_of_them() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer)
    with pytest.raises(RuntimeError, match=r"leave_out belongs after `for batch in step`"):
        batches.leave_out()
    for number, step in enumerate(batches.steps(DataLoader(regression(128), batch_size=4))):
        for batch in step:
            step.backward(loss_of(model, batch) * (math.nan if number in (1, 2) else 1.0))
        before = [p.detach().clone() for p in model.parameters()]
        if number in (3, 4, 5):
            batches.leave_out()
        if number in (0, 1, 2, 3, 6):
            optimizer.step()
        applied = not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert applied == (number in (0, 6))
        optimizer.zero_grad()
        if number == 6:
            break
    assert (batches.progress.steps, batches.consumed.steps) == (2, 7)


def test_a_scaler_that_is_given_may_skip() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    batches = adaptive(model, optimizer, Constant(16), limits=None, engine=EngineOptions(scaler=scaler))
    for step in batches.steps(DataLoader(regression(128), batch_size=4)):
        for batch in step:
            step.backward(loss_of(model, batch) * 10)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert batches.consumed.steps == 8
    assert 0 < batches.progress.steps <= 6


def test_a_scaler_that_has_no_reason_to_skip_is_no_excuse() -> None:
    model = network()
    optimizer, other = SGD(model.parameters(), lr=0.01), SGD(model.parameters(), lr=0.01)
    batches = adaptive(model, optimizer, engine=EngineOptions(scaler=GradScaler("cpu", init_scale=8.0)))
    with pytest.raises(
        RuntimeError, match=r"a GradScaler, give it to AdaptiveBatch as engine=EngineOptions\(scaler=\.\.\.\)"
    ):
        run(batches, model, other)


def test_an_object_whose_steps_are_never_taken_says_so_once() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = linear(model, optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(6):
            loss_of(model, regression(4).tensors).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert len(told) == (number >= 2)
    (warning,) = told
    assert "steps() of the AdaptiveBatch was never called" in str(warning.message)
    assert "for step in batches.steps(loader)" in str(warning.message)
    assert batches.progress.steps == 0
    run(batches, model, optimizer)
    assert batches.progress.steps == 3


def test_a_loop_that_only_measures_measures_each_step_alone() -> None:
    """Neither step() nor zero_grad(): what a step left is no part of the next, and that is said once."""
    model, oracle = network(), network()
    batches = adaptive(model, SGD(model.parameters(), lr=0.01))
    measured, expected = [], []

    def loop() -> None:
        for step in batches.steps(DataLoader(regression(64), batch_size=4)):
            taken = []
            for batch in step:
                step.backward(loss_of(model, batch))
                taken.append(batch)
            assert step.moments is not None
            measured.append(step.moments.grad_sq)
            whole = [torch.cat(parts) for parts in zip(*taken, strict=True)]
            grads = torch.autograd.grad(loss_of(oracle, whole), list(oracle.parameters()))
            expected.append(sum(float(grad.square().sum()) for grad in grads))

    with pytest.warns(RuntimeWarning, match="never came for 2 steps in a row"):
        loop()
    assert len(measured) >= 3
    assert measured == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is not None for p in model.parameters())  # the last are there to be looked at
