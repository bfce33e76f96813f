"""Making a width plan from the shapes of a model and of its base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar, get_args

from torch import nn

from adabatch.arguments import checked_but, require_type, some
from adabatch.optim.mup.entry import Dim, Entry, Role, role_of
from adabatch.optim.mup.layouts import Use, parsed_layout, use_of
from adabatch.optim.mup.names import all_names, full_name, named_modules
from adabatch.optim.mup.plans import Plan, check_names, matching

T = TypeVar("T")


@checked_but("roles")
def plan(
    model: nn.Module,
    base: nn.Module,
    *,
    roles: Mapping[str, Role] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Plan:
    """The plan by which settings tuned on ``base`` are used for ``model``, the same architecture at another width.

    Only shapes and module types are read, so ``base`` may be built under ``torch.device("meta")``. A dimension is width
    if and only if it differs between the two: features, classes, vocabulary and kernels are not, whatever their size.
    For the base model itself, or a third width, use ``plan(...).at(model)``.

    Args:
        model: wrapped or not; only shapes are read, and nothing is written.
        base: the model on which settings were tuned.
        roles: name or pattern (``"blocks.*.router"``) -> role, if shapes give the wrong one: "input" and "output" say
            that the fan-in or the fan-out is not width although it differs, such as the number of classes.
        layouts: name or pattern -> what each dimension is, such as ``"in out"`` or ``"stack out in"``, for parameters
            of modules that torch does not define. A stack of matrices (scanned layers, experts) is not a fan.

    Returns:
        A plan for ``model``.

    Raises:
        ValueError: if the base has the same width or another architecture, weights are tied across roles, the layout of
            a parameter is unknown, torch's MultiheadAttention has heads that grow, or a pattern has no match.
    """
    ours, theirs = _used(model), _used(base)
    check_names(list(theirs), list(ours), "the base model")
    if all(theirs[name].shape == used.shape for name, used in ours.items()):
        raise ValueError(
            "the base model has the same width as the model, so nothing tells which dimensions are width: give a base "
            "of another width, and take plan(...).at(model) for a model as wide as the base"
        )
    _check_heads(model, base)
    named = roles is None or (isinstance(roles, Mapping) and all(isinstance(name, str) for name in roles))
    require_type(named, "roles must be a mapping of names, or None", roles)
    given_roles = _by_name(roles, ours)
    for role in given_roles.values():
        if role not in get_args(Role):
            raise ValueError(f"a role is one of {', '.join(get_args(Role))}; got {role!r}")
    given_layouts = {name: parsed_layout(text) for name, text in _by_name(layouts, ours).items()}
    entries = {
        name: _entry(name, used, theirs[name], role=given_roles.get(name), layout=given_layouts.get(name))
        for name, used in ours.items()
    }
    return Plan(entries)


class _Used(NamedTuple):
    """A parameter with all its names, and its use under each of them."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    uses: tuple[Use, ...]


def _used(model: nn.Module) -> dict[str, _Used]:
    owners = {
        full_name(prefix, key): (module, key) for prefix, module in named_modules(model) for key in module._parameters
    }
    return {
        names[0]: _Used(names, tuple(parameter.shape), tuple(use_of(*owners[name], parameter) for name in names))
        for names, parameter in all_names(model)
    }


def _by_name(overrides: Mapping[str, T] | None, names: Mapping[str, object]) -> dict[str, T]:
    """Overrides by name from overrides by pattern; if several match, the last one is used."""
    return {name: value for pattern, value in (overrides or {}).items() for name in matching(names, [pattern])}


def _entry(name: str, ours: _Used, base: _Used, *, role: Role | None, layout: tuple[Dim, ...] | None) -> Entry:
    if ours.names != base.names:
        raise ValueError(
            f"{some(ours.names)} share a weight, in the base model {some(base.names)}: another architecture"
        )
    if len(ours.shape) != len(base.shape):
        raise ValueError(f"{name} has shape {ours.shape}, in the base model {base.shape}: another architecture")
    # A tied weight has several uses, whose roles may differ: an embedding is an input, a readout an output.
    candidates = [_untied(name, use, ours.shape, base.shape, layout) for use in ours.uses]
    found = {(entry.role, entry.layout) for entry in candidates}
    if role is None and len(found) > 1:
        what = " and ".join(f"{use.kind} {entry.role}" for use, entry in zip(ours.uses, candidates, strict=True))
        raise ValueError(
            f"{some(ours.names)} share a weight as {what}, whose laws differ: untie them, or multiply the logits by "
            f"1/r_in (base width / width) in the model and give roles={{{name!r}: 'input'}}"
        )
    chosen = next((entry for entry in candidates if entry.role == role), candidates[0])
    return replace(chosen, role=role or chosen.role, tied=ours.names[1:]).resized(ours.shape)


def _untied(
    name: str, use: Use, shape: tuple[int, ...], base_shape: tuple[int, ...], layout: tuple[Dim, ...] | None
) -> Entry:
    """The entry of one use of a parameter."""
    dims = layout or use.layout
    if dims is None:
        dims = _guessed(name, shape, base_shape)
    if len(dims) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, its layout {' '.join(dims)!r} has {len(dims)}")
    for dim, size, before in zip(dims, shape, base_shape, strict=True):
        if dim in ("kernel", "stack") and size != before:
            raise ValueError(
                f"{name} has shape {shape}, in the base model {base_shape}, and differs in a {dim}: another "
                f"architecture; if that dimension is width, say so with layouts="
            )
    return Entry(shape, base_shape, dims, use.kind, role_of(dims, shape, base_shape))


def _guessed(name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """A layout for a parameter of an unknown module, if it makes no difference which one."""
    ratios = {size / before for size, before in zip(shape, base_shape, strict=True)}
    # If all dimensions grow alike, both fans have the same ratio, whichever is which.
    if ratios == {1.0} or (len(ratios) == 1 and len(shape) == 2):
        fan_in: Dim = "in"
        return ("out", *(fan_in for _ in shape[1:]))
    raise ValueError(
        f"{name} has shape {shape}, in the base model {base_shape}, and its module does not tell which dimension is "
        f"its fan-in: say it with layouts={{{name!r}: 'out in'}}, 'in out', 'stack out in' or the like"
    )


def _check_heads(model: nn.Module, base: nn.Module) -> None:
    """Checks that torch's attention, which divides by the square root of a head's width, has heads of the same
    width."""
    before = dict(named_modules(base))
    for name, module in named_modules(model):
        other = before.get(name)
        if isinstance(module, nn.MultiheadAttention) and isinstance(other, nn.MultiheadAttention):
            ours, theirs = module.head_dim, other.head_dim
            if ours != theirs:
                raise ValueError(
                    f"{name} has heads of width {ours}, in the base model {theirs}; its logits must then be divided "
                    f"by that width and not by its root, which MultiheadAttention cannot: add heads of one width, or "
                    f"use scaled_dot_product_attention(scale=mup.attention_scale({ours}, {theirs}))"
                )
