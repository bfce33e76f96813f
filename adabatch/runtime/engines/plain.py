"""A model on a single process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack, final

from torch import Tensor

from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions


@final
class PlainEngine(Engine):
    """A model without a wrapper, whose gradients are not reduced."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """An empty context: nothing is synchronized."""
        return nullcontext()

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """``MicroBatchProbe``."""
        return MicroBatchProbe(parameters, **options)
