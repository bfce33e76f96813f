"""The journal: what a line says, that it is strict JSON, and that equal runs write equal files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.loops import journal_text

from adabatch.batch.averages import Averages
from adabatch.batch.control import Control, ControlState, Decision, Limits, Reason, decide
from adabatch.batch.criteria import NormTest
from adabatch.batch.estimates import Estimate
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress
from adabatch.cli.schedule.recorded import read_run
from adabatch.journal.parts import parts_of
from adabatch.journal.writer import LINE_FORMAT, Journal, line
from adabatch.report.curves import read_curves, records

PLAN = BatchPlan(micro_batch_size=8, accumulation_steps=2, dp_size=2)
NEXT = BatchPlan(micro_batch_size=8, accumulation_steps=4, dp_size=2)
MOMENTS = GradientMoments.from_noise(30.0, 2.0, part_size=8, num_examples=32)
AVERAGES = Averages().after(MOMENTS, 0.5)


def an_entry(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "plan": PLAN,
        "num_examples": 30,
        "before": Progress(examples=320, steps=10),
        "loss": 0.75,
        "moments": MOMENTS,
        "averages": AVERAGES,
        "decision": Decision(NEXT, Reason.GROW, Estimate(70.0, 60.0, 80.0), ControlState()),
    }
    return line(**{**arguments, **changes})


def test_what_only_some_probes_measure_stands_where_it_was_measured() -> None:
    assert {"noise_along", "noise_at_quantile", "norm"}.isdisjoint(an_entry()["moments"])
    assert "layers" not in an_entry()
    moments = MOMENTS._replace(noise_along=3.0, noise_at_quantile=90.0, layers={"head": MOMENTS})
    entry = an_entry(moments=moments)
    assert (entry["moments"]["noise_along"], entry["moments"]["noise_at_quantile"]) == (3.0, 90.0)
    assert entry["layers"]["head"] == pytest.approx({"noise": 30.0, "signal": 2.0, "noise_scale": 15.0}, rel=1e-12)
    assert entry["norms"]["l2"] == pytest.approx(math.sqrt(MOMENTS.grad_sq))
    entry = an_entry(moments=MOMENTS._replace(norm="adam", grad_l2=0.25))
    assert (entry["moments"]["norm"], entry["norms"]["l2"]) == ("adam", 0.25)


def read(path: Path) -> list[Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(text, parse_constant=refuse) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_what_was_measured_asked_and_decided() -> None:
    entry = an_entry()
    assert entry["format"] == LINE_FORMAT
    assert (entry["step"], entry["examples"], entry["loss"]) == (10, 320, 0.75)
    assert entry["plan"] == {
        "micro_batch_size": 8,
        "accumulation_steps": 2,
        "dp_size": 2,
        "global_batch_size": 30,  # what the step really took
    }
    assert entry["moments"]["noise"] == pytest.approx(30.0, rel=1e-12)
    assert entry["moments"]["signal"] == pytest.approx(2.0, rel=1e-12)
    assert entry["moments"]["noise_scale"] == pytest.approx(15.0, rel=1e-12)
    assert entry["averages"]["noise_scale"] == pytest.approx(15.0, rel=1e-12)
    assert (entry["wanted"], entry["low"], entry["high"]) == (70.0, 60.0, 80.0)
    assert (entry["next"], entry["reason"]) == (64, "grow")
    assert type(entry["reason"]) is str


def test_the_moments_can_be_read_back() -> None:
    names = ("part_sq", "part_size", "grad_sq", "num_examples", "num_parts")
    entry = an_entry()
    assert GradientMoments(**{name: entry["moments"][name] for name in names}) == MOMENTS


def test_what_was_not_measured_is_null() -> None:
    decision = Decision(PLAN, Reason.NOT_PROBED, None, ControlState())
    entry = an_entry(moments=None, loss=None, averages=Averages(), decision=decision)
    for name in ("moments", "loss", "averages", "wanted", "low", "high"):
        assert entry[name] is None
    assert (entry["next"], entry["reason"]) == (32, "not probed")


@pytest.mark.parametrize("grad_sq", [-1e-12, -math.inf, math.nan, math.inf])
def test_no_measurement_keeps_a_line_from_being_written(tmp_path: Path, grad_sq: float) -> None:
    """The mean of inner products with a gradient of nearly zero may fall below zero."""
    journal = Journal(tmp_path / "run.jsonl")
    journal.write(an_entry(moments=MOMENTS._replace(grad_sq=grad_sq)))
    (found,) = read(tmp_path / "run.jsonl")
    assert found["moments"]["grad_sq"] == (grad_sq if math.isfinite(grad_sq) else None)
    assert found["norms"]["l2"] is None


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    bad = MOMENTS._replace(part_sq=math.nan, grad_sq=math.inf)
    estimate = Estimate(math.inf, math.nan, -math.inf)
    entry = an_entry(moments=bad, loss=math.nan, decision=Decision(PLAN, Reason.NO_SIGNAL, estimate, ControlState()))
    journal.write({**entry, "lr": {"base": [0.1, math.nan], "applied": (math.inf, 0.5)}})
    (found,) = read(tmp_path / "run.jsonl")
    assert found["loss"] is None
    assert (found["wanted"], found["low"], found["high"]) == (None, None, None)
    assert found["moments"]["part_sq"] is None
    assert found["moments"]["noise"] is None
    assert found["moments"]["part_size"] == 8
    assert found["lr"] == {"base": [0.1, None], "applied": [None, 0.5]}


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    journal.write(an_entry(loss=0.1 + 0.2))
    (found,) = read(tmp_path / "run.jsonl")
    assert found == {**an_entry(loss=0.1 + 0.2), "run": journal.run}


def test_lines_are_appended_and_complete_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "run.jsonl"
    journal = Journal(path)
    assert path.read_text() == ""
    for step in range(3):
        journal.write(an_entry(before=Progress(steps=step)))
        assert [each["step"] for each in read(path)] == list(range(step + 1))
    Journal(str(path)).write(an_entry(before=Progress(steps=3)))  # a resumed run goes on in the same file
    assert [each["step"] for each in read(path)] == [0, 1, 2, 3]


def test_a_resumed_run_cuts_what_it_writes_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path)
    for step in range(5):
        journal.write(an_entry(before=Progress(examples=32 * step, steps=step)))
    with path.open("a") as file:
        file.write('{"format":1,"step":5,"exa')  # the machine stopped here
    assert Journal(path).cut(1000) == 4 * 32 + 30
    assert [each["step"] for each in read(path)] == [0, 1, 2, 3, 4]
    assert Journal(path).cut(96) == 2 * 32 + 30
    assert [each["step"] for each in read(path)] == [0, 1, 2]
    journal.write(an_entry(before=Progress(examples=96, steps=3)))
    assert [each["step"] for each in read(path)] == [0, 1, 2, 3]
    assert Journal(path).cut(0) == 0
    assert read(path) == []
    # Nothing is lost: what was cut stands beside it, in the order of the cuts.
    aside = path.with_name("run.jsonl.cut").read_text().splitlines()
    assert aside[0] == '{"format":1,"step":5,"exa'
    assert [json.loads(text)["step"] for text in aside[1:]] == [3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("token", [True, False])
def test_readers_refuse_two_runs_in_one_journal_and_steps_that_are_there_twice(tmp_path: Path, token: bool) -> None:
    def entries(*steps: int, run: str) -> list[dict[str, Any]]:
        made = [an_entry(before=Progress(examples=30 * step, steps=step)) for step in steps]
        return [{**entry, **({"run": run} if token else {})} for entry in made]

    def reads(*entries: dict[str, Any]) -> None:
        path = tmp_path / "run.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        for read in (read_curves, read_run):
            read(path)

    first = entries(0, 1, 2, run="aaaa")
    reads(*first)
    reads(*first, *entries(3, 4, run="bbbb"))  # goes on where the other ended: its state was saved by hand
    reads(*first, *entries(7, run="aaaa"))  # lines were lost
    with pytest.raises(ValueError, match=r"run\.jsonl, line 4, begins again at 60 examples, .* end at 90"):
        reads(*first, *entries(2, 3, run="aaaa"))
    for begin in (0, 1):
        with pytest.raises(ValueError, match=r"run\.jsonl, line 4, begins .*: give one run at a time"):
            reads(*first, *entries(begin, run="bbbb"))
    if token:
        with pytest.raises(ValueError, match=r"line 4, begins another run \(bbbb after aaaa\) at 300 examples"):
            reads(*first, *entries(10, run="bbbb"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text(""), "was removed or emptied while the run goes on"),
        (lambda path: path.unlink(), "was removed or emptied while the run goes on"),
        (lambda path: Journal(path).write(an_entry()), "something else writes into the journal"),
    ],
)
def test_what_others_do_to_the_file_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, said: str
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"of": "an older run"}\n')
    journal = Journal(path, part_bytes=10**4)
    for _ in range(40):  # over several files
        journal.write(an_entry())
    journal.cut(0)
    journal.write(an_entry())
    assert not caplog.messages
    for _ in range(2):
        spoil(path)
        journal.write(an_entry())
    assert len(caplog.messages) == 1
    assert said in caplog.text


def test_a_disk_that_is_full_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path)
    journal.write(an_entry())
    before = path.read_bytes()
    opened = Path.open

    class Full:
        """Takes ten bytes, and is full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return int(self.file.fileno())

        def write(self, data: Any) -> int:
            if os.fstat(self.fileno()).st_size > len(before):
                raise OSError(28, "No space left on device")
            return int(self.file.write(data[:10]))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", lambda self, *args, **options: Full(opened(self, *args, **options)))
        with pytest.raises(OSError, match=r"the journal could not be written: No space left on device.*run\.jsonl"):
            journal.write(an_entry())
    assert path.read_bytes() == before
    journal.write(an_entry())
    assert len(read(path)) == 2
    with pytest.raises(OSError, match="the journal could not be written: No space left on device"):
        Journal("/dev/full").write(an_entry())


def test_a_disk_that_is_full_when_a_file_is_put_aside_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path, part_bytes=1)

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    for broken in ("fsync", "rename"):
        with monkeypatch.context() as patched:
            patched.setattr(*((os, "fsync") if broken == "fsync" else (Path, "rename")), fails)
            match = r"the journal is full, and no new file could be begun: No space left on device: '.*run\.jsonl'$"
            with pytest.raises(OSError, match=match):
                journal.write(an_entry())
    assert len(read(path)) == 2  # both lines are whole
    journal.write(an_entry())
    assert (len(read(tmp_path / "run.jsonl.1")), path.read_text()) == (3, "")


def test_a_cut_of_what_is_no_journal_says_so_and_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for step in range(3):
        Journal(path).write(an_entry(before=Progress(examples=32 * step, steps=step)))
    damaged = path.read_text().replace('"step":1', '"stepp:1')
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2, is not a line of a journal, and not the last one"):
        Journal(path).cut(64)
    assert path.read_text() == damaged
    assert Journal(path).cut(0) == 0  # a run that begins anew needs none of it
    assert path.read_text() == ""
    assert Journal(None).cut(64) == 0


def full_journal(path: Path, num_steps: int, *, per_part: int = 3) -> Journal:
    """A journal whose files are full after a few lines each."""
    size = len(json.dumps({**an_entry(before=Progress(examples=0, steps=0)), "run": "0" * 12}, separators=(",", ":")))
    journal = Journal(path, part_bytes=(size + 1) * per_part - 5)
    for step in range(num_steps):
        journal.write(an_entry(num_examples=32, before=Progress(examples=32 * step, steps=step)))
    return journal


def steps_in(path: Path) -> list[int]:
    return [entry["step"] for entry in records(path)]


def test_a_full_file_is_put_aside_and_readers_take_all(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = full_journal(path, 8)
    assert [each.name for each in parts_of(path)] == ["run.jsonl.1", "run.jsonl.2", "run.jsonl"]
    assert [len(each.read_text().splitlines()) for each in parts_of(path)] == [3, 3, 2]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(each.read_text() for each in parts_of(path)))
    assert steps_in(path) == steps_in(whole) == list(range(8))
    for one, other in zip(read_curves(path), read_curves(whole), strict=True):
        assert one is other or np.array_equal(np.asarray(one), np.asarray(other), equal_nan=np.asarray(one).size > 0)
    assert len(read_run(path).batch) == len(read_run(whole).batch)
    assert Journal(path).last_run() == journal.run
    for step in range(8, 40):  # beyond nine the names no longer sort as text
        journal.write(an_entry(num_examples=32, before=Progress(examples=32 * step, steps=step)))
    assert steps_in(path) == list(range(40))


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 6, 7, 8, 9, 11])
def test_a_cut_reaches_into_older_files(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "run.jsonl"
    full_journal(path, 9)  # the newest file is empty
    reached = Journal(path).cut(32 * kept)
    assert reached == 32 * min(kept, 9)
    assert steps_in(path) == list(range(min(kept, 9)))
    assert path.is_file()
    aside = path.with_name("run.jsonl.cut")
    moved = [json.loads(text)["step"] for text in aside.read_text().splitlines()] if aside.exists() else []
    assert moved == list(range(kept, 9))
    journal = full_journal(path, 0)
    for step in range(min(kept, 9), 14):  # and goes on, with files of its own
        journal.write(an_entry(num_examples=32, before=Progress(examples=32 * step, steps=step)))
    assert steps_in(path) == list(range(14))


def test_a_cut_of_a_long_run_reads_the_newest_file_only(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    full_journal(path, 8)
    oldest = parts_of(path)[0]
    oldest.write_text("damaged\n" * 3)
    assert Journal(path).cut(32 * 7) == 32 * 7
    assert oldest.read_text() == "damaged\n" * 3


def test_a_kill_in_a_cut_leaves_the_journal_of_some_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    full_journal(path, 8)
    for name in ("unlink", "replace"):
        with monkeypatch.context() as killed:
            killed.setattr(Path, name, lambda self, *more: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                Journal(path).cut(32 * 2)
        left = steps_in(path)
        assert left == list(range(len(left)))
        assert len(left) >= 2
    assert Journal(path).cut(32 * 2) == 64
    assert steps_in(path) == [0, 1]
    assert parts_of(path) == [path]


def test_no_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Journal(None).write(an_entry())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Journal(tmp_path / "file" / "run.jsonl")
    with pytest.raises(OSError):
        Journal(tmp_path)


def test_equal_runs_write_equal_files(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "other"):
        journal = Journal(tmp_path / name)
        plan, state, progress = PLAN, ControlState(), Progress()
        for step in range(8):
            moments = GradientMoments.from_noise(400.0 + step, 1.0, part_size=8, num_examples=plan.global_batch_size)
            before, progress = progress, progress.after(plan.global_batch_size)
            decision = decide(
                NormTest(0.5),
                moments,
                control=Control(pace=math.inf),
                limits=Limits(32, 1024),
                grid=PlanGrid(dp_size=2, micro_sizes=(8,)),
                plan=plan,
                progress=progress,
                state=state,
            )
            entry = line(
                plan=plan,
                num_examples=plan.global_batch_size,
                before=before,
                loss=None,
                moments=moments,
                averages=decision.state.averages,
                decision=decision,
            )
            journal.write(entry)
            plan, state = decision.plan, decision.state
        texts.append(journal_text(tmp_path / name))
    assert texts[0] == texts[1]
    assert {each["reason"] for each in read(tmp_path / "one")} >= {"grow"}
    *_, last = read(tmp_path / "one")
    assert last["freedom"] > 8 * 3, "eight probes of four parts and more"


def test_an_evaluation_has_a_line_of_its_own_which_readers_of_steps_pass_over(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path)
    journal.write(an_entry(num_examples=32, before=Progress(examples=0, steps=0)))
    journal.record_evaluation({"loss": np.float32(0.5), "accuracy": math.nan}, after=Progress(examples=32, steps=1))
    journal.write(an_entry(num_examples=32, before=Progress(examples=32, steps=1)))
    assert read(path)[1] == {
        "format": LINE_FORMAT,
        "step": 1,
        "examples": 32,
        "evaluation": {"loss": 0.5, "accuracy": None},
        "run": journal.run,
    }
    assert read_run(path).num_steps == len(read_curves(path).examples) == 2


@pytest.mark.parametrize(
    ("metrics", "error", "said"),
    [
        ({}, ValueError, "at least one number by name"),
        ({"": 1.0}, ValueError, "must not be empty"),
        ({3: 1.0}, TypeError, "must be a string, got 3"),
        ({"loss": "low"}, TypeError, "the metric 'loss' must be one number, got 'low'"),
        ({"loss": [1.0, 2.0]}, TypeError, r"one number, got \[1.0, 2.0\]"),
        ({"loss": np.ones(2)}, TypeError, "one number, got array"),
    ],
)
def test_an_evaluation_is_numbers_by_name(tmp_path: Path, metrics: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Journal(tmp_path / "run.jsonl").record_evaluation(metrics, after=Progress())
    assert read(tmp_path / "run.jsonl") == []


@pytest.mark.parametrize("per_part", [2, 1000])
def test_a_cut_keeps_the_evaluation_of_the_weights_that_are_resumed(tmp_path: Path, per_part: int) -> None:
    path = tmp_path / "run.jsonl"
    journal = full_journal(path, 0, per_part=per_part)
    for step in range(4):
        journal.write(an_entry(num_examples=32, before=Progress(examples=32 * step, steps=step)))
        journal.record_evaluation({"loss": 1.0 / (1 + step)}, after=Progress(examples=32 * (step + 1), steps=step + 1))
    assert Journal(path).cut(64) == 64
    assert [("evaluation" in entry, entry["step"]) for entry in records(path)] == [
        (False, 0),
        (True, 1),
        (False, 1),
        (True, 2),
    ]
    assert Journal(path).cut(0) == 0
    assert list(records(path)) == []
