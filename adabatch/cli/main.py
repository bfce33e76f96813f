"""The ``adabatch`` command, and its exit status. Help and version need none of the extras."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType

from adabatch import __version__
from adabatch.checkpointing.files import CheckpointError
from adabatch.cli.overview import COMMANDS, overview
from adabatch.guards.drift import RanksDrifted
from adabatch.guards.left_out import EXIT_NO_UPDATES, UpdatesLeftOut
from adabatch.guards.watchdog import EXIT_RANK_LOST, RankLost
from adabatch.runtime.launch.interrupts import INTERRUPTED

FILE_FAILED = 1
MISTAKE = 2
OUTPUT_CLOSED = 141
"""128 plus the number of SIGPIPE."""

WITHOUT_EXTRAS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "report": ("adabatch.cli.report", "run_report"),
        "plan": ("adabatch.cli.plan", "run_plan"),
        "tail": ("adabatch.cli.tail", "run_tail"),
        "init": ("adabatch.cli.init", "run_init"),
        "completion": ("adabatch.cli.completion", "run_completion"),
        "doctor": ("adabatch.cli.doctor", "run_doctor"),
    }
)
"""Commands that need none of the extras: module and function, which gets the arguments after the command."""

EXTRAS = ("jsonargparse", "yaml", "rich")
PATH_MISTAKES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
USER_ERRORS = (ValueError, TypeError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. docs/checkpoints.md has the table of statuses.

    A mistake of the user, or an error of a path or a disk, is one line on standard error. Other errors inside a model,
    a loss or a data set keep their traceback.

    Raises:
        SystemExit: with status 2, if the parser finds a mistake.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = ["--help-all" if each == "--help=all" else each for each in given]
    command = f"adabatch {given[0]}" if given and given[0] in COMMANDS else "adabatch"
    try:
        if not given or given[0] in ("-h", "--help", "--help-all"):
            print(overview(), file=sys.stdout if given else sys.stderr)
            return 0 if given else MISTAKE
        if given[0] == "--version":
            print(f"adabatch {__version__}")
            return 0
        with _working_folder_on_path():
            return _run(given)
    # also Ctrl-C; SystemExit has no line of its own, and goes on
    except BaseException as error:
        ended = _ending(error)
        if ended is None:
            raise
        status, line = ended
        _say(f"{command}: {line}")
        return status


def _run(given: Sequence[str]) -> int:
    if given[0] in WITHOUT_EXTRAS:
        # Imported by name, so that help and version load none of them.
        module, function = WITHOUT_EXTRAS[given[0]]
        status: int = getattr(importlib.import_module(module), function)(given[1:])
        sys.stdout.flush()
        return status
    try:
        from adabatch.cli.commands import run_command
    except ImportError as error:
        # A failing import of our own, or of the user's code, must not be taken for a missing extra.
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        raise ImportError(f"the command line needs `pip install adabatch[cli]` ({error})") from error
    status = run_command(given)
    sys.stdout.flush()  # if the reader has ended, this raises the error while it can still be reported
    return status


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Lets a config name a class in a file of the working folder, as ``python -m adabatch`` does."""
    here = os.getcwd()
    # safe_path: the user has told Python to leave the folder out (-P)
    if sys.flags.safe_path or here in sys.path or "" in sys.path:
        yield
        return
    # in front, as Python puts a script's folder
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _ending(error: BaseException) -> tuple[int, str] | None:
    """Exit status and one line for an error that has them; None for an error that needs its traceback."""
    # The order matters: BrokenPipeError is an OSError, and CheckpointError and the next three are RuntimeErrors.
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return OUTPUT_CLOSED, "the reader of its output is gone"
    if isinstance(error, CheckpointError):
        return FILE_FAILED, f"error: {_plain(error)}"
    if isinstance(error, RankLost | RanksDrifted):
        return EXIT_RANK_LOST, f"error: {_plain(error)}"
    if isinstance(error, UpdatesLeftOut):
        return EXIT_NO_UPDATES, f"error: {_plain(error)}"
    if isinstance(error, RecursionError):
        return MISTAKE, "error: the config is nested too deeply: write it with fewer levels"
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        return (
            MISTAKE if isinstance(error, PATH_MISTAKES) else FILE_FAILED,
            f"error: {place}{_dangling(error) or error.strerror or _plain(error)}",
        )
    return (MISTAKE, f"error: {_plain(error)}") if isinstance(error, USER_ERRORS) else None


def _dangling(error: OSError) -> str | None:
    """What is wrong if a link that leads nowhere stands where a folder is to be made; None otherwise."""
    if isinstance(error, FileExistsError) and os.path.islink(error.filename) and not os.path.exists(error.filename):
        return f"a link to {os.readlink(error.filename)}, which does not exist: remove the link, or make the folder"
    return None


def _plain(error: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may be reading that either
        print(line, file=sys.stderr, flush=True)


def _drop_output() -> None:
    # buffered output would raise another error when the interpreter ends
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)
