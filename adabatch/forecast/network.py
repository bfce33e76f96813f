"""How long an all-reduce takes on a cluster: rings, trees and hierarchies in the alpha-beta model. Pure.

A message of n bytes takes ``latency + n / bandwidth`` seconds; a device sends and receives one at a time, both at once.
The model leaves out contention, and that a reduction may run beside the backward.

Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adabatch.arguments import check_fields, checked, require


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and the network between them.

    Args:
        devices: how many, positive.
        bandwidth: of a device to one of another node, in bytes per second, positive.
        latency: of a message between them, in seconds, zero or positive.
        node_size: devices in a node; 1 if no devices are joined more closely than others.
        node_bandwidth: within a node, in bytes per second; None for ``bandwidth``.
        node_latency: within a node, in seconds; None for ``latency``.
        price_per_hour: of a device, in any currency, zero or positive.

    Raises:
        ValueError: if a number is outside its range.
    """

    devices: int
    bandwidth: float
    latency: float = 0.0
    node_size: int = 1
    node_bandwidth: float | None = None
    node_latency: float | None = None
    price_per_hour: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("devices", "node_size"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more", getattr(self, name))
        for name in ("bandwidth", "node_bandwidth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a positive number of bytes per second, such as 1e9, got {value}")
        for name in ("latency", "node_latency", "price_per_hour"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"{name} must be zero or positive", value)


def ring_seconds(devices: int, num_bytes: float, *, latency: float, bandwidth: float) -> float:
    """Time of a ring: ``2 (p - 1)`` messages of ``n / p`` bytes, one after another."""
    return 2 * (devices - 1) * (latency + num_bytes / devices / bandwidth)


def tree_seconds(devices: int, num_bytes: float, *, latency: float, bandwidth: float) -> float:
    """Time of a binomial tree to one device and back: ``2 ceil(log2 p)`` messages of n bytes, one after another."""
    return 2 * math.ceil(math.log2(devices)) * (latency + num_bytes / bandwidth)


def hierarchy_seconds(cluster: Cluster, num_bytes: float) -> float:
    """Time of a reduce-scatter in each node, a ring between nodes for each share, and an all-gather in each node.

    Nodes that are not full count as full.
    """
    size = min(cluster.node_size, cluster.devices)
    nodes = math.ceil(cluster.devices / size)
    # a latency of 0 is a value, so not `or`; a bandwidth of 0 is none
    latency = cluster.latency if cluster.node_latency is None else cluster.node_latency
    bandwidth = cluster.node_bandwidth or cluster.bandwidth
    inside = ring_seconds(size, num_bytes, latency=latency, bandwidth=bandwidth)
    return inside + ring_seconds(nodes, num_bytes / size, latency=cluster.latency, bandwidth=cluster.bandwidth)


@checked
def all_reduce_seconds(cluster: Cluster, num_bytes: float) -> float:
    """The fastest of ring, tree and hierarchy, in seconds; zero for one device.

    Args:
        cluster: the devices and their network.
        num_bytes: bytes to be summed, on each device.
    """
    require(0 <= num_bytes < math.inf, "num_bytes must be zero or positive", num_bytes)
    flat = {"latency": cluster.latency, "bandwidth": cluster.bandwidth}
    return min(
        ring_seconds(cluster.devices, num_bytes, **flat),
        tree_seconds(cluster.devices, num_bytes, **flat),
        hierarchy_seconds(cluster, num_bytes),
    )


def fitted(devices: int, timed: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second, fitted to timed all-reduces as if each were a ring.

    The fit minimizes the squares of relative errors. If the latency would be negative, it is zero.

    Args:
        devices: devices that took part, two or more.
        timed: pairs of bytes and seconds, both positive, with at least two sizes.

    Raises:
        ValueError: if there are fewer than two devices or sizes, or the times do not grow with the size.
    """
    if devices < 2 or len({num_bytes for num_bytes, _ in timed}) < 2:
        raise ValueError(f"a network is fitted to two devices and two sizes or more, got {devices} and {len(timed)}")
    sizes, seconds = (np.array(column, dtype=np.float64) for column in zip(*timed, strict=True))
    rounds = 2 * (devices - 1)
    # divided by the times: relative errors, since large messages take a thousand times as long as small ones
    shares = np.stack([rounds / seconds, rounds * sizes / devices / seconds], axis=1)
    scale = shares.max(axis=0)
    latency, per_byte = np.linalg.lstsq(shares / scale, np.ones(len(seconds)), rcond=None)[0] / scale
    # The nearest fit without a negative latency is the one with bandwidth alone.
    if latency < 0:
        column = shares[:, 1]
        latency, per_byte = 0.0, column.sum() / (column @ column)
    if not per_byte > 0:
        raise ValueError("the all-reduces took no longer for more bytes: time larger ones, or give the bandwidth")
    return float(latency), float(1 / per_byte)
