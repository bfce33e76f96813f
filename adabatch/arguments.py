"""Checks of the user's arguments, and their messages; every layer may use them.

**One rule**: a value of the wrong type is a ``TypeError``, and a value of the right type that is out of range is a
``ValueError``. Both read "NAME must be ..., got VALUE". What the right type is, the annotation of the argument says:
``checked`` reads those of a function, and ``check_fields`` those of a dataclass, so that no type is written twice.
Ranges, and what arguments must be together, are checked where they are used.

    annotation      what is accepted                                            what the function gets
    int             whole numbers of Python, numpy and torch (0-dimensional);   an ``int``
                    no float, not even 3.0, since 1e9 + 0.5 is 1e9 to a float32
    float           those, and numbers with a fraction                          an ``int`` or a ``float``
    bool            True and False of Python and numpy                          a ``bool``
    ArrayLike       numbers in an array, a tensor or lists of equal length      an array of float64
    Literal         one of the words
    all others      an instance of the class, or what has the methods of the protocol; something that can be called

True and False are not numbers.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np
from numpy.typing import ArrayLike

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 160
"""Characters of a value in an error; longer ones are cut."""

MOST = 2**64 - 1
"""The largest whole number that is accepted anywhere: the largest seed."""

MOST_STEPS = 10**8
"""The most steps between two of anything, and the most entries of a table: 800 MB of float64."""


def require(holds: bool, rule: str, value: object) -> None:
    """Raises an error that tells the rule and the value, unless the rule holds.

    Args:
        holds: the condition. Write it such that NaN breaks it: ``0 < x``, not ``not x <= 0``.
        rule: names the argument and what is allowed, such as "eta must be positive".
        value: what was given.

    Raises:
        ValueError: if ``holds`` is false.
    """
    if not holds:
        raise ValueError(f"{rule}, got {shown(value, str)}")


def require_one_of(name: str, value: object, choices: Any) -> None:
    """Raises an error that lists the choices, unless the value is one of them.

    Args:
        name: of the argument.
        value: what was given.
        choices: a ``Literal`` type, or the names themselves.

    Raises:
        ValueError: if ``value`` is not among the choices.
    """
    names: Iterable[Any] = get_args(choices) or choices
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {shown(value)}")


def require_type(holds: bool, rule: str, value: object) -> None:
    """Raises an error that tells the rule, the value and its type, unless the rule holds.

    Raises:
        TypeError: if ``holds`` is false.
    """
    if not holds:
        raise TypeError(f"{rule}, got {shown(value)} (of type {type(value).__name__})")


def whole(name: str, value: Any, *, at_least: int = 0, at_most: int = MOST, why: str = "") -> int:
    """The whole number as an ``int``.

    Args:
        name: of the argument.
        value: what was given.
        at_least, at_most: the bounds, which are allowed.
        why: the reason for the upper bound, or what is counted.

    Raises:
        TypeError: if it is not a whole number, as the head of this module says.
        ValueError: if it is out of bounds.
    """
    found = _whole(value)
    require_type(found is not _WRONG, f"{name} must be a whole number", value)
    require(at_least <= found <= at_most, f"{name} must be from {at_least} to {at_most}{why and f' ({why})'}", found)
    return int(found)


def number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = sys.float_info.max
) -> float:
    """The number as an ``int`` or a ``float``; never NaN, and infinite only with ``at_most=inf``.

    Args:
        name: of the argument.
        value: what was given.
        above: a bound that is not allowed.
        at_least, at_most: bounds that are.

    Raises:
        TypeError: if it is not a number, as the head of this module says.
        ValueError: if it is out of bounds.
    """
    found = _number(value)
    require_type(found is not _WRONG, f"{name} must be a number", value)
    bounds = {
        f"above {above:g}": above > -math.inf,
        f"at least {at_least:g}": at_least > -math.inf,
        f"at most {at_most:g}": at_most < sys.float_info.max,
        "finite": at_most == sys.float_info.max,
    }
    told = [bound for bound, holds in bounds.items() if holds]
    holds = above < found and at_least <= found <= at_most and (isinstance(found, float) or abs(found) <= MOST)
    require(holds, f"{name} must be {' and '.join(told) or 'a number'}", found)
    return float(found) if isinstance(found, float) else int(found)


def require_state(state: Any, *names: str, of: str, argument: str = "state") -> None:
    """Raises an error unless a saved state holds some entries; what is in them is not looked at.

    Args:
        state: what was given to ``load_state_dict``.
        names: of the entries.
        of: whose state it should be.
        argument: its name.

    Raises:
        TypeError: if it is not a mapping.
        ValueError: if entries are missing.
    """
    require_type(isinstance(state, Mapping), f"{argument} must be what state_dict() of {of} returned", state)
    missing = [name for name in names if name not in state]
    require(not missing, f"{argument} must be what state_dict() of {of} returned, with {', '.join(names)}", list(state))


def require_format(what: str, found: int, newest: int) -> None:
    """Raises an error if a state was saved by a later release.

    Args:
        what: was saved, such as "the schedule".
        found: the format in which it was saved.
        newest: the newest format that this release reads.

    Raises:
        ValueError: if the format is newer.
    """
    if found > newest:
        raise ValueError(f"{what} was saved in format {found}, this version reads up to {newest}: upgrade adabatch")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: object, form: Callable[[object], str] = repr, *, most: int = LONGEST) -> str:
    """A value as text for an error: one line, at most ``most`` characters, and whatever its own ``repr`` does."""
    try:
        text = " ".join(form(value).split(None)) if not isinstance(value, str) else form(value)
    except Exception:  # the repr of a user's object, or of a whole number of 5,000 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


# --- types, as annotations say them -----------------------------------------------------------------------------------


def checked_but(*left: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``checked``, except for some arguments, about whose types the function itself can say more."""
    return functools.partial(checked, left=left)


def checked(function: Callable[P, R], *, left: Sequence[str] = ()) -> Callable[P, R]:
    """Checks the types of the arguments of a function against its annotations, and makes numbers those of Python.

    A default is not checked. Errors of the function itself, such as of a range, are raised as they are.

    Args:
        function: with annotations.
        left: arguments that are left to the function.

    Raises:
        TypeError: from the function that is returned, if an argument has the wrong type.
        ValueError: from it, for a word that is not among those of a ``Literal``.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Kind] = {}

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kinds:  # at the first call, when all that the annotations name has been defined
            kinds.update(_kinds_of(function, signature.parameters))
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in kinds and name not in left:
                bound.arguments[name] = conform(name, value, kinds[name])
        return function(*bound.args, **bound.kwargs)

    return with_checks


def check_fields(instance: Any, prefix: str = "") -> None:
    """Checks the types of the fields of a dataclass as ``checked`` does; call it first in ``__post_init__``.

    Args:
        instance: the dataclass, which may be frozen.
        prefix: what errors put before the name of a field, such as "limits.".

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: for a word that is not among those of a ``Literal``.
    """
    for name, kind in _field_kinds(instance.__class__).items():
        value = getattr(instance, name)
        found = conform(prefix + name, value, kind)
        if found is not value:
            object.__setattr__(instance, name, found)


def conform(name: str, value: Any, kind: Kind) -> Any:
    """The value as the function wants it.

    Raises:
        TypeError: if it is of another kind.
        ValueError: for an unknown word.
    """
    # The mistake decides the type of the error: another word, or a number above all that is counted, is of the right
    # type.
    found = kind.take(value)
    if found is _WRONG:
        rule = f"{name} must be {kind.words}"
        require(not (kind.is_word and isinstance(value, str)), rule, shown(value))
        whole = _whole(value)
        require(whole is _WRONG or abs(whole) <= MOST, f"{rule}, up to {MOST}", whole)
        require_type(False, rule, value)
    return found


class Kind(NamedTuple):
    """What an annotation allows.

    Args:
        words: what is allowed, for errors.
        take: the value as a function wants it, or ``_WRONG``.
        is_word: whether it is one of some words, so that another word is a wrong value of the right type.
    """

    words: str
    take: Callable[[Any], Any]
    is_word: bool = False


_WRONG: Any = object()
"""Stands for a value of another type, as ``None`` may be a value."""

SUCH_AS: dict[str, str] = {
    "Duration": "a duration, such as adabatch.steps(1000)",
    "Optimizer": "a torch.optim.Optimizer",
    "Module": "a torch.nn.Module",
    "Tensor": "a tensor",
    "Limits": "Limits(min=..., max=...)",
    "Schedule": "a schedule, such as LinearRamp(...)",
    "Shape": "a shape from adabatch.lr, such as adabatch.lr.cosine()",
    "Criterion": "a criterion or a schedule, such as NormTest(eta=0.7)",
    "GradScaler": "a torch.amp.GradScaler",
    "str": "text",
    "Path": "a path",
    "PathLike": "a path",
}
"""How errors name a class; others are named by their names."""


def _kinds_of(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Kind]:
    hints = get_type_hints(function, include_extras=True)
    # *args and **kwargs: their annotation is that of each value, not of the tuple or dict
    spread = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: allowed_by(hints[name]) for name, each in parameters.items() if name in hints and each.kind not in spread
    }


# get_type_hints evaluates every annotation, too slow for dataclasses that are made at each step, such as Progress
@functools.cache
def _field_kinds(cls: Any) -> dict[str, Kind]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: allowed_by(hints[field.name]) for field in dataclasses.fields(cls)}


def allowed_by(hint: Any) -> Kind:
    """What an annotation allows; everything, if it is of a form that cannot be checked."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return allowed_by(inside[0])
    # before unions, because ArrayLike is one, of a dozen types
    if hint == ArrayLike or origin is np.ndarray:
        return Kind("numbers, as an array or a list of them", _array)
    if origin in (Union, types.UnionType):
        return _union([allowed_by(each) for each in sorted(_in_arrays(inside), key=_order)])
    if origin is Literal:
        words = ", ".join(map(str, inside))
        return Kind(f"one of {words}", lambda value: value if _is_one_of(value, inside) else _WRONG, is_word=True)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if hint is None or hint is types.NoneType:
        return Kind("None", lambda value: None if value is None else _WRONG)
    if origin is tuple:
        return _tuple(inside)
    if origin is collections.abc.Callable or hint is Callable:
        return Kind("something to call, such as a function", lambda value: value if callable(value) else _WRONG)
    if origin is type:
        return Kind("a class", lambda value: value if isinstance(value, type) else _WRONG)
    if origin is os.PathLike:
        return allowed_by(os.PathLike)
    if isinstance(origin, type):
        return _container(origin, inside) if issubclass(origin, collections.abc.Iterable) else _ANY
    if isinstance(hint, type) and not is_typeddict(hint):
        # isinstance() refuses protocols that are not runtime_checkable
        if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
            return _ANY
        words = SUCH_AS.get(hint.__name__, f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}")
        return Kind(words, lambda value: value if isinstance(value, hint) else _WRONG)
    return _ANY


def _order(hint: Any) -> int:
    """Numbers last: a tensor of one number is a number only where no tensor is allowed."""
    return {int: 1, float: 2}.get(hint, 0)


def _in_arrays(inside: Sequence[Any]) -> list[Any]:
    """The members of a union, with those of ``ArrayLike``, which is a union itself, put together again."""
    parts = set(get_args(ArrayLike))
    if not parts <= set(inside):
        return list(inside)
    return [ArrayLike, *(each for each in inside if each not in parts)]


def _union(kinds: Sequence[Kind]) -> Kind:
    def take(value: Any) -> Any:
        return next((found for kind in kinds if (found := kind.take(value)) is not _WRONG), _WRONG)

    if any(kind is _ANY for kind in kinds):
        return _ANY
    words = [kind.words for kind in kinds if kind.words != "None"] + ["None"] * any(k.words == "None" for k in kinds)
    return Kind(" or ".join(dict.fromkeys(words)), take, is_word=any(kind.is_word for kind in kinds))


def _tuple(inside: tuple[Any, ...]) -> Kind:
    each = [allowed_by(one) for one in inside if one is not Ellipsis]
    any_length = Ellipsis in inside

    def take(value: Any) -> Any:
        # lists too, because configs and JSON have no tuples
        if not isinstance(value, tuple | list) or not (any_length or len(value) == len(each)):
            return _WRONG
        kinds = each * len(value) if any_length else each
        found = tuple(kind.take(one) for kind, one in zip(kinds, value, strict=True))
        return _WRONG if any(one is _WRONG for one in found) else _unchanged(value, found)

    words = f"a sequence, each {each[0].words}" if any_length else f"({', '.join(kind.words for kind in each)})"
    return Kind(words, take)


def _container(origin: type, inside: tuple[Any, ...]) -> Kind:
    """A collection, whose members are looked at if that does not use it up."""
    members = [allowed_by(one) for one in inside]

    def take(value: Any) -> Any:
        if isinstance(value, str | bytes) or not _is_a(value, origin):
            return _WRONG
        if issubclass(origin, Mapping):
            pairs = list(value.items()) if members else []
            found = [tuple(kind.take(one) for kind, one in zip(members, pair, strict=True)) for pair in pairs]
            if any(one is _WRONG for pair in found for one in pair):
                return _WRONG
            kept = all(_unchanged(old, new) is old for old, new in zip(pairs, found, strict=True))
            return value if kept else dict(found)
        if isinstance(value, Mapping) and len(members) == 1:  # not its keys, as if they were all of it
            return _WRONG
        if len(members) != 1 or members[0] is _ANY:
            return value
        if hasattr(value, "dtype"):  # by its type, as it may be long
            holds = _NUMBERS.get(members[0])
            return value if holds is not None and holds(str(value.dtype)) else _WRONG
        if not isinstance(value, list | tuple | set | frozenset):
            return value
        taken = type(value)(members[0].take(one) for one in value)
        return _WRONG if any(one is _WRONG for one in taken) else _unchanged(value, taken)

    name = {"Mapping": "a mapping", "Iterable": "an iterable"}.get(origin.__name__, f"a {origin.__name__.lower()}")
    words = f" of {' to '.join(map(_plural, members))}" if members and _ANY not in members else ""
    return Kind(f"{name}{words}", take)


def _plural(kind: Kind) -> str:
    return f"{kind.words.removeprefix('a ')}s" if kind.words.endswith("number") else kind.words


def _is_a(value: Any, origin: type) -> bool:
    if issubclass(origin, Sequence):  # arrays and tensors too
        return isinstance(value, Sequence) or (hasattr(value, "__getitem__") and len(getattr(value, "shape", ())) == 1)
    return isinstance(value, origin) and getattr(value, "shape", True) != ()  # no iteration over a 0-d tensor


def _unchanged(value: Any, found: Any) -> Any:
    """The value itself if nothing in it had to be converted."""
    return value if all(a is b for a, b in zip(value, found, strict=True)) else found


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    # == alone would take True for 1
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _whole(value: Any) -> Any:
    if type(value) is int:
        return value
    # operator.index(True) is 1; by the name of the dtype, because this module does not import torch
    truth = isinstance(value, bool | np.bool_) or str(getattr(value, "dtype", "")) == "torch.bool"
    if truth or isinstance(value, type) or getattr(value, "shape", ()) != ():
        return _WRONG
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's errors have all these types
        return _WRONG


def _number(value: Any) -> Any:
    if type(value) is float:
        return value
    found = _whole(value)
    if found is not _WRONG:
        return found
    if isinstance(value, bool | np.bool_) or getattr(value, "shape", ()) != ():
        return _WRONG
    # a tensor of one number is no numbers.Real, and goes by its dtype
    dtype = getattr(value, "dtype", None)
    if isinstance(value, numbers.Real) or (dtype is not None and "float" in str(dtype)):
        return float(value)
    return _WRONG


def _in_range(found: Any) -> Any:
    """The number, unless it is a whole one above all that is counted; NaN is left to the ranges, which refuse it."""
    return _WRONG if isinstance(found, int) and abs(found) > MOST else found


def _array(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(each is None for each in value):
        value = [math.nan if each is None else each for each in value]  # the null of a journal: a number is missing
    try:
        found = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # lists of unequal lengths; a tensor with a gradient or on a device
        return _WRONG
    return found.astype(np.float64, copy=False) if found.dtype.kind in "iuf" else _WRONG


_ANY = Kind("anything", lambda value: value)

_SIMPLE: dict[Any, Kind] = {
    Any: _ANY,
    object: _ANY,
    bool: Kind("True or False", lambda value: bool(value) if isinstance(value, bool | np.bool_) else _WRONG),
    int: Kind("a whole number", lambda value: _in_range(_whole(value))),
    float: Kind("a number", lambda value: _in_range(_number(value))),
}

_NUMBERS: dict[Kind, Callable[[str], bool]] = {
    _SIMPLE[int]: lambda dtype: "int" in dtype,
    _SIMPLE[float]: lambda dtype: "int" in dtype or "float" in dtype,
}
"""Whether an array of this type holds such numbers."""


def level_of_the_user() -> int:
    """The ``stacklevel`` of a warning that names the line which called this package, for the function that warns."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    return level
