"""The panel of the noise by layer: there where a journal has it, with the layers named that hold most of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from support.loops import loss_of, network, regression

from adabatch import AdaptiveBatch, Constant, GlobalOrder, steps
from adabatch.adaptive.options import Measure
from adabatch.report import draw
from adabatch.report.curves import read_curves
from adabatch.report.layers import LAYER_WINDOW, OTHERS, layer_scales, noise_shares
from adabatch.report.picture import compose

LAYERS = {"embed": (30.0, 2.0), "head": (60.0, 1.0), "norm": (10.0, 4.0)}


def line(step: int, layers: dict[str, tuple[float | None, float | None]] | None, *, batch: int = 16) -> dict[str, Any]:
    """A line of the journal, with noise and signal of each layer."""
    found = None if layers is None else {name: dict(noise=n, signal=s) for name, (n, s) in layers.items()}
    return {
        "format": 1,
        "examples": batch * step,
        "plan": {"global_batch_size": batch},
        "loss": 1.0,
        **({} if found is None else {"layers": found}),
    }


def run_of(num_steps: int = 40, layers: dict[str, tuple[float, float]] = LAYERS) -> list[dict[str, Any]]:
    return [line(i, dict(layers)) for i in range(num_steps)]


def picture(**journals: list[dict[str, Any]]) -> Figure:
    runs = {label: read_curves(journal) for label, journal in journals.items()}
    return compose(runs if len(runs) > 1 else {"": next(iter(runs.values()))})


def names(figure: Figure, panel: int = 3) -> list[str]:
    legend = figure.axes[panel].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_steps_without_layers_and_numbers_that_are_missing_are_nan() -> None:
    curves = read_curves([line(0, None), line(1, {"a": (3.0, None)}), line(2, {"b": (5.0, 7.0), "a": (4.0, 2.0)})])
    assert curves.layers == ("a", "b")
    np.testing.assert_array_equal(curves.layer_noise, [[math.nan] * 2, [3.0, math.nan], [4.0, 5.0]])
    np.testing.assert_array_equal(curves.layer_signal, [[math.nan] * 2, [math.nan] * 2, [2.0, 7.0]])
    damaged = dict(line(0, None), layers={"a": 3.0, "b": {"noise": "much"}})
    assert np.isnan(read_curves([damaged]).layer_noise).all()


def test_a_journal_without_layers_has_no_panel_of_them() -> None:
    figure = picture(run=[line(i, None) for i in range(3)])
    assert len(figure.axes) == 4
    assert figure.get_size_inches().tolist() == [8, 10]


def test_noise_and_signal_are_averaged_apart_and_divided_last() -> None:
    """Against the sums written out, on steps of unequal size, some of them not probed."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(8, 64, 60)
    starts = np.cumsum(sizes) - sizes
    noise, signal = generator.gamma(2.0, 10.0, 60), generator.normal(0.3, 1.0, 60)
    journal = [
        {**line(0, {"a": (n, s)} if i % 3 else None), "examples": int(start), "plan": {"global_batch_size": int(size)}}
        for i, (n, s, start, size) in enumerate(zip(noise, signal, starts, sizes, strict=True))
    ]
    found = layer_scales(read_curves(journal))[:, 0]
    probed = np.arange(60) % 3 > 0
    assert np.isnan(found).tolist() == (~probed).tolist()
    for i in np.flatnonzero(probed):
        near = probed & (abs(starts - starts[i]) <= LAYER_WINDOW * sizes.sum() / 2)
        mean_noise, mean_signal = (np.average(values[near], weights=sizes[near]) for values in (noise, signal))
        expected = mean_noise / mean_signal if mean_signal > 0 else math.inf
        assert found[i] == pytest.approx(expected, rel=1e-9)
    assert np.isinf(found).any()
    assert np.isfinite(found).sum() > 20


def test_shares_are_those_of_the_noise_of_the_whole_run() -> None:
    curves = read_curves([line(0, {"a": (30.0, 1.0), "b": (5.0, 1.0), "c": (-4.0, 1.0)}), line(1, {"a": (60.0, 1.0)})])
    assert noise_shares(curves).tolist() == [0.9, 0.1, 0.0]
    assert noise_shares(read_curves([line(0, {"a": (-1.0, 1.0)})])).tolist() == [0.0]


def test_the_panel_names_each_of_a_few_layers_the_noisiest_first() -> None:
    figure = picture(run=run_of())
    panel = figure.axes[3]
    assert panel.get_title(loc="left") == "noise scale by layer (examples)"
    assert names(figure) == ["60 %  head", "30 %  embed", "10 %  norm"]
    assert [drawn.get_ydata()[0] for drawn in panel.lines] == pytest.approx([60.0, 15.0, 2.5])
    assert panel.get_yscale() == "log"
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 640)] * 5


def many(count: int) -> dict[str, tuple[float, float]]:
    return {f"transformer.layers.{i}.attention.output_projection": (1.0 + i % 7, 0.1 + i / 50) for i in range(count)}


def test_of_many_layers_the_noisiest_are_named_and_the_others_grey() -> None:
    figure = picture(run=run_of(layers=many(100)))
    *named, others = names(figure)
    noisiest = [name for i, name in enumerate(many(100)) if i % 7 == 6][:5]
    assert named == [f"2 %  \N{HORIZONTAL ELLIPSIS}{name[-31:]}" for name in noisiest]
    assert others == "91 %  95 others"
    grey = [drawn for drawn in figure.axes[3].lines if drawn.get_color() == OTHERS]
    assert len(grey) == 95
    assert len(figure.axes[3].lines) == 100
    assert max(drawn.get_zorder() for drawn in grey) < 3


@pytest.mark.parametrize("count", [1, 6, 100])
def test_nothing_lies_on_anything_else(count: int) -> None:
    figure = picture(a_run_with_a_long_name_indeed=run_of(layers=many(count)), another=run_of(30))
    figure.canvas.draw()
    panel = figure.axes[3]
    legend = panel.get_legend()
    assert legend is not None
    boxes = [figure.legends[0].get_window_extent(), legend.get_window_extent(), panel.get_window_extent()]
    boxes += [
        text.get_window_extent() for text in (panel.title, panel._left_title, panel._right_title) if text.get_text()
    ]  # type: ignore[attr-defined]
    for index, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[:index])
    whole = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(whole):
        assert not any(box.overlaps(other) for other in whole[:index])


def test_of_several_runs_the_first_with_layers_is_shown_and_named() -> None:
    figure = picture(first=[line(i, None) for i in range(9)], second=run_of(9), third=run_of(9, {"other": (1.0, 1.0)}))
    assert figure.axes[3].get_title(loc="left") == "noise scale by layer, second"
    assert names(figure)[0] == "60 %  head"
    assert names(picture(run=run_of(9, {"_private": (1.0, 1.0)}))) == ["100 %  _private"]


def test_signals_that_are_never_positive_are_said() -> None:
    panel = picture(run=run_of(layers={"a": (3.0, -1.0)})).axes[3]
    assert [text.get_text() for text in panel.texts] == ["no positive estimate"]


@pytest.mark.parametrize("per_layer", ["module", "group"])
def test_what_a_run_writes_is_drawn(per_layer: Any, tmp_path: Path) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "name": "body"}, {"params": model[2].parameters(), "name": "head"}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    journal = tmp_path / "journal.jsonl"
    batches = AdaptiveBatch(
        model,
        optimizer,
        Constant(16),
        micro_batch_size=4,
        measure=Measure(monitor=True, layers=per_layer),
        journal=journal,
    )
    for step in batches.steps(GlobalOrder(regression(64)), until=steps(8)):
        for batch in step:
            step.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    curves = read_curves(journal)
    assert curves.layers == (("0", "2") if per_layer == "module" else ("body", "head"))
    assert np.isfinite(curves.layer_noise).all()
    data = draw(journal, tmp_path / "run.png").read_bytes()
    assert int.from_bytes(data[20:24]) > 1500  # taller than without layers
