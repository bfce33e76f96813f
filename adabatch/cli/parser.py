"""The parser of the whole command: fields of a job from YAML files and flags, short help, mistakes in one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from adabatch.cli.branch import FACTORS, CriticalOptions
from adabatch.cli.job import Job
from adabatch.cli.mistakes import one_line
from adabatch.cli.mup.commands import DESCRIPTION as MUP_DESCRIPTION
from adabatch.cli.mup.commands import SUBCOMMANDS as MUP_SUBCOMMANDS
from adabatch.cli.overview import COMMANDS, DESCRIPTION
from adabatch.cli.schedule.commands import DESCRIPTION as SCHEDULE_DESCRIPTION
from adabatch.cli.schedule.commands import SUBCOMMANDS as SCHEDULE_SUBCOMMANDS
from adabatch.cli.subcommands import add_subcommands
from adabatch.cli.verify import DEFAULT_STEPS
from adabatch.cli.yaml_text import MODE

# Written by hand: the list of all fields, and of the fields inside them, hides the few that most runs need.
JOB_HELP = """\
usage: adabatch {command} --config FILE [--FIELD VALUE ...]

{description}

A config file sets all fields; a flag overrides one of them. The most common fields:

  --config FILE              YAML file with the fields; later files override earlier ones
  --model CLASS              the network; pass its arguments as --model.NAME
  --train_data CLASS         data set of (input, target); --test_data CLASS for a test at the end
  --evaluate_every DURATION  how often to test before, such as "{{count: 1000, unit: steps}}"
  --loss CLASS               a module (outputs, targets) -> mean loss
  --optimizer CLASS          such as torch.optim.AdamW, with --optimizer.lr
  --criterion CLASS          which batch size to ask for, such as adabatch.NormTest with --criterion.eta
  --micro_batch_size N       examples in one forward and backward on one rank
  --max_micro_batch_size N   how far the micro-batch may grow before steps accumulate
  --limits.min N             smallest global batch size; --limits.max N the largest
  --total.count N            length of the run, in --total.unit examples, tokens, steps or gain_steps
  --lr_rule RULE             how the learning rate follows the batch: none, linear, sqrt, gain, ...;
                             left out, gain and the betas of Adam follow if the batch follows noise
  --shape SHAPE              schedule of the learning rate, such as adabatch.lr.cosine; --warmup before it
  --engine NAME              ddp (default), fsdp2 or deepspeed
  --seed N                   of weights, order of the data and everything random
  --out FOLDER               where journal, checkpoints and picture go
  --checkpoint.every_seconds S   how often to save; the same command resumes the run
  --quiet                    no progress; --log_every N for a line every N steps
{own}
  --help-all                 list every field, with its type and default (or --help=all)
  --criterion.help CLASS     list the arguments of a class; also --model.help, --optimizer.help, ...
  --print_config             print the config with all defaults

examples:
  adabatch {command} --config configs/quickstart.yaml --limits.max=512
  torchrun --nproc-per-node=2 -m adabatch {command} --config configs/digits_adamw.yaml
"""

COMPARE_OPTIONS = """\
  --tune                     search the best base LR of each of the three runs, by validation loss, on a grid of factors
                             of 2 that grows until the best lies inside; finished trials are kept
"""

CBS_OPTIONS = """\
  --branch_from PATH         first checkpoint, or a folder whose newest is used; by default that of the run in --out
  --factors 1 2 4 8 16       sizes of the branches, over the smallest; --smallest N, by default the checkpoint's
  --examples N               examples of each branch; by default a twentieth of --total.count
  --tolerance X              share of the smallest batch's loss (0.005); --half_life N of its smoothing, in examples
  --judge NAME               compare the smoothed training loss (train), or the loss on --test_data (test)
  --processes N              branches at the same time; --max_minutes X stops those that are unfinished by then
"""

VERIFY_OPTIONS = """\
  --steps N                  steps beside the hand-written loop; timed pairs
  --max_cost X               largest allowed time of a step with a probe over one without
"""


class Parser(ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, and whose ``--help`` may be short, with ``--help-all`` beside.

    Args:
        short_help: what ``--help`` prints in place of the list of all options.
    """

    def __init__(self, *arguments: Any, short_help: str | None = None, **options: Any) -> None:
        # our own loader of YAML, which bounds what aliases may expand to
        super().__init__(*arguments, parser_mode=options.pop("parser_mode", MODE), **options)
        self._short_help = short_help
        self._file: str | None = None
        """The config that is being read, for errors of its text."""
        self.asked: Parser | None = None
        """The parser of the command that was called, for errors that do not name their parser."""
        if short_help is not None:
            self.add_argument("--help-all", action=_HelpAll, help="list every field")

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The text of ``--help``."""
        return super().format_help(formatter) if self._short_help is None else self._short_help

    def format_full_help(self) -> str:
        """The text of ``--help-all``."""
        return super().format_help()

    def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Namespace:
        """Parses a config file."""
        self._file = os.fspath(path)
        try:
            parsed: Namespace = super().parse_path(path, *arguments, **options)
            return parsed
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error in one line, and exits with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)  # raises
        place: ArgumentParser = getattr(ex, "subcommand_parser", None) or self.asked or self
        # jsonargparse puts this into the names of sub-commands
        prog = place.prog.replace(" [options]", "")
        known = [option.lstrip("-") for option in place._option_string_actions]
        listed = f"{prog} --help-all" if getattr(place, "_short_help", None) else f"{prog} --help"
        self.exit(2, f"{prog}: error: {one_line(message, known=known, help_command=listed, file=self._file)}\n")


class _HelpAll(argparse.Action):
    """Prints the help of all options."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        # suppressed, so that it is no field of the config
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_full_help(), end="")
        parser.exit()


def _job_parser(command: str, description: str, own: str = "") -> Parser:
    parser = Parser(
        description=description, short_help=JOB_HELP.format(command=command, description=description, own=own)
    )
    parser.add_argument("--config", action="config", help="YAML file with the fields below")
    parser.add_class_arguments(Job)
    parser.add_argument("--quiet", action="store_true", help="show only results and errors, no progress")
    parser.add_argument(
        "--log_every",
        "--log-every",
        type=int | None,
        default=None,
        help="steps from one line of progress to the next; by default a live line, or ten lines per run in a log",
    )
    return parser


def _cbs_parser() -> Parser:
    parser = _job_parser(
        "cbs",
        "Measure the critical batch: from a checkpoint of `adabatch train`, branches at 1, 2, 4, ... times the batch,\n"
        "on equally many examples, at the learning rates that --lr_rule gives to their sizes. Give the run's config.\n"
        "Table, JSON and picture beside the noise scale; finished branches are not run again.",
        CBS_OPTIONS,
    )
    # added below with nargs, so that they are written as --factors 1 2 4, and not as a list
    parser.add_class_arguments(CriticalOptions, skip={"factors"})
    parser.add_argument(
        "--factors",
        nargs="+",
        type=float,
        default=list(FACTORS),
        metavar="X",
        help="sizes of the branches, over the smallest",
    )
    return parser


def _verify_parser() -> Parser:
    parser = _job_parser(
        "verify",
        "Check on a job's model, data and processes that no rank drifts, that the probe is right, that a constant\n"
        "policy and a resume change nothing, and what the probe costs. Runs on one process or under torchrun, and\n"
        "writes no file.\n"
        "Status 0: all passed; 1: a check failed; 2: a mistake in the config.",
        VERIFY_OPTIONS,
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="steps beside the hand-written loop; timed pairs"
    )
    parser.add_argument(
        "--max_cost",
        type=float | None,
        default=None,
        help="largest time of a step with a probe over one without",
    )
    return parser


@cache  # cached, because building it takes longer than using it
def build_parser(asked: str | None = None) -> Parser:
    """The parser of the whole command; errors that do not name their parser are those of the command ``asked``."""
    parser = Parser(prog="adabatch", description=DESCRIPTION)
    commands = parser.add_subcommands()
    train = _job_parser("train", "Train the model of a config file, on one process or under torchrun.")
    compare = _job_parser(
        "compare",
        "Train the job, and again at constant smallest and largest batch size, and compare. Without --tune nothing\n"
        "is tuned: all have the config's base LR, and the rule gives each its factor.",
        COMPARE_OPTIONS,
    )
    # an option of the command and not a field of the job, whose settings identify a run
    compare.add_argument(
        "--tune",
        action="store_true",
        help="give each run the base LR that is best for it on a tenth of the training data, on which none trains",
    )
    schedule, mup = Parser(description=SCHEDULE_DESCRIPTION), Parser(description=MUP_DESCRIPTION)
    parsers = {
        "train": train,
        "compare": compare,
        "cbs": _cbs_parser(),
        "verify": _verify_parser(),
        "schedule": schedule,
        "mup": mup,
    }
    for name, own in parsers.items():
        commands.add_subcommand(name, own, help=COMMANDS[name])
    # only now: jsonargparse wants the parser to be part of its parent before it gets sub-commands of its own
    add_subcommands(schedule, SCHEDULE_SUBCOMMANDS)
    add_subcommands(mup, MUP_SUBCOMMANDS)
    parser.asked = parsers.get(asked or "")
    return parser
