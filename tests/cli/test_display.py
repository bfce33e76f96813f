"""What a person sees while a job runs: rate and time left, one live line or plain ones, or silence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from adabatch.batch.plan import examples
from adabatch.cli.display import RATE_SECONDS, Display, Pace, PlainConsole, Shown

STATE = {"loss": 0.5, "global_batch_size": 16, "lr": 0.1, "noise_scale": 40.0}


def console(*, terminal: bool = False) -> tuple[PlainConsole, io.StringIO]:
    out = io.StringIO()
    return PlainConsole(file=out, width=200, force_terminal=terminal, force_jupyter=False), out


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace(total=1000)
    assert str(pace) == ""
    pace.add(0.0, 0, 0)
    pace.add(1.0, 10, 10)
    assert str(pace) == "10 examples/s  0:01:39 left"
    for second in range(2, 60):  # ten times as fast from now on
        pace.add(float(second), 10 + 10 * (second - 1), 10 + 100 * (second - 1))
    assert str(pace).startswith("100 examples/s")
    assert len(pace._seen) <= RATE_SECONDS + 2


def test_the_pace_of_a_resumed_run_leaves_out_what_was_there() -> None:
    pace = Pace(total=1000)
    pace.add(5.0, 500, 500)
    pace.add(5.0, 500, 500)  # no time has passed
    assert str(pace) == ""
    pace.add(7.0, 600, 600)
    assert str(pace) == "50 examples/s  0:00:08 left"


def lines_of(log_every: int | None, *, steps: int = 40, terminal: bool = False) -> list[str]:
    to, out = console(terminal=terminal)
    clock: Iterator[float] = iter(range(steps))
    drawn: list[float] = []
    draw = (lambda done, text: drawn.append(done)) if terminal else None
    shown = Shown(to, draw, "train", examples(16 * steps), log_every=log_every, clock=lambda: float(next(clock)))
    for step in range(1, steps + 1):
        shown.update(16 * step, examples=16 * step, **STATE)
    assert drawn == ([16 * step for step in range(1, steps + 1)] if terminal else [])
    return out.getvalue().splitlines()


def test_a_log_has_ten_lines_or_one_every_so_many_steps() -> None:
    assert len(lines_of(None)) == 10
    assert len(lines_of(8)) == 5
    assert lines_of(8)[-1] == (
        "train: 640 of 640 examples  loss 0.5  batch 16  lr 0.1  noise scale 40  16 examples/s  0:00:00 left"
    )


def test_a_terminal_has_a_live_line_and_lines_where_they_are_asked_for() -> None:
    assert lines_of(None, terminal=True) == []
    assert len(lines_of(8, terminal=True)) == 5


def test_quiet_and_the_other_ranks_show_no_progress() -> None:
    for display, says in ((Display(0, (made := console())[0], quiet=True), True), (Display(1, made[0]), False)):
        with display.progress("train", examples(32)) as shown:
            shown.update(32, examples=32, **STATE)
        display.say("a result")
        assert ("a result" in made[1].getvalue()) is says
        assert "train" not in made[1].getvalue()
        made[1].truncate(0)


def test_a_terminal_shows_the_rate_in_its_live_line() -> None:
    to, out = console(terminal=True)
    with Display(0, to).progress("train", examples(32)) as shown:
        for done in (16, 32):
            shown.update(done, examples=done, **STATE)
    assert "32/32 examples" in out.getvalue()
    assert "examples/s" in out.getvalue()


def test_a_notebook_has_a_bar_in_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    shown_in = pytest.importorskip("IPython.display", reason="needs IPython")
    texts: list[Any] = []

    class Handle:
        def update(self, data: Any, *, raw: bool) -> None:
            texts.append(data["text/plain"])

    monkeypatch.setattr(shown_in, "display", lambda data, **_: Handle())
    to = PlainConsole(file=io.StringIO(), force_terminal=False, force_jupyter=True)
    with Display(0, to).progress("train", examples(32)) as shown:
        shown.update(32, examples=32, **STATE)
    assert texts == ["train " + "█" * 20 + " 32/32 examples  loss 0.5  batch 16  lr 0.1  noise scale 40"]


def test_log_every_is_checked() -> None:
    with pytest.raises(ValueError, match=r"log_every must be at least 1 step, .* got 0"):
        Display(0, log_every=0)
