"""What ``adabatch plan --measure`` times, under any launcher."""

from __future__ import annotations

from typing import Any

from adabatch.runtime.launch.world import World, connected
from adabatch.runtime.machine_speed import all_reduce_times, matmul_flops


def measured(with_flops: bool) -> tuple[bool, dict[str, Any]]:
    """Whether this process is the first rank, and what was timed: ``devices``, ``all_reduce`` and ``flops``.

    Args:
        with_flops: also time a matrix product; a journal with step times needs none.
    """
    world = World.from_environment()
    found: dict[str, Any] = {"devices": world.size}
    with connected(world, device=world.device):
        if world.size > 1:
            found["all_reduce"] = all_reduce_times(world.device)
        if with_flops:
            found["flops"] = matmul_flops(world.device)
    return world.rank == 0, found
