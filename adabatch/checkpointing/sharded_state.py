"""Model and optimizer of a sharded run (FSDP2) through ``torch.distributed.checkpoint``: each rank writes its shards.

Only tensors are written in this way, under the names ``model/NAME`` and ``optimizer/INDEX/KEY`` (the index of the
parameter among all of the optimizer's). The rest of a state dict is a few numbers, which the caller stores. Another
world size can read the same files. Only torch's own records of names, shapes and offsets are unpickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adabatch.checkpointing.files import Damaged
from adabatch.runtime.wrappers.fsdp2 import units_of

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
}


class Shards(NamedTuple):
    """A state, split into tensors and the rest.

    Args:
        tensors: by name, plain or distributed.
        model: the rest of the model's state dict, by name.
        optimizer: the rest of the optimizer's, in the structure of its state dict.
    """

    tensors: dict[str, Tensor]
    model: dict[str, Any]
    optimizer: dict[str, Any]


def taken_apart(model: nn.Module, optimizer: Optimizer | None) -> Shards:
    """The state of a sharded model and its optimizer; the tensors are not copied.

    Raises:
        ValueError: if an optimizer keeps distributed tensors of another shape than their parameter.
    """
    for unit in units_of(model).values():
        unit.reshard()  # after a forward without a backward the root still holds whole parameters
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            tensors[f"model/{name}"] = value
        else:
            others[name] = value
    if optimizer is None:
        return Shards(tensors, others, {})
    state = optimizer.state_dict()
    parameters = _parameters_of(optimizer)
    numbers: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, DTensor) and value.shape != parameters[index].shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameters[index].shape)}: such a sharded state cannot be saved"
                )
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers.setdefault(index, {})[key] = value
    return Shards(tensors, others, {"state": numbers, "param_groups": state["param_groups"]})


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Writes the tensors, each rank its own shards; a plain tensor is written once.

    Raises:
        CheckpointException: on all ranks, if one could not write; with the reason of each.
    """
    state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group)


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and type of each tensor that was saved, by its name.

    Raises:
        Damaged: if something other than tensors was recorded.
    """
    shapes = {}
    for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        shapes[name] = (entry.size, entry.properties.dtype)
    return shapes


def put_back(
    model: nn.Module, optimizer: Optimizer | None, shards: Shards, folder: Path, group: dist.ProcessGroup
) -> None:
    """Reads a saved state into a sharded model and its optimizer, at this or another world size.

    Args:
        model: its tensors are overwritten.
        optimizer: gets the saved state; None for no optimizer.
        shards: of the model as it is now (``taken_apart``), with the saved ``model`` and ``optimizer`` in them.
        folder: where ``write_shards`` wrote.
        group: of all ranks, for host tensors.
    """
    tensors = {name: tensor for name, tensor in shards.tensors.items() if name.startswith("model/")}
    state: dict[int, dict[str, Any]] = {}
    if optimizer is not None:
        state = {index: dict(entries) for index, entries in shards.optimizer["state"].items()}
        parameters = _parameters_of(optimizer)
        for name, (shape, dtype) in shapes_in(folder).items():
            if name.startswith("optimizer/"):
                _, place, key = name.split("/", 2)
                # The optimizer of a fresh run has no state yet, so room is made for the saved one.
                parameter = parameters[int(place)].detach()
                like = shape == parameter.shape
                # what has the shape of its parameter is sharded like it; the rest, such as a step count, is whole on
                # each rank
                tensors[name] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(shape, dtype=dtype)
                state.setdefault(int(place), {})[key] = tensors[name]
    state_dict_loader.load(tensors, storage_reader=_Reader(folder), process_group=group)
    saved = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    # the parameters were read in place; this runs the model's own hooks, and sets what is not a tensor
    model.load_state_dict({**saved, **shards.model})
    if optimizer is not None:
        optimizer.load_state_dict({"state": state, "param_groups": shards.optimizer["param_groups"]})


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters, in the order of its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Reader(FileSystemReader):
    """Torch's reader, except that the metadata is unpickled without the permission to run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except pickle.UnpicklingError as error:
                raise Damaged(f"{self.path}: {error}") from error
        entries = getattr(metadata, "state_dict_metadata", {}).values()
        if not (isinstance(metadata, Metadata) and all(isinstance(entry, TensorStorageMetadata) for entry in entries)):
            raise Damaged(f"{self.path}: .metadata records something other than tensors")
        return metadata


class _Unpickler(pickle.Unpickler):
    """Unpickles torch's records of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _RECORDS.get(module, ()):
            # the types of tensors are too many to list, and are data
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not part of a record of tensors")
