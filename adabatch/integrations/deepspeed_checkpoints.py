"""Checkpoints of a run on a DeepSpeed engine: the engine writes its own, and our parts ride in its ``client_state``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import require
from adabatch.batch.plan import Duration
from adabatch.checkpointing.checkpoints import Loaded
from adabatch.checkpointing.files import CheckpointError
from adabatch.checkpointing.lock import FolderLock, read_lock
from adabatch.checkpointing.plain import NotPlain, plain
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
        require(keep >= 1, "keep must be at least 1 checkpoint", keep)
        named = {"order": order, "batches": batches, "schedule": schedule}
        self._parts: dict[str, Any] = {name: part for name, part in named.items() if part is not None}
        self._folder = Path(folder)
        self._engine = engine
        self._batches = batches
        self._ranks = workers_of(None, device=engine.device)
        self._keep = keep
        self._lock = FolderLock(self._folder)
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
        """Saves the run as it is between two steps; on all ranks.

        Raises:
            CheckpointError: a part holds what could not be read back, or the folder is another process's or another
                run's; on all ranks.
        """
        self._batches.settle()
        rows = self._ranks.gather(random_state(self._engine.device).to(self._ranks.device)).cpu()
        failure: Exception | None = None
        state: dict[str, Any] = {}
        try:
            state = {name: plain(part.state_dict(), name) for name, part in self._parts.items()}
            state |= {"random": rows, "run": self._batches.journal.run}
            if self._ranks.rank == 0:
                if not self._lock.held:
                    self._refuse_other_run()
                    self._claim()
                self._lock.check()
        except (NotPlain, CheckpointError, OSError) as error:
            failure = error
        self._raise_together(failure)
        tag = f"step{self._batches.consumed.steps:08d}"
        if self._ranks.rank == 0:
            self._batches.journal.sync()  # no checkpoint may know of steps that the journal can still lose
        self._engine.save_checkpoint(str(self._folder), tag=tag, client_state={KEY: state})
        if self._ranks.rank == 0:
            for old in sorted(self._folder.glob("step*"))[: -self._keep]:
                shutil.rmtree(old)
        self._times.saved()

    def start_over(self) -> None:
        """Begins a new run in the folder; the journal's lines go to its side file.

        Raises:
            CheckpointError: the folder is another process's.
        """
        failure: Exception | None = None
        try:
            if self._ranks.rank == 0:
                self._claim()
            self._batches.journal.cut(0)
        except (CheckpointError, OSError) as error:
            failure = error
        self._raise_together(failure)

    def load(self, *, missing_ok: bool | None = None) -> Loaded | None:
        """Goes on from the checkpoint that DeepSpeed calls its latest.

        Args:
            missing_ok: return None where there is none, as by default, rather than raise.

        Raises:
            FileNotFoundError: there is none, where that is an error.
            ValueError: one that DeepSpeed cannot load, or that was saved without ``DeepSpeedCheckpoints``.
            CheckpointError: the folder is another process's.
        """
        failure: Exception | None = None
        try:
            if self._ranks.rank == 0 and self._folder.is_dir():
                self._lock.claim(None)
        except (CheckpointError, OSError) as error:
            failure = error
        self._raise_together(failure)
        if not self._ranks.minimum_of((self._folder / LATEST).exists())[0]:
            if missing_ok is False:
                raise FileNotFoundError(f"there is no checkpoint in {self._folder.absolute()}: check the path")
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
        self._batches.journal.run = state.get("run", self._batches.journal.run)
        if self._ranks.rank == 0:
            self._claim()
            self._batches.journal.cut(self._batches.consumed.examples)
        self._times.loaded()
        return Loaded(Path(path).parent, (), ())

    def __enter__(self) -> Self:
        """Nothing is open."""
        return self

    def __exit__(self, *error: Any) -> None:
        """All ranks have what they saved."""
        if self._batches.journal.guard == self._lock.check:
            self._batches.journal.guard = None
        self._lock.release()
        if error[0] is None and dist.is_initialized():
            dist.barrier()

    def _claim(self) -> None:
        self._lock.claim(self._batches.journal.run)
        if self._batches.journal.guard is None:
            self._batches.journal.guard = self._lock.check

    def _refuse_other_run(self) -> None:
        mine, theirs = self._batches.journal.run, read_lock(self._folder).run
        if theirs not in (None, mine) and (self._folder / LATEST).exists():
            raise CheckpointError(
                f"{self._folder} holds the checkpoints of run {theirs}, and this is run {mine}, which has loaded none "
                f"of them: load() to go on with that run, start_over() to take its folder, or use another folder"
            )

    def _raise_together(self, failure: Exception | None) -> None:
        """Raises on all ranks what failed on one."""
        failed = self._ranks.sum_of(failure is not None)[0]
        if failure is not None:
            raise CheckpointError(f"a checkpoint in {self._folder}: {failure}") from failure
        if failed:
            raise CheckpointError(f"another rank could not use the checkpoints in {self._folder}")
