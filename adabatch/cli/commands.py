"""Runs a command with its arguments: builds the job and trains, compares or verifies; or passes them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import torch.distributed as dist
from jsonargparse import Namespace

from adabatch.cli.branch import CriticalOptions
from adabatch.cli.cbs import measure
from adabatch.cli.compare import HEADER, compare, result_row
from adabatch.cli.display import Display
from adabatch.cli.job import Job, run
from adabatch.cli.making import job_maker, job_settings, seed_everything
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


def job_in(path: Path) -> Job:
    """The job of a config file.

    Raises:
        SystemExit: with status 2, if there is a mistake in it.
        ValueError: if its settings or objects cannot be made.
    """
    parser = build_parser("train")
    config = parser.parse_args(["train", "--config", str(path)])
    _check_given(config.train)
    return job_maker(parser, config, "train")()


def run_command(arguments: Sequence[str]) -> int:
    """Runs the command with its arguments; its exit status.

    Raises:
        SystemExit: if the parser finds a mistake (status 2), or handles an option itself, such as ``--print_config``.
        Exception: the error that ends the run.
    """
    parser = build_parser(arguments[0])
    try:
        config = parser.parse_args(arguments)
    except ValueError as error:  # the parser reports its own errors; this one is about a text that it tried as a path
        parser.error(f"a text in the config or on the command line is neither a path nor the value of a field: {error}")
    command = config.subcommand
    if command == "schedule":
        run_schedule(config.schedule)
        return 0
    if command == "mup":
        return run_mup(config.mup)
    _check_given(config[command])
    world = World.from_environment()
    own = config[command]
    # before anything is made: weights, and data sets that draw their examples, come from the seed
    seed_everything(own.seed)
    display = Display(world.rank, quiet=own.quiet, log_every=own.log_every)
    # A function and not a job: comparisons, checks and branches need it again and again, from the same seed.
    make = job_maker(parser, config, command)
    with connected(world, device=world.device), watched(world, config[command].hang_timeout):
        if command == "verify":
            checks = verify(make, world, steps=config.verify.steps, max_cost=config.verify.max_cost, display=display)
            display.check_read()
            return 0 if all(check.passed for check in checks) else 1
        if command == "cbs":
            return _critical_batch(make, world, config.cbs, arguments, job_settings(parser, config, command), display)
        if command == "compare":
            settings = job_settings(parser, config, command)
            if compare(make, world, display=display, tune=config.compare.tune, settings=settings) is not None:
                return 0
            display.note(f"{_why_stopped(display)}: no comparison; the same command begins again")
            return EXIT_PREEMPTED
        return _train(make, world, job_settings(parser, config, command), display)


class _Outside(Heartbeat):
    """The heartbeat of a rank outside its training loops. It may take any time there, for instance to draw pictures
    when the others have ended."""

    @property
    def still(self) -> float:
        # it never hangs, but can still be found dead, or raise an error
        return 0.0


class _Start:
    """The ranks before there is a run, so that a rank that raises an error or dies is already named to the others."""

    def __init__(self, device: torch.device) -> None:
        groups = [dist.group.WORLD] if dist.group.WORLD is not None else []
        self.collectives = Collectives(*groups, device=device)
        self.heartbeat = _Outside()


@contextmanager
def watched(world: World, timeout: float | None) -> Iterator[None]:
    """Tells all ranks if one raises an error while it builds its job, loads, or tests; within the training loop its own
    watchdog knows more, and reports first."""
    if timeout is None or world.size == 1 or not 0 < timeout < float("inf"):  # the job itself reports what is wrong
        yield
        return
    with Watchdog(_Start(world.device), timeout=timeout):
        yield


def _check_given(fields: Namespace) -> None:
    """Checks what the parser accepts: null for any field, and anything for one whose fields all have defaults.

    Raises:
        ValueError: if a required field of a job is null, or has no fields although it should.
    """
    for name, kind in get_type_hints(Job).items():
        value = fields[name]
        if value is None and NoneType not in get_args(kind):
            raise ValueError(f"{name} must not be null: give it a value, or leave it out if it has a default")
        if is_dataclass(kind) and not isinstance(value, Namespace):
            raise ValueError(f"{name} has fields of its own, as --help-all lists them, got {value!r}")


def _critical_batch(
    make: Callable[[], Job],
    world: World,
    fields: Namespace,
    arguments: Sequence[str],
    settings: dict[str, Any],
    display: Display,
) -> int:
    options = CriticalOptions(**{name: fields[name] for name in CriticalOptions.__dataclass_fields__})
    found = measure(make, world, options, arguments=arguments, settings=settings, display=display)
    display.check_read()
    if found is not None:
        return 0
    display.note("fewer than two branches were finished: the same command continues")
    return EXIT_PREEMPTED


def _train(make: Callable[[], Job], world: World, settings: dict[str, Any], display: Display) -> int:
    result = run(make(), world, display=display, label="train", config=settings)
    if result.preempted:
        display.note(f"{_why_stopped(display)}: saved at {result.examples:,} examples; the same command continues")
        return EXIT_PREEMPTED
    display.table("Result", HEADER, [result_row(result)])
    if world.rank == 0:
        picture({"": result.journal}, result.journal.with_name("picture.png"), display=display)
    display.say(f"journal and checkpoints: {result.journal.parent}")
    return 0


def _why_stopped(display: Display) -> str:
    return "the reader of its output is gone" if display.unread else "stopped by a signal"
