"""A mistake in a config or on the command line, in one line: the field, its value, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
    "dot import path string": "a class path (package.module.Class) or a mapping of its arguments",
}
VALUE = re.compile(r"(?:Given value|Got value): (.*?)(?=\. Got value: |$)", re.MULTILINE)
GROUPS = {"Control": "control", "Guard": "guard", "Limits": "limits", "Measure": "measure"}
"""Classes whose own errors are about fields that a config has in a mapping, and the name of that mapping."""
OF_A_GROUP = re.compile(rf"\b({'|'.join(GROUPS)}): (.+?)(?=\s+- Expected an? <class|\s*\Z)", re.DOTALL)
LONGEST = 300
"""Characters of a message that is passed on unchanged."""


def one_line(
    message: str,
    *,
    known: Iterable[str] = (),
    help_command: str = "adabatch train --help-all",
    file: str | None = None,
) -> str:
    """The parser's message of up to 30 lines, in one line.

    Args:
        message: of the parser.
        known: names of all options, to find the one that was meant.
        help_command: the command that lists them.
        file: the config that was being read; None if none was.

    Returns:
        The field, its value, and what to write instead, as far as the message contains them.
    """
    if file is not None and (said := _of_a_file(message)):
        return f"{file}: {said}"
    field = _field(message)
    # from the special to the general, because one message may contain the words of several
    if said := of_a_group(message):
        return said
    if found := re.search(r"unrecognized arguments: (.*)", message):
        return _unknown(found[1], known, help_command)
    if found := re.search(r"Key '?\"?([\w.]+)'?\"? is not expected|Unexpected keys?:? '?\"?([\w.]+)", message):
        return _unknown(found[1] or found[2], known, help_command)
    if found := re.search(r"Problem with given class_path '(.*?)':\s*(.*)", message):
        return f"{field}: {found[1]}: {_way_in(found[2], field, found[1])}"
    if found := re.search(r"(?:^|\s)(Option '.*?' is not accepted|the following arguments are required: .*)", message):
        return f"{field}: {_way_in(found[1].split('. Got value')[0], field, None)}"
    value = VALUE.search(message) or re.search(r"dot import path string: (.*)", message)
    got = "" if value is None else f", got {value[1]!r}"
    expected = re.findall(r"Expected an? (.+?)(?=\. Got value|: |\n|$)", message)
    if expected == ["<class 'NoneType'>"]:  # for a class, the parser only says that it expected none of these
        expected.insert(0, "dot import path string")
    if expected:
        return f"{field} must be {' or '.join(dict.fromkeys(map(_type, expected)))}{got}"
    if "Unable to load config" in message and field:
        found = re.search(r"Unable to load config [\"'](.*?)[\"']", message)
        return f"{field} has fields of its own, which {help_command} lists, got {found[1] if found else 'none'!r}"
    if classes := re.findall(r"Expected '(.*?)' to be a subclass of <class '(.*?)'>", message):
        kinds = " or ".join(dict.fromkeys(kind for _, kind in classes))
        return f"{field} must be a class of kind {kinds}, got {classes[0][0]}"
    if "Does not implement protocol" in message or "Subclass types expect" in message:
        return f"{field} must be {_type('dot import path string')}{got}"
    plain = " ".join(re.sub(r"^[Pp]arser key [\"'](.*?)[\"']", r"\1", message).split())
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]} ..."


def of_a_group(message: str) -> str | None:
    """The error of a class that holds a group of fields, such as ``Control``, with the field; None for any other."""
    found = OF_A_GROUP.search(message)
    if found is None:
        return None
    group, said = GROUPS[found[1]], " ".join(found[2].split())
    return said if said.startswith(f"{group}.") else f"{group}.{said}"


def _of_a_file(message: str) -> str | None:
    """What is wrong with the text of a config as a whole; None for an error in one of its fields."""
    if message.startswith("Unexpected config:"):
        return "a config must be a mapping of fields to values, such as `micro_batch_size: 16`"
    if found := re.match(r"Problems parsing config:\s*(.*)", message, re.DOTALL):
        return " ".join(found[1].replace(' in "<unicode string>",', " in").split())
    return None


def _field(message: str) -> str:
    """The path of the field: that in the config, and that inside the arguments of a class."""
    path: list[str] = []
    for name in re.findall(r"[Pp]arser key [\"'](.*?)[\"']", message):
        if not path or (name != path[-1] and len(path) < 2):
            path.append(name)
    return ".".join(path)


def _way_in(reason: str, field: str, path: str | None) -> str:
    """The reason, and the command that lists the arguments of the class."""
    if "required" in reason or "not accepted" in reason:
        which = f" {path}" if path else " CLASS"
        return f"{reason} (adabatch train --{field.split('.')[0]}.help{which} lists the arguments)"
    return reason


def _unknown(text: str, known: Iterable[str], help_command: str) -> str:
    name = text.split()[0].lstrip("-").partition("=")[0]
    # only the nearest, since a line with three guesses is read as a list of what exists
    near = get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{text} is not a field or an option; {meant}{help_command} lists them"


def _type(name: str) -> str:
    """A type in plain words."""
    if literal := re.fullmatch(r"typing.Literal\[(.*)\]", name):
        return "one of " + literal[1].replace("'", "")
    return TYPES.get(name, name)
