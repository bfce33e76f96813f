"""A run's whole state: taken, written to the files of a checkpoint, and put back."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.checkpointing.differences import Difference, Parameter, describe, refuse_order
from adabatch.checkpointing.files import CheckpointError, Files, sealed
from adabatch.checkpointing.plain import NotPlain, plain
from adabatch.checkpointing.rank_states import state_of_rank, states_of_all
from adabatch.checkpointing.settings import KeptSetting, Settings
from adabatch.checkpointing.sharded_state import Shards, put_back, shapes_in, taken_apart, write_shards
from adabatch.runtime.collectives import HostGroup, collectives_of
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.fsdp2 import is_sharded, own_piece
from adabatch.runtime.local_sgd import LocalSGD
from adabatch.runtime.random_state import random_state, restore_random_state

STATE = "state.pt"
STATE_OF = "state-{}.pt"
SHARDS = "shards"

_log = logging.getLogger("adabatch")


class Stateful(Protocol):
    """torch's own protocol: gives its state as plain data and tensors, and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Goes back to a state."""
        ...


class Snapshot(NamedTuple):
    """The state of a run at one moment, as one rank has to write it.

    Args:
        contents: what the manifest says of it.
        state: of all parts by name, and of the random numbers of all ranks; what a sharded model and its optimizer
            keep in tensors is not in it.
        tensors: of those, by name.
    """

    contents: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class Restored(NamedTuple):
    """What a run that goes on from a checkpoint makes of settings other than those that were saved.

    Args:
        taken_over: those of this run, which hold from now on.
        kept: those of the checkpoint.
    """

    taken_over: tuple[Difference, ...]
    kept: tuple[KeptSetting, ...]


class RunState:
    """The parts of a run that are saved together.

    Args:
        parts: by name, in the order in which they are loaded; "model" is among them.
        config: the run's settings, for the manifest.

    Raises:
        TypeError: a part without state.
        ValueError: local SGD of a sharded model.
    """

    def __init__(self, parts: Mapping[str, Any], *, config: Mapping[str, Any] | None) -> None:
        for name, part in parts.items():
            if not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))):
                raise TypeError(
                    f"{name} is a {type(part).__name__}, which has no state_dict() and load_state_dict(): leave it "
                    f"out, or give the object that has its state"
                )
        self._parts = dict(parts)
        self._model: nn.Module = _inner(parts["model"])
        self._optimizer: Optimizer | None = parts.get("optimizer")
        self._batches: AdaptiveBatch | None = parts.get("batches")
        self._config = config
        workers: LocalSGD | None = parts.get("local_sgd")
        self.sharded = is_sharded(self._model)
        if workers is not None and self.sharded:
            raise ValueError(
                "the workers of local SGD are sharded, each over ranks of its own, and a checkpoint cannot hold them: "
                "save the state_dict of every part on every rank yourself"
            )
        self.collectives = collectives_of(parts["model"]) if workers is None else workers.collectives
        # Under local SGD every rank has parts of its own.
        self._apart = workers is not None and self.collectives.size > 1
        self._was_read = False  # the first of a run's checkpoints is read back
        self._host = HostGroup(self.collectives) if self.sharded or self._apart else None
        self._device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        # A loader stands at a place of its own on each rank; a GlobalOrder has one for all.
        order: Stateful | None = parts.get("order")
        self._loader = None if isinstance(order, GlobalOrder) else order

    def describe(self) -> dict[str, Any]:
        """The run as the manifest says it."""
        return describe(
            self._parts,
            world_size=self.collectives.size,
            sharded=self.sharded,
            parameters=self._parameters(),
            config=self._config,
        )

    def _parameters(self) -> list[Parameter]:
        """Those of the optimizer, in the order in which its state counts them."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return [Parameter(names.get(id(p)), tuple(p.shape)) for group in groups for p in group["params"]]

    # --- taking and writing -----------------------------------------------------------------------------------------

    def take(self, *, copy: bool) -> Snapshot | None:
        """The state as this rank has to write it, or None where the first rank writes all; call it on all ranks.

        Args:
            copy: on the CPU, so that the training may go on; else it shares the run's tensors.

        Raises:
            NotPlain: on some rank, after all exchanges; a part whose state could not be read back.
            CheckpointError: so too; weights that are not finite.
        """
        own = random_state(self._device).to(self.collectives.device)
        state: dict[str, Any] = {"random": self.collectives.gather(own).cpu()}
        failure: NotPlain | None = None
        if self._loader is not None:
            mine = None
            try:
                mine = plain(self._loader.state_dict(), "order")
            except NotPlain as error:  # after the exchange, for which the other ranks wait
                failure = error
            state["order"] = states_of_all(mine, self.collectives, name="order")
        if failure is not None:
            raise failure
        self._check_finite()
        if self.collectives.rank > 0 and not (self.sharded or self._apart):
            return None
        tensors: dict[str, Tensor] = {}
        if self.sharded:
            shards = taken_apart(self._model, self._optimizer)
            tensors, state["model"], state["optimizer"] = shards
        for name, part in self._parts.items():
            if name not in state:
                state[name] = _inner(part).state_dict()
        state = {name: plain(value, name, copy=copy) for name, value in state.items()}
        return Snapshot(self.describe(), state, plain(tensors, copy=copy))

    def _check_finite(self) -> None:
        """That this rank's trained weights are finite: a checkpoint of others takes the place of one that is of use.

        Raises:
            CheckpointError: names one that is not.
        """
        pieces: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            piece = own_piece(parameter.detach())[0]
            if parameter.requires_grad and piece.numel() and (piece.is_floating_point() or piece.is_complex()):
                pieces[name] = piece
        if not pieces or torch.isfinite(get_total_norm(list(pieces.values()), norm_type=math.inf)):
            return
        bad = next((name for name, piece in pieces.items() if not torch.isfinite(piece).all()), "a parameter")
        raise CheckpointError(
            f"{bad} holds numbers that are not finite, and going on from them would be of no use: the checkpoints that "
            f"are there stay; resume from the newest with a smaller learning rate"
        )

    def write(self, taken: Snapshot, place: Path) -> Files:
        """Writes this rank's files, and on the first rank returns those of all; may run beside the training.

        Raises:
            Exception: a disk is full or fails; of a sharded run on all ranks.
        """
        first = self.collectives.rank == 0
        if first and self._batches is not None:
            self._batches.journal.sync()  # no checkpoint may know of steps that the journal can still lose
        if self._host is None:
            return self._written_and_read(taken.state, place)
        # Nobody may wait for a rank that failed: before each exchange a failure is kept, and then said to all.
        if self._apart:
            rank = self.collectives.rank
            written = self._heard(_tried(lambda: self._written_and_read(taken.state, place, rank)))
            return {name: entry for files in written for name, entry in files.items()}
        heard = self._heard(_tried(lambda: self._written_and_read(taken.state, place) if first else {}))
        write_shards(place / SHARDS, taken.tensors, self._host.group)
        # torch names the files of rank r __r_0.distcp and so on, and the first rank writes .metadata.
        patterns = [f"{SHARDS}/__{self.collectives.rank}_*", *([f"{SHARDS}/.*"] if first else [])]

        def own() -> Files:
            if first and not self._was_read:
                shapes_in(place / SHARDS)
            return {name: entry for pattern in patterns for name, entry in sealed(place, pattern).items()}

        files = {name: entry for files in [*heard, *self._heard(_tried(own))] for name, entry in files.items()}
        self._was_read = True
        return files

    def _written_and_read(self, state: dict[str, Any], place: Path, rank: int = 0) -> Files:
        """Writes this rank's file, and once per run reads it as a resumed run will."""
        files = write_state(state, place, rank=rank)
        if not self._was_read:
            # Mapped: the tensors, whose bytes are checked by their digest, are not read.
            try:
                torch.load(place / _state_file(rank), map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise CheckpointError(f"what was written cannot be read back: {str(error).splitlines()[0]}") from error
            self._was_read = not self.sharded
        return files

    def _heard(self, own: Files | str) -> list[Files]:
        """The files of all ranks; raises on all where one could not write."""
        assert self._host is not None
        all_of_them = self._host.gathered(own)
        failures = [f"rank {rank}: {files}" for rank, files in enumerate(all_of_them) if isinstance(files, str)]
        if failures:
            raise OSError("; ".join(failures))
        return all_of_them

    # --- reading ----------------------------------------------------------------------------------------------------

    def restore(self, path: Path, contents: Mapping[str, Any]) -> Restored:
        """Puts everything back as a checkpoint has it, the random numbers last, and cuts the journal to its place.

        Settings that this run was built with are then put in force, where they are taken over.

        Args:
            path: the checkpoint.
            contents: what its manifest says.

        Raises:
            ValueError: a model or an optimizer of another make than was saved, or what a part refuses.
        """
        state = self._read(path)
        self._check_model(path, state["model"])
        settings = Settings(self._parts)
        if self._optimizer is not None:
            _check_groups(state["optimizer"]["param_groups"], self._optimizer)
            refuse_order(contents, self._parameters())
            settings.refuse(state)
        if self._batches is not None:
            self._batches.check_reference(state["batches"]["reference_batch_size"])
        for name, part in self._parts.items():
            if name == "model" and self.sharded:
                assert self._host is not None
                now = taken_apart(self._model, self._optimizer)
                saved = Shards(now.tensors, state["model"], state["optimizer"])
                put_back(self._model, self._optimizer, saved, path / SHARDS, self._host.group)
            elif name == "order" and self._loader is not None:
                self._loader.load_state_dict(state_of_rank(state[name], self.collectives, name=name))
            elif name != "optimizer" or not self.sharded:
                _inner(part).load_state_dict(state[name])
        restore_random_state(state["random"], self.collectives.rank, self._device)
        restored = Restored(*settings.enforce(state))
        if self._batches is not None:
            self._batches.journal.run = contents.get("run", self._batches.journal.run)
        self.cut_journal()
        return restored

    def _read(self, path: Path) -> dict[str, Any]:
        """This rank's file of a checkpoint, with the state of all parts in it.

        Raises:
            CheckpointError: it is no such file, though it is the one that was written.
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
        """What this rank reads; of other workers' states than there are now, one of them."""
        saved = len(list(path.glob(STATE_OF.format("*")))) + 1
        return _state_file(self.collectives.rank % saved if self._apart else 0)

    def cut_journal(self) -> None:
        """Leaves in the journal the steps that the run has behind it, and no others."""
        if self._batches is None or self._batches.journal.path is None:
            return
        journal, examples = self._batches.journal, self._batches.consumed.examples
        reached = journal.cut(examples)
        if reached != examples:
            _log.warning("%s ends at %d examples, and the run stands at %d", journal.path, reached, examples)

    def _check_model(self, path: Path, state: Mapping[str, Any]) -> None:
        """That names and shapes of the saved tensors are those of the model."""
        saved = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
        if self.sharded:
            saved = {
                name.removeprefix("model/"): shape
                for name, (shape, _) in shapes_in(path / SHARDS).items()
                if name.startswith("model/")
            }
        mine = {name: value.shape for name, value in self._model.state_dict().items() if isinstance(value, Tensor)}
        wrong = [name for name in {**saved, **mine} if saved.get(name) != mine.get(name)]
        if wrong:
            shown = (f"{name}: {_text(saved.get(name))} saved, {_text(mine.get(name))} here" for name in wrong[:3])
            raise ValueError(
                f"the checkpoint {path} is of another model than this {type(self._model).__name__}; {len(wrong)} "
                f"tensor(s) differ ({'; '.join(shown)}): build the model as the saving run did"
            )

    def release(self) -> None:
        """Ends what was begun for this run's sake; no more is written or read."""
        if self._host is not None:
            self._host.close()
            self._host = None


def _state_file(rank: int) -> str:
    return STATE_OF.format(rank) if rank else STATE


def write_state(state: dict[str, Any], place: Path, *, rank: int = 0) -> Files:
    """Writes what is not sharded of a run's state to the place of a checkpoint.

    Args:
        state: by the names of the parts.
        place: of the checkpoint.
        rank: whose it is; 0 where one is that of all.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        with (place / _state_file(rank)).open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch closes its archive in vain after a failed write, and speaks of that.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return sealed(place, _state_file(rank))


def _tried(action: Callable[[], Files]) -> Files | str:
    """What an action returns, or what it raised as text."""
    try:
        return action()
    except Exception as error:  # the other ranks must hear of any
        return f"{type(error).__name__}: {error}"


def _inner(part: Any) -> Any:
    """The model inside DDP and torch.compile: its state is the same with one process and with many."""
    if not isinstance(part, nn.Module):
        return part
    inner = uncompiled(part)
    return uncompiled(inner.module) if isinstance(inner, DistributedDataParallel) else inner


def _text(shape: torch.Size | None) -> str:
    return "nothing" if shape is None else f"shape {tuple(shape)}"


def _check_groups(saved: list[dict[str, Any]], optimizer: Optimizer) -> None:
    was, goes = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if was != goes:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {was} parameters, this {type(optimizer).__name__} of {goes}: "
            f"build it as the saving run did"
        )
