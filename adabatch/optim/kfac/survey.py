"""Which layers of a model K-FAC takes, and which parameters it leaves to a first-order method."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adabatch.optim.kfac.layers import EmbeddingLayer, Layer, layer_of
from adabatch.optim.mup.names import all_names, named_modules


class FoundLayer(NamedTuple):
    """A layer that K-FAC takes.

    Args:
        name: its name in the model, without the names of wrappers.
        module: the layer.
        kind: what it does with its weight.
    """

    name: str
    module: nn.Module
    kind: Layer

    @property
    def dims(self) -> tuple[int, int]:
        """d_in, d_out."""
        weight = self.module.get_parameter("weight")
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        return (rows, columns) if self.diagonal_input else (columns, rows)

    @property
    def diagonal_input(self) -> bool:
        """Whether the input factor is diagonal."""
        return isinstance(self.kind, EmbeddingLayer)


class Survey(NamedTuple):
    """What was found in a model.

    Args:
        layers: the layers that K-FAC takes.
        refused: the names of the other parameters, and why K-FAC does not take them.
        names: the names of all parameters, by ``id``.
    """

    layers: list[FoundLayer]
    refused: dict[str, str]
    names: dict[int, str]


def survey(model: nn.Module, exclude: Sequence[str]) -> Survey:
    """Finds the layers of a model.

    Args:
        model: the model, wrapped or not.
        exclude: ``fnmatch`` patterns of the names of layers to exclude.
    """
    uses = {id(parameter): names for names, parameter in all_names(model)}
    found = Survey([], {}, {key: names[0] for key, names in uses.items()})
    seen: set[nn.Module] = set()
    for name, module in named_modules(model):
        own = dict(module.named_parameters(recurse=False))
        if not own or module in seen:
            continue
        seen.add(module)
        kind = _kind(name, module, own, uses, exclude)
        if isinstance(kind, str):
            found.refused.update({uses[id(parameter)][0]: kind for parameter in own.values()})
        else:
            found.layers.append(FoundLayer(name, module, kind))
    return found


def _kind(
    name: str, module: nn.Module, own: Mapping[str, Tensor], uses: Mapping[int, Sequence[str]], exclude: Sequence[str]
) -> Layer | str:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded"
    for parameter in own.values():
        # Its gradient is a sum over several layers, and the factors of one do not describe it.
        if len(uses[id(parameter)]) > 1:
            return f"{' and '.join(uses[id(parameter)])} are one tied parameter"
    return layer_of(module)


def split_groups(
    groups: Sequence[Mapping[str, Any]], found: Survey, *, others: str | None, others_lr: float
) -> list[dict[str, Any]]:
    """The user's groups, with the parameters that K-FAC does not take moved to separate groups.

    Raises:
        ValueError: if a parameter does not belong to the model, or if K-FAC does not take one and ``others`` is None.
    """
    taken = {id(p) for layer in found.layers for p in layer.module.parameters(recurse=False)}
    result: list[dict[str, Any]] = []
    for group in groups:
        for p in group["params"]:
            if id(p) not in found.names:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} in the groups is not one of the model's: pass the model "
                    f"whose parameters these are, wrapped (DDP, fully_shard) before the optimizer is made"
                )
        apart = [p for p in group["params"] if id(p) not in taken]
        if apart and others is None:
            reasons = "; ".join(f"{found.names[id(p)]}: {found.refused[found.names[id(p)]]}" for p in apart)
            raise ValueError(
                f"K-FAC cannot take these parameters ({reasons}): train them by a first-order method in groups of "
                f"their own with others='adamw' or others='sgd', or leave them out of params"
            )
        mine = [p for p in group["params"] if id(p) in taken]
        if mine:
            result.append({**group, "params": mine, "method": "kfac"})
        if apart:
            # Their learning rate is others_lr, to which the multipliers of a width plan do not apply.
            rest = {name: value for name, value in group.items() if name not in ("mup_lr", "mup_base_lr")}
            result.append({**rest, "params": apart, "method": others, "lr": others_lr})
    return result
