"""All-reduces simulated message by message: what the closed forms of `adabatch.forecast.network` are checked against.

A message leaves when what it carries has arrived, its sender has sent what it was sending, and its receiver has
received what it was receiving. Nothing here knows how many rounds there are."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Message:
    """From one device to another, after others."""

    source: int
    target: int
    seconds: float
    waits_for: int = 0
    followers: list[int] = field(default_factory=list)


class Network:
    """Messages between devices, and when the last of them arrives.

    With jitter each is late by an exponential time, of ``jitter`` latencies of its link in the mean.
    """

    def __init__(self, *, jitter: float = 0.0, seed: int = 0) -> None:
        self.messages: list[Message] = []
        self.jitter = jitter
        self.random = random.Random(seed)

    def send(self, source: int, target: int, num_bytes: float, after: Sequence[int], link: tuple[float, float]) -> int:
        """A message over a link of (latency, bandwidth) after others; its number."""
        latency, bandwidth = link
        late = self.jitter * latency * self.random.expovariate(1.0)
        number = len(self.messages)
        self.messages.append(Message(source, target, latency + num_bytes / bandwidth + late, len(after)))
        for each in after:
            self.messages[each].followers.append(number)
        return number

    def run(self) -> float:
        """When the last message arrives."""
        ready = [(0.0, number) for number, message in enumerate(self.messages) if not message.waits_for]
        heapq.heapify(ready)
        sends: dict[int, float] = {}
        receives: dict[int, float] = {}
        from_when = [0.0] * len(self.messages)
        last = 0.0
        while ready:
            since, number = heapq.heappop(ready)
            message = self.messages[number]
            begin = max(since, sends.get(message.source, 0.0), receives.get(message.target, 0.0))
            end = begin + message.seconds
            sends[message.source] = receives[message.target] = end
            last = max(last, end)
            for each in message.followers:
                follower = self.messages[each]
                follower.waits_for -= 1
                from_when[each] = max(from_when[each], end)
                if not follower.waits_for:
                    heapq.heappush(ready, (from_when[each], each))
        assert all(message.waits_for == 0 for message in self.messages)
        return last


def _around(
    network: Network,
    ring: Sequence[int],
    rounds: int,
    num_bytes: float,
    link: tuple[float, float],
    after: dict[int, int],
) -> dict[int, int]:
    """Each device of a ring passes on, ``rounds`` times, what came last; the number of that message by device."""
    came = {device: after[device] for device in ring if device in after}
    for _ in range(rounds):
        came = {
            target: network.send(source, target, num_bytes, [came[source]] if source in came else [], link)
            for source, target in zip(ring, [*ring[1:], ring[0]], strict=True)
        }
    return came


def ring(devices: int, num_bytes: float, link: tuple[float, float], *, jitter: float = 0.0) -> float:
    network = Network(jitter=jitter)
    _around(network, range(devices), 2 * (devices - 1), num_bytes / devices, link, {})
    return network.run()


def tree(devices: int, num_bytes: float, link: tuple[float, float], *, jitter: float = 0.0) -> float:
    """Binomial: device r hands to ``r`` without its lowest bit, when its own children are done; then back."""
    network = Network(jitter=jitter)
    levels = math.ceil(math.log2(devices))
    came: dict[int, list[int]] = {device: [] for device in range(devices)}
    for level in range(levels):
        for child in range(2**level, devices, 2 ** (level + 1)):
            parent = child - 2**level
            came[parent].append(network.send(child, parent, num_bytes, came[child], link))
    down = {0: came[0]}
    for level in reversed(range(levels)):
        for child in range(2**level, devices, 2 ** (level + 1)):
            down[child] = [network.send(child - 2**level, child, num_bytes, down[child - 2**level], link)]
    return network.run()


def hierarchy(
    nodes: int,
    node_size: int,
    num_bytes: float,
    inside: tuple[float, float],
    between: tuple[float, float],
    *,
    jitter: float = 0.0,
) -> float:
    """Reduce-scatter in each node, a ring between the nodes for each share, all-gather in each node."""
    network, share = Network(jitter=jitter), num_bytes / node_size
    places = [[node * node_size + place for place in range(node_size)] for node in range(nodes)]
    came: dict[int, int] = {}
    for node in places:
        came |= _around(network, node, node_size - 1, share, inside, came)
    for place in range(node_size):
        same = [node[place] for node in places]
        came |= _around(network, same, 2 * (nodes - 1), share / nodes, between, came)
    for node in places:
        came |= _around(network, node, node_size - 1, share, inside, came)
    return network.run()
