"""``adabatch mup``: a model's width plan, the coordinate check, and a small sweep over widths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jsonargparse import ArgumentParser, Namespace

from adabatch.cli.display import Display, output
from adabatch.cli.mup.widths import Subject, check_coordinates, show_plan, sweep
from adabatch.cli.subcommands import Command
from adabatch.optim.mup.coordinates import TOLERANCE
from adabatch.optim.mup.methods import METHODS

DESCRIPTION = (
    "Settings that survive a change of width: the plan of a model, whether its updates keep their size, and whether "
    "the best learning rate and damping stay where they are. docs/mup.md has the rules, their sources and their limits."
)
PLAIN_WIDTH = 160
"""Width of a table that goes into a file."""


def run_mup(config: Namespace) -> int:
    """Runs the sub-command; returns its exit status.

    Raises:
        ValueError: if something is wrong with its arguments.
        OSError: if a file cannot be written, or the reader of its output has ended.
    """
    display = Display(0, output(width=PLAIN_WIDTH))
    arguments = vars(config[config.subcommand])
    names = Subject.__dataclass_fields__
    # `check` and `sweep` have all of these arguments, `plan` has not
    if names.keys() <= arguments.keys():
        subject = Subject(**{name: arguments.pop(name) for name in names})
        arguments["subject"] = subject
    status: int = SUBCOMMANDS[config.subcommand].run(**arguments, display=display)
    display.check_read()
    return status


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=str,
        default="adabatch.recipes.widths.mlp",
        metavar="PATH",
        help="import path of a function: width -> model",
    )
    parser.add_argument("--base", type=int, default=64, metavar="WIDTH", help="width at which the settings were tuned")


def _add_subject(parser: ArgumentParser, *, widths: list[int], steps: int, seeds: int) -> None:
    _add_model(parser)
    parser.add_argument(
        "--data",
        type=str,
        default="adabatch.recipes.widths.digits",
        metavar="PATH",
        help="import path of a function: seed -> batches of (inputs, targets)",
    )
    parser.add_argument(
        "--loss",
        type=str,
        default="torch.nn.functional.cross_entropy",
        metavar="PATH",
        help="import path of a function: outputs, targets -> scalar",
    )
    parser.add_argument(
        "--method",
        type=str,
        default="adamw",
        help=f"{', '.join(METHODS)}, or import path of a function: model, plan, lr, damping -> optimizer(s)",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=widths, metavar="WIDTH", help="widths to compare")
    parser.add_argument("--steps", type=int, default=steps, help="steps of training")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many seeds")
    parser.add_argument("--device", type=str, default="cpu", help="where to train")


def _plan_arguments(parser: ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--width", type=int, required=True, help="width of the model")
    parser.add_argument("--out", type=Path | None, default=None, metavar="JSON", help="file to write the plan to")


def _check_arguments(parser: ArgumentParser) -> None:
    _add_subject(parser, widths=[256, 512, 1024], steps=1, seeds=4)
    parser.add_argument("--lr", type=float | None, default=None, help="learning rate at the base width")
    parser.add_argument("--damping", type=float | None, default=None, help="eps, epsilon or damping at the base width")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest own slope that passes")
    parser.add_argument("--out", type=Path, default=Path("mup_check.png"), metavar="PNG", help="picture to write")


def _sweep_arguments(parser: ArgumentParser) -> None:
    _add_subject(parser, widths=[64, 256], steps=100, seeds=1)
    parser.add_argument("--lrs", type=float, nargs="+", required=True, metavar="LR", help="learning rates to try")
    parser.add_argument("--damping", type=float | None, default=None, help="damping of the learning rates' sweep")
    parser.add_argument(
        "--dampings", type=float, nargs="*", default=[], metavar="DAMPING", help="dampings to try at the best of them"
    )
    parser.add_argument("--control", type=bool, default=False, help="the standard parameterization too")
    parser.add_argument("--out", type=Path, default=Path("mup_sweep.png"), metavar="PNG", help="picture to write")


SUBCOMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "plan": Command(
            "how settings move from a narrow model to a wide one",
            "Prints fan ratios, roles and multipliers of every parameter. Example: adabatch mup plan --model "
            "mypackage.models.make --base 64 --width 1024",
            _plan_arguments,
            show_plan,
        ),
        "check": Command(
            "whether every layer's update keeps its size",
            "The coordinate check, beside the standard parameterization that ought to fail. Status 0: passed; 1: "
            "failed; 2: a mistake in the arguments. Example: adabatch mup check --method shampoo --widths 128 256 512",
            _check_arguments,
            check_coordinates,
        ),
        "sweep": Command(
            "whether the best learning rate and damping stay",
            "Short training runs over widths, learning rates and dampings. Example: adabatch mup sweep --method adamw "
            "--lrs 0.001 0.002 0.004 0.008 0.016 --control true",
            _sweep_arguments,
            sweep,
        ),
    }
)
