"""Checkpoints of a run on a DeepSpeed engine: the engine writes its own, with our state in its ``client_state``."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]
from torch import Tensor

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import require
from adabatch.batch.plan import Duration
from adabatch.checkpointing.checkpoints import Loaded
from adabatch.checkpointing.files import CheckpointError
from adabatch.checkpointing.finite_state import check_finite, optimizer_states
from adabatch.checkpointing.lock import FolderLock, read_lock
from adabatch.checkpointing.own_parts import warn_of_missing_parts
from adabatch.checkpointing.plain import NotPlain, plain
from adabatch.checkpointing.run_state import Stateful
from adabatch.checkpointing.save_times import SaveTimes
from adabatch.integrations.deepspeed_settings import EngineSettings
from adabatch.runtime.collectives import workers_of
from adabatch.runtime.random_state import random_state, restore_random_state
from adabatch.runtime.waiting import named_if_long

_log = logging.getLogger("adabatch")

KEY = "adabatch"
"""The key of our state in ``client_state``."""

_NAME = re.compile(r"step\d{8,}(-\d+)?")
"""The name of a checkpoint: its step, and a number if another run has one of that step."""

LATEST = "latest"
"""The file in which DeepSpeed names its newest checkpoint, once it is complete."""


class DeepSpeedCheckpoints:
    """Saves a run on a DeepSpeed engine at intervals into one folder, and resumes from the newest checkpoint.

    It does for ``engine.save_checkpoint`` what ``Checkpoints`` does on its own: it decides when to save, keeps a few
    checkpoints, and saves the batches, the schedule, the place in the data and the random numbers with them. The files
    are DeepSpeed's, so its tools can read them. They are not checked for damage, and another number of ranks needs
    DeepSpeed's universal checkpoints. Settings that differ on resume are taken over, kept or refused as ``Checkpoints``
    does it, if this object is made before the run begins.

    Args:
        folder: the folder of the run's checkpoints.
        engine: the engine, as ``deepspeed.initialize`` returned it.
        batches: the batches, as ``attach`` returned them.
        schedule: the schedule of the learning rate.
        order: the order of the data, whose place is saved. The first save warns if the loop reads a ``GlobalOrder``
            and it is not given.
        every: save after this much training.
        every_seconds: save after this much time on the first rank.
        keep: number of checkpoints to keep.

    Raises:
        ValueError: if ``keep`` is below 1, or an interval has no length.
        TypeError: if an interval has no unit.
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
        self._settings = EngineSettings(engine, self._parts)
        self._folder = Path(folder)
        self._engine = engine
        self._batches = batches
        self._ranks = workers_of(None, device=engine.device)
        self._keep = keep
        self._warned = False
        self._lock = FolderLock(self._folder)
        self._times = SaveTimes(batches, every=every, every_seconds=every_seconds)
        self._times.listen(first=self._ranks.rank == 0)

    def step(self, *, now: bool = False) -> bool:
        """Saves if a checkpoint is due. Call it on all ranks at the end of a step, after ``engine.step()``.

        Args:
            now: save in any case, unless this step is saved already.

        Returns:
            Whether it saved.
        """
        if not self._times.due(now=now):
            return False
        self.save()
        return True

    def save(self) -> None:
        """Saves the run as it is between two steps. All ranks must call it.

        Raises:
            CheckpointError: on all ranks, if a part contains something that could not be read back, if weights or the
                optimizer's state are not finite, or if the folder belongs to another process or another run.
        """
        self._batches.settle()
        if not self._warned:
            # of the order of the data only: the engine saves the optimizer
            warn_of_missing_parts(self._batches, self._batches.optimizer, self._parts.values())
            self._warned = True
        self._wait_for_all("save() or step() of DeepSpeedCheckpoints")
        # A collective, so it comes before anything that may fail on one rank only.
        own = random_state(self._engine.device).to(self._ranks.device)
        with named_if_long("save() or step() of DeepSpeedCheckpoints", self._ranks.size):
            rows = self._ranks.gather(own).cpu()
        failure: Exception | None = None
        state: dict[str, Any] = {}
        again = 0
        try:
            state = {name: plain(part.state_dict(), name) for name, part in self._parts.items()}
            state |= {"random": rows, "run": self._batches.journal.run}
            check_finite(_numbers_of(self._engine))
        except (NotPlain, CheckpointError) as error:
            failure = error
        self._raise_together(failure)  # before anything is written
        try:
            if self._ranks.rank == 0:
                self._lock.check()
                # At each save, since load() claims a folder whose run it does not know, and finds nothing there where
                # the run that it names was killed before its first checkpoint.
                self._refuse_other_run()
                self._claim()
                again = self._make_room()
                # Before the engine's files: once `latest` names the checkpoint, its description is there.
                self._settings.write(self._place(again))
                self._batches.journal.sync()  # no checkpoint may know of steps that the journal can still lose
        except (NotPlain, CheckpointError, OSError) as error:
            failure = error
        (again,) = map(int, self._raise_together(failure, again))
        place = self._place(again)
        self._engine.save_checkpoint(str(self._folder), tag=place.name, client_state={KEY: state})
        if self._ranks.rank == 0:
            self._remove_older_than(place)
        self._times.saved()

    def _remove_older_than(self, newest: Path) -> None:
        """Removes all but the newest checkpoints; logs a warning if that cannot be done."""
        try:
            others = [path for path in _checkpoints_in(self._folder) if path != newest]
            # By time: a run that begins again in this folder counts its steps from the first.
            others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for old in others[self._keep - 1 :]:
                shutil.rmtree(old)
        except OSError as error:
            # No error: the checkpoint is saved, and the other ranks do not come here, and would wait for this one.
            _log.warning("checkpoints older than %s could not be removed: %s", newest, error)

    def start_over(self) -> None:
        """Begins a new run in the folder; the lines of its journal are moved to a file beside it.

        Raises:
            CheckpointError: if another process uses the folder.
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
        """Resumes from the checkpoint that DeepSpeed calls its latest.

        Args:
            missing_ok: False raises an error if there is no checkpoint; otherwise the result is None then.

        Raises:
            FileNotFoundError: if there is no checkpoint, and ``missing_ok`` is False.
            ValueError: if DeepSpeed cannot load the checkpoint, if it was saved without ``DeepSpeedCheckpoints``, or if
                this run cannot continue from it.
            CheckpointError: if another process uses the folder.
        """
        self._wait_for_all("load() of DeepSpeedCheckpoints")
        failure: Exception | None = None
        try:
            if self._ranks.rank == 0 and self._folder.is_dir():
                self._lock.claim(None)
        except (CheckpointError, OSError) as error:
            failure = error
        self._raise_together(failure)
        # Only if every rank sees it, so that none begins a run while others load one.
        if not self._ranks.minimum_of((self._folder / LATEST).exists())[0]:
            if missing_ok is False:
                raise FileNotFoundError(f"there is no checkpoint in {self._folder.absolute()}: check the path")
            self._batches.journal.cut(0)
            return None
        saved: dict[str, Any] | None = None
        try:
            saved = self._settings.refuse(self._folder / self._newest())
        except (ValueError, CheckpointError, OSError) as error:
            failure = error
        self._raise_together(failure)
        path, client = self._engine.load_checkpoint(str(self._folder))
        if path is None or KEY not in client:
            raise ValueError(
                f"{self._folder} holds no checkpoint of DeepSpeedCheckpoints: give another folder, or load it with "
                f"engine.load_checkpoint"
            )
        state = client[KEY]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        taken, kept = ((), ()) if saved is None else self._settings.enforce(saved, state)
        restore_random_state(state["random"], self._ranks.rank, self._engine.device)
        self._batches.journal.run = state.get("run", self._batches.journal.run)
        if self._ranks.rank == 0:
            self._claim()
            self._batches.journal.cut(self._batches.consumed.examples)
            for setting in kept:
                _log.warning("%s", setting)
        self._times.loaded()
        return Loaded(Path(path).parent, taken, (), kept)

    def _wait_for_all(self, call: str) -> None:
        if self._batches.places is not None:
            self._batches.places.wait_for_all(call)

    def __enter__(self) -> Self:
        """Opens nothing."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Releases the folder, and waits until all ranks have saved."""
        if self._batches.journal.guard == self._lock.check:
            self._batches.journal.guard = None
        self._lock.release()
        if error[0] is None and dist.is_initialized():
            dist.barrier()

    def _newest(self) -> str:
        """The name of the checkpoint that DeepSpeed loads; the file of the shared folder may be gone."""
        return (self._folder / LATEST).read_text(encoding="utf-8").strip()

    def _place(self, again: int) -> Path:
        return self._folder / f"step{self._batches.consumed.steps:08d}{f'-{again}' if again else ''}"

    def _make_room(self) -> int:
        """The number of checkpoints of this step that must stay, as the newest of another run may be one.

        Files of a checkpoint that was never finished are removed: DeepSpeed would read those of ranks that are gone.
        """
        newest = self._newest() if (self._folder / LATEST).exists() else ""
        again = 0
        while self._place(again).name == newest:
            again += 1
        if self._place(again).exists():
            shutil.rmtree(self._place(again))
        return again

    def _claim(self) -> None:
        self._lock.claim(self._batches.journal.run)
        if self._batches.journal.guard is None:
            self._batches.journal.guard = self._lock.check

    def _refuse_other_run(self) -> None:
        mine, theirs = self._batches.journal.run, read_lock(self._folder).run
        if theirs not in (None, mine) and (self._folder / LATEST).exists():
            raise CheckpointError(
                f"{self._folder} holds the checkpoints of run {theirs}, and this is run {mine}, which has loaded none "
                f"of them: load() to continue that run, start_over() to take its folder, or use another folder"
            )

    def _raise_together(self, failure: Exception | None, *numbers: float) -> list[float]:
        """Raises on all ranks what failed on one; returns the sums of the ranks' numbers."""
        failed, *sums = self._ranks.sum_of(failure is not None, *numbers)
        if isinstance(failure, ValueError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"a checkpoint in {self._folder}: {failure}") from failure
        if failed:
            raise CheckpointError(f"another rank could not use the checkpoints in {self._folder}")
        return sums


def _checkpoints_in(folder: Path) -> list[Path]:
    """The folders that this class names, and no other: the user may keep more beside them."""
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]


def _numbers_of(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """The trained weights of a model, the copies of them in the optimizer, and its state, as far as this rank holds
    them."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name, getattr(parameter, "ds_tensor", parameter.detach())  # ZeRO 3 leaves a shard
    for parameter in engine.basic_optimizer.state:
        yield "the optimizer's copy of a parameter", parameter.detach()
    yield from optimizer_states(engine.basic_optimizer, engine.module)
