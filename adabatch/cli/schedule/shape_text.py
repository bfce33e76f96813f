"""Shapes on the command line: ``cosine``, ``wsd(cooldown=0.2)``, or a YAML file with a ``shape``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adabatch.lr.shapes import FACTORIES, Shape


class NamedShape(NamedTuple):
    """A shape, and its name in tables and pictures."""

    label: str
    shape: Shape


def known_shapes() -> str:
    """All shapes with their settings, for a help text: ``constant, linear(floor), ...``."""
    settings = {name: ", ".join(inspect.signature(make).parameters) for name, make in FACTORIES.items()}
    return ", ".join(f"{name}({taken})" if taken else name for name, taken in settings.items())


def parse_shape(text: str) -> NamedShape:
    """The shape that ``text`` names. Only literals are evaluated.

    Args:
        text: the name of a shape with its settings by keyword, as a shape prints itself (``linear()`` or ``linear``,
            ``wsd(cooldown=0.2, decay='1-sqrt')``); or the path of a YAML file, ending in .yaml or .yml, with a key
            ``shape`` as a job's config has it.

    Raises:
        ValueError: if the text or file contains no shape, or a name or setting is unknown or out of its range.
    """
    if text.endswith((".yaml", ".yml")):
        return NamedShape(Path(text).name, _from_file(Path(text)))
    try:
        # parsed, never evaluated: a shape may come from a config that somebody else wrote
        shape = _from_expression(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, TypeError):
        shape = None
    if shape is None:
        raise ValueError(
            f"{text!r} is not a shape: give a name, and settings by keyword, such as cosine or 'wsd(cooldown=0.2)'; "
            f"there are {known_shapes()}"
        )
    return NamedShape(repr(shape).removesuffix("()"), shape)


def class_path(shape: Shape) -> dict[str, Any]:
    """The shape in the form of a job's config."""
    # lists, since YAML has no tuples that a safe loader would read back
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in shape.settings.items()}
    return {"class_path": f"adabatch.lr.{shape.name}"} | ({"init_args": settings} if settings else {})


def config_text(head: Sequence[str], config: Mapping[str, Any]) -> str:
    """A config as YAML, below comments that say how it was made."""
    # tables of a schedule stay on a few long lines (default_flow_style=None), keys in the order that a reader expects
    text = yaml.safe_dump(dict(config), default_flow_style=None, sort_keys=False, width=110)
    return "".join(f"# {line}\n" for line in head) + text


def _from_expression(expression: ast.expr) -> Shape | None:
    match expression:
        case ast.Name(id=name):
            return Shape(name, {})
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            settings = {keyword.arg: _literal(keyword.value) for keyword in keywords if keyword.arg is not None}
            if len(settings) < len(keywords):  # a setting given twice, or **
                return None
            return Shape(name, settings)
    return None


def _literal(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except ValueError:
        raise ValueError(
            f"a setting of a shape is a number, a string in quotes or a list of numbers, got {ast.unparse(expression)}"
        ) from None


def _from_file(path: Path) -> Shape:
    if not path.is_file():
        raise ValueError(f"there is no file {path}, which should hold a shape")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    described = content.get("shape") if isinstance(content, dict) else None
    if isinstance(described, str):
        described = {"class_path": described}
    if not isinstance(described, dict) or not isinstance(described.get("class_path"), str):
        raise ValueError(f"{path} has no key shape with a class_path, as a job's config has it")
    settings = described.get("init_args") or {}
    module, _, name = described["class_path"].rpartition(".")
    if module not in ("", "adabatch.lr", "adabatch.lr.shapes") or not isinstance(settings, dict):
        raise ValueError(f"{path}: the shape must be one of adabatch.lr with its init_args, got {described!r:.100}")
    return Shape(name, settings)
