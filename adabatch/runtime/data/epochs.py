"""Advances the epoch of a loader's samplers and data set after a pass."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

# Where loaders and samplers keep what they read from: torch, DeepSpeed, Accelerate, and the bars of tqdm.
_INSIDE = ("dataloader", "base_dataloader", "iterable", "sampler", "batch_sampler", "data_sampler", "dataset")


@runtime_checkable
class _CountsEpochs(Protocol):
    """torch's ``DistributedSampler``, Accelerate's ``SeedableRandomSampler``, and streams of Hugging Face."""

    epoch: int

    def set_epoch(self, epoch: int) -> None: ...


class EpochCounters:
    """The samplers and data sets of a loader that count epochs, with their epochs at the beginning of a pass.

    They are the loader itself, its data set, its samplers, and the samplers inside of those (a ``DistributedSampler``
    inside a ``batch_sampler``); each once.

    Args:
        loader: any.
    """

    def __init__(self, loader: Any) -> None:
        self._found = [(part, part.epoch) for part in _parts(loader) if isinstance(part, _CountsEpochs)]

    def advance(self) -> None:
        """After the pass: sets each to its next epoch, unless the user has set it in the meantime.

        A ``DistributedSampler`` then shuffles again. So does a streaming data set of Hugging Face, which otherwise
        would also return to the place at which it was resumed in every pass.
        """
        for part, epoch in self._found:
            if part.epoch == epoch:
                part.set_epoch(epoch + 1)


def _parts(loader: object) -> list[object]:
    """The loader and its parts, each once, the outer ones first."""
    found: list[object] = []
    waiting: list[tuple[str, object]] = [("", loader)]
    while waiting:
        name, part = waiting.pop(0)
        if part is None or any(part is other for other in found):
            continue
        found.append(part)
        # Not into a data set, whose attributes have other meanings.
        if name != "dataset":
            inner = _INSIDE if part is loader or name.endswith(("loader", "iterable")) else ("sampler", "batch_sampler")
            waiting += [(each, getattr(part, each, None)) for each in inner]
    return found
