"""``fully_shard`` (FSDP2): each rank holds its shard of the weights, and gets its shard of the mean gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack, final

from torch import Tensor, nn

from adabatch.arguments import some
from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.engines.engine import Engine, GradientSync
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe
from adabatch.runtime.wrappers.backward import PLAIN, Backward
from adabatch.runtime.wrappers.fsdp2 import reduces, units_of


@final
class FSDP2Engine(Engine):
    """A model that ``fully_shard`` was applied to, over one data-parallel mesh (FSDP2, HSDP).

    Raises:
        ValueError: if the model is not sharded over one data-parallel mesh, or has sparse gradients.
    """

    shards = True
    runs_alone = False
    stand_in = "flags"

    def __init__(self, model: nn.Module, *, gradient_sync: GradientSync = "each", backward: Backward = PLAIN) -> None:
        # Refused here, since FSDP2 itself would fail in the first backward only.
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
                raise ValueError(
                    f"FSDP2 cannot reduce the sparse gradient of {name}: build the {type(module).__name__} with "
                    f"sparse=False, or wrap the model in DistributedDataParallel"
                )
        super().__init__(model, collectives_of(model), backward)
        self._sync = gradient_sync
        self._units = list(units_of(model).values())

    def no_sync(self) -> AbstractContextManager[Any]:
        """Reduces in every micro-batch, unless ``gradient_sync`` is "last"."""
        return self._whole_gradients() if self._sync == "last" else nullcontext()

    def unreduced(self) -> AbstractContextManager[Any]:
        """Each rank keeps its whole gradient."""
        return self._whole_gradients()

    def switched_off(self, *, last: bool) -> str | None:
        """FSDP2's switch of each unit."""
        if (last or self._sync == "each") and not all(reduces(unit) for unit in self._units):
            return "set_requires_gradient_sync(False) is in force for the model or a part of it"
        return None

    @contextmanager
    def _whole_gradients(self) -> Iterator[None]:
        for unit in self._units:
            # Not recursively: the list holds every unit, and recursion would visit the inner ones once for each outer
            # one.
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in self._units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def make_probe(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """``ReduceScatterProbe``, which measures everything that FSDP2 reduces.

        Raises:
            ValueError: if trainable parameters are not among ``parameters``, or if there is a single part only.
        """
        trained = {id(p) for p in parameters}
        strange = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in trained]
        if strange:
            raise ValueError(
                f"the optimizer does not hold {some(strange)}, but FSDP2 reduces their gradients together with those "
                f"of its parameters, so that they cannot be measured apart: freeze them with requires_grad_(False), or "
                f"give them to the optimizer"
            )
        # A rank that reduces once per step contributes one part, however many micro-batches it ran.
        if self._sync == "last" and self.collectives.size == 1:
            raise ValueError(
                "gradient_sync='last' on a single rank leaves one part, which has no spread to measure: use 'each'"
            )
        return ReduceScatterProbe(self.model, **options)
