"""Which value a resumed run uses if a setting differs from that of the run that saved.

The table is in docs/checkpoints.md. Of an optimizer, the base learning rate under a ``ProgressLR`` and the weight decay
are taken over from the run that loads. All its other settings are kept as they were saved, as in
``Optimizer.load_state_dict``, because the user's own schedules may change them, or because they are state.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from adabatch.checkpointing.differences import Difference
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.optimizers.scheduler import ProgressLR
from adabatch.runtime.optimizers.step_hooks import put_setting

TAKEN_OVER = ("weight_decay",)


class KeptSetting(NamedTuple):
    """A setting of the run that loads that is not used, because the saved one is kept.

    Args:
        name: such as "optimizer.betas".
        saved: the value that is used.
        given: the value with which this run was built.
        way_out: how to change it nevertheless.
    """

    name: str
    saved: Any
    given: Any
    way_out: str

    def __str__(self) -> str:
        return (
            f"{self.name} stays {self.saved!r}, as it was saved, and the {self.given!r} of this run is not used: "
            f"{self.way_out}"
        )


class BuiltSettings:
    """The settings with which a run was built, read before its parts are loaded, and applied afterwards.

    Args:
        parts: of the run, by name.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        optimizer, schedule, order = (parts.get(name) for name in ("optimizer", "schedule", "order"))
        self._optimizer: Optimizer | None = optimizer if isinstance(optimizer, Optimizer) else None
        self._schedule = schedule
        self._order = order
        self._groups: list[dict[str, Any]] = []
        if self._optimizer is not None:
            self._groups = [group_settings(group, self._optimizer) for group in self._optimizer.param_groups]
        self._seed = _seed_of(order)

    def refuse(self, saved: Mapping[str, Any]) -> None:
        """Raises an error, before anything is changed, if a scheduler would override the learning rate.

        Args:
            saved: the state of all parts.

        Raises:
            ValueError: if the learning rate differs from the saved one, and the scheduler is not a ``ProgressLR``.
        """
        if self._schedule is None or isinstance(self._schedule, ProgressLR):
            return
        for name, before, now in self._differing(saved):
            if name.endswith("lr"):
                raise ValueError(
                    f"the checkpoint was saved with {name}={before!r}, this run was built with {now!r}, and "
                    f"{type(self._schedule).__name__} holds rates of its own that would overrule it: build the "
                    f"optimizer with {before!r} and change the scheduler after loading, use ProgressLR, or leave the "
                    f"schedule out of load"
                )

    def enforce(self, saved: Mapping[str, Any]) -> tuple[tuple[Difference, ...], tuple[KeptSetting, ...]]:
        """Applies the settings that are taken over to the loaded parts; returns those, and the settings that are
        kept."""
        taken: list[Difference] = []
        kept: list[KeptSetting] = []
        if isinstance(self._schedule, ProgressLR) and "schedule" in saved:
            state = saved["schedule"]
            # The rates with which each run was built: only they show whether the user has changed them.
            before, now = [float(lr) for lr in state.get("built_lrs", state["base_lrs"])], self._schedule.built_lrs
            if before != now:
                self._schedule.set_base_lrs(now)
                for index, (old, new) in enumerate(zip(before, now, strict=True)):
                    if old != new:
                        taken.append(Difference(_name("lr", index, len(now)), old, new))
        for name, before, now in self._differing(saved):
            setting = name.rpartition(".")[2]
            # taken over above, through the schedule that writes it
            if setting == "lr" and isinstance(self._schedule, ProgressLR):
                continue
            if setting in TAKEN_OVER:
                taken.append(Difference(name, before, now))
            else:
                kept.append(KeptSetting(name, before, now, "set it in optimizer.param_groups after loading"))
        if self._optimizer is not None:
            for group, built in zip(self._optimizer.param_groups, self._groups, strict=True):
                for setting in TAKEN_OVER:
                    if setting in built and _plain(group[setting]) != built[setting]:
                        put_setting(group, setting, built[setting])
        seed = _seed_of(self._order)
        if seed != self._seed:
            way_out = "an epoch would not hold each example once; another seed is another run"
            kept.append(KeptSetting("data.seed", seed, self._seed, way_out))
        return tuple(taken), tuple(kept)

    def put_back(self, groups: Sequence[Mapping[str, Any]], *, rates: bool) -> None:
        """Writes the saved settings that are kept into the optimizer, for engines whose loading does not do so.

        Args:
            groups: the saved settings of each parameter group.
            rates: whether the learning rates are among them.
        """
        assert self._optimizer is not None
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            for name, value in group_settings(saved, self._optimizer).items():
                if name not in TAKEN_OVER and (rates or name != "lr") and _plain(group[name]) != value:
                    put_setting(group, name, tuple(value) if isinstance(value, list) else value)

    def _differing(self, saved: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """Names of the optimizer's settings that differ from the saved ones, with both values."""
        if self._optimizer is None:
            return
        groups = saved["optimizer"]["param_groups"]
        for index, (group, built) in enumerate(zip(groups, self._groups, strict=True)):
            before = group_settings(group, self._optimizer)
            for name, now in built.items():
                if name in before and before[name] != now:
                    yield _name(name, index, len(groups)), before[name], now


def group_settings(group: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The constructor arguments of a group, in plain values, without what its optimizer stores there.

    The learning rate is the base one, if a scheduler has stored it in the group.
    """
    names = [name for name in inspect.signature(type(optimizer)).parameters if name in group and name != "params"]
    settings = {name: _plain(group[name]) for name in names}
    # a scheduler has stored the base rate there, and changed the other
    if "lr" in settings and "initial_lr" in group:
        settings["lr"] = _plain(group["initial_lr"])
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _name(setting: str, index: int, num_groups: int) -> str:
    return f"optimizer.{setting}" if num_groups == 1 else f"optimizer.param_groups[{index}].{setting}"


def _seed_of(order: Any) -> int | str | None:
    return order.state_dict()["seed"] if isinstance(order, GlobalOrder) else None
