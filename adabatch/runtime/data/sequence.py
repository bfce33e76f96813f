"""The endless sequence of examples that epochs make, joined end to end: a pure function from place to example."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized

import numpy as np

from adabatch.arguments import require_type, shown
from adabatch.runtime.data.permutation import Integers
from adabatch.runtime.data.shuffles import Epoch, FullShuffle, InOrder, ScatteredShuffle, Shuffle

IN_MEMORY = 2**24
"""Examples up to which ``shuffle=True`` draws a permutation in memory: 128 MiB per epoch."""


def shuffle_of(choice: bool | Shuffle, num_examples: int) -> Shuffle:
    """The shuffle for a user's ``shuffle=``.

    Raises:
        TypeError: if it is neither a bool nor a shuffle.
    """
    if isinstance(choice, bool):
        if not choice:
            return InOrder()
        return FullShuffle() if num_examples <= IN_MEMORY else ScatteredShuffle()
    # A class passes for a Shuffle too, because it has the attributes that the protocol asks for.
    if isinstance(choice, type) or not isinstance(choice, Shuffle):
        raise TypeError(f"shuffle must be True, False or a shuffle such as ScatteredShuffle(), got {shown(choice)}")
    return choice


class Subset:
    """Some examples of a data set; the order ignores the others.

    Args:
        indices: their numbers in the data set, each once; a ``range`` takes no memory.
        num_examples: examples in the data set.

    Raises:
        ValueError: if there is no example, one that the data set does not have, or one twice.
        TypeError: if they are not whole numbers, such as a mask.
    """

    def __init__(self, indices: Sequence[int], num_examples: int) -> None:
        rule = "subset must be whole numbers of examples, one after the other"
        sized = isinstance(indices, Sized) and not isinstance(indices, str | bytes | Mapping)
        require_type(sized and getattr(indices, "shape", True) != (), rule, indices)
        if len(indices) == 0:
            raise ValueError("the subset is empty: a step needs at least one example")
        if isinstance(indices, range):
            self._indices: range | Integers = indices
            least, most = sorted((indices[0], indices[-1]))
            self.name = f"{indices}"
        else:
            try:
                given = np.asarray(indices)
            except (TypeError, ValueError, RuntimeError):  # lists of different lengths, and tensors with a gradient
                raise TypeError(f"{rule}, got {shown(indices)}") from None
            if given.ndim != 1 or given.dtype.kind not in "iu":
                raise TypeError(
                    f"subset must be whole numbers of examples, one after the other, got {given.dtype} of shape "
                    f"{given.shape}: for a mask give numpy.flatnonzero(mask)"
                )
            self._indices = given.astype(np.int64)
            distinct = np.unique(self._indices)
            if len(distinct) < len(self._indices):
                raise ValueError("the subset names an example twice: WeightedShuffle lets examples come more often")
            # unique() sorts.
            least, most = int(distinct[0]), int(distinct[-1])
            self.name = f"subset {hashlib.sha256(self._indices.tobytes()).hexdigest()[:12]}"
        if least < 0 or most >= num_examples:
            raise ValueError(
                f"the subset reaches from example {least} to {most}, but the data set has 0 to {num_examples - 1}"
            )

    def __len__(self) -> int:
        """How many examples."""
        return len(self._indices)

    def at(self, places: Integers) -> Integers:
        """The examples at places of the subset."""
        if isinstance(self._indices, range):
            return self._indices.start + self._indices.step * places
        return self._indices[places]


class ExampleSequence:
    """Which example is at place g: the one at place ``g % length`` of epoch ``g // length``.

    Args:
        num_examples: examples in the data set.
        seed: of the shuffle.
        shuffle: how an epoch is ordered.
        subset: the examples that take part; all by default.
    """

    def __init__(self, num_examples: int, *, seed: int, shuffle: Shuffle, subset: Subset | None = None) -> None:
        self.num_examples = num_examples
        self.seed = seed
        self._shuffle = shuffle
        self._subset = subset
        self._taking_part = num_examples if subset is None else len(subset)
        self.length = shuffle.length(self._taking_part)
        self.name = shuffle.name if subset is None else f"{shuffle.name} of {subset.name}"
        self._epochs: dict[int, Epoch] = {}

    def seeded(self, seed: int) -> ExampleSequence:
        """The same with another seed."""
        return ExampleSequence(self.num_examples, seed=seed, shuffle=self._shuffle, subset=self._subset)

    def at(self, begin: int, end: int) -> Integers:
        """The examples at places ``begin`` to ``end - 1``, which may lie in several epochs; shape (end - begin,)."""
        pieces = [np.arange(0)]
        while begin < end:
            epoch, offset = divmod(begin, self.length)
            stop = min(self.length, offset + end - begin)
            pieces.append(self._epoch(epoch)(offset, stop))
            begin += stop - offset
        found = np.concatenate(pieces)
        return found if self._subset is None else self._subset.at(found)

    def _epoch(self, epoch: int) -> Epoch:
        """The order of an epoch."""
        # two are cached, since micro-batches cross from one epoch into the next
        if epoch not in self._epochs:
            self._epochs = {number: order for number, order in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._shuffle.epoch(self._taking_part, seed=self.seed, epoch=epoch)
        return self._epochs[epoch]
