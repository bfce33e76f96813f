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
    """A model as it is, whose gradients nobody reduces."""

    def no_sync(self) -> AbstractContextManager[Any]:
        """Nothing to hold back."""
        return nullcontext()

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """``MicroBatchProbe``."""
        return MicroBatchProbe(parameters, **options)
