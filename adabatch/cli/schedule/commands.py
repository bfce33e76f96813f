"""``adabatch schedule``: which learning-rate schedule, at which base learning rate, and how to continue a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from adabatch.cli.display import Display, output
from adabatch.cli.schedule.compare import compare_shapes, transfer_lr
from adabatch.cli.schedule.extend import extend
from adabatch.cli.schedule.refine import NextRule, write_refined
from adabatch.cli.schedule.shape_text import known_shapes
from adabatch.cli.subcommands import Command
from adabatch.lr.recorded import RecordedUnit
from adabatch.lr.refine import OptimizerKind

DESCRIPTION = (
    "Learning-rate schedules from theory: which shape is best, at which base learning rate, and how to continue a "
    "run. docs/schedules.md has the formulas, their sources and their limits."
)
PLAIN_WIDTH = 132
"""Width of a table that goes into a file."""

SHAPE = f"a name with settings by keyword, or a YAML file with a key `shape`; there are {known_shapes()}"
RUN = "folder of a run of `adabatch train`, or its journal"
NORMS = f"take gradient norms, batch factors and progress from a run: {RUN}; without it they are constant"


def run_schedule(config: Namespace) -> None:
    """Runs the sub-command.

    Raises:
        ValueError: if something is wrong with its arguments.
        OSError: if a file cannot be read or written, or the reader of its output has ended.
    """
    display = Display(0, output(width=PLAIN_WIDTH))
    SUBCOMMANDS[config.subcommand].run(**vars(config[config.subcommand]), display=display)
    display.check_read()


def _compare_arguments(parser: ArgumentParser) -> None:
    default = ["linear", "cosine", "wsd(cooldown=0.2)"]
    parser.add_argument("--shapes", nargs="+", type=str, default=default, metavar="SHAPE", help=f"shapes, each {SHAPE}")
    _add_steps(parser)
    _add_norms(parser)
    parser.add_argument("--out", type=Path, default=Path("schedules.png"), metavar="PNG", help="picture to write")


def _transfer_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base_lr", type=float, required=True, metavar="LR", help="base learning rate tuned for --source"
    )
    parser.add_argument("--source", type=str, required=True, metavar="SHAPE", help=f"shape that was tuned, {SHAPE}")
    parser.add_argument("--target", type=str, required=True, metavar="SHAPE", help="shape to use, in the same form")
    _add_steps(parser)
    for name, what in (("--target_steps", "length of the new run"), ("--target_warmup_steps", "its warm-up")):
        parser.add_argument(name, type=int | None, default=None, metavar="N", help=f"{what}; by default the same")
    _add_norms(parser)
    parser.add_argument("--out", type=Path, default=Path("transfer.png"), metavar="PNG", help="picture to write")


def _refine_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--kind",
        type=OptimizerKind,
        default="sgd",
        help="optimizer: sgd reads l2 norms (with momentum or not), adam and adagrad l1 norms (measure.l1)",
    )
    parser.add_argument(
        "--lr_rule",
        type=NextRule | None,
        default=None,
        metavar="{" + ",".join(get_args(NextRule)) + "}",
        help="how the next run's learning rate follows the batch; by default as this run's did, from its journal",
    )
    parser.add_argument(
        "--smoothing",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="window of the median filter, a share of the norms",
    )
    parser.add_argument("--length", type=int, default=200, metavar="N", help="largest number of values in the table")
    _add_clock(parser)
    _add_folder(parser, "refined.yaml and refined.png")


def _extend_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of `adabatch train` with a wsd shape")
    parser.add_argument(
        "--factor", type=float | None, default=None, metavar="X", help="new length over the old; 2 if neither is given"
    )
    parser.add_argument(
        "--new_total", type=int | None, default=None, metavar="N", help="new length in the unit of the run's total"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path | None,
        default=None,
        metavar="FILE",
        help="checkpoint of the run from before an extension departs from its schedule: it is copied under the new one",
    )
    _add_folder(parser, "extend_two_stages.yaml, extend_longer_cooldown.yaml and extend.png")


def _add_steps(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int | None, default=None, metavar="T", help="length, warm-up included; that of --norms, or 1000"
    )
    parser.add_argument("--warmup_steps", type=int, default=0, metavar="W", help="linear warm-up from zero")


def _add_norms(parser: ArgumentParser) -> None:
    parser.add_argument("--norms", type=Path | None, default=None, metavar="RUN", help=NORMS)
    _add_clock(parser)


def _add_clock(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        type=RecordedUnit | None,
        default=None,
        metavar="{" + ",".join(get_args(RecordedUnit)) + "}",
        help="what progress counts; by default what it counted in RUN, or examples if RUN is a journal",
    )


def _add_folder(parser: ArgumentParser, files: str) -> None:
    parser.add_argument(
        "--out", type=Path | None, default=None, metavar="FOLDER", help=f"folder for {files}; by default RUN's"
    )


SUBCOMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "compare": Command(
            "which shape, by the last-iterate bound",
            "Ranks shapes by the last-iterate bound of convex theory, each at its best base learning rate. "
            "Example: adabatch schedule compare --shapes linear cosine 'wsd(cooldown=0.2)' --steps 10000",
            _compare_arguments,
            compare_shapes,
        ),
        "refine": Command(
            "a schedule from the gradient norms of a run",
            "Makes the schedule that a finished run's gradient norms ask for, as a config for the next run. "
            "Example: adabatch schedule refine runs/first",
            _refine_arguments,
            write_refined,
        ),
        "transfer": Command(
            "a tuned base learning rate, for another shape or length",
            "Carries a tuned base learning rate over to another shape or length. Example: adabatch schedule transfer "
            "--base_lr 1e-3 --source 'wsd(cooldown=0.2)' --target linear",
            _transfer_arguments,
            transfer_lr,
        ),
        "extend": Command(
            "how to make a finished run longer",
            "Two ways to make a finished wsd run longer at the base learning rate it has, with where to resume. "
            "Example: adabatch schedule extend runs/first --factor 2",
            _extend_arguments,
            extend,
        ),
    }
)
