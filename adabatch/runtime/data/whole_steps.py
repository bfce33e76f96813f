"""Steps whose size is given from outside: each item of the data contains all micro-batches of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from adabatch.arguments import checked_but, shown
from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data.counting import num_examples_in
from adabatch.runtime.data.portions import Portion


class WholeSteps:
    """Data that comes in steps, such as the rollouts of reinforcement learning; passed to ``AdaptiveBatch.steps``.

        def rollouts():
            while True:
                yield [collate(samples) for samples in chunks(sample(policy), 16)]

        for step in batches.steps(adabatch.WholeSteps(rollouts()), until=adabatch.steps(1000)):
            for batch in step:
                step.backward(loss_of(batch))
            optimizer.step(); optimizer.zero_grad()

    The size of a step is then the number of examples in its micro-batches, over all ranks. The loss, the gradient, the
    noise, the progress and the learning rate use that number, and it is in ``step.plan``. The plan of ``AdaptiveBatch``
    is only advice: ``batches.plan.global_batch_size`` is how many examples the criterion would take next. An item is
    requested when its step begins, after the update of the step before.

    Args:
        steps: yields, for each step, a list of this rank's micro-batches, of at most ``micro_batch_size`` examples
            each. Ranks may have different numbers of them, and of examples, but each has at least one; under FSDP2 and
            DeepSpeed, whose ranks run each micro-batch together, the same number.
    """

    @checked_but("steps")
    def __init__(self, steps: Iterable[Sequence[Any]]) -> None:
        no_items = isinstance(steps, str | bytes) or getattr(steps, "shape", None) == ()
        if no_items or not hasattr(steps, "__iter__"):
            raise TypeError(f"WholeSteps takes an iterable of lists of micro-batches, got {shown(steps)} as its steps")
        self.steps = steps


class WholeStepsFeed:
    """Portions as the data gives them, whatever the plan: one pass over ``WholeSteps``.

    The ranks agree on the size of a step, in 40 bytes. If the data of one rank ends, the pass ends on all ranks.

    Args:
        data: the steps.
        collectives: the data-parallel ranks.
        count: examples in a micro-batch.
        together: whether the ranks run each micro-batch together.

    Raises:
        ValueError: if a step of some rank has no micro-batch, one without examples or with more than
            ``micro_batch_size``, or if the ranks run micro-batches together and have different numbers of them; on all
            ranks at once.
    """

    def __init__(
        self,
        data: WholeSteps,
        collectives: Collectives,
        *,
        count: Callable[[Any], int] = num_examples_in,
        together: bool,
    ) -> None:
        self._data = data
        self._items: Iterator[Sequence[Any]] | None = None
        self._collectives = collectives
        self._count = count
        self._together = together

    def take(self, plan: BatchPlan) -> Portion | None:
        """The next step's micro-batches; None at the end."""
        if self._items is None:
            self._items = iter(self._data.steps)
        found, error = self._next()
        sizes: list[int] = [] if found is None else [size for _, size in found]
        wrong = self._wrong(found, sizes, plan) if error is None else error
        ended = found is None and wrong is None
        # Ends and errors travel with the sizes, so that all ranks stop together.
        num_ended, num_failed, num_examples = self._collectives.sum_of(ended, wrong is not None, sum(sizes))
        if num_failed:
            raise wrong or RuntimeError("the data of another rank raised an error, or gave a step that cannot be run")
        if num_ended:
            return None
        least, minus_largest = map(int, self._collectives.minimum_of(len(sizes), -len(sizes)))
        largest = -minus_largest
        if self._together and largest != least:
            raise ValueError(
                f"the ranks have between {least} and {largest} micro-batches in a step, and run each of them together: "
                f"split the examples of a step into the same number of micro-batches on all ranks, or use DDP"
            )
        assert found is not None
        plan = BatchPlan(micro_batch_size=plan.micro_batch_size, accumulation_steps=largest, dp_size=plan.dp_size)
        return Portion([batch for batch, _ in found], sizes, int(num_examples), plan=plan)

    def _next(self) -> tuple[list[tuple[Any, int]] | None, Exception | None]:
        """The next item with the sizes of its micro-batches, None at the end; or an error of the user's code."""
        assert self._items is not None
        try:
            # All of the item inside the `try`: it may be a generator, whose error is one of this rank too.
            item = next(self._items, None)
            return (None if item is None else [(batch, int(self._count(batch))) for batch in item]), None
        except Exception as error:
            return None, error

    def _wrong(self, found: list[Any] | None, sizes: list[int], plan: BatchPlan) -> Exception | None:
        """Why a step of this rank cannot be run; None if it can."""
        if found is None:
            return None
        if not sizes:
            return ValueError(
                "a step has no micro-batch on this rank, and other ranks would wait for its gradient: give each rank "
                "at least one in each step; with steps(weigh=) it may weigh 0"
            )
        if min(sizes) < 1 or max(sizes) > plan.micro_batch_size:
            return ValueError(
                f"a step has micro-batches of {min(sizes)} to {max(sizes)} examples, but 1 to "
                f"{plan.micro_batch_size} are allowed (micro_batch_size): cut it into smaller ones"
            )
        return None

    def consumed(self, portion: Portion) -> None:
        """Nothing to do: the data keeps its own place."""
