"""Reads the YAML of configs, of which a few lines with aliases may stand for more than any memory holds."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "adabatch"
"""The parser mode, in jsonargparse's sense, in which configs and values of flags are read."""

MAX_NODES = 100_000
"""Values that a config may hold once its aliases are written out. The largest of ours, a table of 200, holds 300."""


class TooManyNodes(ValueError):
    """A text whose aliases stand for more values than ``MAX_NODES``, or for themselves."""


def load(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        TooManyNodes: see there. The parser writes aliases out, so it would not come to an end.
        yaml.YAMLError: the text is not YAML.
    """
    if "*" in text and "&" in text:
        count = _count(yaml.compose(text, Loader=yaml.SafeLoader), {})
        if count > MAX_NODES:
            raise TooManyNodes(
                f"the aliases (*name) of a YAML text stand for more than {MAX_NODES:,} values: write out what is meant"
            )
    return get_loader("yaml")(text)


def _count(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Values of a node, those of an alias as often as it stands there; infinitely many if one holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = float("inf")  # what an alias inside of it finds
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
