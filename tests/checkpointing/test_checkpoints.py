"""``save``, ``load`` and ``Checkpoints`` on one process: the resumed run is the uninterrupted one, or says why not."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.loops import journal_text, lines, loss_of, network, regression, weights
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import TensorDataset

import adabatch
from adabatch import AdaptiveBatch, Checkpoints, GlobalOrder, Limits, NormTest, ProgressLR, lr
from adabatch.adaptive.options import Measure
from adabatch.checkpointing import CheckpointError
from adabatch.checkpointing.files import checkpoints_in, finish, sealed

TOTAL = adabatch.examples(2000)


@pytest.fixture(autouse=True)
def own_numbers() -> Iterator[None]:
    """Leaves the random numbers of the process as they were: loading moves them."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002


class Run(NamedTuple):
    """A training run with everything that can be saved."""

    model: nn.Module
    optimizer: Optimizer
    batches: AdaptiveBatch
    schedule: ProgressLR
    order: GlobalOrder
    scaler: torch.amp.GradScaler

    def parts(self) -> dict[str, Any]:
        return self._asdict()


def made(
    folder: Path,
    *,
    model: nn.Module | None = None,
    optimizer: Callable[..., Optimizer] = Adam,
    data: TensorDataset | None = None,
    high: int = 64,
    shuffle: bool = True,
) -> Run:
    """A model with dropout, whose masks come from the global random numbers, and a batch that grows."""
    model = model or nn.Sequential(network(), nn.Dropout(0.2))
    stepped = optimizer(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=7)
    batches = AdaptiveBatch(
        model,
        stepped,
        NormTest(eta=0.3),
        micro_batch_size=4,
        limits=Limits(min=8, max=high),
        lr_rule="sqrt",
        journal=folder / "journal.jsonl",
        engine=adabatch.EngineOptions(scaler=scaler),
    )
    schedule = ProgressLR(stepped, lr.cosine(), batches, total=TOTAL)
    order = GlobalOrder(data or regression(300), seed=5, shuffle=shuffle)
    return Run(model, stepped, batches, schedule, order, scaler)


def train(run: Run, *, until: adabatch.batch.Duration = TOTAL, each: Callable[[int], None] = lambda step: None) -> None:
    """With a scaler whose unscaled gradients overflow at step 5, so that it leaves that update out."""
    for step in run.batches.steps(run.order, until=until):
        for batch in step:
            step.backward(loss_of(run.model, batch))
        if run.batches.consumed.steps == 5:
            next(run.model.parameters()).grad[0, 0] = torch.inf
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        run.schedule.step()
        each(run.batches.consumed.steps)


def same(one: Run, two: Run) -> None:
    """To the bit, the random numbers to come among it."""
    assert torch.equal(weights(one.model), weights(two.model))
    assert one.batches.state_dict() == two.batches.state_dict()
    assert one.schedule.state_dict() == two.schedule.state_dict()
    assert one.order.state_dict() == two.order.state_dict()
    assert one.scaler.state_dict() == two.scaler.state_dict()
    for mine, other in zip(one.optimizer.state.values(), two.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)


class Stopped(Exception):
    """Ends a loop from within."""


def stop_at(number: int) -> Callable[[int], None]:
    def each(step: int) -> None:
        if step == number:
            raise Stopped

    return each


# --- resumed == uninterrupted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 5, 6, 31])
def test_a_run_that_is_saved_and_loaded_equals_one_that_was_not(tmp_path: Path, last: int) -> None:
    """After the first update, after the one that the scaler leaves out, and later."""
    torch.manual_seed(1)
    whole = made(tmp_path / "whole")
    train(whole)
    after = torch.rand(3)

    torch.manual_seed(1)
    first = made(tmp_path / "parts")
    with pytest.raises(Stopped):
        train(first, each=stop_at(last))
    adabatch.save(tmp_path / "saved", **first.parts())
    with pytest.raises(Stopped):
        train(first, each=stop_at(last + 3))  # what is trained after the save is lost, and its journal lines too

    torch.manual_seed(2)
    second = made(tmp_path / "parts", model=nn.Sequential(network(seed=9), nn.Dropout(0.2)))
    loaded = adabatch.load(tmp_path / "saved", **second.parts())
    assert loaded is not None
    assert not loaded.differences
    assert not loaded.damaged
    assert second.batches.consumed.steps == last
    train(second)
    same(whole, second)
    assert torch.equal(torch.rand(3), after)
    assert journal_text(tmp_path / "whole/journal.jsonl") == journal_text(tmp_path / "parts/journal.jsonl")
    assert not lines(tmp_path / "parts/journal.jsonl")[4]["applied"]


def test_without_a_checkpoint_nothing_is_loaded_and_the_journal_begins_anew(tmp_path: Path) -> None:
    run = made(tmp_path)
    train(run, until=adabatch.steps(2))
    again = made(tmp_path)
    assert adabatch.load(tmp_path / "nowhere", **again.parts()) is None
    assert lines(tmp_path / "journal.jsonl") == []


def test_everything_in_a_checkpoint_loads_without_running_code(tmp_path: Path) -> None:
    run = made(tmp_path)
    train(run, until=adabatch.steps(6))
    adabatch.save(tmp_path / "saved", **run.parts(), others={"average": network()})
    (path,) = checkpoints_in(tmp_path / "saved").values()
    state = torch.load(path / "state.pt", weights_only=True)
    assert state.keys() == {"random", "average", *run.parts()}
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pt"]


def test_parts_that_are_left_out_stay_as_they_are_and_are_named(tmp_path: Path) -> None:
    run = made(tmp_path)
    train(run, until=adabatch.steps(6))
    adabatch.save(tmp_path / "saved", **run.parts())
    model = nn.Sequential(network(seed=7), nn.Dropout(0.2))
    loaded = adabatch.load(tmp_path / "saved", model=model)
    assert torch.equal(weights(model), weights(run.model))
    assert loaded is not None
    assert {difference.name for difference in loaded.differences} >= {"parts.optimizer", "parts.scaler"}


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path: Path) -> None:
    model = network()
    rates, decay = np.logspace(-3, -1, 3), np.float32(0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rates[1], weight_decay=decay, betas=(np.float64(0.8), 0.9))
    batches = AdaptiveBatch(
        model,
        optimizer,
        NormTest(np.float64(0.3)),
        micro_batch_size=4,
        limits=Limits(min=8, max=8),
        reference_batch_size=np.int64(8),
        journal=tmp_path / "journal.jsonl",
    )
    schedule = ProgressLR(optimizer, lr.cosine(), batches, total=TOTAL)
    order = GlobalOrder(regression(64), seed=5)
    parts: dict[str, Any] = {
        "model": model, "optimizer": optimizer, "batches": batches, "schedule": schedule, "order": order,
        "others": {"average": Loader({"rate": np.float64(0.5), np.int64(3): [np.bool_(True)]})},
        "config": {"lr": rates[1], "size": np.int64(3), "sizes": rates},
    }  # fmt: skip
    for step in batches.steps(order, until=adabatch.steps(2)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    adabatch.save(tmp_path / "saved", **parts)
    before = weights(model)
    with torch.no_grad():
        model[0].weight.zero_()
    loaded = adabatch.load(tmp_path / "saved", **parts)
    assert loaded is not None
    assert not loaded.differences
    assert torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert parts["others"]["average"].state == {"rate": 0.5, 3: [True]}


@pytest.mark.parametrize("background", [True, False])
def test_what_could_not_be_loaded_is_refused_at_once_and_by_its_place(tmp_path: Path, background: bool) -> None:
    run = made(tmp_path)
    run.optimizer.param_groups[0]["lr"] = np.longdouble("0.1")
    with (
        pytest.raises(CheckpointError, match=r"optimizer\.param_groups\[0\]\['lr'\] is np\.longdouble"),
        Checkpoints(tmp_path / "saved", **run.parts(), background=background) as checkpoints,
    ):
        checkpoints.save()
    assert not (tmp_path / "saved").exists()


def test_the_first_checkpoint_is_read_back_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = made(tmp_path), []
    load = torch.load

    def loads(*args: Any, **options: Any) -> Any:
        assert options["weights_only"]
        read.append(args[0])
        return load(*args, **options)

    monkeypatch.setattr("adabatch.checkpointing.run_state.torch.load", loads)
    with Checkpoints(tmp_path / "saved", **run.parts(), background=False) as checkpoints:
        checkpoints.save()
        checkpoints.save()
    assert [path.parent.name[:14] for path in read] == ["000001-step-0."]
    # A tensor of a class that torch makes by a function of its own: the walk takes it for a tensor, the reader cannot.
    monkeypatch.setattr("adabatch.checkpointing.run_state.plain", lambda state, *_, **__: state)
    other = {**run.parts(), "others": {"mine": Loader(Path("anything"))}}
    with pytest.raises(CheckpointError, match="what was written cannot be read back: Weights only load failed"):
        adabatch.save(tmp_path / "other", **other)
    assert checkpoints_in(tmp_path / "other") == {}


def test_a_checkpoint_with_right_checksums_and_wrong_contents_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (path,) = checkpoints_in(folder).values()
    state = torch.load(path / "state.pt", weights_only=True)
    for wrong, words in (
        ([1, 2], "holds no state of order, model"),
        ({"model": state["model"]}, "holds no state of order, optimizer"),
        ({**state, "optimizer": {}}, "a part cannot load what it holds .KeyError: 'param_groups'"),
        ({**state, "model": 7}, "a part cannot load what it holds .AttributeError"),
    ):
        shutil.rmtree(path)
        path.mkdir()
        torch.save(wrong, path / "state.pt")
        contents = {"parts": {name: type(part).__name__ for name, part in made(tmp_path).parts().items()}}
        unfinished = path.rename(path.with_name(path.name + ".unfinished"))
        path = finish(unfinished, {**contents, "sharded": False}, sealed(unfinished), keep=1)
        with pytest.raises(CheckpointError, match=words):
            adabatch.load(folder, **made(tmp_path).parts())
    unfinished = path.rename(path.with_name(path.name + ".unfinished"))
    (unfinished / "manifest.json").unlink()
    finish(unfinished, {"anything": "else"}, sealed(unfinished), keep=1)
    with pytest.raises(CheckpointError, match=r"manifest\.json matches its checksum, but does not describe a run"):
        adabatch.load(folder, **made(tmp_path).parts())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = made(tmp_path)
    with Checkpoints(tmp_path / "saved", **run.parts(), keep=1) as checkpoints:
        checkpoints.save()
        for bad in (torch.nan, torch.inf, -torch.inf):
            with torch.no_grad():
                run.model[0][2].weight[0, 3] = bad
            with pytest.raises(CheckpointError, match=r"0\.2\.weight holds numbers that are not finite"):
                checkpoints.save()
        run.model[0][2].weight.requires_grad_(False)  # a mask, say, whose infinities are meant
        checkpoints.save()
    assert list(checkpoints_in(tmp_path / "saved")) == [2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_optimizer_states_that_are_not_finite_are_not_saved(tmp_path: Path, name: str, bad: float) -> None:
    """The weights are still good, and the next update would spoil them."""
    run = made(tmp_path)
    train(run, until=adabatch.steps(2))
    state = run.optimizer.state[run.model[0][0].bias]
    with Checkpoints(tmp_path / "saved", **run.parts(), keep=1) as checkpoints:
        checkpoints.save()
        good = state[name][1].clone()
        state[name][1] = bad
        words = rf"the optimizer's state\['{name}'\] of 0\.0\.bias holds numbers that are not finite.*are kept"
        with pytest.raises(CheckpointError, match=words):
            checkpoints.save()
        state[name][1] = good
        checkpoints.save()
    assert list(checkpoints_in(tmp_path / "saved")) == [2]


# --- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_checkpoints_come_at_their_interval_and_a_step_is_saved_once(tmp_path: Path, background: bool) -> None:
    run = made(tmp_path)
    saved = []
    with Checkpoints(
        tmp_path / "saved", **run.parts(), every=adabatch.examples(300), keep=2, background=background
    ) as checkpoints:

        def each(step: int) -> None:
            if checkpoints.step():
                saved.append(run.batches.consumed.examples)
                assert not checkpoints.step(now=True)

        train(run, each=each)
        checkpoints.step(now=True)
        checkpoints.step(now=True)
    assert len(saved) >= 4
    assert all(300 <= after - before < 300 + 64 for before, after in zip([0, *saved], saved, strict=False))
    assert list(checkpoints_in(tmp_path / "saved")) == [len(saved) + 1, len(saved)]


def test_time_between_checkpoints_counts_from_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("adabatch.checkpointing.save_times.time.monotonic", lambda: now)
    run = made(tmp_path)
    saved = []
    with Checkpoints(tmp_path / "saved", **run.parts(), every_seconds=10, background=False) as checkpoints:

        def each(step: int) -> None:
            nonlocal now
            now += 3.0
            if checkpoints.step():
                saved.append(step)

        train(run, until=adabatch.steps(12), each=each)
    # Due at the end of a step's inner loop: 9 s after the third step is too early, 12 s after the fourth is not.
    assert saved == [5, 10]


def test_a_background_save_holds_what_was_there_when_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread waits until the run has moved on."""
    moved = threading.Event()
    write = torch.save
    monkeypatch.setattr("adabatch.checkpointing.run_state.torch.save", lambda *args: (moved.wait(60), write(*args)))
    run = made(tmp_path)
    with Checkpoints(tmp_path / "saved", **run.parts()) as checkpoints:
        train(run, until=adabatch.steps(6))
        expected = weights(run.model), run.batches.state_dict(), run.order.state_dict()
        checkpoints.save()
        assert checkpoints_in(tmp_path / "saved") == {}
        train(run, until=adabatch.steps(9))
        moved.set()
    other = made(tmp_path / "other")
    adabatch.load(tmp_path / "saved", **other.parts())
    assert torch.equal(weights(other.model), expected[0])
    assert (other.batches.state_dict(), other.order.state_dict()) == expected[1:]
    assert not any(thread.name == "adabatch checkpoint" for thread in threading.enumerate())


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_is_an_error_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    run = made(tmp_path)
    checkpoints = Checkpoints(tmp_path / "saved", **run.parts(), background=background)
    train(run, until=adabatch.steps(2))
    checkpoints.save()
    checkpoints._waited()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("adabatch.checkpointing.run_state.torch.save", full)
        train(run, until=adabatch.steps(4))
        if background:
            checkpoints.save()  # the next one will tell
        with pytest.raises(CheckpointError, match=r"saved: .*No space left"):
            checkpoints.save()
    train(run, until=adabatch.steps(6))
    checkpoints.save()
    checkpoints.close()
    assert [path.name for path in checkpoints_in(tmp_path / "saved").values()] == ["000002-step-6", "000001-step-2"]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"000002-step-6", "000001-step-2", "lock.json"}


def test_an_exception_in_the_loop_lets_the_write_finish_and_carries_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path)

    def loop() -> None:
        with Checkpoints(tmp_path / "saved", **run.parts()) as checkpoints:
            checkpoints.save()
            raise Stopped

    with pytest.raises(Stopped):
        loop()
    assert len(checkpoints_in(tmp_path / "saved")) == 1
    monkeypatch.setattr("adabatch.checkpointing.run_state.torch.save", lambda *_: 1 / 0)
    with pytest.raises(Stopped) as stopped:
        loop()
    assert "division by zero" in stopped.value.__notes__[0]


def test_a_checkpoint_in_the_middle_of_a_step_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path)
    for step in run.batches.steps(run.order, until=adabatch.steps(1)):
        for batch in step:
            step.backward(loss_of(run.model, batch))
            with pytest.raises(RuntimeError, match="`for batch in step` has not been run to its end"):
                adabatch.save(tmp_path / "saved", **run.parts())
        parts = {**run.parts(), "scaler": None}
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) has not been run to its end"):
            adabatch.save(tmp_path / "saved", **parts)
        run.scaler.step(run.optimizer)
        with pytest.warns(RuntimeWarning, match=r"the GradScaler of the AdaptiveBatch .* give it as scaler="):
            adabatch.save(tmp_path / "saved", **parts)


# --- what differs -----------------------------------------------------------------------------------------------------


def saved(folder: Path, *, last: int = 6, **options: Any) -> Path:
    run = made(folder / "first")
    train(run, until=adabatch.steps(last))
    adabatch.save(folder / "saved", **run.parts(), **options)
    return folder / "saved"


def test_harmless_differences_are_stated(tmp_path: Path) -> None:
    config = {"limits": {"max": 64}, "eta": 0.9, "names": ["a"], "nan": float("nan"), "gone": 1}
    folder = saved(tmp_path, last=40, config=config)
    run = made(tmp_path, high=12)
    config = {"limits": {"max": 12}, "eta": 0.9, "names": ["a"], "nan": float("nan")}
    loaded = adabatch.load(folder, **run.parts(), config=config)
    assert loaded is not None
    found = {difference.name: difference for difference in loaded.differences}
    assert found["config.limits.max"][1:] == (64, 12)
    assert found["config.gone"][1:] == (1, None)
    assert found["batch.global_batch_size"].now <= 12 < found["batch.global_batch_size"].saved
    assert not found.keys() - {"config.limits.max", "config.gone"} - {n for n in found if n.startswith("batch.")}
    assert str(found["config.limits.max"]) == "config.limits.max was 64 when the checkpoint was saved, and is 12 now"


def test_what_would_be_wrong_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": nn.Sequential(nn.Linear(6, 1), nn.Dropout())}, "of another model .*0.0.weight: shape"),
        ({"optimizer": SGD}, "the optimizer Adam, this run has SGD"),
        ({"data": regression(301)}, "saved with length 300, now 301"),
        ({"shuffle": False}, "saved with order .*, now "),
    ]
    for options, words in wrong:
        run = made(tmp_path / "second", **options)
        before = weights(run.model)
        with pytest.raises(ValueError, match=words):
            adabatch.load(folder, **run.parts())
        assert torch.equal(weights(run.model), before)
        assert run.batches.consumed.steps == 0
    run = made(tmp_path / "third")
    with pytest.raises(ValueError, match="holds no average"):
        adabatch.load(folder, **run.parts(), others={"average": network()})
    groups = Adam([{"params": list(run.model[0][0].parameters())}, {"params": list(run.model[0][2].parameters())}])
    with pytest.raises(ValueError, match=r"groups of \[4\] parameters, this Adam of \[2, 2\]"):
        adabatch.load(folder, model=run.model, optimizer=groups)


class Loader:
    """Has a state that is whatever it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return {"state": self.state}

    def load_state_dict(self, state: Any) -> None:
        self.state = state["state"]


def test_a_loaders_state_is_saved_if_it_can_be_read_back(tmp_path: Path) -> None:
    run = {**made(tmp_path).parts(), "order": Loader([1, "two", torch.ones(3)])}
    adabatch.save(tmp_path / "saved", **run)
    run["order"] = Loader(None)
    adabatch.load(tmp_path / "saved", **run)
    assert run["order"].state[:2] == [1, "two"]
    run["order"] = Loader(Path("anything"))
    with pytest.raises(CheckpointError, match=r"order\.state is PosixPath\('anything'\)"):
        adabatch.save(tmp_path / "saved", **run)
    with pytest.raises(ValueError, match="the order Loader, this run has GlobalOrder"):
        adabatch.load(tmp_path / "saved", **made(tmp_path).parts())


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path)
    (good,) = checkpoints_in(folder).values()
    other = made(tmp_path / "other").model
    adabatch.load(folder, model=other)
    for _ in range(2):
        adabatch.save(folder, model=other)
    for bad in list(checkpoints_in(folder).values())[:2]:
        (bad / "state.pt").write_bytes(b"")
    run = made(tmp_path / "second")
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        loaded = adabatch.load(folder, **run.parts())
    assert loaded is not None
    assert loaded.path == good
    assert len(loaded.damaged) == 2
    assert "000003-step-0: state.pt has 0 bytes" in caplog.text
    assert f"resuming from {good.name}" in caplog.text


def test_a_journal_that_lost_lines_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path)
    journal = tmp_path / "first" / "journal.jsonl"
    kept, dropped = journal.read_text().splitlines(keepends=True)[:3], journal.read_text().splitlines()[3]
    journal.write_text("".join(kept))
    run = made(tmp_path / "first")
    with caplog.at_level(logging.WARNING, logger="adabatch"):
        adabatch.load(folder, **run.parts())
    end = json.loads(dropped)["examples"]
    assert f"journal.jsonl ends at {end} examples, and the run is at" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": 0}, ValueError, "keep must be at least 1 checkpoint, got 0"),
        ({"every": 100}, TypeError, r"such as adabatch.examples\(100\)"),
        ({"every": adabatch.examples(0)}, ValueError, "every must be at least 1"),
        ({"every": adabatch.tokens(100)}, ValueError, "does not count tokens"),
        ({"every_seconds": 0}, ValueError, "every_seconds must be positive"),
        ({"batches": None, "every": adabatch.steps(1)}, ValueError, "pass batches="),
        ({"others": {"random": network()}}, ValueError, "must not use the names random, which are taken"),
        ({"schedule": object()}, TypeError, "schedule is a object, which has no state_dict"),
    ],
)
def test_mistakes_are_clear(tmp_path: Path, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Checkpoints(tmp_path / "saved", **{**made(tmp_path).parts(), **options})


def test_step_needs_the_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass batches="):
        Checkpoints(tmp_path, model=network()).step()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("probed", [True, False])
def test_a_signal_is_agreed_on_at_the_end_of_the_step(tmp_path: Path, number: signal.Signals, probed: bool) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    batches = AdaptiveBatch(model, optimizer, adabatch.Constant(8), micro_batch_size=4, measure=Measure(monitor=probed))
    order = GlobalOrder(regression(64))
    before = signal.getsignal(number)
    stopped = []
    with adabatch.Preemption(batches) as preemption:
        for step in batches.steps(order, until=adabatch.steps(8)):
            for batch in step:
                step.backward(loss_of(model, batch))
                if batches.consumed.steps == 3:
                    signal.raise_signal(number)
                    signal.raise_signal(number)
            optimizer.step()
            optimizer.zero_grad()
            stopped.append(preemption.agreed)
    assert stopped == [False] * 3 + [True] * 5
    assert signal.getsignal(number) is before
    assert adabatch.EXIT_PREEMPTED == 75


def test_a_run_may_ask_itself_to_stop(tmp_path: Path) -> None:
    run = made(tmp_path)
    preemption = adabatch.Preemption(run.batches)
    train(run, until=adabatch.steps(2))
    assert not preemption.agreed
    preemption.request()
    train(run, until=adabatch.steps(3))
    assert preemption.agreed
