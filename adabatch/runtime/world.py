"""Rank and world size of this process: the only reader of the launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among those that were launched together.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: number of this process on its node, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """What torchrun (or a launcher that sets the same variables) says; one process where it says nothing.

        Raises:
            ValueError: variables that are incomplete, not numbers, or contradict each other.
        """
        source = os.environ if environment is None else environment
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = {name: source[name] for name in names if name in source}
        if "RANK" not in found and "WORLD_SIZE" not in found:
            return cls()
        try:
            world = cls(
                rank=int(found["RANK"]), size=int(found["WORLD_SIZE"]), local_rank=int(found.get("LOCAL_RANK", 0))
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"the launcher's variables are incomplete or not numbers: {found}; "
                f"start the job with torchrun, or unset RANK and WORLD_SIZE to run one process"
            ) from error
        if not 0 <= world.rank < world.size:
            raise ValueError(f"RANK={world.rank} is not below WORLD_SIZE={world.size}: check the launcher")
        return world

    @property
    def device(self) -> torch.device:
        """The accelerator of this process where there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


@contextmanager
def connected(world: World, *, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """The default process group for the time of the block; nothing for a single process.

    NCCL on CUDA, gloo elsewhere. A rank that waits longer than ``timeout`` in a collective raises.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
