"""``adabatch completion``: a script with which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from adabatch.cli.overview import COMMANDS, DESCRIPTION
from adabatch.cli.plain_parser import PlainParser

SHELLS = ("bash", "zsh", "fish")
ABOUT = """\
Print a script with which your shell completes commands, options and their values.

  bash   adabatch completion bash > ~/.local/share/bash-completion/completions/adabatch
  zsh    adabatch completion zsh > "${fpath[1]}/_adabatch"
  fish   adabatch completion fish > ~/.config/fish/completions/adabatch.fish

Then open a new shell."""

PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "report": "adabatch.cli.report",
        "plan": "adabatch.cli.plan",
        "tail": "adabatch.cli.tail",
        "init": "adabatch.cli.init",
    }
)
"""Commands with their own parser, which their module makes."""


class Field(NamedTuple):
    """A field of an option's value.

    Args:
        name: of the field.
        type: its annotation.
    """

    name: str
    type: Any


def run_completion(arguments: Sequence[str]) -> int:
    """Runs the command with the arguments after its name; its exit status.

    Raises:
        ImportError: if the extra "cli" is not installed.
        SystemExit: with status 2, if there is a mistake on the command line.
    """
    parser = _parser()
    shell = parser.parse_args(arguments).shell
    try:
        # imported here, so that the command's help works without the extra
        import shtab

        from adabatch.cli.parser import build_parser
    except ImportError as error:
        raise ImportError(f"completion needs `pip install adabatch[cli]` ({error})") from error
    print(shtab.complete(_tree(build_parser(), shtab.FILE), shell))
    return 0


def _tree(jobs: argparse.ArgumentParser, file: Any) -> argparse.ArgumentParser:
    """One plain parser of all commands, with only their names, options and choices."""
    # a copy, since shtab knows argparse's parsers only, not those with class arguments and configs
    root = argparse.ArgumentParser(prog="adabatch", description=DESCRIPTION)
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    known: dict[str, argparse.ArgumentParser] = dict(_subparsers(jobs))
    known |= {name: _parser_of(module) for name, module in PLAIN.items()} | {"completion": _parser()}
    for name, what in COMMANDS.items():
        into = commands.add_parser(name, help=what, description=what, add_help=False)
        if name in known:
            _copy(known[name], into, file)
    return root


def _parser_of(module: str) -> argparse.ArgumentParser:
    make: Callable[[], argparse.ArgumentParser] = import_module(module)._parser
    return make()


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _copy(source: argparse.ArgumentParser, into: argparse.ArgumentParser, file: Any) -> None:
    inner = _subparsers(source)
    for action in source._actions:
        if isinstance(action, argparse._SubParsersAction) or (action.help == argparse.SUPPRESS):
            continue
        # where jsonargparse keeps the annotation
        kind = getattr(action, "_typehint", action.type)
        settings: dict[str, Any] = {"help": _first_sentence(action.help)}
        flag = action.nargs == 0
        if flag:
            settings["action"] = "store_true"
        else:
            settings |= {"choices": action.choices or _choices(kind), "nargs": action.nargs}
        names = action.option_strings or [action.dest]
        copied = into.add_argument(*names, **settings)
        if not flag and not copied.choices and (kind is Path or Path in get_args(kind) or "--config" in names):
            copied.complete = file  # type: ignore[attr-defined]
        for field in _fields(kind):
            option = f"{names[0]}.{field.name}"
            if option not in source._option_string_actions:
                into.add_argument(option, help=f"of {names[0].lstrip('-')}", choices=_choices(field.type))
    if inner:
        commands = into.add_subparsers()
        for name, parser in inner.items():
            # no help of its own: that of the source is copied
            _copy(parser, commands.add_parser(name, add_help=False), file)


def _choices(kind: Any) -> list[str] | None:
    """The choices of a literal type."""
    if kind is bool:
        return ["true", "false"]
    for each in (kind, *(part for part in get_args(kind) if part is not NoneType)):
        if get_origin(each) is Literal:
            return [str(word) for word in get_args(each)]
    return None


def _fields(kind: Any) -> list[Field]:
    """Name and type of each field of an option that is given by its fields, such as ``Limits``."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and is_dataclass(each):
            hints = get_type_hints(each)
            return [Field(field.name, hints[field.name]) for field in fields(each) if field.init]
    return []


def _first_sentence(text: str | None) -> str:
    """The text that a shell shows beside an option, without percent signs, which would be formats."""
    return (text or "").split(";")[0].split(". ")[0].replace("%", "%%")


def _parser() -> PlainParser:
    parser = PlainParser(prog="adabatch completion", description=ABOUT)
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    return parser
