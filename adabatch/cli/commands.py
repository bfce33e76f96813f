"""What each command does with its arguments: builds the job and trains, compares or verifies; or hands them on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, Namespace

from adabatch.arguments import require
from adabatch.cli.compare import HEADER, compare, row
from adabatch.cli.display import Display
from adabatch.cli.job import Job, run
from adabatch.cli.mup.commands import run_mup
from adabatch.cli.parser import build_parser
from adabatch.cli.picture import picture
from adabatch.cli.schedule.commands import run_schedule
from adabatch.cli.verify import verify
from adabatch.guards.heartbeat import Heartbeat
from adabatch.guards.preemption import EXIT_PREEMPTED
from adabatch.guards.watchdog import Watchdog
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.launch.world import World, connected


def run_command(arguments: Sequence[str]) -> int:
    """Runs the command with its arguments; its exit status.

    Raises:
        SystemExit: a mistake that the parser finds (status 2), or what it answers itself, such as ``--print_config``.
        Exception: whatever ends the run.
    """
    parser = build_parser(arguments[0])
    try:
        config = parser.parse_args(arguments)
    except ValueError as error:  # its own it tells itself; this is of a text that was tried as a path
        parser.error(f"a text of the config or the command line is not a path, nor what should stand there: {error}")
    command = config.subcommand
    if command == "schedule":
        run_schedule(config.schedule)
        return 0
    if command == "mup":
        return run_mup(config.mup)
    _check_given(config[command])
    world = World.from_environment()
    _seed(config[command].seed)
    display = Display(world.rank)
    make = _maker(parser, config, command)
    with connected(world, device=world.device), _watched(world, config[command].hang_timeout):
        if command == "verify":
            checks = verify(make, world, steps=config.verify.steps, max_cost=config.verify.max_cost, display=display)
            display.check_read()
            return 0 if all(check.passed for check in checks) else 1
        if command == "compare":
            if compare(make, world, display=display) is not None:
                return 0
            display.note(f"{_why_stopped(display)}: no comparison; the same command begins again")
            return EXIT_PREEMPTED
        return _train(make, world, _settings(parser, config, command), display)


class _Start:
    """The ranks before there is a run: where a rank that raises, or dies, is named to the others already."""

    def __init__(self, device: torch.device) -> None:
        groups = [dist.group.WORLD] if dist.group.WORLD is not None else []
        self.collectives = Collectives(*groups, device=device)
        self.heartbeat = Heartbeat()


@contextmanager
def _watched(world: World, timeout: float | None) -> Iterator[None]:
    """Tells all ranks of one that raises while it builds its job, loads, or tests; the training loop's own watchdog
    knows more, and is first there."""
    if timeout is None or world.size == 1 or not 0 < timeout < float("inf"):  # the job says what is wrong with it
        yield
        return
    with Watchdog(_Start(world.device), timeout=timeout):
        yield


def _check_given(fields: Namespace) -> None:
    """What the parser lets pass: null for any field, and anything for one whose fields all have defaults.

    Raises:
        ValueError: a field of a job is null that has to be something, or has no fields where it should.
    """
    for name, kind in get_type_hints(Job).items():
        value = fields[name]
        if value is None and NoneType not in get_args(kind):
            raise ValueError(f"{name} must not be null: give it a value, or leave it out where it has a default")
        if is_dataclass(kind) and not isinstance(value, Namespace):
            raise ValueError(f"{name} has fields of its own, as --help-all lists them, got {value!r}")


def _seed(seed: int) -> None:
    """The generators that models and data sets draw from, numpy's old global one among them.

    Raises:
        ValueError: a seed that torch does not take.
    """
    require(0 <= seed < 2**64, "seed must be a whole number from 0 to 2**64 - 1", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _maker(parser: ArgumentParser, config: Namespace, command: str) -> Callable[[], Job]:
    """A function that builds the job of a config again, from the same seed each time."""

    def make() -> Job:
        _seed(config[command].seed)
        fields: dict[str, Any] = vars(parser.instantiate(config, instantiators=[(_made, object, True)])[command])
        names = Job.__dataclass_fields__
        return Job(**{name: value for name, value in fields.items() if name in names})

    return make


def _made(kind: type[Any], *arguments: Any, **named: Any) -> Any:
    """An object of the config.

    Raises:
        ValueError: its class refuses the arguments; in front of its reason, which may name none of them, the class.
    """
    try:
        return kind(*arguments, **named)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def _settings(parser: ArgumentParser, config: Namespace, command: str) -> dict[str, Any]:
    """The job as it was asked for, in plain values; where it writes is not part of it."""
    asked: dict[str, Any] = yaml.safe_load(parser.dump(config))[command]
    return {name: value for name, value in asked.items() if name not in ("config", "out", "checkpoint")}


def _train(make: Callable[[], Job], world: World, settings: dict[str, Any], display: Display) -> int:
    result = run(make(), world, display=display, label="train", config=settings)
    if result.preempted:
        display.note(f"{_why_stopped(display)}: saved at {result.examples:,} examples; the same command goes on")
        return EXIT_PREEMPTED
    display.table("Result", HEADER, [row(result)])
    if world.rank == 0:
        picture({"": result.journal}, result.journal.with_name("picture.png"), display=display)
    display.say(f"journal and checkpoints: {result.journal.parent}")
    return 0


def _why_stopped(display: Display) -> str:
    return "the reader of its output is gone" if display.unread else "stopped by a signal"
