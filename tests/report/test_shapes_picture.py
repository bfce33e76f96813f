"""Pictures of schedules: the panels show what they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adabatch.report.shapes import MOST_POINTS, Line, Mark, Panel, compose_panels, draw_panels

X = np.linspace(0, 10, 11)


def test_lines_are_drawn_as_given_and_named_once() -> None:
    panels = [
        Panel("first", [Line("a", X, X), Line("b", X, 2 * X, "reference")]),
        Panel("second", [Line("a", X, 3 * X, "dots"), Line("c", X, 4 * X)], x_title="step"),
    ]
    figure = compose_panels(panels, title="both")
    top, bottom = figure.axes
    assert [line.get_ydata().tolist() for line in top.lines] == [X.tolist(), (2 * X).tolist()]
    assert [line.get_ydata().tolist() for line in bottom.lines] == [(3 * X).tolist(), (4 * X).tolist()]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert top.lines[0].get_color() == bottom.lines[0].get_color()
    assert len({line.get_color() for line in (*top.lines, bottom.lines[1])}) == 3
    assert [axes.get_title("left") for axes in figure.axes] == ["first", "second"]
    assert bottom.get_xlabel() == "step"
    assert top.get_xlim() == bottom.get_xlim()


def test_the_lines_of_a_panel_differ_in_more_than_colour() -> None:
    figure = compose_panels([Panel("", [Line(str(i), X, X + i) for i in range(5)])])
    assert len({str(line._dash_pattern) for line in figure.axes[0].lines}) == 5


def test_an_axis_of_its_own_is_left_alone() -> None:
    own = Panel("", [Line("b", 10 ** (X / 5), X)], [Mark("b", 10.0, 5.0, "here")], log="x", own_x=True)
    top, bottom = compose_panels([Panel("", [Line("a", X, X)]), own]).axes
    assert top.get_xlim() == (0, 10)
    assert bottom.get_xlim() == pytest.approx((1, 100))
    assert bottom.get_xscale() == "log"
    assert [text.get_text() for text in bottom.texts] == ["here"]


@pytest.mark.parametrize("log", ["", "y"])
def test_what_is_cut_off_does_not_set_the_axis(log: str) -> None:
    values = np.array([1e9, 8.0, 4.0, 2.0, 1.0])
    (axes,) = compose_panels([Panel("", [Line("a", np.arange(5), values)], log=log, top=9.0)]).axes
    assert 8 <= axes.get_ylim()[1] <= 9
    assert axes.get_ylim()[0] < 1


def test_long_lines_are_thinned_between_their_ends() -> None:
    long = np.arange(10 * MOST_POINTS)
    (axes,) = compose_panels([Panel("", [Line("a", long, long)])]).axes
    drawn = axes.lines[0].get_xdata()
    assert len(drawn) <= MOST_POINTS
    assert (drawn[0], drawn[-1]) == (0, long[-1])


def test_a_single_line_needs_no_legend_and_no_panels_are_refused() -> None:
    assert not compose_panels([Panel("", [Line("a", X, X)])]).legends
    with pytest.raises(ValueError, match="at least one panel"):
        compose_panels([])


def test_the_file_is_a_png(tmp_path: Path) -> None:
    path = draw_panels([Panel("", [Line("a", X, X)])], tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
