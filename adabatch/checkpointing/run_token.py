"""The token of a run that has no ``AdaptiveBatch``, whose journal would hold it."""

from __future__ import annotations

import secrets
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from adabatch.checkpointing.files import is_checkpoint

# The run of a process goes by its model, since `save` and `load` make a new `Checkpoints` at each call. Nothing is kept
# alive. An attribute on the user's model would be copied and pickled with it.
_TOKENS: WeakKeyDictionary[nn.Module, dict[Path, str]] = WeakKeyDictionary()


def new_token() -> str:
    """A token that no other run has."""
    # From the system: a seeded generator could give the same token to another run.
    return secrets.token_hex(6)


def token_of(model: nn.Module, folder: Path) -> str:
    """The token of the run of a model, in a folder of checkpoints; a new one if it has loaded nothing from there."""
    return _TOKENS.setdefault(model, {}).setdefault(_place(folder), new_token())


def set_token(model: nn.Module, folder: Path, token: str) -> None:
    """Notes that a model belongs to a run, as far as a folder of checkpoints goes.

    Args:
        model: without wrappers.
        folder: of the run's checkpoints, or one of them.
        token: of the run.
    """
    # By folder: of two runs that begin from one pretrained model, each has a token of its own where it saves.
    _TOKENS.setdefault(model, {})[_place(folder)] = token


def _place(folder: Path) -> Path:
    return (folder.parent if is_checkpoint(folder) else folder).resolve()
