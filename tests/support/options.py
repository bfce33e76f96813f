"""Options by single words, for tests that combine them: sorted into the groups that ``AdaptiveBatch`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adabatch.adaptive.options import EngineOptions, Guard, Measure

MEASURE = {"monitor": "monitor", "record_l1": "l1", "per_layer": "layers", "layer_weights": "layer_weights"}
GUARD = {name: name for name in ("skip_nonfinite", "trial", "check_every")}
ENGINE = {name: name for name in ("gradient_sync", "scaler")}


def grouped(options: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The arguments of ``AdaptiveBatch``; what is in no group stays as it is."""
    rest = {**(options or {}), **more}
    for group, kind, names in (
        ("measure", Measure, MEASURE),
        ("guard", Guard, GUARD),
        ("engine", EngineOptions, ENGINE),
    ):
        found = {names[name]: rest.pop(name) for name in list(rest) if name in names}
        if found:
            rest[group] = kind(**found)
    return rest
