"""One run, one folder: which process may write checkpoints into a folder, and to which run they belong.

``lock.json`` in a folder of checkpoints names the run to which they belong, by its token, and the process that writes
them. The file stays after the process was killed, so that a successor can find out whether that process is still alive.
A process checks the lock before it puts a checkpoint in place and before it writes a line of the journal. A process
that was taken for dead, but was not, therefore cannot write at the same time as its successor.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from adabatch.checkpointing.files import CheckpointError
from adabatch.runtime.launch.world import launcher_job

LOCK = "lock.json"

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class FolderInUse(CheckpointError):
    """Another process writes into a folder of checkpoints, or has taken it over."""


class Holder(NamedTuple):
    """A process, so that another one can tell whether it still runs.

    Args:
        host: its machine.
        pid: its process id.
        started: when it started, in clock ticks of its machine since the boot; None if the system does not say.
        boot: identifier of the machine's boot.
        since: when it took the folder, for messages.
        job: the launcher's name for the job, which is the same after a restart; None if it has none.
    """

    host: str
    pid: int
    started: int | None
    boot: str
    since: str
    job: str | None

    @classmethod
    def this(cls) -> Self:
        """The current process."""
        boot = ""
        with suppress(OSError):
            boot = _BOOT.read_text().strip()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(platform.node(), os.getpid(), _started(os.getpid()), boot, now, launcher_job())

    def same_process(self, other: Holder) -> bool:
        """Whether both are the same process, even if it took the folder at different times."""
        return (self.host, self.pid, self.started, self.boot) == (other.host, other.pid, other.started, other.boot)

    def may_run(self, me: Holder) -> bool:
        """Whether it may still run. On another host this is unknown, unless the launcher has restarted the job.

        Args:
            me: the current process.
        """
        if self.host != me.host:
            # a launcher starts a job again only after its processes have ended
            return self.job is None or self.job != me.job
        # process ids begin again with each boot
        if self.boot != me.boot:
            return False
        if self.started is not None:
            # the id alone may belong to another process by now
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it runs, as another user
            pass
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock(NamedTuple):
    """The contents of a folder's lock.

    Args:
        run: token of the run whose checkpoints are there; None if unknown.
        holder: the process that writes; None if there is none.
    """

    run: str | None
    holder: Holder | None


def read_lock(folder: Path) -> Lock:
    """The lock of a folder; empty if it has none, or a file that is not such a lock."""
    try:
        said = json.loads((folder / LOCK).read_bytes())
        run, holder = said["run"], said["holder"]
        # A file that is not a lock counts as none: a damaged one must not keep a run from its own folder.
        if not (run is None or isinstance(run, str)):
            return Lock(None, None)
        return Lock(run, None if holder is None else _holder(holder))
    except (OSError, ValueError, LookupError, TypeError):
        return Lock(None, None)


class FolderLock:
    """The right to write into a folder of checkpoints.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me: Holder | None = None  # None until it is claimed
        self._run: str | None = None  # whose checkpoints it claimed the folder for; None if unknown
        self._releases = False

    @property
    def held(self) -> bool:
        """Whether it was claimed."""
        return self._me is not None

    @property
    def shared(self) -> bool:
        """Whether another object of this process holds the folder, or held it when this one claimed it."""
        if self.held:
            return not self._releases
        holder = read_lock(self._folder).holder
        return holder is not None and holder.same_process(Holder.this())

    def claim(self, run: str | None) -> None:
        """Takes the folder, or keeps it; the folder of a dead process is taken over.

        Args:
            run: token of the run whose checkpoints the folder holds from now on; None does not change it.

        Raises:
            FolderInUse: names the process that has the folder, and the way out.
            OSError: if the folder cannot be created or written.
        """
        me = Holder.this()
        self._folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(self._folder):
            lock = read_lock(self._folder)
            mine = lock.holder is not None and lock.holder.same_process(me)
            if lock.holder is not None and not mine and lock.holder.may_run(me):
                raise FolderInUse(
                    f"{self._folder} is in use by {lock.holder}, and one run at a time writes into a "
                    f"folder: {self._way_out(lock.holder)}"
                )
            # Another object of this process may have claimed it before, and is then the one to release it.
            self._releases = self._releases or not mine
            self._write(Lock(lock.run if run is None else run, lock.holder if mine else me))
        self._me, self._run = me, run

    def check(self) -> None:
        """Checks that this process, and in it this run, still holds the folder.

        Raises:
            FolderInUse: if another process or another run of this process has taken it over, or the lock was removed.
        """
        if self._me is None:
            return
        run, holder = read_lock(self._folder)
        if holder is not None and holder.same_process(self._me) and None not in (run, self._run) and run != self._run:
            raise FolderInUse(
                f"{self._folder} was taken from run {self._run} by run {run} of the same process: nothing more is "
                f"written for run {self._run}, so its loop should end"
            )
        if holder is None or not holder.same_process(self._me):
            # Not claimed again: a process that was taken for dead would write beside what its successor has written.
            if holder is None and (self._folder / LOCK).exists():
                raise FolderInUse(
                    f"{self._folder} is no longer held by this process (pid {os.getpid()} on {platform.node()}): "
                    f"another Checkpoints object of this run was closed and has released it, or another process has "
                    f"taken it and has ended. Use one Checkpoints object for a run, or close the one last that saved "
                    f"or loaded first; nothing more is written here"
                )
            now = "its lock was removed" if holder is None else f"it belongs to {holder} now"
            raise FolderInUse(
                f"{self._folder} was taken from this process (pid {os.getpid()} on {platform.node()}): "
                f"{now}; nothing more is written by this process, and it should end"
            )

    def release(self) -> None:
        """Releases the folder, if this object has claimed it."""
        if self._me is not None and self._releases:
            with suppress(OSError), _alone_in(self._folder):
                lock = read_lock(self._folder)
                if lock.holder is not None and lock.holder.same_process(self._me):
                    self._write(lock._replace(holder=None))
        self._me, self._run, self._releases = None, None, False

    def _way_out(self, holder: Holder) -> str:
        if holder.host == platform.node():
            return f"end that process (kill {holder.pid}), or give this run another folder"
        return (
            f"end it there, or, if it has ended, remove {self._folder / LOCK}; whether a process of another host runs "
            f"cannot be seen from here"
        )

    def _write(self, lock: Lock) -> None:
        text = json.dumps({"run": lock.run, "holder": None if lock.holder is None else lock.holder._asdict()})
        # written beside it and renamed, so that no reader sees half a lock
        new = self._folder / f"{LOCK}.{os.getpid()}"
        try:
            new.write_text(text + "\n", encoding="utf-8")
            new.replace(self._folder / LOCK)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Excludes other processes while the lock is read and rewritten; some network file systems do not support this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Without flock two claims at once may both succeed; `check` before each write then sees whose lock came last.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holder(said: Any) -> Holder:
    holder = Holder(**said)
    kinds = {"host": str, "pid": int, "started": int | None, "boot": str, "since": str, "job": str | None}
    if not all(isinstance(value, kinds[name]) for name, value in holder._asdict().items()):
        raise TypeError("no holder of a lock")
    return holder


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if it does not run, or the system does not say."""
    try:
        # The name is in brackets and may itself contain brackets; the state and nineteen numbers follow the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
