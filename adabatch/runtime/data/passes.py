"""Passes over data: where one ends, what happens between two, and whether a plan fits the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch.utils.data import DataLoader

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.counting import num_examples_in
from adabatch.runtime.data.epochs import EpochCounters
from adabatch.runtime.data.loader_feed import LoaderFeed
from adabatch.runtime.data.loss_weights import LossWeightedFeed
from adabatch.runtime.data.order import GlobalOrder
from adabatch.runtime.data.portions import Feed, Portion
from adabatch.runtime.data.whole_steps import WholeSteps, WholeStepsFeed


class Passes(Feed, Protocol):
    """A feed for several passes over its data; ``take`` returns None at the end of a loader's pass."""

    @property
    def ended(self) -> bool:
        """Whether the current pass is over."""
        ...

    def end_pass(self) -> None:
        """The pass is over, or was interrupted; the next portion begins another one."""
        ...


class OrderPasses:
    """Passes of a ``GlobalOrder``, whose epochs are joined: the step that crosses the end of an epoch ends the pass.

    Args:
        order: the order.
        collectives: the ranks that share it.
        weigh: weight of a micro-batch in the gradient; None for its number of examples.
        largest: the largest global batch size that is known beforehand.

    Raises:
        ValueError: if a batch is larger than the data set, now or in a later step.
    """

    def __init__(
        self, order: GlobalOrder, collectives: Collectives, *, weigh: Callable[[Any], float] | None, largest: int
    ) -> None:
        check_fits(largest, order)
        self._order = order
        fixed = collectives.fixed
        feed = order.feed(collectives.rank, collectives.size) if fixed else order.shared_feed(collectives)
        self._feed = weighed(feed, weigh, collectives)
        self._epoch = order.epoch

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step."""
        check_fits(plan.global_batch_size, self._order)  # a schedule without limits may become too large later
        return self._feed.take(plan)

    def consumed(self, portion: Portion) -> None:
        """The step has run."""
        self._feed.consumed(portion)

    @property
    def ended(self) -> bool:
        """Whether the order is in another epoch than when the pass began."""
        return self._order.epoch != self._epoch

    def end_pass(self) -> None:
        """The next pass begins where this one ended."""
        self._epoch = self._order.epoch


class LoaderPasses:
    """Passes over the user's own loader; after each pass its samplers and data set go to their next epoch.

    Args:
        loader: yields micro-batches of this rank.
        collectives: the ranks.
        count: examples in a micro-batch.
        weigh: weight of a micro-batch in the gradient; None for its number of examples.
        may_be_empty: whether the first pass may be empty, as for a loader whose state was saved after its last
            micro-batch.
        allow_same_data: whether ranks may hold the same micro-batches.
        together: whether the ranks run each micro-batch together; used for ``WholeSteps``.
    """

    def __init__(
        self,
        loader: Iterable[Any] | WholeSteps,
        collectives: Collectives,
        *,
        count: Callable[[Any], int],
        weigh: Callable[[Any], float] | None,
        may_be_empty: bool,
        allow_same_data: bool = False,
        together: bool = False,
    ) -> None:
        self._loader = loader
        self._together = together
        self._collectives = collectives
        self._count = count
        self._weigh = weigh
        self._may_be_empty = may_be_empty
        self._allow_same_data = allow_same_data
        self._epochs = EpochCounters(loader)
        self._feed: Feed | None = None
        self._ended = False

    def take(self, plan: BatchPlan) -> Portion | None:
        """The portion of the next step, or None at the end of the pass."""
        if self._feed is None:
            self._epochs = EpochCounters(self._loader)
            feed = self._new_feed()
            self._feed, self._may_be_empty = weighed(feed, self._weigh, self._collectives), False
        portion = self._feed.take(plan)
        self._ended = portion is None
        return portion

    def _new_feed(self) -> Feed:
        if isinstance(self._loader, WholeSteps):
            return WholeStepsFeed(self._loader, self._collectives, count=self._count, together=self._together)
        return LoaderFeed(
            self._loader,
            self._collectives,
            count=self._count,
            may_be_empty=self._may_be_empty,
            allow_same_data=self._allow_same_data,
        )

    def consumed(self, portion: Portion) -> None:
        """The step has run."""
        if self._feed is not None:
            self._feed.consumed(portion)

    @property
    def ended(self) -> bool:
        """Whether the loader has ended."""
        return self._ended

    def end_pass(self) -> None:
        """Sets the loader's samplers and data set to their next epoch."""
        if self._feed is not None:
            # A pass that never began leaves the epochs as the user has set them.
            self._epochs.advance()
        self._feed, self._ended = None, False


def passes_over(
    loader: GlobalOrder | WholeSteps | Iterable[Any],
    collectives: Collectives,
    *,
    plan: BatchPlan,
    largest: int,
    grows_micro_batch: bool,
    count: Callable[[Any], int],
    weigh: Callable[[Any], float] | None,
    may_be_empty: bool,
    allow_same_data: bool,
    together: bool,
) -> Passes:
    """The passes over the data of ``steps()``; the arguments are those of the two classes above.

    Args:
        plan: of the next step.
        grows_micro_batch: whether plans may change the size of the micro-batch.

    Raises:
        ValueError: if the loader cannot run the plans.
    """
    if not collectives.fixed and not isinstance(loader, GlobalOrder):
        raise ValueError(
            f"replicas that come and go share the steps of a GlobalOrder: a {type(loader).__name__} does not "
            f"know which of them are there; use adabatch.GlobalOrder(dataset)"
        )
    if isinstance(loader, GlobalOrder):
        return OrderPasses(loader, collectives, weigh=weigh, largest=largest)
    if grows_micro_batch:
        raise ValueError(
            f"max_micro_batch_size needs a GlobalOrder: a {type(loader).__name__} decides its micro-batch itself"
        )
    if count is num_examples_in and not isinstance(loader, WholeSteps):
        check_loader(loader, plan.micro_batch_size)
    return LoaderPasses(
        loader,
        collectives,
        count=count,
        weigh=weigh,
        may_be_empty=may_be_empty,
        allow_same_data=allow_same_data,
        together=together,
    )


def weighed(feed: Feed, weigh: Callable[[Any], float] | None, collectives: Collectives) -> Feed:
    """The feed, with micro-batches weighted by ``weigh`` if it is given."""
    return feed if weigh is None else LossWeightedFeed(feed, weigh, collectives)


def check_fits(size: int, order: GlobalOrder) -> None:
    """Checks that a batch does not hold an example of the data set twice.

    Raises:
        ValueError: if it would.
    """
    if size > len(order):
        raise ValueError(
            f"a batch of {size} is above the {len(order)} examples of the data set, and may not hold an example twice: "
            f"limit the batch to use at most {len(order)}"
        )


def check_loader(loader: Iterable[Any], micro_batch_size: int) -> None:
    """Checks that a ``DataLoader`` yields micro-batches of the size that the plan assumes.

    Raises:
        ValueError: if it does not.
    """
    if isinstance(loader, DataLoader) and loader.batch_size not in (None, micro_batch_size):
        raise ValueError(
            f"the DataLoader has batch_size={loader.batch_size}, but micro_batch_size={micro_batch_size}: give both "
            f"the same (a larger batch is made by accumulation)"
        )
