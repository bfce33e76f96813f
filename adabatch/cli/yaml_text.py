"""Reads the YAML of configs, in which a few lines with aliases could expand to more than fits into memory."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "adabatch"
"""The parser mode, in jsonargparse's sense, in which configs and values of flags are read."""

MAX_NODES = 100_000
"""Values that a config may have after its aliases are expanded. Our largest config, with a table of 200, has 300."""


class TooManyNodes(ValueError):
    """The aliases of a text expand to more than ``MAX_NODES`` values, or contain themselves."""


def load(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        TooManyNodes: see there. The parser expands aliases, so it would not terminate.
        yaml.YAMLError: if the text is not YAML.
    """
    # a text without aliases, as nearly all are, is parsed only once
    if "*" in text and "&" in text:
        count = _count(yaml.compose(text, Loader=yaml.SafeLoader), {})
        if count > MAX_NODES:
            raise TooManyNodes(
                f"the aliases (*name) of a YAML text stand for more than {MAX_NODES:,} values: write out what is meant"
            )
    return get_loader("yaml")(text)


def _count(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Number of values of a node with its aliases expanded; infinite if an alias contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = float("inf")  # what an alias inside of it finds
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]


set_loader(MODE, load, exceptions=(yaml.YAMLError,))
