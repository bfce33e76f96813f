"""What depends on how a model is wrapped: which ranks share it, when they reduce, and the probe that suits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, Unpack, get_args

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives, collectives_of
from adabatch.runtime.compiled import uncompiled
from adabatch.runtime.engines.backward import PLAIN, Backward, scaled_by
from adabatch.runtime.fsdp2 import is_sharded, units_of
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe

GradientSync = Literal["each", "last"]
"""At which micro-batches of a step the ranks reduce their gradients."""


class MakeProbe(Protocol):
    """Makes a probe for the parameters that an optimizer trains."""

    def __call__(self, parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        """The probe; its hooks are on the model from here on."""
        ...


def _nothing(plan: BatchPlan) -> None:
    pass


def _never() -> bool:
    return False


class Wrapper(NamedTuple):
    """A way to run a model on several ranks.

    Args:
        collectives: the ranks that see different data.
        no_sync: a context in which a backward reduces nothing; for every micro-batch of a step but the last.
        make_probe: the probe that suits it.
        backward: how the backward of a micro-batch runs, and what it multiplies gradients by.
        fit_probe: makes a probe of the user's own measure all ranks, where it would not by itself.
        num_compared: ranks whose parts are compared with each other; None for all.
        measures_next: whether the next step's gradient may be measured.
        steps_alone: whether the next step is taken with this rank's gradient, and not with the mean of all.
        gradient_ready: called with the weight of this rank's micro-batches (their examples, or what ``steps(weigh=)``
            says) when a step's gradient is complete, before it is measured.
        journal_entry: what a step's line in the journal says besides.
        begin: called with the plan of a step before its first micro-batch.
        reduced: when the mean gradient of a step is there to be measured: after the "backward" of its last micro-batch,
            or not until its "update" begins.
        left_out: in the second case, whether the update has come and gone without a step of the optimizer.
        parameters: what is trained, where the optimizer holds other tensors in the place of the model's parameters.
        runs_alone: whether a rank can run a micro-batch without the others.
    """

    collectives: Collectives
    no_sync: Callable[[], AbstractContextManager[Any]]
    make_probe: MakeProbe
    backward: Backward = PLAIN
    fit_probe: Callable[[Probe], Probe] = lambda probe: probe
    num_compared: int | None = None
    measures_next: Callable[[], bool] = lambda: True
    steps_alone: Callable[[], bool] = lambda: False
    gradient_ready: Callable[[float], None] = lambda weight: None
    journal_entry: Callable[[], dict[str, Any]] = dict
    begin: Callable[[BatchPlan], None] = _nothing
    reduced: Literal["backward", "update"] = "backward"
    left_out: Callable[[], bool] = _never
    parameters: Sequence[Tensor] | None = None
    runs_alone: bool = True


def wrapper_of(
    model: nn.Module, gradient_sync: GradientSync | None = None, scaler: GradScaler | None = None
) -> Wrapper:
    """How a model is wrapped: not at all, in ``DistributedDataParallel``, or by ``fully_shard`` (FSDP2).

    Args:
        model: as it is trained.
        gradient_sync: "each" or "last" micro-batch; None for what suits the wrapper.
        scaler: of the losses, in float16; None for none.

    Raises:
        ValueError: an unknown ``gradient_sync`` or one that the wrapper does not go with; a plain model on several
            processes; a sharded model that is not sharded over one data-parallel mesh, or has sparse gradients.
        TypeError: a scaler that is none.
    """
    wrapper = _wrapper_of(model, gradient_sync)
    return wrapper if scaler is None else wrapper._replace(backward=scaled_by(scaler))


def _wrapper_of(model: nn.Module, gradient_sync: GradientSync | None) -> Wrapper:
    if gradient_sync is not None and gradient_sync not in get_args(GradientSync):
        raise ValueError(f"gradient_sync must be one of {', '.join(get_args(GradientSync))}, got {gradient_sync!r}")
    if is_sharded(model):
        return _sharded(model, gradient_sync or "each")
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        return _replicated(inner, gradient_sync or "last")
    return Wrapper(collectives_of(model), nullcontext, MicroBatchProbe)


def _replicated(model: DistributedDataParallel, gradient_sync: GradientSync) -> Wrapper:
    if gradient_sync == "each":
        raise ValueError(
            "gradient_sync='each' is for FSDP2: DistributedDataParallel would reduce the sum of a step again at every "
            "micro-batch, and save nothing; leave it out"
        )
    collectives = collectives_of(model)
    return Wrapper(collectives, _NoSync(model), partial(MicroBatchProbe, collectives=collectives))


class _NoSync:
    """``no_sync`` of a ``DistributedDataParallel``, but for the first backward of one with a static graph.

    That backward is where it learns the graph, and it must reduce what it sees. The gradient stays what it is: a sum of
    means, to which the other micro-batches are added before the last of them has the whole reduced, as the mean of
    equal numbers is that number.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        self._learns = True

    def __call__(self) -> AbstractContextManager[Any]:
        learns, self._learns = self._learns and self._model.static_graph, False
        return nullcontext() if learns else self._model.no_sync()


def _sharded(model: nn.Module, gradient_sync: GradientSync) -> Wrapper:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"FSDP2 cannot reduce the sparse gradient of {name}: build the {type(module).__name__} with "
                f"sparse=False, or wrap the model in DistributedDataParallel"
            )
    collectives = collectives_of(model)
    units = list(units_of(model).values())

    @contextmanager
    def no_sync() -> Iterator[None]:
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def make_probe(parameters: Sequence[Tensor], **options: Unpack[ProbeOptions]) -> Probe:
        trained = {id(p) for p in parameters}
        strange = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
        if strange:
            raise ValueError(
                f"the optimizer does not hold {_some(strange)}, whose gradients FSDP2 reduces together with those it "
                f"holds, so they are measured together: freeze them with requires_grad_(False), or let it hold them"
            )
        if gradient_sync == "last" and collectives.size == 1:
            raise ValueError(
                "gradient_sync='last' on a single rank leaves one part, which has no spread to measure: use 'each'"
            )
        return ReduceScatterProbe(model, **options)

    return Wrapper(collectives, no_sync if gradient_sync == "last" else nullcontext, make_probe, runs_alone=False)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more parameters" if len(names) > 3 else "")
