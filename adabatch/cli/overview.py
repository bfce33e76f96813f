"""The commands and their descriptions, which need none of the extras."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adabatch import __version__

DESCRIPTION = "Batch sizes that grow with the noise of the gradient, and learning rates that follow."
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "init": "write a commented config for your own model file, or a shipped one",
        "train": "train the model of a config file",
        "compare": "compare a run with the constant smallest and largest batch size",
        "cbs": "measure the critical batch by branches from a checkpoint",
        "verify": "check that adaptive batches work on a job's model, data and processes",
        "report": "report what happened in runs, and why, as one HTML page",
        "plan": "plan a run: which batch to use, and what it will cost on a cluster",
        "tail": "follow a run in a terminal",
        "schedule": "compare, refine, transfer and extend learning-rate schedules",
        "mup": "plan and check settings that survive a change of width",
        "doctor": "print what is installed, where this process runs, and what is too old",
        "completion": "print a script with which a shell completes commands and options",
    }
)


def overview() -> str:
    """The text of `adabatch --help`."""
    commands = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    return (
        f"usage: adabatch COMMAND [OPTION ...]\n\n{DESCRIPTION}\n\n{commands}\n\n"
        f"adabatch COMMAND --help tells more; adabatch --version is {__version__}."
    )
