"""Checkpoints of a run on a DeepSpeed engine: the engine writes its own, and our parts ride in its ``client_state``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]

from adabatch.adaptive import AdaptiveBatch
from adabatch.batch.plan import Duration
from adabatch.checkpointing.checkpoints import Loaded
from adabatch.checkpointing.run_state import Stateful
from adabatch.checkpointing.save_times import SaveTimes
from adabatch.runtime.collectives import workers_of
from adabatch.runtime.random_state import random_state, restore_random_state

KEY = "adabatch"
"""Where in ``client_state`` our parts are."""

LATEST = "latest"
"""The file in which DeepSpeed names its newest checkpoint, once that is whole."""


class DeepSpeedCheckpoints:
    """Saves a run on a DeepSpeed engine again and again into one folder, and goes on from the newest.

    It does for ``engine.save_checkpoint`` what ``Checkpoints`` does by itself: says when, keeps a few, and takes the
    batches, the schedule, the place in the data and the random numbers along. Files are DeepSpeed's, so its tools read
    them; they are not checked for damage, and another number of ranks needs DeepSpeed's universal checkpoints.

    Args:
        folder: of the run's checkpoints.
        engine: of ``deepspeed.initialize``.
        batches: of ``attach``.
        schedule: of the learning rate.
        order: the place in the data.
        every: save after so much training.
        every_seconds: save after so much time on the first rank.
        keep: how many checkpoints stay.

    Raises:
        ValueError: ``keep`` below 1, or an interval of no length.
        TypeError: an interval without a unit.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: DeepSpeedEngine,
        batches: AdaptiveBatch,
        schedule: Stateful | None = None,
        order: Stateful | None = None,
        every: Duration | None = None,
        every_seconds: float | None = None,
        keep: int = 3,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        named = {"order": order, "batches": batches, "schedule": schedule}
        self._parts: dict[str, Any] = {name: part for name, part in named.items() if part is not None}
        self._folder = Path(folder)
        self._engine = engine
        self._batches = batches
        self._ranks = workers_of(None, device=engine.device)
        self._keep = keep
        self._times = SaveTimes(batches, every=every, every_seconds=every_seconds)
        self._times.listen(first=self._ranks.rank == 0)

    def step(self, *, now: bool = False) -> bool:
        """Saves where a checkpoint is due; call it on all ranks at the end of a step, after ``engine.step()``.

        Args:
            now: save in any case, unless this very step is saved already.

        Returns:
            Whether it saved.
        """
        if not self._times.due(now=now):
            return False
        self.save()
        return True

    def save(self) -> None:
        """Saves the run as it is between two steps; on all ranks."""
        self._batches.settle()
        rows = self._ranks.gather(random_state(self._engine.device).to(self._ranks.device)).cpu()
        state = {"random": rows, **{name: part.state_dict() for name, part in self._parts.items()}}
        tag = f"step{self._batches.consumed.steps:08d}"
        if self._ranks.rank == 0:
            self._batches.journal.sync()  # no checkpoint may know of steps that the journal can still lose
        self._engine.save_checkpoint(str(self._folder), tag=tag, client_state={KEY: state})
        if self._ranks.rank == 0:
            for old in sorted(self._folder.glob("step*"))[: -self._keep]:
                shutil.rmtree(old)
        self._times.saved()

    def load(self) -> Loaded | None:
        """Goes on from the checkpoint that DeepSpeed calls its latest; None where there is none.

        Raises:
            ValueError: one that DeepSpeed cannot load, or that was saved without ``DeepSpeedCheckpoints``.
        """
        if not self._ranks.minimum_of((self._folder / LATEST).exists())[0]:
            self._batches.journal.cut(0)
            return None
        path, client = self._engine.load_checkpoint(str(self._folder))
        if path is None or KEY not in client:
            raise ValueError(
                f"{self._folder} holds no checkpoint of such a run: give another folder, or load it by "
                f"engine.load_checkpoint"
            )
        state = client[KEY]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        restore_random_state(state["random"], self._ranks.rank, self._engine.device)
        if self._ranks.rank == 0:
            self._batches.journal.cut(self._batches.consumed.examples)
        self._times.loaded()
        return Loaded(Path(path).parent, (), ())

    def __enter__(self) -> Self:
        """Nothing is open."""
        return self

    def __exit__(self, *error: Any) -> None:
        """All ranks have what they saved."""
        if error[0] is None and dist.is_initialized():
            dist.barrier()
