"""Commands that consist of sub-commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """A sub-command: what it is for, its arguments, and what runs it."""

    help: str
    description: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[..., Any]


def add_subcommands(parser: ArgumentParser, commands: Mapping[str, Command]) -> None:
    """Adds sub-commands to the parser of a command, which must already be part of its parent."""
    group = parser.add_subcommands()
    for name, command in commands.items():
        own = type(parser)(description=command.description)
        command.add_arguments(own)
        group.add_subcommand(name, own, help=command.help)
