"""The picture of a forecast: hours and device-hours over devices, with their ranges and the knee."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from adabatch.forecast.costs import Forecast
from adabatch.report.style import COLORS, heading, prepare


def draw_costs(forecasts: Sequence[Forecast], knee: int, path: Path, *, title: str = "") -> Path:
    """Draws forecasts of one run for several numbers of devices into a PNG."""
    # a dict, because the cluster itself may have one of the usual numbers of devices
    ordered = sorted({each.devices: each for each in forecasts}.values(), key=lambda each: each.devices)
    devices = [each.devices for each in ordered]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, what, color in zip(
        panels, ("hours", "device_hours"), ("hours", "device-hours"), COLORS, strict=False
    ):
        ranges = [getattr(each, name) for each in ordered]
        prepare(panel)
        heading(panel, what, f"band: noise and time    dashed: knee at {knee:,}")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.fill_between(
            devices, [each.low for each in ranges], [each.high for each in ranges], color=color, alpha=0.2
        )
        panel.plot(devices, [each.point for each in ranges], "o-", color=color)
        panel.axvline(knee, color="#666666", linestyle="--", linewidth=1)
        panel.set_xlabel("devices")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return path
