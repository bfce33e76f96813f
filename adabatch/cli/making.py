"""Jobs from configs, which can be built again from the same seed in any process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from adabatch.arguments import require
from adabatch.cli.job import Job
from adabatch.cli.mistakes import of_a_group
from adabatch.cli.parser import build_parser


def seed_everything(seed: int) -> None:
    """Seeds the generators of models and data sets, including numpy's legacy global one.

    Raises:
        ValueError: if torch does not accept the seed.
    """
    require(0 <= seed < 2**64, "seed must be a whole number from 0 to 2**64 - 1", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    # numpy's takes 32 bits only
    np.random.seed(seed % 2**32)  # noqa: NPY002


def job_maker(parser: ArgumentParser, config: Namespace, command: str) -> Callable[[], Job]:
    """A function that builds the job of a config again, from the same seed each time."""

    def make() -> Job:
        seed_everything(config[command].seed)
        # every class of the config is made by _made, so that an error says which of them refused its arguments
        try:
            fields: dict[str, Any] = vars(parser.instantiate(config, instantiators=[(_made, object, True)])[command])
        except ValueError as error:  # for a field that may be null too, the parser lists all that it tried
            if (said := of_a_group(str(error))) is None:
                raise
            raise ValueError(said) from error
        # the fields also hold options of the command, such as --quiet, which are not part of the job
        names = Job.__dataclass_fields__
        return Job(**{name: value for name, value in fields.items() if name in names})

    return make


def job_of(arguments: Sequence[str]) -> Job:
    """The job of a command line, for a separate process."""
    parser = build_parser(arguments[0])
    return job_maker(parser, parser.parse_args(arguments), arguments[0])()


def job_settings(parser: ArgumentParser, config: Namespace, command: str) -> dict[str, Any]:
    """The settings of the job in plain values, without the folders that it writes to."""
    # as YAML and back: plain values, with defaults, whatever mixture of files and flags they came from
    asked: dict[str, Any] = yaml.safe_load(parser.dump(config))[command]
    # a run that is moved, or saved at other intervals, is still the same run
    names = Job.__dataclass_fields__.keys() - {"out", "checkpoint"}
    return {name: value for name, value in asked.items() if name in names}


def _made(kind: type[Any], *arguments: Any, **named: Any) -> Any:
    """An object of the config.

    Raises:
        ValueError: if its class refuses the arguments; names the class in front of the reason.
    """
    try:
        return kind(*arguments, **named)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{kind.__name__}: {error}") from error
