"""The whole state of a run: taken, written to the files of a checkpoint, and restored."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.checkpointing.differences import (
    Difference,
    Parameter,
    describe,
    refuse_groups,
    refuse_model,
    refuse_order,
)
from adabatch.checkpointing.files import CheckpointError, Files, sealed
from adabatch.checkpointing.finite_state import check_finite, optimizer_states, trained_weights
from adabatch.checkpointing.plain import plain
from adabatch.checkpointing.rank_states import state_of_rank, states_of_all
from adabatch.checkpointing.settings import BuiltSettings, KeptSetting
from adabatch.checkpointing.sharded_state import Shards, put_back, shapes_in, taken_apart, write_shards
from adabatch.runtime.collectives import HostGroup, collectives_of
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.local_sgd.averaging import LocalSGD
from adabatch.runtime.local_sgd.meetings import Purpose
from adabatch.runtime.random_state import random_state, restore_random_state
from adabatch.runtime.waiting import named_if_long
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import is_sharded

STATE = "state.pt"
STATE_OF = "state-{}.pt"
SHARDS = "shards"

_log = logging.getLogger("adabatch")


@runtime_checkable
class Stateful(Protocol):
    """An object with ``state_dict`` and ``load_state_dict``, torch's own protocol."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restores a state."""
        ...


class Snapshot(NamedTuple):
    """The state of a run at one moment, as one rank has to write it.

    Args:
        contents: the description for the manifest.
        state: of all parts by name, and of the random numbers of all ranks, without the tensors of a sharded model and
            its optimizer.
        tensors: those tensors, by name.
    """

    contents: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class Restored(NamedTuple):
    """How a resumed run treats settings that differ from the saved ones.

    Args:
        taken_over: settings of this run, which are used from now on.
        kept: settings of the checkpoint, which remain in use.
    """

    taken_over: tuple[Difference, ...]
    kept: tuple[KeptSetting, ...]


class RunState:
    """The parts of a run that are saved together.

    Attributes:
        model: without wrappers.
        sharded: whether it is sharded.
        collectives: the ranks of the run.

    Args:
        parts: by name, in the order in which they are loaded; "model" is among them.
        config: the run's settings, for the manifest.

    Raises:
        TypeError: if a part has no state.
        ValueError: if local SGD is used with a sharded model.
    """

    def __init__(self, parts: Mapping[str, Any], *, config: Mapping[str, Any] | None) -> None:
        for name, part in parts.items():
            if not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))):
                raise TypeError(
                    f"{name} is a {type(part).__name__}, which has no state_dict() and load_state_dict(): leave it "
                    f"out, or give the object that has its state"
                )
        self._parts = dict(parts)
        self.model: nn.Module = _inner(parts["model"])
        self._optimizer: Optimizer | None = parts.get("optimizer")
        self._batches: AdaptiveBatch | None = parts.get("batches")
        self._config = config
        workers: LocalSGD | None = parts.get("local_sgd")
        self.sharded = is_sharded(self.model)
        if workers is not None and self.sharded:
            raise ValueError(
                "the workers of local SGD are sharded, each over ranks of its own, and a checkpoint cannot hold them: "
                "save the state_dict of every part on every rank yourself"
            )
        self.collectives = collectives_of(parts["model"]) if workers is None else workers.collectives
        # Under local SGD every rank has its own parts.
        self._apart = workers is not None and self.collectives.size > 1
        self._workers = workers
        if self.sharded or self._apart:  # all ranks make the group that follows
            self.wait_for_all(Purpose.MAKE, "Checkpoints(...), save() or load()")
        self._was_read = False  # the first of a run's checkpoints is read back
        self._host = HostGroup(self.collectives) if self.sharded or self._apart else None
        self._device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        # A loader has its own place on each rank; a GlobalOrder has one place for all.
        order: Stateful | None = parts.get("order")
        self._loader = None if isinstance(order, GlobalOrder) else order

    def wait_for_all(self, purpose: Purpose, call: str) -> None:
        """Waits until all ranks make a call, before its first collective.

        Args:
            purpose: what the workers of local SGD meet for.
            call: its name, for an error.

        Raises:
            RuntimeError: on all ranks, if another one has gone on instead, as far as that can be seen: with
                ``batches``, or under local SGD.
        """
        if self._batches is not None and self._batches.places is not None:
            self._batches.places.wait_for_all(call)
        elif self._apart and self._workers is not None:
            with named_if_long(call, self.collectives.size):
                self._workers.meet(purpose)

    def describe(self) -> dict[str, Any]:
        """The description of the run for the manifest."""
        return describe(
            self._parts,
            world_size=self.collectives.size,
            sharded=self.sharded,
            parameters=self._parameters(),
            config=self._config,
        )

    def _parameters(self) -> list[Parameter]:
        """The parameters of the optimizer, in the order of its state."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return [Parameter(names.get(id(p)), tuple(p.shape)) for group in groups for p in group["params"]]

    # --- taking and writing -----------------------------------------------------------------------------------------

    def take(self, *, copy: bool) -> Snapshot | None:
        """The state that this rank has to write, or None if the first rank writes everything; call it on all ranks.

        Args:
            copy: whether to copy it to the CPU, so that training may continue; else it shares the run's tensors.

        Raises:
            Exception: on some rank, after all exchanges, if the state of a part could not be taken or read back.
            CheckpointError: in the same way, if weights or the optimizer's state are not finite.
        """
        own = random_state(self._device).to(self.collectives.device)
        # a collective, so before the ranks that write nothing return
        with named_if_long("save() or step() of Checkpoints", self.collectives.size):
            # Workers of local SGD each write a file of their own, with all rows, as any of them may be read for a rank
            # that was not saved. Otherwise the first rank writes the rows, and no other has to hold them.
            rows = self.collectives.gather(own) if self._apart else self.collectives.gather_at(0, own)
        state: dict[str, Any] = {} if rows is None else {"random": rows.cpu()}
        failure: Exception | None = None
        if self._loader is not None:
            mine = None
            try:
                mine = plain(self._loader.state_dict(), "order")
            except Exception as error:  # of the user's loader, too
                failure = error  # raised after the exchange, for which the other ranks wait
            # a rank whose state failed takes part with None
            state["order"] = states_of_all(mine, self.collectives, name="order")
        if failure is not None:
            raise failure
        states = () if self._optimizer is None else optimizer_states(self._optimizer, self.model)
        # on every rank, each with its own pieces, before most of them return
        check_finite([*trained_weights(self.model), *states])
        if self.collectives.rank > 0 and not (self.sharded or self._apart):
            return None
        tensors: dict[str, Tensor] = {}
        if self.sharded:
            shards = taken_apart(self.model, self._optimizer)
            tensors, state["model"], state["optimizer"] = shards
        for name, part in self._parts.items():
            if name not in state:
                state[name] = _inner(part).state_dict()
        state = {name: plain(value, name, copy=copy) for name, value in state.items()}
        return Snapshot(self.describe(), state, plain(tensors, copy=copy))

    def write(self, taken: Snapshot, place: Path) -> Files:
        """Writes this rank's files, and on the first rank returns those of all; may run in a thread beside the
        training.

        Raises:
            Exception: if a disk is full or fails; in a sharded run on all ranks.
        """
        first = self.collectives.rank == 0
        if first and self._batches is not None:
            self._batches.journal.sync()  # first: a checkpoint must not be ahead of the journal on the disk
        if self._host is None:
            return self._written_and_read(taken.state, place)
        # No rank may wait for one that failed: an error is kept until the next exchange, which tells all ranks.
        if self._apart:
            rank = self.collectives.rank
            written = self._heard(_tried(lambda: self._written_and_read(taken.state, place, rank)))
            return {name: entry for files in written for name, entry in files.items()}
        heard = self._heard(_tried(lambda: self._written_and_read(taken.state, place) if first else {}))
        write_shards(place / SHARDS, taken.tensors, self._host.group)
        # torch names the files of rank r __r_0.distcp and so on, and the first rank writes .metadata.
        patterns = [f"{SHARDS}/__{self.collectives.rank}_*", *([f"{SHARDS}/.*"] if first else [])]

        def own() -> Files:
            # the shards of torch are read back only as far as their names and shapes
            if first and not self._was_read:
                shapes_in(place / SHARDS)
            return {name: entry for pattern in patterns for name, entry in sealed(place, pattern).items()}

        files = {name: entry for files in [*heard, *self._heard(_tried(own))] for name, entry in files.items()}
        self._was_read = True
        return files

    def _written_and_read(self, state: dict[str, Any], place: Path, rank: int = 0) -> Files:
        """Writes this rank's file, and once per run reads it as a resumed run would."""
        files = write_state(state, place, rank=rank)
        if not self._was_read:
            # Memory-mapped, so that the tensors are not read: a digest checks their bytes.
            try:
                torch.load(place / _state_file(rank), map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise CheckpointError(f"what was written cannot be read back: {str(error).splitlines()[0]}") from error
            # a sharded run still has its shards to read back
            self._was_read = not self.sharded
        return files

    def _heard(self, own: Files | str) -> list[Files]:
        """The files of all ranks; raises an error on all of them if one could not write."""
        assert self._host is not None
        all_of_them = self._host.gathered(own)
        failures = [f"rank {rank}: {files}" for rank, files in enumerate(all_of_them) if isinstance(files, str)]
        if failures:
            raise OSError("; ".join(failures))
        return all_of_them

    # --- reading ----------------------------------------------------------------------------------------------------

    def restore(self, path: Path, contents: Mapping[str, Any]) -> Restored:
        """Restores everything from a checkpoint, the random numbers last, and cuts the journal back to its step.

        Settings of this run that are taken over are then applied.

        Args:
            path: the checkpoint.
            contents: of its manifest.

        Raises:
            ValueError: if the model or the optimizer differs from the saved one, or a part refuses its state.
        """
        state = self._read(path)
        # All checks come before the first part is loaded: a run that is refused goes on as it was, or ends, but is not
        # mixed.
        self._check_model(path, state["model"])
        settings = BuiltSettings(self._parts)
        if self._optimizer is not None:
            saved_groups = state["optimizer"]["param_groups"]
            refuse_groups(self._optimizer, _sizes(saved_groups), _sizes(self._optimizer.param_groups))
            refuse_order(contents, self._parameters())
            settings.refuse(state)
        if self._batches is not None:
            self._batches.check_reference(state["batches"]["reference_batch_size"])
        for name, part in self._parts.items():
            # model and optimizer together, since they share the tensors of one set of files
            if name == "model" and self.sharded:
                assert self._host is not None
                now = taken_apart(self.model, self._optimizer)
                saved = Shards(now.tensors, state["model"], state["optimizer"])
                put_back(self.model, self._optimizer, saved, path / SHARDS, self._host.group)
            elif name == "order" and self._loader is not None:
                self._loader.load_state_dict(state_of_rank(state[name], self.collectives, name=name))
            elif name != "optimizer" or not self.sharded:
                _inner(part).load_state_dict(state[name])
        # last: loading a part may draw random numbers
        restore_random_state(state["random"], self.collectives.rank, self._device)
        restored = Restored(*settings.enforce(state))
        if self._batches is not None:
            self._batches.journal.run = contents.get("run", self._batches.journal.run)
        self.cut_journal()
        return restored

    def _read(self, path: Path) -> dict[str, Any]:
        """This rank's file of a checkpoint, with the state of all parts.

        Raises:
            CheckpointError: if the file matches its checksum, but is not such a file.
        """
        name = self._own_file(path)
        try:
            state = torch.load(path / name, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {str(error).splitlines()[0]}") from error
        missing = [part for part in (*self._parts, "random") if not isinstance(state, dict) or part not in state]
        if missing:
            raise CheckpointError(
                f"{path}: {name} holds no state of {', '.join(missing)}, and is not a file of this run"
            )
        return dict(state)

    def _own_file(self, path: Path) -> str:
        """The file that this rank reads; if the number of workers has changed, that of one of the saved workers."""
        saved = len(list(path.glob(STATE_OF.format("*")))) + 1
        return _state_file(self.collectives.rank % saved if self._apart else 0)

    def cut_journal(self) -> None:
        """Removes the lines of later steps from the journal."""
        if self._batches is None or self._batches.journal.path is None:
            return
        journal, examples = self._batches.journal, self._batches.consumed.examples
        reached = journal.cut(examples)
        if reached != examples:
            _log.warning("%s ends at %d examples, and the run is at %d", journal.path, reached, examples)

    def _check_model(self, path: Path, state: Mapping[str, Any]) -> None:
        """Checks that names and shapes of the saved tensors are those of the model."""
        saved = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
        if self.sharded:
            saved = {
                name.removeprefix("model/"): shape
                for name, (shape, _) in shapes_in(path / SHARDS).items()
                if name.startswith("model/")
            }
        mine = {name: value.shape for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        before, now = ({name: f"shape {tuple(shape)}" for name, shape in each.items()} for each in (saved, mine))
        refuse_model(path, self.model, before, now)

    def release(self) -> None:
        """Releases the resources of this object; it cannot be used afterwards."""
        if self._host is not None:
            self._host.close()
            self._host = None


def _state_file(rank: int) -> str:
    return STATE_OF.format(rank) if rank else STATE


def write_state(state: dict[str, Any], place: Path, *, rank: int = 0) -> Files:
    """Writes the part of a run's state that is not sharded.

    Args:
        state: by the names of the parts.
        place: of the checkpoint.
        rank: to which it belongs; 0 if one state is for all ranks.

    Raises:
        OSError: if the disk is full or fails.
    """
    try:
        with (place / _state_file(rank)).open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # After a failed write, torch also fails to close its archive, and reports only that.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return sealed(place, _state_file(rank))


def _tried(action: Callable[[], Files]) -> Files | str:
    """The result of an action, or its error as text."""
    try:
        return action()
    except Exception as error:  # the other ranks must learn of any error
        return f"{type(error).__name__}: {error}"


def _inner(part: Any) -> Any:
    """The model inside DDP and torch.compile: its state is the same with one process and with many."""
    if not isinstance(part, nn.Module):
        return part
    inner = uncompiled(part)
    return uncompiled(inner.module) if isinstance(inner, DistributedDataParallel) else inner


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]
