"""A width plan: pure data that says, for each parameter, how settings of a base model change for a wider one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from adabatch.arguments import check_fields, checked, checked_but, require_one_of, some
from adabatch.optim.mup.entry import Entry
from adabatch.optim.mup.laws import LAWS, AdamLaw, Law, Method, law_of
from adabatch.optim.mup.names import named_parameters
from adabatch.optim.mup.table import aligned

FORMAT = 1
SHOWN = 8
"""Largest number of names in a message."""

DecayScaling = Literal["constant", "1/width"]


@dataclass(frozen=True)
class Plan:
    """The width plan of a model; make one with ``plan``.

    Nothing in it refers to a model, so it can be saved with the checkpoint: a resumed or wider run must use the same
    base. ``print`` shows it as a table.

    Args:
        entries: parameter name, without the names of wrappers -> its entry, which the laws read.
    """

    entries: Mapping[str, Entry]

    def __post_init__(self) -> None:
        check_fields(self)

    @checked
    def at(self, model: nn.Module) -> Plan:
        """The plan of the same architecture at another width, such as that of the base, where every multiplier is 1.

        Raises:
            ValueError: if the model has another architecture.
        """
        named = named_parameters(model)
        check_names(self.entries, named, "the plan's model")
        resized = {}
        for name, entry in self.entries.items():
            if named[name].dim() != len(entry.shape):
                raise ValueError(
                    f"{name} has shape {tuple(named[name].shape)}, in the plan {entry.shape}: another architecture"
                )
            resized[name] = entry.resized(named[name].shape)
        return Plan(resized)

    def standard(self) -> Plan:
        """Every multiplier one, the standard parameterization of this width: the control of a coordinate check."""
        # a model that is its own base: every ratio is 1, and so is every multiplier
        return Plan({name: replace(entry, base_shape=entry.shape) for name, entry in self.entries.items()})

    @checked_but("only", "method")
    def groups(
        self,
        model: nn.Module,
        method: Method | Law,
        *,
        lr: float | Tensor,
        damping: float | None = None,
        weight_decay: float = 0.0,
        decay_scaling: DecayScaling = "constant",
        only: Collection[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer, with the settings tuned at the base width changed for this one.

        Each group has ``params``, ``lr``, ``weight_decay``, the options that its law sets (damping, and for Shampoo and
        Muon the settings of the law), and two plain numbers for the journal and for ``guard``: ``mup_base_lr``, and
        ``mup_lr``, the multiplier in its ``lr``. Parameters with equal settings share a group; frozen ones are left
        out.

        Args:
            model: of the plan's architecture and width, wrapped or not.
            method: "sgd", "adam", "adamw", "muon", "shampoo", "kfac", or a law with settings, such as
                ``mup.ShampooLaw(exponent=0.5)``.
            lr: learning rate tuned at the base width.
            damping: Adam's and Muon's ``eps``, Shampoo's ``epsilon``, K-FAC's ``damping``, tuned at the base width;
                None for the optimizer's default.
            weight_decay: tuned at the base width, for a decay by ``lr x weight_decay`` per step, as in torch.
            decay_scaling: "constant" keeps that product, the share that decays per step, the same at every width;
                "1/width" divides it by r_in, for language models trained longer the wider they are (Qiu et al. 2025).
            only: names or patterns of the parameters to include; by default all.

        Raises:
            ValueError: if a parameter is unknown to the plan, has another shape, or is not supported by the method, a
                pattern has no match, weight decay is given for "adam", whose coupled decay has no width law, or the
                method or ``decay_scaling`` is unknown.
        """
        law = law_of(method)
        if weight_decay and isinstance(law, AdamLaw) and not law.decoupled:
            raise ValueError(f"adam's coupled decay ({weight_decay}) has no width law: use adamw")
        require_one_of("decay_scaling", decay_scaling, DecayScaling)
        named = self.parameters_of(model)
        chosen = list(named) if only is None else matching(named, [only] if isinstance(only, str) else only)
        # after the patterns, which may name frozen parameters too: a fine-tuned part of the model has the same plan
        names = [name for name in chosen if named[name].requires_grad]
        left = [name for name in names if not law.takes(self.entries[name])]
        if left:
            raise ValueError(
                f"{law.name} cannot take {some(left, SHOWN)}: give it only=plan.taken_by({law.name!r}), and the rest, "
                f"only=plan.left_by({law.name!r}), to a first-order optimizer"
            )
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name in names:
            entry = self.entries[name]
            multiplier = law.lr(entry)
            spread = 1.0 if decay_scaling == "constant" else entry.r_in
            options = {
                # torch decays by lr * weight_decay, and the multiplier is in the lr
                "weight_decay": weight_decay / (multiplier * spread),
                **law.options(entry, damping),
                "mup_base_lr": float(lr),
                "mup_lr": multiplier,
            }
            # few groups rather than one per parameter: torch's multi-tensor updates run over one group at a time
            group = groups.setdefault(tuple(options.items()), {"params": [], "lr": lr * multiplier, **options})
            group["params"].append(named[name])
        return list(groups.values())

    def taken_by(self, method: Method | Law) -> list[str]:
        """Names of the parameters that a method can take."""
        law = law_of(method)
        return [name for name, entry in self.entries.items() if law.takes(entry)]

    def left_by(self, method: Method | Law) -> list[str]:
        """Names of the parameters that a method cannot take, for an additional first-order optimizer."""
        taken = set(self.taken_by(method))
        return [name for name in self.entries if name not in taken]

    def layer_weights(self) -> dict[str, float]:
        """Weights of the parameters' squared gradient norms that make widths comparable: their SGD multipliers.

        For ``Measure(layer_weights=)``. Squared gradient norms scale like 1/width in the input layer and like width in
        the readout, so the plain norm of a wide model is dominated by its readout; weighted by ``r_out / r_in``, every
        layer keeps its share at every width.
        """
        return {name: LAWS["sgd"].lr(entry) for name, entry in self.entries.items()}

    def to_json(self) -> str:
        """The plan as text, for the checkpoint."""
        parameters = {name: entry.to_dict() for name, entry in self.entries.items()}
        return json.dumps({"format": FORMAT, "parameters": parameters})

    @classmethod
    @checked
    def from_json(cls, text: str) -> Plan:
        """The inverse of ``to_json``.

        Raises:
            ValueError: if the text is not a plan, or has a newer format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("format"), int) or "parameters" not in data:
            raise ValueError("no width plan: a plan's JSON has the fields format and parameters")
        if data["format"] > FORMAT:
            raise ValueError(f"the plan has format {data['format']}, this version reads up to {FORMAT}: upgrade")
        return cls({name: Entry.from_dict(entry) for name, entry in data["parameters"].items()})

    def __str__(self) -> str:
        """A table: fan ratios, role, and the multipliers on init and on the learning rate of each method."""
        header = ("parameter", "shape", "base", "role", "r_in", "r_out", "init", *(f"lr {name}" for name in SHOWN_LAWS))
        return aligned([header, *(tuple(_row(name, entry)) for name, entry in self.entries.items())])

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a model by the plan's names.

        Raises:
            ValueError: if the model has another architecture or width.
        """
        named = named_parameters(model)
        check_names(self.entries, named, "the plan's model")
        for name, parameter in named.items():
            if tuple(parameter.shape) != self.entries[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, in the plan {self.entries[name].shape}: for a model "
                    f"of another width use plan.at(model)"
                )
        return named


SHOWN_LAWS: Mapping[str, Law] = {name: LAWS[name] for name in ("sgd", "adamw", "muon", "shampoo", "kfac")}


def _row(name: str, entry: Entry) -> Iterator[str]:
    yield name
    for shape in (entry.shape, entry.base_shape):
        yield "x".join(map(str, shape)) or "-"
    yield entry.role
    for ratio in (entry.r_in, entry.r_out, entry.init):
        yield f"{ratio:.4g}"
    for law in SHOWN_LAWS.values():
        yield f"{law.lr(entry):.4g}" if law.takes(entry) else "-"


def matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """The names that a pattern matches, in their order.

    Raises:
        ValueError: if the pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter is called {pattern!r}: there are {some(list(names), SHOWN)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_names(known: Collection[str], found: Collection[str], what: str) -> None:
    """Checks that a model has the same parameters as another one.

    Raises:
        ValueError: if it does not; names the differences.
    """
    more = [name for name in found if name not in known]
    less = [name for name in known if name not in found]
    if more or less:
        both = (("it has also", more), ("it lacks", less))
        differences = [f"{text} {some(names, SHOWN)}" for text, names in both if names]
        raise ValueError(f"the model is of another architecture than {what}: {'; '.join(differences)}")
