"""Steps from any loader that yields micro-batches of this rank."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch.utils.data import DataLoader, Dataset, IterableDataset

from adabatch.arguments import shown
from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.counting import WAY_OUT, num_examples_in, outline
from adabatch.runtime.data.portions import Portion
from adabatch.runtime.data.same_data import check_different, digest_of_one, glance

_END = object()


class LoaderFeed:
    """Portions from any loader, by accumulation only: one pass over it.

    Exactly the micro-batches of a step are fetched before it begins, and the ranks agree (16 bytes) on how many each
    has. If a loader ends in the middle of a step, the last step is therefore shorter on all ranks; what a rank has
    beyond the others is left out. Between steps, a loader with its own ``state_dict`` is exactly after what was
    consumed. A loader that fills the memory of an earlier micro-batch again is an error, which is looked for in each
    step that holds more micro-batches than any before it in the pass.

    If ``num_examples_in`` counts the examples, every micro-batch but the last of the pass must hold
    ``micro_batch_size`` of them: another number shows that something else was counted. Each loading process of a stream
    has a last micro-batch.

    Args:
        loader: yields micro-batches of this rank.
        collectives: the data-parallel ranks.
        count: examples in a micro-batch; micro-batches may then be smaller at any place.
        may_be_empty: whether the pass may be empty, as for a loader whose state was saved after its last batch.
        allow_same_data: whether ranks may hold the same micro-batches, see ``check_different``.

    Raises:
        ValueError: on all ranks at once, if the loader of some rank is empty, or yields micro-batches of another size
            than that of the plan, without examples, changed after it was given, or equal to those of another rank.
        RuntimeError: if the loader of another rank raised an error.
        TypeError: if it cannot be iterated, or is a data set of single examples.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        collectives: Collectives,
        *,
        count: Callable[[Any], int] = num_examples_in,
        may_be_empty: bool = False,
        allow_same_data: bool = False,
    ) -> None:
        _check_loader(loader)
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._over = False
        self._collectives = collectives
        self._count = count
        self._may_end = may_be_empty
        self._compares = not allow_same_data
        self._most = 1  # micro-batches that a step has held at a time
        self._num_seen = 0  # micro-batches of this pass
        self._num_short = 0  # those among them below micro_batch_size
        self._short: str | None = None  # the error about the last of them, in case another follows
        self._may_be_short = _num_last_ones(loader)
        # Of a stream that does not share itself out, each loading process begins with the same micro-batch.
        self._firsts = _Firsts(self._may_be_short) if self._compares and self._may_be_short > 1 else None

    def take(self, plan: BatchPlan) -> Portion | None:
        """As many micro-batches as the plan accumulates, fewer at the end of the loader, then None."""
        batches, sizes, error = self._fetch(plan)
        # NaN for an impossible count and infinite for an error of the loader: both survive the sum over the ranks, so
        # that all of them see it and raise together.
        local = sum(sizes) if all(size >= 1 for size in sizes) else math.nan
        full, num_examples = self._collectives.sum_of(
            len(batches) == plan.accumulation_steps if error is None else math.inf, local
        )
        if full == math.inf:
            self._raise_together(error)
        self._check(num_examples, plan)
        if full < self._collectives.size:
            # a second exchange only at the end of a pass
            common = int(self._collectives.minimum_of(len(batches))[0])
            batches, sizes = batches[:common], sizes[:common]
            if common == 0:
                if not self._may_end:
                    raise ValueError(f"the loader gave no micro-batch on at least one rank: {self._why_empty()}")
                return None
            (num_examples,) = self._collectives.sum_of(sum(sizes))
        if self._compares:
            check_different(batches, self._collectives)
            self._compares = False
        # From the second step on, no micro-batch is the end of the pass.
        self._may_end = True
        return Portion(batches, sizes, int(num_examples))

    def _fetch(self, plan: BatchPlan) -> tuple[list[Any], list[int], Exception | None]:
        """The next micro-batches and their sizes, and an error of the user's loader or count."""
        batches: list[Any] = []
        sizes: list[int] = []
        looks = plan.accumulation_steps > self._most
        glances: list[bytes] = []
        try:
            while len(batches) < plan.accumulation_steps:
                batch = self._next()
                if batch is _END:
                    break
                batches.append(batch)
                sizes.append(self._size_of(batch, plan))
                if self._firsts is not None:
                    self._firsts.see(batch)
                if looks:
                    glances.append(glance(batch))
            if looks and [glance(batch) for batch in batches] != glances:
                raise ValueError(
                    f"the loader changed a micro-batch after it yielded it, probably because it fills the same buffer "
                    f"again: all {len(batches)} micro-batches of a step are fetched before it begins. Yield copies "
                    f"(tensor.clone()), or use as many buffers as a step may hold micro-batches"
                )
            self._most = max(self._most, len(batches))
            return batches, sizes, None
        except Exception as error:
            # Kept until the ranks have exchanged their numbers: an error that was raised here would leave the others
            # waiting.
            return [], [], error

    def _next(self) -> Any:
        """The next micro-batch of the pass, or ``_END``; after its end the loader is not asked again."""
        # One iterator per pass, and one `next()` after the other: `itertools.islice` calls `iter()` again, at which
        # a loader that is its own iterator begins a new pass.
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = _END if self._over else next(self._batches, _END)
        self._over = batch is _END
        return batch

    def _size_of(self, batch: Any, plan: BatchPlan) -> int:
        """Examples in a micro-batch, which has just been fetched."""
        micro = plan.micro_batch_size
        size = _whole(self._count(batch))
        if size > micro:
            raise ValueError(_misfit(batch, size, micro, "came"))
        if self._count is not num_examples_in:
            return size
        if self._short is not None and self._num_short == self._may_be_short:
            raise ValueError(self._short)
        self._num_seen += 1
        if size < micro:
            self._short = _misfit(batch, size, micro, "came before the last one of a pass")
            self._num_short += 1
            # If the first micro-batch is too small, it is either the only one of the pass, or something else was
            # counted. Which of the two must be known before a step uses it.
            if self._num_seen == self._may_be_short == 1 and self._next() is not _END:
                raise ValueError(self._short)
        return size

    def _raise_together(self, error: Exception | None) -> NoReturn:
        """Raises an error on all ranks if one has an error, so that the others do not wait for it."""
        rank, message = self._collectives.first_message(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        raise RuntimeError(f"the loader of rank {rank} raised an error: {message}")

    def _check(self, num_examples: float, plan: BatchPlan) -> None:
        if math.isnan(num_examples):
            raise ValueError("the loader gave a micro-batch without examples on at least one rank")
        if num_examples > plan.global_batch_size:
            raise ValueError(
                f"a step holds {num_examples:.0f} examples, but {plan.global_batch_size} were planned: give all ranks "
                f"the same micro_batch_size"
            )

    def _why_empty(self) -> str:
        if self._batches is self._loader:
            return (
                f"the {type(self._loader).__name__} is an iterator, which can be passed over only once, and it is at "
                f"its end: give something that begins again at every iter(), such as a DataLoader"
            )
        return "is its data set too small, or is it at its end, and cannot be passed over again?"

    def consumed(self, portion: Portion) -> None:
        """Nothing to do: the loader keeps its own place."""


class _Firsts:
    """The first micro-batch of each loading process of a stream.

    Args:
        number: of processes.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._seen: list[float] = []

    def see(self, batch: Any) -> None:
        """The next micro-batch of the pass.

        Raises:
            ValueError: if two processes begin with the same examples, to the bit.
        """
        if len(self._seen) == self._number:
            return
        digest = digest_of_one(batch)
        if digest is not None and digest in self._seen:
            raise ValueError(
                f"the {self._number} loading processes of the DataLoader give the same examples, to the bit: each "
                f"would come {self._number} times, and the noise would look too small. Let the data set share its "
                f"examples out by torch.utils.data.get_worker_info(), or give num_workers=1; if they are to come "
                f"several times, say so: steps(..., allow_same_data=True)"
            )
        self._seen.append(math.nan if digest is None else digest)


def _check_loader(loader: Any) -> None:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"steps() takes micro-batches, and a {type(loader).__name__} is a data set: give GlobalOrder(dataset), or "
            f"a DataLoader around it (with batch_size=None if its items are micro-batches)"
        )
    empty = getattr(loader, "shape", None) == ()  # a tensor or a number of numpy cannot be iterated, but has the method
    if (
        empty
        or isinstance(loader, str | bytes | Mapping)
        or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__"))
    ):
        raise TypeError(
            f"steps() takes a GlobalOrder or an iterable of micro-batches, such as a DataLoader, got {shown(loader)}"
        )


def _num_last_ones(loader: Iterable[Any]) -> int:
    """How many micro-batches of a pass may be short: the last one, or that of each loading process of a stream."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return max(1, loader.num_workers)
    return 1


def _whole(count: Any) -> int:
    try:
        return operator.index(count)
    except TypeError:
        if isinstance(count, float) and count.is_integer():
            return int(count)
        raise TypeError(f"count= must give a whole number of examples, got {count!r}") from None


def _misfit(batch: Any, size: int, micro: int, came: str) -> str:
    return (
        f"a micro-batch of {size} examples {came} ({outline(batch)}), but micro_batch_size={micro}: give the loader "
        f"and AdaptiveBatch the same size; if {size} is not how many examples it holds, or micro-batches are to "
        f"differ, {WAY_OUT}"
    )
