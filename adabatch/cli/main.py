"""The ``adabatch`` command."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

try:
    import yaml
    from jsonargparse import ArgumentParser, Namespace
except ImportError as error:  # the library itself does without
    raise SystemExit(f"adabatch: error: the command line needs `pip install adabatch[cli]` ({error})") from None

from adabatch import __version__
from adabatch.checkpointing.files import CheckpointError
from adabatch.cli.compare import HEADER, compare, row
from adabatch.cli.display import Display
from adabatch.cli.job import Job, run
from adabatch.cli.mup.commands import DESCRIPTION as MUP_DESCRIPTION
from adabatch.cli.mup.commands import add_mup_commands, run_mup
from adabatch.cli.picture import picture
from adabatch.cli.schedule.commands import DESCRIPTION, add_schedule_commands, run_schedule
from adabatch.cli.verify import DEFAULT_STEPS, verify
from adabatch.guards.drift import RanksDrifted
from adabatch.guards.preemption import EXIT_PREEMPTED
from adabatch.guards.watchdog import EXIT_RANK_LOST, RankLost
from adabatch.runtime.launch.world import World, connected

CHECKPOINT_FAILED = 1
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, ImportError)


def _job_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML file with the fields below")
    parser.add_class_arguments(Job)
    return parser


def _verify_parser() -> ArgumentParser:
    parser = _job_parser(
        "Check on a job's model, data and processes that no rank drifts, that the probe is right, that a constant "
        "policy and a resume change nothing, and what the probe costs; alone or under torchrun. Writes no file. "
        "Status 0: all passed; 1: a check failed; 2: a mistake in the config."
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="steps beside the hand-written loop; timed pairs"
    )
    parser.add_argument(
        "--max_cost", type=float | None, default=None, help="largest time of a probed step over one without"
    )
    return parser


@cache  # it takes longer to make than to use
def build_parser() -> ArgumentParser:
    """The parser of the whole command."""
    parser = ArgumentParser(
        prog="adabatch",
        description="Batch sizes that grow with the noise of the gradient, and learning rates that follow.",
        version=f"adabatch {__version__}",
    )
    commands = parser.add_subcommands()
    commands.add_subcommand(
        "train",
        _job_parser("Train a model as a config file says; alone or under torchrun."),
        help="train a model as a config file says",
    )
    commands.add_subcommand(
        "compare",
        _job_parser("Train, then train the same at constant smallest and largest batch size, and compare."),
        help="train beside the constant smallest and largest batch size",
    )
    commands.add_subcommand(
        "verify",
        _verify_parser(),
        help="check on a job's model, data and processes that adaptive batches do what they should",
    )
    schedule = ArgumentParser(description=DESCRIPTION)
    commands.add_subcommand("schedule", schedule, help="compare, refine, transfer and extend learning-rate schedules")
    add_schedule_commands(schedule)
    mup = ArgumentParser(description=MUP_DESCRIPTION)
    commands.add_subcommand("mup", mup, help="plan and check settings that survive a change of width")
    add_mup_commands(mup)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    A user's mistake is one line on standard error and status 2, a checkpoint that could not be written or read one line
    and status 1. A run that a signal ended has saved itself, and returns ``EXIT_PREEMPTED``; one that lost a rank, or
    whose ranks drifted apart, returns ``EXIT_RANK_LOST``.
    """
    parser = build_parser()
    try:
        config = parser.parse_args(arguments)
    except ValueError as error:  # its own it tells itself; this is of a text that was tried as a path
        parser.error(f"a text of the config or the command line is no path, nor what should stand there: {error}")
    command = config.subcommand
    try:
        if command == "schedule":
            run_schedule(config.schedule)
            return 0
        if command == "mup":
            return run_mup(config.mup)
        _check_given(config[command])
        world = World.from_environment()
        _seed(config[command].seed)
        with connected(world, device=world.device):
            if command == "verify":
                return _verify(_maker(parser, config, command), world, config.verify)
            if command == "train":
                return _train(_maker(parser, config, command), world, _settings(parser, config, command))
            return _compare(_maker(parser, config, command), world)
    except CheckpointError as error:
        print(f"adabatch {command}: error: {error}", file=sys.stderr)
        return CHECKPOINT_FAILED
    except (RankLost, RanksDrifted) as error:
        print(f"adabatch {command}: error: {error}", file=sys.stderr)
        return EXIT_RANK_LOST
    except USER_ERRORS as error:
        print(f"adabatch {command}: error: {error}", file=sys.stderr)
        return 2


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
            raise ValueError(f"{name} has fields of its own, as --help lists them, got {value!r}")


def _seed(seed: int) -> None:
    """The generators that models and data sets draw from, numpy's old global one among them.

    Raises:
        ValueError: a seed that torch does not take.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, got {seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _maker(parser: ArgumentParser, config: Namespace, command: str) -> Callable[[], Job]:
    """A function that builds the job of a config anew, from the same seed each time."""

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
    """The job as it was asked for, in plain values; where it writes is no part of it."""
    asked: dict[str, Any] = yaml.safe_load(parser.dump(config))[command]
    return {name: value for name, value in asked.items() if name not in ("config", "out", "checkpoint")}


def _train(make: Callable[[], Job], world: World, settings: dict[str, Any]) -> int:
    display = Display(world.rank)
    result = run(make(), world, display=display, label="train", config=settings)
    if result.preempted:
        display.say(f"stopped by a signal and saved at {result.examples:,} examples: the same command goes on")
        return EXIT_PREEMPTED
    display.table("Result", HEADER, [row(result)])
    if world.rank == 0:
        picture({"": result.journal}, result.journal.with_name("picture.png"), display=display)
    display.say(f"journal and checkpoints: {result.journal.parent}")
    return 0


def _compare(make: Callable[[], Job], world: World) -> int:
    return EXIT_PREEMPTED if compare(make, world, display=Display(world.rank)) is None else 0


def _verify(make: Callable[[], Job], world: World, config: Namespace) -> int:
    checks = verify(make, world, steps=config.steps, max_cost=config.max_cost, display=Display(world.rank))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
