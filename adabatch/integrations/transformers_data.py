"""The data of a run with the Trainer of Transformers: its loader, which yields whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from adabatch.adaptive.step import Step
from adabatch.runtime.data import GlobalOrder


class StepLoader:
    """The loader of the Trainer, whose batches are ``Step`` objects.

    Args:
        order: the order of the examples.
        steps: returns the steps from the present place on, to the end of the epoch or of the run.
        length: an upper bound for the steps of an epoch.
    """

    def __init__(self, order: GlobalOrder, steps: Callable[[], Iterator[Step]], length: int) -> None:
        self._order = order
        self._steps = steps
        self._length = length
        self.dataset = order.dataset

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Step]:
        return self._steps()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of the epoch, if a callback ended the previous one early."""
        if self._order.epoch < epoch:
            self._order.start_epoch(epoch)


def order_of(loader: Any, *, seed: int) -> GlobalOrder:
    """The data set of a loader in an order that all ranks share, loaded with the same options.

    Args:
        loader: a loader of a map-style data set, with torch's random or sequential sampler.
        seed: the seed of the order.

    Raises:
        ValueError: if the data set is only iterable, or another sampler orders it.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "a data set that is only iterable cannot be dealt in steps of other sizes, nor resumed at an example: use "
            "one with __len__ and __getitem__ (datasets: load it without streaming=True)"
        )
    batch_sampler: Any = loader.batch_sampler
    # Accelerate wraps it once for each way of sharding.
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None)
    known = type(sampler) in (RandomSampler, SeedableRandomSampler, SequentialSampler)
    if type(batch_sampler) is not BatchSampler or not known:
        found = batch_sampler if known or sampler is None else sampler
        raise ValueError(
            f"{type(found).__name__} orders the examples in batches of one size: use train_sampling_strategy="
            f"'random' or 'sequential'"
        )
    pinned = loader.pin_memory and torch.accelerator.is_available()  # torch warns of it otherwise
    options = {} if loader.num_workers == 0 else {
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "timeout": loader.timeout,
    }  # fmt: skip
    return GlobalOrder(
        loader.dataset,
        seed=seed,
        shuffle=not isinstance(sampler, SequentialSampler),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=pinned,
        **options,
    )
