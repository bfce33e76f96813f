"""Layers: named sets of parameters whose noise is measured separately, and sums over each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adabatch.runtime.probes.norms import gathered

PerLayer = Literal["module", "group"]
"""What counts as a layer: a module that owns parameters directly, or a parameter group of the optimizer."""

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What ``torch.compile`` and checkpoint wrappers add to the names of the modules inside."""


class Layers:
    """Named sets of parameters. A parameter in several of them belongs to the first.

    Args:
        members: the parameters of each layer, by its name in the journal.

    Raises:
        ValueError: if there are no layers.
    """

    def __init__(self, members: Mapping[str, Sequence[Tensor]]) -> None:
        if not members:
            raise ValueError("layers must name at least one set of parameters, got none")
        self.names = tuple(members)
        self._place: dict[Tensor, int] = {}
        for place, parameters in enumerate(members.values()):
            for parameter in parameters:
                self._place.setdefault(parameter, place)

    def place_of(self, parameter: Tensor) -> int:
        """The position in ``names`` of the parameter's layer.

        Raises:
            ValueError: if the parameter is in no layer.
        """
        try:
            return self._place[parameter]
        except KeyError:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} belongs to none of the layers "
                f"{', '.join(self.names[:3])}...: every measured parameter needs one"
            ) from None


def layers_of(model: nn.Module, optimizer: Optimizer, per_layer: PerLayer) -> Layers:
    """The layers of the parameters of a model that an optimizer trains.

    Args:
        model: the model as it is trained. Layers are named after modules without the prefixes of wrappers.
        optimizer: with "group", its parameter groups are the layers, named by their ``name`` or else their number.
        per_layer: "module" or "group".

    Raises:
        ValueError: if ``per_layer`` is unknown, or if two groups have the same name.
    """
    if per_layer not in get_args(PerLayer):
        raise ValueError(f"per_layer must be None or one of {', '.join(get_args(PerLayer))}, got {per_layer!r}")
    # The optimizer may hold parameters of other models, which the probe does not measure.
    own = {p for p in model.parameters() if p.requires_grad}
    groups = [[p for p in group["params"] if p in own] for group in optimizer.param_groups]
    if per_layer == "group":
        names = [str(group.get("name", number)) for number, group in enumerate(optimizer.param_groups)]
        if len(set(names)) < len(names):
            raise ValueError(f"per_layer='group' needs groups of different names, got {', '.join(names)}")
        return Layers({name: members for name, members in zip(names, groups, strict=True) if members})
    # A module that is frozen, or that another optimizer trains, is not a layer.
    trained = {p for members in groups for p in members}
    members: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        own_here = [p for p in module.parameters(recurse=False) if p in trained]
        trained.difference_update(own_here)  # a tied weight belongs to the first of its modules
        if own_here:
            members.setdefault(_inner_name(name) or type(module).__name__, []).extend(own_here)
    return Layers(members)


def layers_of_weight(weights: Mapping[Tensor, float]) -> tuple[Layers, dict[str, float]]:
    """One layer for each distinct weight, and the weights by the names of the layers.

    Args:
        weights: the factor on the squared norm of each parameter's gradient.
    """
    members: dict[str, list[Tensor]] = {}
    values: dict[str, float] = {}
    for parameter, weight in weights.items():
        name = f"weight {weight:g}"
        values[name] = weight
        members.setdefault(name, []).append(parameter)
    return Layers(members), values


def _inner_name(name: str) -> str:
    words = [word for word in name.split(".") if word not in WRAPPERS]
    return ".".join(words[1:] if words[:1] == ["module"] else words)  # what DDP puts first


class LayerSums:
    """Sums of powers of norms: one per layer, or one over all parameters.

    Args:
        parameters: the measured parameters.
        layers: the layers they belong to; None for one sum.
        device: the device of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], layers: Layers | None, *, device: torch.device) -> None:
        self.names = () if layers is None else layers.names
        self.size = max(1, len(self.names))
        self._places = None if layers is None else [layers.place_of(p) for p in parameters]
        self._device = device
        self._known: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def of(self, pieces: Sequence[tuple[int, Tensor]], power: int = 2) -> Tensor:
        """Sums in float64, shape (num_layers,).

        Args:
            pieces: pairs of a parameter's number and norms of blocks of its gradient, shape (num_blocks,).
            power: the power that the norms are raised to.
        """
        values = gathered([piece for _, piece in pieces], self._device).pow_(power)
        if self._places is None:
            return values.sum().view(1)
        return values.new_zeros(self.size).index_add_(0, self._index(pieces), values)

    def _index(self, pieces: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The layer of each norm."""
        # Cached, because copying host numbers to a device waits for the device; the pieces are the same in each step.
        key = tuple((number, len(piece)) for number, piece in pieces)
        if key not in self._known:
            assert self._places is not None
            places = [place for number, length in key for place in [self._places[number]] * length]
            self._known[key] = torch.tensor(places, dtype=torch.int64, device=self._device)
        return self._known[key]
