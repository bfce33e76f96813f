"""``Measure(late=True)``: the numbers of a step are read, and decided upon, at the end of the next one."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixed_probe import FixedProbe
from support.loops import all_lines, lines, loss_of, network, regression, train, weights
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

from adabatch import AdaptiveBatch, Constant, Control, GlobalOrder, Goodput, Guard, Limits, LocalSGD, NormTest
from adabatch import examples as of_examples
from adabatch import steps as of_steps
from adabatch.adaptive.options import EngineOptions, Measure
from adabatch.batch.moments import GradientMoments
from adabatch.batch.needs import Needs
from adabatch.optim import AdaGradNorm
from adabatch.probes import MicroBatchProbe
from adabatch.runtime.probes.layers import layers_of
from adabatch.runtime.probes.metrics import AdamMetric
from adabatch.runtime.probes.parts import PartSums

LATE = {"measure": Measure(late=True), "guard": Guard(skip_nonfinite=False)}
ON_TIME = {"guard": Guard(skip_nonfinite=False)}


def steady() -> FixedProbe:
    """What a stream of gradients with constant noise and signal gives, whatever the batch: a noise scale of 40."""
    moments = GradientMoments.from_noise(40.0, 1.0, part_size=2, num_examples=64)
    return FixedProbe(moments, Needs(noise="euclidean"))


def made(model: nn.Module, optimizer: Any = None, **options: Any) -> AdaptiveBatch:
    """Grows by 1.5 at most, from 4 to 64."""
    given = {
        "limits": Limits(4, 64),
        "control": Control(growth=1.5, pace=math.inf, hold=0),
        "lr_rule": "none",
        "micro_batch_size": 2,
        "criterion": NormTest(0.7),
        **options,
    }
    return AdaptiveBatch(model, optimizer or SGD(model.parameters(), lr=0.01), given.pop("criterion"), **given)


class Ran:
    """A run: its model, batch sizes and which steps were probed."""

    def __init__(self, num_steps: int = 12, **options: Any) -> None:
        self.model = network()
        optimizer = SGD(self.model.parameters(), lr=0.01)
        self.batches = made(self.model, optimizer, **options)
        self.sizes: list[int] = []
        self.probed: list[bool] = []

        def each(step: Any) -> None:
            self.sizes.append(step.global_batch_size)
            self.probed.append(step.probed)

        order = GlobalOrder(regression(64), seed=1)
        train(self.batches, self.model, optimizer, order, until=of_steps(num_steps), each=each)
        self.batches.remove()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_constant_stream_gives_the_same_sizes_one_step_later(interval: int) -> None:
    control = Control(growth=1.5, pace=math.inf, hold=0, interval=interval)
    on_time = Ran(control=control, probe=steady(), **ON_TIME)
    late = Ran(13, control=control, probe=steady(), **LATE)
    assert max(on_time.sizes) > 2 * on_time.sizes[0]
    assert late.sizes == [4, *on_time.sizes]
    assert late.probed[:12] == on_time.probed


def test_growth_in_the_window_makes_probes_rarer_as_on_time() -> None:
    control = Control(interval=None, memory_share=0.9)
    on_time = Ran(160, control=control, probe=steady(), limits=Limits(4, 4), **ON_TIME)
    late = Ran(160, control=control, probe=steady(), limits=Limits(4, 4), **LATE)
    assert 60 < sum(on_time.probed) < 140
    assert abs(sum(late.probed) - sum(on_time.probed)) <= 1


def test_a_line_holds_the_measurement_of_its_own_step_and_names_that_of_its_decision(tmp_path: Path) -> None:
    fixed = {"limits": Limits(8, 8), "control": Control(interval=2)}
    measure = Measure(late=True, layers="module", l1=True)
    Ran(7, journal=tmp_path / "late", guard=LATE["guard"], measure=measure, **fixed)
    Ran(7, journal=tmp_path / "on time", measure=Measure(layers="module", l1=True), **fixed, **ON_TIME)
    late, on_time = lines(tmp_path / "late"), lines(tmp_path / "on time")
    assert [line["step"] for line in late] == list(range(7))
    assert [line["decided_by"] for line in late] == [None, 0, None, 2, None, 4, None]
    own = ("loss", "moments", "norms", "layers", "plan", "examples", "lr", "applied")
    assert [[line.get(key) for key in own] for line in late] == [[line.get(key) for key in own] for line in on_time]
    assert all(line["loss"] is not None and line["layers"] for line in late[::2])
    decided = ("averages", "wanted", "low", "high", "freedom")
    for line, before in zip(late[1::2], on_time[::2], strict=False):
        assert {key: line[key] for key in decided} == {key: before[key] for key in decided}
    assert late[0]["averages"] is None


def test_a_gain_is_taken_from_what_is_known_before_the_step(tmp_path: Path) -> None:
    late = Ran(journal=tmp_path / "late", probe=steady(), lr_rule="gain", **LATE)
    on_time = Ran(13, journal=tmp_path / "on time", probe=steady(), lr_rule="gain", **ON_TIME)
    factors = [[line["lr"]["factor"] for line in lines(tmp_path / name)] for name in ("late", "on time")]
    assert factors[0][1:] == pytest.approx(factors[1][:11])
    assert factors[0][0] == 1.0
    assert late.sizes[1:] == on_time.sizes[:11]


def test_no_number_of_a_step_is_read_before_its_update() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches, before, known = made(model, optimizer, **LATE), None, []
    for step in batches.steps(GlobalOrder(regression(64), seed=1), until=of_steps(5)):
        for batch in step:
            step.backward(loss_of(model, batch))
        known.append((step.unread, step.loss, step.moments, None if before is None else before.unread))
        assert step.decision is not None
        optimizer.step()
        optimizer.zero_grad()
        assert step.unread
        before = step
    assert known == [(True, None, None, None), *[(True, None, None, False)] * 4]
    assert before is not None
    assert before.loss is not None, "the last one is read when the loop ends"
    batches.remove()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("saved", [1, 2, 3, 4])
def test_resumed_to_the_bit(tmp_path: Path, saved: int, interval: int) -> None:
    def fresh(name: str) -> tuple[nn.Module, SGD, AdaptiveBatch, GlobalOrder]:
        model = network()
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        control = Control(interval=interval, growth=1.5, pace=math.inf, hold=0, confidence=0.5, memory=2)
        journal = tmp_path / name
        batches = made(
            model, optimizer, control=control, lr_rule="gain", journal=journal, criterion=NormTest(0.4), **LATE
        )
        return model, optimizer, batches, GlobalOrder(regression(64), seed=3)

    def go(parts: tuple[nn.Module, SGD, AdaptiveBatch, GlobalOrder], until: int) -> None:
        model, optimizer, batches, order = parts
        train(batches, model, optimizer, order, until=of_steps(until))

    through, before, after = fresh("through"), fresh("parts"), fresh("rest")
    go(through, 16)
    go(before, saved)
    file = io.BytesIO()
    torch.save({str(n): part.state_dict() for n, part in enumerate(before)}, file)
    file.seek(0)
    for part, state in zip(after, torch.load(file, weights_only=True).values(), strict=True):
        part.load_state_dict(state)
    go(after, 16)
    assert torch.equal(weights(through[0]), weights(after[0]))
    assert lines(tmp_path / "through") == [*lines(tmp_path / "parts"), *lines(tmp_path / "rest")]
    assert len({line["plan"]["global_batch_size"] for line in lines(tmp_path / "through")}) > 1


def test_layers_survive_a_save() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = made(model, optimizer, measure=Measure(late=True, layers="module"), guard=LATE["guard"])
    train(batches, model, optimizer, GlobalOrder(regression(64)), until=of_steps(1))
    saved = json.loads(json.dumps(batches.state_dict()["late"]))
    again = made(network(), measure=Measure(late=True, layers="module"), guard=LATE["guard"])
    again.load_state_dict({**batches.state_dict(), "late": saved})
    assert again.state_dict() == batches.state_dict()
    assert len(saved["moments"]["layers"]) == 2
    batches.remove()
    again.remove()


def test_a_run_without_it_drops_what_waits_and_measures_at_once() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = made(model, optimizer, control=Control(interval=5), **LATE)
    train(batches, model, optimizer, GlobalOrder(regression(64)), until=of_steps(1))
    on_time = made(network(), control=Control(interval=5), **ON_TIME)
    on_time.load_state_dict(batches.state_dict())
    assert "late" not in on_time.state_dict()
    assert math.isnan(on_time.noise_scale)
    assert on_time._planner.measures_next
    batches.remove()
    on_time.remove()


@pytest.mark.parametrize("ends", ["break", "error", "evaluation", "state_dict"])
def test_the_last_line_is_written_whichever_way_a_loop_ends(tmp_path: Path, ends: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = made(model, optimizer, journal=tmp_path / "j", **LATE)
    try:
        for step in batches.steps(GlobalOrder(regression(64))):
            for batch in step:
                step.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            if ends == "error" and batches.consumed.steps == 3:
                raise ZeroDivisionError
            if ends == "evaluation" and batches.consumed.steps == 3:
                batches.record_evaluation({"loss": 0.5})
                break
            if ends == "state_dict" and batches.consumed.steps == 3:
                batches.state_dict()
                break
            if batches.consumed.steps == 3:
                break
    except ZeroDivisionError:
        batches.remove()
    written = all_lines(tmp_path / "j")
    assert [line["step"] for line in written if "evaluation" not in line] == [0, 1, 2]
    assert all(line["loss"] is not None and line["applied"] for line in written if "evaluation" not in line)
    assert "evaluation" not in written[2]
    batches.remove()
    assert all_lines(tmp_path / "j") == written


def test_a_missing_update_is_written_with_its_measurement(tmp_path: Path) -> None:
    model = network()
    batches = made(model, journal=tmp_path / "j", **LATE)
    for number, step in enumerate(batches.steps(GlobalOrder(regression(64)))):
        for batch in step:
            step.backward(loss_of(model, batch))
        batches.leave_out()
        if number == 2:
            break
    batches.remove()
    written = lines(tmp_path / "j")
    assert [line["applied"] for line in written] == [False] * 3
    assert all(line["moments"] is not None for line in written)


def test_a_step_that_weighs_nothing_is_left_out_and_decides_by_the_one_before(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = made(model, optimizer, journal=tmp_path / "j", probe=steady(), **LATE)
    data = regression(64)
    empty = {1, 3}

    def weigh(batch: Any) -> float:
        return 0.0 if batches.consumed.steps in empty else 1.0

    for step in batches.steps(GlobalOrder(data, shuffle=False), weigh=weigh, until=of_steps(5)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    written = lines(tmp_path / "j")
    assert [line["applied"] for line in written] == [True, False, True, False, True]
    assert [line["decided_by"] for line in written] == [None, 0, None, 2, None]
    assert [line["reason"] for line in written] == ["not probed", "not significant", "not probed", "grow", "not probed"]


def test_numbers_that_are_not_finite_hold_the_plan_one_step_later(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = made(model, optimizer, journal=tmp_path / "j", **LATE)
    x, y = regression(64).tensors
    y[4:6] = math.inf  # in step 1, whose batch of 4 is not larger than that of step 0
    for step in batches.steps(GlobalOrder(torch.utils.data.TensorDataset(x, y), shuffle=False), until=of_steps(3)):
        for batch in step:
            step.backward(loss_of(model, batch))
        if not torch.isfinite(model[0].weight.grad).all():
            batches.leave_out()
        optimizer.step()
        optimizer.zero_grad()
    batches.remove()
    written = lines(tmp_path / "j")
    assert [line["applied"] for line in written] == [True, False, True]
    assert (written[2]["decided_by"], written[2]["reason"]) == (1, "not finite")
    assert written[1]["loss"] is None
    assert written[1]["moments"]["grad_sq"] is None
    assert written[1]["averages"] == written[2]["averages"]
    assert written[1]["averages"] is not None


def test_adagrad_norm_reads_its_gradient_itself() -> None:
    found = []
    for options in (LATE, ON_TIME):
        model = network()
        optimizer = AdaGradNorm(model.parameters(), lr=0.3)
        batches = made(model, optimizer, limits=Limits(8, 8), **options)
        taken: list[Any] = []
        original = optimizer.take_norm
        optimizer.take_norm = lambda norm, to=taken, give=original: (to.append(norm), give(norm))[1]  # type: ignore[method-assign]
        train(batches, model, optimizer, GlobalOrder(regression(64)), until=of_steps(6))
        batches.remove()
        found.append((len(taken), weights(model)))
    assert (found[0][0], found[1][0]) == (0, 6)
    # the sum over parameters of their sums, and not in the probe's order
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)


def test_a_probe_tells_moments_of_a_step_whose_norm_was_unknown() -> None:
    """Adam's norm begins with the second step: that of the first has no parts, also when it is read then."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    probe = MicroBatchProbe(
        list(model.parameters()), norm=AdamMetric(optimizer), layers=layers_of(model, optimizer, "module")
    )
    x, y = regression(8).tensors

    def run() -> list[float]:
        probe.start(1)
        for half in (slice(0, 4), slice(4, 8)):
            probe.begin_part()
            (loss_of(model, (x[half], y[half])) / 2).backward()
            probe.end_part(4, 0.5)
        totals: list[float] = probe.collect().tolist()
        return totals

    first = run()
    at_once = probe.moments(first)
    optimizer.step()
    second = run()
    assert probe.moments(second).num_parts == 2
    assert repr(probe.moments(first)) == repr(at_once)
    assert at_once.num_parts == 0
    assert math.isnan(at_once.noise)
    probe.remove()


def test_sums_without_a_step_know_no_lengths() -> None:
    assert PartSums(1, device=torch.device("cpu")).lengths == {}


def refused(**options: Any) -> AdaptiveBatch:
    return made(network(), **{**LATE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": Guard()}, r"leaves out an update for them: give Guard\(skip_nonfinite=False\)"),
        ({"guard": Guard(skip_nonfinite="probed")}, "skip_nonfinite='probed'"),
        ({"criterion": Goodput()}, "Goodput times steps when the host waits"),
    ],
)
def test_what_cannot_be_late_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**options)


def test_local_sgd_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with LocalSGD(model, optimizer, sync_every=2) as local, pytest.raises(ValueError, match="once per round"):
        made(model, optimizer, local_sgd=local, **LATE)


def test_a_scaler_with_several_optimizers_is_refused() -> None:
    model = network()
    halves = [SGD(model[0].parameters(), lr=0.01), SGD(model[2].parameters(), lr=0.01)]
    engine = EngineOptions(scaler=GradScaler("cpu"))
    with pytest.raises(ValueError, match="GradScaler and several optimizers"):
        made(model, halves, engine=engine, **LATE)


def test_a_policy_that_measures_nothing_is_the_same_run() -> None:
    late = Ran(6, criterion=Constant(8), limits=None, **LATE)
    on_time = Ran(6, criterion=Constant(8), limits=None, **ON_TIME)
    assert torch.equal(weights(late.model), weights(on_time.model))
    assert late.batches.consumed.reached(of_examples(48))
