"""The description of a run in its checkpoint, what differs in the run that loads it, and what must not differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.checkpointing.plain import plain
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.optimizers.joined import JoinedOptimizers, kind_of


class Difference(NamedTuple):
    """Something that differs from the run that saved.

    Args:
        name: such as "world_size" or "config.limits.max".
        saved: the value in the run that saved; None if there was none.
        now: the value in the run that loads; None if there is none.
    """

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.saved!r} when the checkpoint was saved, and is {self.now!r} now"


class Parameter(NamedTuple):
    """A parameter of an optimizer.

    Args:
        name: in the model; None if the model does not contain it.
        shape: of the whole parameter, not of a shard.
    """

    name: str | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name or 'one outside the model'} of shape {self.shape}"


def describe(
    parts: Mapping[str, Any],
    *,
    world_size: int,
    sharded: bool,
    parameters: Sequence[Parameter],
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The description of a run for the manifest of a checkpoint: ready for JSON.

    Args:
        parts: what is saved, by name.
        world_size: ranks that see different data.
        sharded: whether model and optimizer are.
        parameters: of the optimizer, in its order.
        config: whatever the run calls its settings.
    """
    batches, order = parts.get("batches"), parts.get("order")
    said: dict[str, Any] = {
        "parts": {name: _kind(part) for name, part in parts.items()},
        "sharded": sharded,
        "world_size": world_size,
        "torch": str(torch.__version__),
        "parameters": [list(parameter) for parameter in parameters],
    }
    if isinstance(batches, AdaptiveBatch):
        said |= {"batch": {**asdict(batches.plan), "global_batch_size": batches.plan.global_batch_size}}
        said |= {"steps": batches.consumed.steps, "examples": batches.consumed.examples}
    if isinstance(local := parts.get("local_sgd"), LocalSGD):
        said["local_sgd"] = local.settings
    if isinstance(order, GlobalOrder):
        place = order.state_dict()
        said["data"] = {name: place[name] for name in ("length", "order", "seed")}
    numbers: dict[str, Any] = plain(said, "manifest")
    return numbers | ({} if config is None else {"config": _flat(config)})


def _kind(part: Any) -> str:
    return kind_of(part) if isinstance(part, JoinedOptimizers) else type(part).__name__


def refuse(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises an error if resuming would be wrong and no part would notice.

    Args:
        saved, now: descriptions of the run that saved and of the one that loads.

    Raises:
        ValueError: if a part was not saved, an optimizer or an order is of another kind, or one model is sharded and
            the other is not.
    """
    for name, kind in now["parts"].items():
        if name not in saved["parts"]:
            raise ValueError(
                f"the checkpoint holds no {name} (it has {', '.join(saved['parts'])}): leave it out of load, to begin "
                f"with it as it is"
            )
        # Other parts refuse a state that is not theirs; these would load the state of another class silently.
        if name in ("optimizer", "order") and kind != saved["parts"][name]:
            raise ValueError(
                f"the checkpoint was saved with the {name} {saved['parts'][name]}, this run has {kind}, which cannot "
                f"use its state: use the same one, or leave the {name} out of load"
            )
    if saved["sharded"] != now["sharded"]:
        was, goes = ("sharded", "whole") if saved["sharded"] else ("whole", "sharded")
        raise ValueError(
            f"the checkpoint holds a {was} model, and this one is {goes}: apply fully_shard where the saving run did, "
            f"on one rank too, and nowhere else"
        )


def refuse_order(saved: Mapping[str, Any], parameters: Sequence[Parameter]) -> None:
    """Raises an error if the parameters of the optimizer are in another order than in the run that saved.

    Args:
        saved: description of the run that saved; older ones do not name the parameters, and are not checked.
        parameters: of the optimizer that loads, in its order.

    Raises:
        ValueError: if a parameter differs; names the first.
    """
    before = [Parameter(name, tuple(shape)) for name, shape in saved.get("parameters", ())]
    if len(before) != len(parameters):
        return  # also where one of them has no optimizer; groups of other sizes are refused by their number
    for index, (was, now) in enumerate(zip(before, parameters, strict=True)):
        # a parameter outside the model has no name to compare, only a shape
        named = was.name is not None and now.name is not None
        if was.shape != now.shape or (named and was.name != now.name):
            raise ValueError(
                f"the optimizer's parameter {index} was {was} when the checkpoint was saved, and is {now} now, and its "
                f"state is stored by position: give the optimizer the parameters in the order in which the saving run "
                f"did"
            )


def refuse_model(place: Path, model: nn.Module, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError if the saved tensors, by name with their shapes, are not those of the model."""
    wrong = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if wrong:
        shown = (f"{name}: {saved.get(name, 'nothing')} saved, {now.get(name, 'nothing')} here" for name in wrong[:3])
        raise ValueError(
            f"the checkpoint {place} is of another model than this {type(model).__name__}; {len(wrong)} tensor(s) "
            f"differ ({'; '.join(shown)}): build the model as the saving run did"
        )


def refuse_groups(optimizer: Optimizer, saved: Sequence[int], now: Sequence[int]) -> None:
    """Raises a ValueError if the numbers of parameters in the groups of the optimizer are not the saved ones."""
    if saved != now:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {saved} parameters, this {type(optimizer).__name__} of {now}: "
            f"build it as the saving run did"
        )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The other differences, which are allowed."""
    before, after = _flat(saved), _flat(now)
    ignored = ("steps", "examples", "run", "parameters", "data.seed")  # the seed is one of the settings
    names = [name for name in {**before, **after} if name not in ignored and before.get(name) != after.get(name)]
    return tuple(Difference(name, before.get(name), after.get(name)) for name in names)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names; values that JSON cannot represent become text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = str(list(value))
        else:
            value = value.item() if isinstance(value, np.generic) else value
            simple = value is None or isinstance(value, bool | int | str)
            finite = isinstance(value, float) and math.isfinite(value)
            flat[f"{prefix}{key}"] = value if simple or finite else str(value)
    return flat
