"""Finds ranks that are about to make different updates: other learning rates, or another number of updates so far.

A scheduler that is stepped on one rank only, or an update that only some ranks leave out, lets copies of the weights
drift apart. The check for drift (``drift.py``) reads the weights, and is therefore rare. Here two numbers per rank ride
on the reduction that a step makes anyway, so that the ranks find it out before the update.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from adabatch.batch.plan import Progress
from adabatch.guards.drift import RanksDrifted
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.differences import rank_differences
from adabatch.runtime.observers.protocol import Rider
from adabatch.runtime.optimizers.group_numbers import digest_of_numbers, number_settings, numbers_of_groups

_EXACT_BITS = 53
"""A float64 holds whole numbers of up to this many bits."""


class SameUpdates(Rider):
    """The digests of all ranks, of the numbers that decide about the next update.

    With digests ``h`` of n ranks, ``n sum(h^2) = sum(h)^2`` only if all are equal (Cauchy and Schwarz). Both sums are
    exact, since a digest has at most half of the bits of a float64, less those of n. A difference is missed once in
    2^26 steps by two ranks, and once in 2^19 by 10,000.

    Args:
        collectives: the ranks.
        optimizer: the settings of its groups are compared, as far as they are numbers on the host.
    """

    def __init__(self, collectives: Collectives, optimizer: Optimizer) -> None:
        self._collectives = collectives
        self._optimizer = optimizer
        self._applied = Progress()
        self._differ = False
        self._bits = (_EXACT_BITS - collectives.size.bit_length()) // 2

    def before(self, applied: Progress) -> None:
        """A step begins.

        Args:
            applied: what the updates consumed so far.
        """
        self._applied = applied

    def outgoing(self, device: torch.device) -> Tensor:
        """This rank's digest and its square, shape (2,)."""
        settings = numbers_of_groups(self._optimizer.param_groups).values()
        counts = self._applied.examples, self._applied.steps
        mine = digest_of_numbers([*counts, *chain.from_iterable(settings)]) % 2**self._bits
        return torch.tensor([mine, mine * mine], dtype=torch.float64, device=device)

    def incoming(self, totals: Sequence[float]) -> None:
        """Compares the digests."""
        total, squares = map(int, totals)
        self._differ = self._collectives.size * squares != total * total

    def check(self, step: int) -> None:
        """Raises an error if the digests of the last reduction differed.

        Args:
            step: number of the step.

        Raises:
            RanksDrifted: on all ranks; names what differs, the values, and the ranks that hold them.
        """
        if not self._differ:
            return
        self._differ = False
        mine = {"number of updates so far": repr(self._applied.steps), **number_settings(self._optimizer)}
        ranks = [json.loads(sent) for sent in self._collectives.gather_bytes(json.dumps(mine).encode())]
        told = rank_differences(ranks) or "a digest of their settings differs"
        raise RanksDrifted(
            f"in step {step} the ranks are about to make different updates, and would drift apart: {told}. Look for "
            f"what only some ranks do: step a scheduler (such as ReduceLROnPlateau on a loss of their own), call "
            f"leave_out(), or leave optimizer.step() out. If ranks may differ, give Guard(check_every=None)"
        )
