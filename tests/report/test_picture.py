"""The picture of a run: what a journal says is what the panels show, whatever pieces the journal lacks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.ranks import run_ranks

from adabatch.report import draw
from adabatch.report.curves import Curves, moving_mean, read_curves
from adabatch.report.picture import compose, short_number


def line(step: int, examples: int, batch: int, **other) -> dict:
    """A line of the journal with all its pieces; ``other`` replaces some."""
    noise, signal = 50.0 + step, 2.0 / (1 + step)
    scale = {"noise": noise, "signal": signal, "noise_scale": noise / signal}
    return {
        "format": 1,
        "step": step,
        "examples": examples,
        "plan": {
            "micro_batch_size": 8,
            "accumulation_steps": batch // 16,
            "dp_size": 2,
            "global_batch_size": batch,
        },
        "loss": 2.0 / (1 + step),
        "moments": {
            **scale,
            "part_sq": 1.0,
            "part_size": 8.0,
            "grad_sq": 1.0,
            "num_examples": float(batch),
            "num_parts": batch // 8,
        },
        "averages": {**scale, "noise_scale": 2 * scale["noise_scale"]},
        "wanted": 40.0,
        "low": 30.0,
        "high": None,
        "next": batch,
        "reason": "hold",
        "lr": {"base": [0.1, 0.2], "shape": [1.0, 1.0], "factor": 1.0, "applied": [0.1, 0.2]},
        **other,
    }


def run_of(batches, **other) -> list[dict]:
    starts = np.concatenate([[0], np.cumsum(batches)[:-1]]).tolist()
    return [line(i, start, batch, **other) for i, (start, batch) in enumerate(zip(starts, batches, strict=True))]


GROWING = run_of([16, 16, 16, 32, 32, 64, 128, 128])


def panels(journal) -> list[Axes]:
    return compose({"": read_curves(journal)}).axes


def test_curves_are_what_the_lines_say():
    curves = read_curves(GROWING)
    assert curves.examples.tolist() == [0, 16, 32, 48, 80, 112, 176, 304]
    assert curves.batch.tolist() == [16, 16, 16, 32, 32, 64, 128, 128]
    assert curves.lr.tolist() == [[0.1, 0.2]] * 8
    assert curves.loss.tolist() == [entry["loss"] for entry in GROWING]
    assert curves.noise_scale.tolist() == [entry["moments"]["noise_scale"] for entry in GROWING]
    np.testing.assert_array_equal(curves.noise_scale_average, 2 * curves.noise_scale)


def test_a_path_its_lines_and_their_objects_are_the_same_journal(tmp_path):
    lines = [json.dumps(entry) for entry in GROWING]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(lines) + "\n")
    for journal in (path, str(path), lines, iter(lines), GROWING):
        for ours, expected in zip(read_curves(journal), read_curves(GROWING), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_a_journal_cut_at_any_byte_of_its_last_line_is_read(tmp_path):
    lines = [json.dumps(line(0, 0, 16, reason="größer")), json.dumps(line(1, 16, 16, reason="größer"))]
    lines = [text.encode().decode("unicode_escape").encode() for text in lines]  # two-byte letters, to be cut
    path = tmp_path / "journal.jsonl"
    for length in range(len(lines[1])):
        path.write_bytes(lines[0] + b"\n" + lines[1][:length])
        assert read_curves(path).examples.tolist() == [0]
    path.write_bytes(b"\n".join(lines))
    assert read_curves(path).examples.tolist() == [0, 16]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"j\.jsonl holds no complete step"),
        ('{"format": 1, "step"', r"j\.jsonl holds no complete step"),
        ('{"format": 1}\n{}\n', r"j\.jsonl holds no complete step"),
        ('{"step": 0\n{"step": 1}\n', r"j\.jsonl, line 1, is not JSON and not the last line"),
        ('{"step": 0}\n[1, 2]\n', r"j\.jsonl, line 2, is not a JSON object"),
        ('{"format": 2, "step": 0}\n', r"line 1, has format 2, this version of adabatch reads format 1"),
    ],
)
def test_what_is_no_journal_is_refused(tmp_path, text, message):
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        draw(path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_missing_numbers_are_nan_and_a_lost_signal_is_infinite():
    plan = GROWING[0]["plan"]
    curves = read_curves(
        [
            {"examples": 0, "plan": plan},
            line(1, 16, 16, loss=None, moments=None, averages=None, lr=None),
            line(2, 32, 16, loss=math.nan, averages={"noise": 3.0, "signal": -1.0, "noise_scale": None}),
            line(3, 48, 16, lr={"applied": [0.3]}),
            {"event": "no step"},
        ]
    )
    assert curves.examples.tolist() == [0, 16, 32, 48]
    assert np.isnan(curves.loss).tolist() == [True, True, True, False]
    assert np.isnan(curves.noise_scale).tolist() == [True, True, False, False]
    assert np.isinf(curves.noise_scale_average).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(curves.lr, [[math.nan] * 2, [math.nan] * 2, [0.1, 0.2], [0.3, math.nan]])


numbers = st.floats(-1e3, 1e3) | st.just(math.nan)


@given(
    st.lists(st.tuples(st.integers(1, 50), numbers), min_size=1, max_size=20),
    st.floats(0, 300),
)
def test_the_moving_mean_is_the_weighted_mean_over_its_window(steps, window):
    """Against the sum written out; cumulative sums of up to 20 values below 5e4 cancel to within 1e-9."""
    batch = np.array([size for size, _ in steps], dtype=float)
    values = np.array([value for _, value in steps])
    starts = np.cumsum(batch) - batch
    nothing = np.full(len(steps), math.nan)
    none = np.empty((len(steps), 0))
    curves = Curves(starts, batch, nothing[:, None], nothing, nothing, values, (), none, none)
    means = moving_mean(curves, values, window=window)
    for start, mean in zip(starts, means, strict=True):
        near = (abs(starts - start) <= window / 2) & np.isfinite(values)
        if near.any():
            assert mean == pytest.approx(np.average(values[near], weights=batch[near]), rel=1e-9, abs=1e-9)
        else:
            assert math.isnan(mean)


def test_the_panels_show_the_curves():
    curves = read_curves(GROWING)
    batch, rate, noise, loss = panels(GROWING)
    steps = batch.lines[0]
    assert steps.get_drawstyle() == "steps-post"
    assert steps.get_xdata().tolist() == [*curves.examples.tolist(), 432]  # the last step holds to its end
    assert steps.get_ydata().tolist() == [*curves.batch.tolist(), 128]
    assert [drawn.get_ydata()[0] for drawn in rate.lines] == [0.1, 0.2]
    dots, average = noise.lines
    np.testing.assert_array_equal(dots.get_ydata(), curves.noise_scale)
    np.testing.assert_array_equal(average.get_ydata(), curves.noise_scale_average)
    raw, mean = loss.lines
    np.testing.assert_array_equal(raw.get_ydata(), curves.loss)
    # A window of 2 % of 432 examples holds one step.
    np.testing.assert_allclose(mean.get_ydata(), curves.loss, rtol=1e-12)


def test_the_axes_share_examples_and_have_their_scales():
    axes = panels(GROWING)
    assert [axis.get_xlim() for axis in axes] == [(0, 432)] * 4
    assert [axis.get_yscale() for axis in axes] == ["log", "linear", "log", "linear"]
    assert axes[0].yaxis.get_transform().base == 2
    assert axes[-1].get_xlabel() == "examples"
    assert [axis.get_title(loc="left") for axis in axes] == [
        "global batch size (examples)",
        "learning rate (applied)",
        "noise scale (examples)",
        "training loss",
    ]
    falling = [line(i, 16 * i, 16, loss=10.0 ** (-i / 10)) for i in range(40)]
    assert panels(falling)[3].get_yscale() == "log"


def tick_labels(axes: Axes) -> list[str]:
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high]


def test_batch_sizes_are_labelled_as_plain_numbers():
    assert tick_labels(panels(run_of([512, 1024, 2048, 4096]))[0]) == ["512", "1,024", "2,048", "4,096"]
    assert tick_labels(panels(run_of([64] * 3))[0]) == ["64"]


@pytest.mark.parametrize(
    "value, like, expected",
    [
        (0, None, "0"),
        (0.02, None, "0.02"),
        (3e-4, None, "3e-4"),
        (2.5e-5, None, "2.5e-5"),
        (512, None, "512"),
        (1024, None, "1,024"),
        (60_000, None, "60 k"),
        (1_500_000, None, "1.5 M"),
        (2e9, None, "2 G"),
        (5_000, 60_000, "5 k"),
        (500_000, 6_000_000, "0.5 M"),
        (0, 6_000_000, "0"),
    ],
)
def test_tick_labels_are_short(value, like, expected):
    assert short_number(value, like=like) == expected


def test_what_was_not_measured_is_said():
    bare = [{key: entry[key] for key in ("examples", "plan")} for entry in GROWING]
    said = [[text.get_text() for text in axis.texts] for axis in panels(bare)]
    assert said == [[], ["no learning rate in the journal"], ["not measured"], ["no loss in the journal"]]


def test_estimates_that_are_not_positive_leave_gaps():
    lost = {"noise": 5.0, "signal": -0.1, "noise_scale": None}
    journal = [*GROWING, *run_of([16] * 8, moments=lost, averages=lost)]
    noise = panels([dict(entry, examples=16 * i) for i, entry in enumerate(journal)])[2]
    assert "gaps" in noise.get_title(loc="right")
    assert np.isnan(noise.lines[1].get_ydata()).tolist() == [False] * 8 + [True] * 8
    noise = panels(run_of([16] * 8, moments=lost, averages=lost))[2]
    assert [text.get_text() for text in noise.texts] == ["no positive estimate"]


def test_steps_between_probes_leave_no_gaps():
    journal = [entry if i % 2 else dict(entry, averages=None) for i, entry in enumerate(GROWING)]
    average = panels(journal)[2].lines[1]
    assert average.get_xdata().tolist() == [entry["examples"] for entry in GROWING[1::2]]


def test_outliers_do_not_set_the_axis():
    journal = run_of([16] * 200)
    journal[100] = dict(journal[100], moments={"noise_scale": 1e30})
    assert panels(journal)[2].get_ylim()[1] < 1e7


def overlaid() -> Figure:
    runs = {"adaptive": GROWING, "constant 16": run_of([16] * 27), "constant 128": run_of([128] * 4)}
    return compose({label: read_curves(lines) for label, lines in runs.items()}, title="Three runs")


def test_runs_are_overlaid_in_their_own_colours_the_first_on_top():
    figure = overlaid()
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["adaptive", "constant 16", "constant 128"]
    colors = [handle.get_color() for handle in legend.legend_handles]
    assert len(set(colors)) == 3
    drawn = figure.axes[0].lines
    assert [steps.get_color() for steps in drawn] == colors
    assert drawn[0].get_zorder() > drawn[1].get_zorder() > drawn[2].get_zorder()
    assert figure.axes[0].get_xlim() == (0, 512)


def test_nothing_lies_on_anything_else():
    figure = overlaid()
    figure.canvas.draw()
    boxes = [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
    boxes += [axes.get_tightbbox() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)  # noqa: PT018
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1)  # noqa: PT018
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_draw_writes_a_png(tmp_path):
    out = draw(GROWING, tmp_path / "run.png")
    assert out == tmp_path / "run.png"
    data = out.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[i : i + 4]) for i in (16, 20)] == [1200, 1500]
    assert draw({"a": GROWING, "b": GROWING}, out, title="twice").read_bytes() != data
    with pytest.raises(ValueError, match="at least one run"):
        draw({}, out)


def pyplot_imported(rank: int, folder: Path) -> bool:
    draw(GROWING, folder / "run.png")
    return "matplotlib.pyplot" in sys.modules


@pytest.mark.distributed
def test_pyplot_stays_out(tmp_path):
    assert run_ranks(pyplot_imported, 1, tmp_path, tmp_path, connect=False) == [False]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"adabatch\.report draws with matplotlib: .*adabatch\[report\]"):
        draw([], "x.png")
