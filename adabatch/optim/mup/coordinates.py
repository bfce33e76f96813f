"""The coordinate check: does every layer's update keep its size while the width grows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adabatch.arguments import MOST_STEPS, check_fields, checked, require
from adabatch.optim.mup.names import full_name, named_modules
from adabatch.optim.mup.plans import Plan
from adabatch.optim.mup.table import aligned
from adabatch.optim.mup.trial import (
    Batch,
    Loss,
    MakeModel,
    MakeOptimizers,
    Observe,
    Parameterization,
    Trial,
    check_widths,
    seeded,
)

TOLERANCE = 0.12
"""Largest slope that passes: finite width and few seeds leave smaller slopes; a wrong law gives 0.25 to 1 in some
layer."""


class Coordinate(NamedTuple):
    """One parameter over the widths.

    Args:
        name: of the parameter.
        own: root mean square of the change in its layer's outputs by the change of this parameter alone, with the
            layer's inputs held at their first values; one number per width.
        total: the same for the whole change of the layer's outputs.
    """

    name: str
    own: tuple[float, ...]
    total: tuple[float, ...]


@dataclass(frozen=True)
class CoordinateCheck:
    """What a coordinate check measured; ``print`` shows it as a table.

    Args:
        widths: that were compared.
        coordinates: one per parameter.
        tolerance: largest own slope that passes.
    """

    widths: tuple[int, ...]
    coordinates: tuple[Coordinate, ...]
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        check_fields(self)

    def own_slope(self, coordinate: Coordinate) -> float:
        """Slope of log own update over log width: 0 if the law is right."""
        return slope(self.widths, coordinate.own)

    def total_slope(self, coordinate: Coordinate) -> float:
        """The same for the total, which also includes what earlier layers have learnt."""
        return slope(self.widths, coordinate.total)

    def steepest(self, count: int) -> list[Coordinate]:
        """The parameters whose own update changes most with width, at most ``count``, the steepest first.

        Parameters whose update is zero or not finite at some width have no slope and are left out.
        """
        sloped = [each for each in self.coordinates if math.isfinite(self.own_slope(each))]
        return sorted(sloped, key=lambda each: -abs(self.own_slope(each)))[:count]

    @property
    def failures(self) -> list[Coordinate]:
        """Parameters whose own update grows or shrinks with width, does not exist, or is not finite."""
        # written so that NaN fails
        return [each for each in self.coordinates if not abs(self.own_slope(each)) <= self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether every own update keeps its size."""
        return not self.failures

    def require(self) -> None:
        """Does nothing if the check passed; for your own tests.

        Raises:
            ValueError: if it failed; names the parameters that failed, and their slopes.
        """
        if self.failures:
            named = ", ".join(f"{each.name} {self.own_slope(each):+.2f}" for each in self.failures)
            raise ValueError(f"own updates change with width by more than width^{self.tolerance:g}: {named}")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: for each parameter its own update at each width, both slopes, and whether it passed."""
        rows = [
            [
                each.name,
                *(f"{value:.3g}" for value in each.own),
                f"{self.own_slope(each):+.2f}",
                f"{self.total_slope(each):+.2f}",
                "FAILED" if each in self.failures else "passed",
            ]
            for each in self.coordinates
        ]
        return ["parameter", *map(str, self.widths), "slope", "slope of total", "result"], rows

    def __str__(self) -> str:
        header, rows = self.table()
        return aligned([header, *rows])


@checked
def coordinate_check(
    make: MakeModel,
    optimizer: MakeOptimizers,
    data: Callable[[int], Batch],
    *,
    loss: Loss,
    widths: Sequence[int],
    base: int | Plan,
    steps: int = 1,
    seeds: Sequence[int] = (0, 1),
    parameterization: Parameterization = "mup",
    tolerance: float = TOLERANCE,
    observe: Observe | None = None,
    device: torch.device | str = "cpu",
) -> CoordinateCheck:
    """Trains models of several widths for a few steps and measures how far each parameter moves its layer's outputs.

    With the right law a parameter's *own* update, ``(W_new - W_old) h_old``, has the same size per coordinate at every
    width. Models are initialized by ``make`` and then by ``init_``. A check that cannot fail shows nothing: also run
    ``parameterization="standard"``, which must fail. Turn dropout off.

    Args:
        make: width -> model, from torch's generator, which is seeded.
        optimizer: a model and its plan -> an optimizer, or several.
        data: seed -> inputs and targets, the same for every width. Inputs of zero mean are best.
        loss: of outputs and targets.
        widths: to compare, 64 to 1,024 or more, because the laws hold for large widths only.
        base: width at which the optimizer's settings were tuned; or a plan of any width, if roles must be given.
        steps: on the same batch.
        seeds: of model and data; the root mean squares are averaged over them.
        parameterization: "mup", or "standard" for the control.
        tolerance: largest own slope that passes.
        observe: called for each optimizer with outputs and targets between forward and backward.
        device: where to train.

    Raises:
        ValueError: if there are fewer than two widths, no seed or no step; also as for ``plan``.
    """
    check_widths(widths, seeds)
    require(1 <= steps <= MOST_STEPS, f"steps must be 1 or more, up to {MOST_STEPS}", steps)
    require(0 < tolerance < math.inf, "tolerance must be positive and finite", tolerance)
    trial = Trial(make, optimizer, loss, base, parameterization, observe, device)
    measured = [[_measure(trial, width, seed, data(seed), steps) for seed in seeds] for width in widths]
    # of all widths alike, since the plan has compared the architectures
    names = list(measured[0][0])
    coordinates = [
        Coordinate(
            name,
            tuple(sum(one[name].own for one in each) / len(seeds) for each in measured),
            tuple(sum(one[name].total for one in each) / len(seeds) for each in measured),
        )
        for name in names
    ]
    return CoordinateCheck(tuple(widths), tuple(coordinates), tolerance)


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log width; NaN if a value is zero or not finite."""
    if not all(0 < value < math.inf for value in values):
        return math.nan
    x, y = ([math.log2(value) for value in sequence] for sequence in (widths, values))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread


class _Call(NamedTuple):
    """One call of a layer."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


class _OutputChange(NamedTuple):
    own: float
    total: float


@torch.no_grad()
def _measure(trial: Trial, width: int, seed: int, batch: Batch, steps: int) -> dict[str, _OutputChange]:
    """How much every parameter of one model changes the outputs of its layer."""
    model, optimizers = trial.start(width, seed)
    # a container has no outputs that its own parameters make
    layers = {name: module for name, module in named_modules(model) if module._parameters}
    inputs = batch[0].to(trial.device)
    # copies, since optimizers write in place
    old = {
        name: {key: p.clone() for key, p in module._parameters.items() if p is not None}
        for name, module in layers.items()
    }
    before = _calls(model, layers, inputs)
    # seeded: whatever is random in a step, such as dropout, must not differ between widths
    with seeded(seed), torch.enable_grad():
        for _ in range(steps):
            trial.step(model, optimizers, batch)
    after = _calls(model, layers, inputs)
    found = {}
    for name, module in layers.items():
        total = _rms([new.output - first.output for new, first in zip(after[name], before[name], strict=True)])
        for key in old[name]:
            parameter = module._parameters[key]
            if parameter is not None and parameter.requires_grad:
                found[full_name(name, key)] = _OutputChange(_own(module, key, old[name], before[name]), total)
    return found


def _own(module: nn.Module, key: str, old: dict[str, Tensor], calls: Sequence[_Call]) -> float:
    """How much the change of one parameter alone changes the layer's outputs on its old inputs."""
    new = module._parameters[key]
    assert new is not None
    # The old outputs are computed again, not taken from `calls`, so that both sides differ in the parameter only.
    outputs = [
        _first(functional_call(module, values, call.arguments, call.keywords))
        for call in calls
        for values in ({**old, key: new}, old)
    ]
    # Outputs with the new value and with the old one alternate.
    return _rms([changed - first for changed, first in zip(outputs[::2], outputs[1::2], strict=True)])


def _calls(model: nn.Module, layers: dict[str, nn.Module], inputs: Tensor) -> dict[str, list[_Call]]:
    """The inputs and outputs of every layer in a forward pass."""
    calls: dict[str, list[_Call]] = {name: [] for name in layers}
    with _hooks(layers, lambda name, call: calls[name].append(call)):
        model(inputs)
    return calls


@contextmanager
def _hooks(layers: dict[str, nn.Module], record: Callable[[str, _Call], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def after(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            # Copies, because an activation may work in place.
            record(name, _Call(_copies(arguments), dict(keywords), _first(output).clone()))

        return after

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)


def _first(output: Any) -> Tensor:
    """A layer's output; the first if it has several, as attention does."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _rms(changes: Sequence[Tensor]) -> float:
    if not changes:
        return math.nan
    return torch.cat([change.flatten().double() for change in changes]).square().mean().sqrt().item()
