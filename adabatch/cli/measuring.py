"""What ``adabatch plan --measure`` times, under any launcher."""

from __future__ import annotations

from typing import Any

from adabatch.runtime.launch.machine_speed import all_reduce_times, matmul_flops
from adabatch.runtime.launch.world import World, connected


def measured() -> tuple[bool, dict[str, Any]]:
    """Whether this process is the first rank, and the measurements: ``devices``, ``flops`` and, with several processes,
    the times of ``all_reduce``."""
    world = World.from_environment()
    found: dict[str, Any] = {"devices": world.size}
    with connected(world, device=world.device):
        if world.size > 1:
            found["all_reduce"] = all_reduce_times(world.device)
        found["flops"] = matmul_flops(world.device)
    return world.rank == 0, found
