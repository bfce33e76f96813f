"""Reads the YAML of configs: aliases that expand to more than fits into memory, and keys that are given twice, are
errors."""

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


class GivenTwice(ValueError):
    """A key stands twice in the same mapping. PyYAML would take the last one in silence."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        TooManyNodes: see there. The parser expands aliases, so it would not terminate.
        GivenTwice: see there.
        yaml.YAMLError: if the text is not YAML.
    """
    # a text without a mapping, such as that of most flags, is parsed only once
    if ":" in text:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(root, set())
        if _count(root, {}) > MAX_NODES:
            raise TooManyNodes(
                f"the aliases (*name) of a YAML text stand for more than {MAX_NODES:,} values: write out what is meant"
            )
    return get_loader("yaml")(text)


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Checks that no mapping has a key twice; an alias of a node is the node itself."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for each in node.value:
        key, value = each if isinstance(each, tuple) else (None, each)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise GivenTwice(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}: give it once")
            lines[key.value] = line
        _check_keys(value, seen)


def _count(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Number of values of a node with its aliases expanded; infinite if an alias contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = float("inf")  # what an alias inside of it finds
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]


set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError,))
