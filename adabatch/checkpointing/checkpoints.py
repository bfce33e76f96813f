"""``Checkpoints``, ``save`` and ``load``: a whole run on the disk, and back."""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.arguments import checked, checked_but, require
from adabatch.batch.plan import Duration
from adabatch.checkpointing.background import Background
from adabatch.checkpointing.differences import Difference, differences, refuse
from adabatch.checkpointing.files import (
    MANIFEST,
    CheckpointError,
    abandon,
    begin_checkpoint,
    being_written,
    checkpoints_in,
    finish,
    is_checkpoint,
    place_of,
)
from adabatch.checkpointing.lock import LOCK, FolderInUse, FolderLock, read_lock
from adabatch.checkpointing.newest import newest_checkpoint
from adabatch.checkpointing.own_parts import check_own_parts, warn_of_missing_helpers, warn_of_missing_parts
from adabatch.checkpointing.run_state import Restored, RunState, Snapshot, Stateful
from adabatch.checkpointing.run_token import set_token, token_of
from adabatch.checkpointing.save_times import SaveTimes
from adabatch.checkpointing.settings import KeptSetting
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.local_sgd.meetings import Purpose
from adabatch.runtime.optimizers.joined import joined

_log = logging.getLogger("adabatch")

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Loaded(NamedTuple):
    """The result of ``load``.

    Args:
        path: the checkpoint that was loaded.
        differences: what differs from the run that saved (batch, world size, config, settings that are taken over);
            the values of this run are used.
        damaged: why newer checkpoints could not be used.
        kept: settings of this run that are not used, because the saved ones are kept; the log names them too.
    """

    path: Path
    differences: tuple[Difference, ...]
    damaged: tuple[str, ...]
    kept: tuple[KeptSetting, ...] = ()


class Checkpoints:
    """Saves a run repeatedly into one folder, and resumes it from there.

        checkpoints = Checkpoints("runs/one", model=model, optimizer=optimizer, batches=batches, schedule=schedule,
                                  order=order, every=examples(100_000))
        checkpoints.load()
        with checkpoints:
            for step in batches.steps(order, until=total):
                ...
                checkpoints.step()  # after optimizer.step(); saves if a checkpoint is due
            checkpoints.step(now=True)

    Every rank creates the object and calls its methods. The first rank writes; if ``fully_shard`` has sharded the
    model, each rank writes its shards (``torch.distributed.checkpoint``). All ranks must see the same folder. One
    process at a time writes into it: ``lock.json`` names the process and the run, from the first ``load`` or ``save``
    until ``close``.

    Args:
        folder: of the run's checkpoints.
        model: plain, in ``DistributedDataParallel``, or sharded.
        optimizer: one, or a list of several, always in the same order.
        batches: the ``AdaptiveBatch``, which knows at which step the run is, and has the journal.
        schedule: of the learning rate.
        order: the place in the data: a ``GlobalOrder``, or a loader with ``state_dict``, which is saved for each rank
            and can be loaded with the same number of ranks only.
        scaler: a ``GradScaler``.
        local_sgd: the ``LocalSGD`` of a plain model. Each worker then writes a file with all of its parts, because
            they differ within a round, and the states of the optimizers mostly differ between rounds too. Between
            rounds a run can be resumed with another number of workers, each from the file of one saved worker.
        others: more parts by name, such as an average of the weights; anything with ``state_dict``.
        config: the run's settings, which are compared on loading: nested mappings of plain values.
        every: length of training from one checkpoint to the next; needs ``batches``.
        every_seconds: time from one checkpoint to the next, on the clock of the first rank; needs ``batches``.
        keep: how many checkpoints to keep.
        background: whether to write in a thread, from a copy on the CPU, while the training continues. Only one
            checkpoint is written at a time: the next save waits for it. An error is raised by the next save, or by
            ``close``.

    Raises:
        ValueError: if ``keep`` is below 1, an interval has no length or is given without ``batches``, a name of
            ``others`` is taken, or the model or the optimizer are not those of ``batches``.
        TypeError: if a part has no state, or an interval has no unit.
    """

    @checked_but("schedule", "order", "scaler", "every")
    def __init__(
        self,
        folder: str | Path,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        batches: AdaptiveBatch | None = None,
        schedule: Stateful | None = None,
        order: Stateful | None = None,
        scaler: Stateful | None = None,
        local_sgd: LocalSGD | None = None,
        others: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        every: Duration | None = None,
        every_seconds: float | None = None,
        keep: int = 3,
        background: bool = True,
    ) -> None:
        self._times = SaveTimes(batches, every=every, every_seconds=every_seconds)
        require(keep >= 1, "keep must be at least 1 checkpoint", keep)
        # They are loaded in this order: the place in the data refuses other data before anything is changed, and the
        # schedule's rates depend on the progress of the batches.
        optimizer = None if optimizer is None else joined(optimizer)
        named = {
            "order": order, "model": model, "optimizer": optimizer, "batches": batches, "schedule": schedule,
            "scaler": scaler, "local_sgd": local_sgd,
        }  # fmt: skip
        taken = {*named, "random"} & (others or {}).keys()
        if taken:
            raise ValueError(f"others must not use the names {', '.join(sorted(taken))}, which are taken")
        parts = {name: part for name, part in {**named, **(others or {})}.items() if part is not None}
        self._parts, self._optimizer = parts, optimizer
        self._run = RunState(parts, config=config)
        if batches is not None:
            check_own_parts(batches, model, optimizer)
        self._ranks = self._run.collectives
        self._folder = Path(folder)
        self._batches = batches
        self._scaled = scaler is not None
        self._saved = self._begun = False
        self._keep = keep
        self._background = Background() if background else None
        self._damaged: set[Path] = set()
        self._lock = FolderLock(self._folder)
        self._times.listen(first=self._ranks.rank == 0)

    @checked
    def step(self, *, now: bool = False) -> bool:
        """Saves if a checkpoint is due; call it at the end of a step, after ``optimizer.step()``.

        Args:
            now: save in any case, unless this step is saved already; for the end of a run.

        Returns:
            Whether it saved.

        Raises:
            ValueError: if there are no ``batches``, which count what was consumed.
            CheckpointError: for the same reasons as ``save``.
        """
        if self._batches is not None:
            # also if no checkpoint is due, as it may be only after hours
            self._batches.check_not_inside("a checkpoint")
        if not self._times.due(now=now):
            return False
        self.save()
        return True

    def save(self) -> None:
        """Saves the run as it is between two steps.

        Raises:
            CheckpointError: on all ranks, if this checkpoint or the previous one (in the background) could not be
                written, a part contains what could not be read back, weights are not finite, or the folder belongs to
                another process or run.
            RuntimeError: if a step has not ended.
        """
        steps, nonce = 0, 0
        if self._batches is not None:
            # raises on all ranks alike, because all of them are at the same place of the loop
            self._batches.settle(scaled=self._scaled)
            if not self._saved:
                warn_of_missing_parts(self._batches, self._optimizer, self._parts.values())
                warn_of_missing_helpers(self._batches, self._parts.values())
            self._saved = True
            steps = self._batches.consumed.steps
        self._run.wait_for_all(Purpose.SAVE, "save() or step() of Checkpoints")
        # Errors are kept until all ranks have met below: a rank that raised here would leave the others waiting.
        failure, number = self._waited(), 0
        taken: Snapshot | None = None
        try:
            # in the foreground nothing changes the state until it is written, so a copy would only cost memory
            taken = self._run.take(copy=self._background is not None)
            if taken is not None:
                taken.contents["run"] = self._own_run()
        except Exception as error:  # of a part of the user's own, for instance
            failure = failure or error
        if failure is None and self._ranks.rank == 0:
            try:
                alone = self._begin_folder()
                # From the system: a seeded generator could give the same number to another writer, and would change
                # the run's random numbers.
                nonce = secrets.randbits(40)
                number = begin_checkpoint(self._folder, steps, nonce, clear=alone)
            except (OSError, CheckpointError) as error:
                failure = error
        # One reduction tells of errors, and carries the numbers of the first rank to the others: theirs are 0. 40 bits
        # are exact in its float64.
        number, nonce = map(int, self._raise_together(failure, number, nonce))
        place = place_of(self._folder, number, steps, nonce)
        if self._background is None:
            self._raise_together(_failure_of(self._write, taken, place))
        elif taken is not None:
            # its error is raised by the next save or by close, where all ranks meet again
            self._background.run(lambda: self._write(taken, place), name="adabatch checkpoint")
        self._times.saved()

    def start_over(self) -> None:
        """Begins a new run in the folder: the journal's lines move to its side file, and the existing checkpoints are
        kept until newer ones replace them.

        Raises:
            CheckpointError: if the folder belongs to another process.
        """
        failure: Exception | None = None
        try:
            if self._ranks.rank == 0:
                self._claim(self._own_run())
            if self._batches is not None:
                self._batches.journal.cut(0)
        except (OSError, CheckpointError) as error:
            failure = error
        self._raise_together(failure)

    @checked
    def load(self, *, missing_ok: bool | None = None) -> Loaded | None:
        """Loads the newest intact checkpoint, the same on all ranks.

        Damaged checkpoints are skipped, and named in the log and in the result. The journal is cut back to the step of
        the checkpoint, so that it becomes equal to that of an uninterrupted run.

        Args:
            missing_ok: whether to return None if there is no checkpoint at all, instead of raising an error. The
                default is True with ``batches``, because a run finds no checkpoint at its first start, and False
                without, as for an evaluation.

        Raises:
            FileNotFoundError: if there is no checkpoint at all, and that is an error.
            ValueError: if these parts and this data cannot continue from the checkpoint, or if it belongs to another
                run than the folder or the journal, or was written by a later release.
            CheckpointError: if all checkpoints are damaged, or the folder belongs to another process.
            RuntimeError: inside a step; on all ranks, if some do not call it.
        """
        if self._batches is not None:
            self._batches.check_not_inside("a load")
        self._run.wait_for_all(Purpose.LOAD, "load() of Checkpoints")
        failure: Exception | None = None
        if self._ranks.rank == 0 and self._batches is not None and self._folder.is_dir():
            try:
                self._claim(None)
            except (OSError, CheckpointError) as error:
                failure = error
        self._raise_together(failure, doing="loaded from")
        found = newest_checkpoint(self._folder, self._ranks)
        if found is None:
            if not (self._batches is not None if missing_ok is None else missing_ok):
                raise FileNotFoundError(
                    f"there is no checkpoint in {self._folder.absolute()}: check the path, or pass missing_ok=True to "
                    f"continue with the parts as they are"
                )
            # a journal without a checkpoint is of a run that was killed before its first one, and begins again from
            # step 0
            self._run.cut_journal()
            return None
        # so that they do not count among those to keep, and a good one is not removed in their favour
        self._damaged |= found.damaged.keys()
        for problem in found.damaged.values():
            _log.warning("%s; resuming from %s", problem, found.path.name)
        saved, now = found.manifest.contents, self._run.describe()
        if not (isinstance(saved.get("parts"), dict) and isinstance(saved.get("sharded"), bool)):
            raise CheckpointError(f"{found.path}: {MANIFEST} matches its checksum, but does not describe a run")
        refuse(saved, now)
        restored: Restored | None = None
        try:
            if self._ranks.rank == 0:
                self._refuse_other_run(found.path, saved.get("run"))
            restored = self._run.restore(found.path, saved)
        except (LookupError, AttributeError) as error:
            failure = CheckpointError(
                f"{found.path} is undamaged, but a part cannot load what it holds ({type(error).__name__}: {error}): "
                f"restore one from a copy, or move it away"
            )
        except Exception as error:  # the other ranks must learn of any error before one of them leaves
            failure = error
        if self._ranks.sum_of(failure is not None)[0] and failure is None:
            # this rank has loaded its parts, but a run with a rank that has not is not a run
            failure = CheckpointError(f"the checkpoint {found.path} could not be loaded by another rank")
        if failure is not None:
            raise failure
        assert restored is not None
        if self._batches is None and isinstance(saved.get("run"), str):
            set_token(self._run.model, self._folder, saved["run"])
        self._times.loaded()
        if self._lock.held:
            self._claim(self._own_run())
        if self._ranks.rank == 0:
            for setting in restored.kept:
                _log.warning("%s", setting)
        differing = (*restored.taken_over, *differences(saved, self._run.describe()))
        return Loaded(found.path, differing, tuple(found.damaged.values()), restored.kept)

    def close(self) -> None:
        """Waits until the last checkpoint is written; nothing can be saved afterwards.

        Raises:
            CheckpointError: on all ranks, if it could not be written.
        """
        self._times.warn_if_never_asked()
        self._run.wait_for_all(Purpose.CLOSE, "close() of Checkpoints")
        failure = self._waited()
        try:
            self._raise_together(failure)
        finally:
            self._release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # After an error the other ranks may be anywhere: the current write is finished, but without any collective.
        failure = self._waited()
        self._release()
        if failure is not None:
            error.add_note(f"a checkpoint could not be written to {self._folder}: {failure}")

    # --- private ----------------------------------------------------------------------------------------------------

    def _own_run(self) -> str:
        """The token of this run."""
        if self._batches is None:
            return token_of(self._run.model, self._folder)
        # for a later save of this model without its batches
        set_token(self._run.model, self._folder, self._batches.journal.run)
        return self._batches.journal.run

    def _claim(self, run: str | None) -> None:
        """Takes the folder for this process; on the first rank.

        Raises:
            FolderInUse, OSError: if that is not possible.
        """
        # locking it would put a file into a finished checkpoint
        if is_checkpoint(self._folder):
            return  # one checkpoint, to be read
        try:
            self._lock.claim(run)
        except OSError as error:
            if error.errno not in _READ_ONLY:  # in a folder that can only be read, no other process writes either
                raise
            return
        self._guard_journal()

    def _guard_journal(self) -> None:
        """Lets the journal write only while this process holds the folder."""
        if self._batches is not None and self._batches.journal.guard is None:
            self._batches.journal.guard = self._lock.check

    def _begin_folder(self) -> bool:
        """Checks the folder before a checkpoint is written, on the first rank.

        Returns:
            Whether unfinished checkpoints are of a killed process. Later, and if another object of this process has
            the folder, one may be under way in the background.

        Raises:
            CheckpointError: if the folder holds checkpoints of another run, or belongs to another process or run.
        """
        self._lock.check()
        mine, theirs, shared = self._own_run(), read_lock(self._folder).run, self._lock.shared
        if theirs not in (None, mine):
            # A lock without checkpoints is of a run that ended before its first one, and holds nothing that could be
            # lost.
            if checkpoints_in(self._folder):
                raise CheckpointError(
                    f"{self._folder} holds the checkpoints of run {theirs}, and this is run {mine}, which has loaded "
                    f"none of them: load() to continue that run, start_over() to take its folder, or use another "
                    f"folder"
                )
            if shared and being_written(self._folder):
                raise CheckpointError(
                    f"{self._folder} belongs to run {theirs} of this process, which is still writing a checkpoint, and "
                    f"this is run {mine}: call close() of the Checkpoints of run {theirs} first, or use another folder"
                )
        # Again at each save: the run is known now, and a lock that names an earlier one, which was killed before its
        # first checkpoint, would let nobody load this one.
        self._lock.claim(mine)
        self._guard_journal()
        alone, self._begun = not (shared or self._begun), True
        return alone

    def _refuse_other_run(self, path: Path, run: str | None) -> None:
        """Checks that a checkpoint belongs to the run of the folder and of the journal, as far as they name one.

        Raises:
            ValueError: if it belongs to another run.
        """
        if run is None or self._batches is None:
            return
        folder = None if is_checkpoint(self._folder) else read_lock(self._folder).run
        if folder not in (None, run):
            raise ValueError(
                f"the checkpoint {path} is of run {run}, and its folder belongs to run {folder}: move it away, begin "
                f"again with start_over(), or, to continue run {run}, remove {self._folder / LOCK}"
            )
        written = self._batches.journal.last_run()
        if written not in (None, run):
            raise ValueError(
                f"the checkpoint {path} is of run {run}, and the journal {self._batches.journal.path} was last written "
                f"by run {written}: move the journal away, or give this run another one"
            )

    def _release(self) -> None:
        self._run.release()
        # another Checkpoints on the same journal may have set its own
        if self._batches is not None and self._batches.journal.guard == self._lock.check:
            self._batches.journal.guard = None
        self._lock.release()

    def _waited(self) -> Exception | None:
        return None if self._background is None else self._background.wait()

    def _write(self, taken: Snapshot | None, place: Path) -> None:
        if taken is None:
            return
        first = self._ranks.rank == 0
        try:
            files = self._run.write(taken, place)
            if first:
                finish(place, taken.contents, files, keep=self._keep, damaged=self._damaged, fence=self._lock.check)
        except Exception:
            if first:
                # on the first rank only, which made the folder for all of them
                abandon(place)
            raise

    def _raise_together(self, failure: Exception | None, *numbers: float, doing: str = "written to") -> list[float]:
        """Raises an error on all ranks if one failed; returns the sums of the ranks' numbers."""
        failed, *sums = self._ranks.sum_of(failure is not None, *numbers)
        if isinstance(failure, FolderInUse):
            raise failure
        if failure is not None:
            raise CheckpointError(f"a checkpoint could not be {doing} {self._folder}: {failure}") from failure
        if failed:
            raise CheckpointError(f"a checkpoint could not be {doing} {self._folder} by another rank")
        return sums


@checked
def save(folder: str | Path, *, model: nn.Module, keep: int = 3, **parts: Any) -> None:
    """Saves a run between two steps, and returns when it is on the disk; on all ranks.

    Args:
        folder: of the run's checkpoints; the new one is added to the existing ones.
        model: see ``Checkpoints``, as for all other parts.
        keep: how many checkpoints to keep.
        parts: ``optimizer``, ``batches``, ``schedule``, ``order``, ``scaler``, ``local_sgd``, ``others``, ``config``.

    Raises:
        CheckpointError: if it could not be written.
        RuntimeError: if a step has not ended.
    """
    with Checkpoints(folder, model=model, keep=keep, background=False, **parts) as checkpoints:
        checkpoints.save()


@checked
def load(folder: str | Path, *, model: nn.Module, missing_ok: bool | None = None, **parts: Any) -> Loaded | None:
    """Loads the newest intact checkpoint of a run, the same on all ranks.

    Args:
        folder: of the run's checkpoints, or one of them.
        model: see ``Checkpoints``, as for all other parts.
        missing_ok: whether to return None if there is no checkpoint at all; by default True with ``batches``.
        parts: as for ``save``; those that are left out are not changed.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: as ``Checkpoints.load`` does.
    """
    with Checkpoints(folder, model=model, **parts) as checkpoints:
        return checkpoints.load(missing_ok=missing_ok)


def _failure_of(action: Any, *arguments: Any) -> Exception | None:
    """The error of an action, for ranks that must learn of each other's errors before any of them leaves."""
    try:
        action(*arguments)
    except Exception as error:
        return error
    return None
