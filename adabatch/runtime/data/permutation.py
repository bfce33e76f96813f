"""Pseudo-random numbers and permutations as functions of a place: nothing is stored, and any place costs the same.

An order of a billion examples therefore takes no memory, and a run that resumes in its middle computes nothing twice.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ROUNDS = 8
"""Rounds of the Feistel network. Four are pseudo-random (Luby and Rackoff 1988); small sets need more to mix well."""

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, made odd: its multiples are spread evenly over 64 bits."""


def key_of(*numbers: int) -> int:
    """64 bits from integers of any size; equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits after which every bit depends on all: the finalizer of SplitMix64 (Steele et al. 2014)."""
    # Products of uint64 arrays wrap around without a warning, as the algorithm means them to.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(key: int, places: Integers) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each place and of its shape: the stream of SplitMix64 that begins at ``key``."""
    bits = mixed(places.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key))
    # The upper 53 bits, which a float64 holds exactly.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A pseudo-random permutation of 0 to ``size - 1``, place by place, in constant memory.

    A place is a cell of a grid of ``rows x columns`` cells, which has at least ``size`` cells and few more. The rounds
    shift its row by a hash of its column, and its column by a hash of its row, in turn. Each round can be undone, so
    together they permute the cells. If a place lands on a cell past ``size``, the rounds are repeated until it lands on
    one below.

    Args:
        size: how many places, at least 1.
        key: which permutation.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5 (generalized Feistel
    network and cycle walking).
    """

    def __init__(self, size: int, *, key: int) -> None:
        self.size = size
        # A nearly square grid instead of a power of two: it has few cells past `size`, over which places would have to
        # walk.
        # The root rounded up, in integers: math.sqrt is off by one for some sizes above 2^52.
        rows = math.isqrt(size - 1) + 1
        self._shape = np.uint64(rows), np.uint64(-(-size // rows))
        self._keys = [np.uint64(key_of(key, number)) for number in range(ROUNDS)]

    def __call__(self, places: Integers) -> Integers:
        """The values at ``places``; of the same shape."""
        return self._walked(places, backwards=False)

    def inverse(self, values: Integers) -> Integers:
        """The places of ``values``; of the same shape."""
        return self._walked(values, backwards=True)

    def _walked(self, places: Integers, *, backwards: bool) -> Integers:
        cells = self._through(places.astype(np.uint64), backwards)
        while (outside := cells >= self.size).any():
            cells[outside] = self._through(cells[outside], backwards)
        return cells.astype(np.int64)

    def _through(self, cells: NDArray[np.uint64], backwards: bool) -> NDArray[np.uint64]:
        pair: list[NDArray[np.uint64]] = list(np.divmod(cells, self._shape[1]))  # row, column
        for number in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
            shifted, fixed = number % 2, 1 - number % 2
            size = self._shape[shifted]
            shift = mixed(pair[fixed] + self._keys[number]) % size
            # `size - shift` and not `-shift`, since the numbers are unsigned.
            pair[shifted] = (pair[shifted] + (size - shift if backwards else shift)) % size
        return pair[0] * self._shape[1] + pair[1]
