"""Closed forms of all-reduces against a simulation of their messages."""

from __future__ import annotations

import itertools

import pytest
from support import simulated_network

from adabatch.forecast.network import (
    Cluster,
    all_reduce_seconds,
    fitted,
    hierarchy_seconds,
    ring_seconds,
    tree_seconds,
)

LINK = (2e-5, 1e9)
FLAT = {"latency": LINK[0], "bandwidth": LINK[1]}


@pytest.mark.parametrize("num_bytes", [4.0, 1e6, 1e9])
@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64, 200])
def test_a_ring_takes_what_its_messages_take(devices, num_bytes):
    assert simulated_network.ring(devices, num_bytes, LINK) == pytest.approx(
        ring_seconds(devices, num_bytes, **FLAT), rel=1e-9
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 64, 1024, 8192])
def test_a_tree_takes_what_its_messages_take(devices):
    assert simulated_network.tree(devices, 1e6, LINK) == pytest.approx(tree_seconds(devices, 1e6, **FLAT), rel=1e-9)


@pytest.mark.parametrize("devices", [3, 5, 100, 1000, 10_000])
def test_a_tree_that_is_not_full_takes_no_longer(devices):
    taken = simulated_network.tree(devices, 1e6, LINK)
    assert 0.5 * tree_seconds(devices, 1e6, **FLAT) < taken <= tree_seconds(devices, 1e6, **FLAT) * (1 + 1e-9)


@pytest.mark.parametrize(("nodes", "size"), [(1, 8), (2, 4), (16, 8), (64, 4)])
def test_a_hierarchy_takes_what_its_messages_take(nodes, size):
    inside = (1e-6, 1e11)
    cluster = Cluster(devices=nodes * size, node_size=size, node_latency=inside[0], node_bandwidth=inside[1], **FLAT)
    taken = simulated_network.hierarchy(nodes, size, 1e8, inside, LINK)
    assert taken == pytest.approx(hierarchy_seconds(cluster, 1e8), rel=1e-9)


def test_jitter_adds_more_than_its_mean():
    """A round waits for its slowest message, so a closed form with the mean lateness in it is still too short."""
    for jitter in (1.0, 3.0):
        late = simulated_network.ring(16, 1e6, LINK, jitter=jitter)
        assert late > ring_seconds(16, 1e6, latency=(1 + jitter) * LINK[0], bandwidth=LINK[1])


def test_the_fastest_is_taken():
    small, large = (all_reduce_seconds(Cluster(devices=1024, **FLAT), size) for size in (4.0, 1e9))
    assert small == tree_seconds(1024, 4.0, **FLAT)
    assert large == ring_seconds(1024, 1e9, **FLAT)
    assert all_reduce_seconds(Cluster(devices=1, **FLAT), 1e9) == 0


def test_more_devices_never_take_less():
    for size in (4.0, 1e6, 1e9):
        taken = [
            all_reduce_seconds(Cluster(devices=p, node_size=8, node_bandwidth=1e11, **FLAT), size)
            for p in range(1, 300)
        ]
        assert all(before <= after * (1 + 1e-12) for before, after in itertools.pairwise(taken))


def test_a_network_is_found_in_its_times():
    timed = [(size, ring_seconds(4, size, **FLAT)) for size in (1e3, 1e5, 1e7)]
    assert fitted(4, timed) == pytest.approx(LINK, rel=1e-6)


def test_a_network_without_latency_has_none():
    latency, bandwidth = fitted(2, [(1e3, 0.5e-6), (1e6, 1e-3), (1e8, 0.12)])
    assert latency == 0
    assert 5e8 < bandwidth < 3e9


@pytest.mark.parametrize(("devices", "timed"), [(1, [(1, 1), (2, 2)]), (2, [(1, 1), (1, 2)])])
def test_a_network_needs_devices_and_sizes(devices, timed):
    with pytest.raises(ValueError, match="two devices and two sizes"):
        fitted(devices, timed)


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"bandwidth": 0}, {"latency": -1}, {"price_per_hour": -1}])
def test_a_cluster_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cluster(**{"devices": 8, "bandwidth": 1e9, **wrong})
