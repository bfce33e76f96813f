"""Runs a function on the ranks that a real launcher starts, as programs of their own; what they return comes back."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
RESULTS = "ADABATCH_TEST_RESULTS"
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Ended(NamedTuple):
    """A job that has ended.

    Args:
        returncode: of its launcher.
        output: what it wrote to both streams.
        values: what the function returned on each rank that came to its end, in JSON's types.
    """

    returncode: int
    output: str
    values: list[Any]

    def results(self) -> list[Any]:
        """The values of a job in which no rank failed.

        Raises:
            AssertionError: one did; the message holds what all wrote.
        """
        assert self.returncode == 0, self.output[-12_000:]
        return self.values


def command_of(function: Callable[..., Any], *arguments: str) -> list[str]:
    """A Python script and its arguments, which run ``function(*arguments)`` and leave what it returns."""
    return [str(Path(__file__)), str(Path(function.__code__.co_filename)), function.__name__, *arguments]


def surroundings(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank: the tests can be imported, and one thread is used."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run_whole(
    command: Sequence[str], *, environment: Mapping[str, str], timeout: float, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A launcher, to its end; both streams in ``stdout``.

    Raises:
        AssertionError: it did not end in time. It and all that it started are killed, which would go on otherwise.
    """
    running = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = running.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        output, _ = running.communicate()
        raise AssertionError(f"no end after {timeout:.0f} s: {command}\n{output[-12_000:]}") from None
    return subprocess.CompletedProcess(command, running.returncode, output)


def start(
    launcher: Sequence[str],
    function: Callable[..., Any],
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> Ended:
    """Runs ``function(*arguments)`` on the ranks of ``launcher``, a command that takes a script."""
    with tempfile.TemporaryDirectory() as folder:
        environment = surroundings({**(variables or {}), RESULTS: folder})
        ended = run_whole([*launcher, *command_of(function, *arguments)], environment=environment, timeout=timeout)
        paths = sorted(Path(folder).iterdir(), key=lambda path: int(path.stem))
        return Ended(ended.returncode, ended.stdout, [json.loads(path.read_text()) for path in paths])


def _main(file: str, name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, name)(*arguments)
    rank = next((int(os.environ[each]) for each in RANKS if each in os.environ), 0)
    Path(os.environ[RESULTS], f"{rank}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
