"""Which checkpoint to load: the newest that every rank finds intact, the same on all ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from adabatch.checkpointing.files import CheckpointError, Damaged, Manifest, NewerFormat, check_files, checkpoints_in
from adabatch.runtime.collectives import Collectives

_READABLE, _DAMAGED, _NEWER = 2.0, 1.0, 0.0


class NewestCheckpoint(NamedTuple):
    """A checkpoint that can be read.

    Args:
        path: where it is.
        manifest: its contents.
        damaged: newer ones that cannot be read, with the reason.
    """

    path: Path
    manifest: Manifest
    damaged: dict[Path, str]


def newest_checkpoint(folder: Path, ranks: Collectives) -> NewestCheckpoint | None:
    """The newest checkpoint that is intact for all ranks, which share the reading; None if there is no checkpoint at
    all.

    Args:
        folder: of a run's checkpoints, or one checkpoint.
        ranks: all of them must call this.

    Raises:
        CheckpointError: if there are checkpoints but all are damaged; says how.
        NewerFormat: if a later release wrote the newest one. An older one is not used instead, because that would
            overwrite the run that wrote the newer one.
    """
    mine = checkpoints_in(folder)
    damaged: dict[Path, str] = {}
    below = math.inf
    while True:
        # The first rank decides, because other ranks may see changes of a network folder a little later.
        candidate = next((number for number in mine if number < below), 0) if ranks.rank == 0 else 0
        below = ranks.sum_of(candidate)[0]
        if below == 0:
            break
        # a rank that does not see the folder yet makes up a path, finds it unreadable, and all go on to an older one
        # together
        path = mine.get(int(below), folder / f"{int(below):06d}")
        condition, manifest, problem = _READABLE, None, ""
        try:
            manifest = check_files(path, share=ranks.rank, of=ranks.size)
        except Damaged as error:
            condition, problem = _DAMAGED, str(error)
        except NewerFormat as error:
            condition, problem = _NEWER, str(error)
        # each rank has read only its share of the files, so one rank may find damage that the others cannot know of
        worst = ranks.minimum_of(condition)[0]
        # By the worst verdict of all ranks, which is the same everywhere, so that all leave the loop in the same turn.
        if worst == _READABLE:
            assert manifest is not None
            return NewestCheckpoint(path, manifest, damaged)
        if worst == _NEWER:
            raise NewerFormat(problem or f"{path} has a newer format where another rank read it: upgrade adabatch")
        damaged[path] = problem or f"{path} is damaged where another rank read it"
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be used: {'; '.join(damaged.values())}. Restore one from a copy, or move them away to "
            f"begin again"
        )
    return None
