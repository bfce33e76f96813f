"""The description of a run on a DeepSpeed engine beside each checkpoint, and what a run that loads makes of it.

DeepSpeed restores weights and states, and settings of the optimizer at some stages only. The rules are therefore those
of ``adabatch.checkpointing.settings`` at every stage, and what must not differ is refused before DeepSpeed reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]
from torch import Tensor

from adabatch.checkpointing.differences import (
    Difference,
    Parameter,
    describe,
    differences,
    refuse,
    refuse_groups,
    refuse_model,
    refuse_order,
)
from adabatch.checkpointing.files import CheckpointError
from adabatch.checkpointing.plain import plain
from adabatch.checkpointing.settings import BuiltSettings, KeptSetting, group_settings
from adabatch.integrations.deepspeed import HELD, trained_parameters
from adabatch.runtime.optimizers.scheduler import ProgressLR
from adabatch.runtime.optimizers.step_hooks import put_setting

DESCRIPTION = "adabatch.json"
"""The file of a checkpoint that describes its run."""


class EngineSettings:
    """The settings with which a run on an engine was built, read before the run begins.

    Args:
        engine: of ``deepspeed.initialize``, with its optimizer and perhaps its scheduler.
        parts: what is saved with it, by name: "batches", and "order" and "schedule" if there are any.
    """

    def __init__(self, engine: DeepSpeedEngine, parts: Mapping[str, Any]) -> None:
        self._engine = engine
        self._parts = parts
        self._optimizer = engine.basic_optimizer
        self._scheduler = parts.get("schedule", engine.lr_scheduler)
        built = {"optimizer": self._optimizer, "schedule": self._scheduler, "order": parts.get("order")}
        self._built = BuiltSettings({name: part for name, part in built.items() if part is not None})
        self._other_scheduler = self._scheduler is not None and not isinstance(self._scheduler, ProgressLR)
        # DeepSpeed's own schedulers record no base rate, and the groups hold the present one.
        self._rates = [group_settings(group, self._optimizer).get("lr") for group in self._optimizer.param_groups]

    # --- saving -----------------------------------------------------------------------------------------------------

    def write(self, place: Path) -> None:
        """Writes the description beside a checkpoint.

        Raises:
            OSError: if it cannot be written.
            NotPlain: if a setting could not be read back.
        """
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"contents": self._describe(), "groups": self._groups()}, indent=1)
        (place / DESCRIPTION).write_text(text, encoding="utf-8")

    def _describe(self) -> dict[str, Any]:
        engine = self._engine
        parameters = trained_parameters(engine)
        names = {id(p): name for name, p in engine.module.named_parameters()}
        tensors = [*engine.module.named_parameters(), *engine.module.named_buffers()]
        described = describe(
            {"model": engine.module, "optimizer": self._optimizer, **self._parts},
            world_size=engine.dp_world_size,
            sharded=engine.zero_optimization_stage() == 3,
            parameters=[Parameter(names.get(id(p)), _shape(p)) for p in parameters],
            config=None,
        )
        scheduler = {"kind": type(engine.lr_scheduler).__name__, "params": str(engine.scheduler_params())}
        described |= {
            "zero_stage": engine.zero_optimization_stage(),
            "sizes": _sizes(engine),
            "tensors": {name: list(_shape(tensor)) for name, tensor in tensors},
            "scheduler": None if engine.lr_scheduler is None else scheduler,
            "reference_batch_size": self._parts["batches"].state_dict()["reference_batch_size"],
        }
        numbers: dict[str, Any] = plain(described, "description")
        return numbers

    def _groups(self) -> list[dict[str, Any]]:
        """The settings of each parameter group as they are now; the rate is that from which a scheduler starts."""
        groups = []
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            settings = {
                name: value for name, value in group_settings(group, self._optimizer).items() if _is_number(value)
            }
            if self._other_scheduler:
                settings |= {"lr": rate, "present_lr": float(group["lr"])}
            groups.append(settings)
        return groups

    # --- loading ----------------------------------------------------------------------------------------------------

    def refuse(self, place: Path) -> dict[str, Any] | None:
        """Reads the description of a checkpoint, and raises an error if this run cannot continue from it.

        Returns:
            What ``enforce`` needs; None for a checkpoint of an earlier release, which has no description.

        Raises:
            ValueError: if this run cannot continue from it; names what must not differ.
            CheckpointError: if the description is damaged.
            OSError: if it cannot be read.
        """
        path = place / DESCRIPTION
        if not path.exists():
            return None
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        before, now = saved["contents"], self._describe()
        refuse_model(place, self._engine.module, before["tensors"], now["tensors"])
        # A ZeRO stage that shards the weights shows as another stage, in DeepSpeed's own words.
        refuse(before | {"sharded": False}, now | {"sharded": False})
        self._refuse_layout(before, now)
        refuse_groups(self._optimizer, before["sizes"], now["sizes"])
        refuse_order(before, [Parameter(name, tuple(shape)) for name, shape in now["parameters"]])
        if before["scheduler"] != now["scheduler"]:
            raise ValueError(
                f"the checkpoint was saved with the scheduler {_said(before['scheduler'])} in the engine's config, "
                f"this run has {_said(now['scheduler'])}: a scheduler loads its own rates, which would override it; "
                f"resume with the saved one, or use ProgressLR"
            )
        self._built.refuse({"optimizer": {"param_groups": saved["groups"]}})
        self._parts["batches"].check_reference(before["reference_batch_size"])
        return saved

    def _refuse_layout(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Shards of another number of ranks, or of another stage, can be read from a universal checkpoint only."""
        if self._engine.load_universal_checkpoint():
            return
        names = ["zero_stage"] + ["world_size"] * (now["zero_stage"] > 0)
        for name in names:
            if before[name] != now[name]:
                raise ValueError(
                    f"the checkpoint was saved with {name}={before[name]}, this run has {now[name]}: resume with the "
                    f"saved one, or convert it to one of DeepSpeed's universal checkpoints, and set "
                    f"load_universal in the config"
                )

    def enforce(
        self, saved: Mapping[str, Any], states: Mapping[str, Any]
    ) -> tuple[tuple[Difference, ...], tuple[KeptSetting, ...]]:
        """Applies the rules to what was loaded; returns what was taken over, and what was kept.

        Args:
            saved: what ``refuse`` returned.
            states: of the parts, as they were loaded.
        """
        groups = saved["groups"]
        self._built.put_back(groups, rates=not isinstance(self._scheduler, ProgressLR))
        if self._other_scheduler:
            for group, before in zip(self._optimizer.param_groups, groups, strict=True):
                put_setting(group, "lr", before["present_lr"])
        taken, kept = self._built.enforce({**states, "optimizer": {"param_groups": groups}})
        ignored = ("tensors", "sizes", "scheduler", "reference_batch_size")
        before, now = (
            {name: value for name, value in contents.items() if name not in ignored}
            for contents in (saved["contents"], self._describe())
        )
        return (*taken, *differences(before, now)), kept


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a whole tensor, of which ZeRO 3 leaves a shard."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _sizes(engine: DeepSpeedEngine) -> list[int]:
    """The number of the model's parameters in each group of the optimizer."""
    for name in HELD:
        groups = getattr(engine.optimizer, name, None)
        if groups:
            return [len(group) for group in groups]
    return [len(group["params"]) for group in engine.basic_optimizer.param_groups]


def _is_number(value: Any) -> bool:
    """Whether a setting is a number, a text, or a list of them, which JSON gives back."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or isinstance(value, bool | int | float | str)


def _said(scheduler: Mapping[str, Any] | None) -> str:
    return "none" if scheduler is None else f"{scheduler['kind']} {scheduler['params']}"
