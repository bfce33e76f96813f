"""The pictures of single charts: what is drawn is what the page draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from support.reports import journal, two_runs

from adabatch.report.chart_pictures import DRAWN, write_pictures
from adabatch.report.page import REASON_KINDS, drawn, report_on
from adabatch.report.reason_colors import reason_colors
from adabatch.report.steps import read_steps


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by the names of their files, without those."""
    kept: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: kept.update({Path(path).stem: figure}))
    return kept


def test_each_chart_of_the_page_is_a_picture_of_the_same_numbers(figures: dict[str, Figure], tmp_path: Path) -> None:
    said = drawn(two_runs())
    written = write_pictures(said, tmp_path, over="tokens")
    assert [path.stem for path in written] == list(figures) == [*said["charts"], "layers"]
    assert set(DRAWN) == set(said["charts"]) - {"metric0"}
    for name, chart in said["charts"].items():
        (panel,) = figures[name].axes
        assert panel.get_title(loc="left").strip() == chart["title"]
        assert chart["note"] in [text.get_text() for text in panel.texts]
        assert panel.get_xlabel() == "tokens"
        assert panel.get_xlim()[1] == max(run["end"]["tokens"] for run in said["runs"])
        assert (panel.get_yscale() == "log") == bool(chart["log"])
    (panel,) = figures["metric0"].axes
    for line, run in zip(panel.lines, said["runs"], strict=True):
        (_, accuracy) = run["metrics"]
        np.testing.assert_array_equal(line.get_xdata(), accuracy["x"]["tokens"])
        np.testing.assert_array_equal(line.get_ydata(), accuracy["y"])
    taken = figures["batch"].axes[0].lines[-1]
    np.testing.assert_array_equal(taken.get_ydata()[:-1], said["runs"][1]["batch"])
    assert [text.get_text() for text in figures["batch"].legends[0].texts][:2] == ["first <run>", "second"]


def test_each_kind_of_reason_has_a_colour_of_its_own_the_light_one_of_the_page(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    colors = reason_colors()
    assert set(colors) == {*REASON_KINDS.values()}
    assert len({*colors.values()}) == len(colors)
    assert colors["failed"] == "#1d2330", "white in the dark theme"
    write_pictures(drawn([report_on(read_steps(journal(60), "one"))]), tmp_path)
    legend = figures["batch"].legends[0]
    pairs = zip(legend.texts, legend.get_patches(), strict=True)
    shown = {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in pairs}
    assert shown
    assert shown == {kind: colors[kind] for kind in shown}


def test_what_was_not_measured_is_said(figures: dict[str, Figure], tmp_path: Path) -> None:
    nothing = {"moments": None, "averages": None, "wanted": None, "low": None, "high": None, "lr": None, "loss": None}
    said = drawn([report_on(read_steps(journal(3, **nothing, reason="not probed"), "silent"))])
    write_pictures(said, tmp_path)
    assert "the noise was not measured" in [text.get_text() for text in figures["noise"].axes[0].texts]
    assert "not measured" in [text.get_text() for text in figures["loss"].axes[0].texts]


def test_an_axis_that_no_run_has_is_refused(tmp_path: Path) -> None:
    said = drawn([report_on(read_steps(journal(3), "short"))])
    with pytest.raises(ValueError, match="no run counts tokens, which needs --tokens_per_example=N"):
        write_pictures(said, tmp_path, over="tokens")
    assert list(tmp_path.iterdir()) == []
