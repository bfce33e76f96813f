"""torchft: the global batch stays the same while replicas come and go, with torchft's ``Manager``.

Plans are made for the run as a whole. Before each step the manager forms a quorum, and the replicas in it share the
micro-batches of the step. A step that the manager does not commit has no effect, and its examples are dealt again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.adaptive import AdaptiveBatch
from adabatch.adaptive.options import Guard
from adabatch.arguments import checked
from adabatch.batch.criteria import Criterion
from adabatch.batch.moments import EUCLIDEAN
from adabatch.integrations.versions import require_version
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.data import GlobalOrder
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.nested import text_of
from adabatch.runtime.optimizers.traits import ChecksRanks
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.protocol import Probe, ProbeOptions
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import is_sharded

OLDEST = "0.2"
"""The oldest release of torchft that was tried."""

require_version("torchft", OLDEST)

import torchft  # noqa: E402
from torchft.manager import WorldSizeMode  # noqa: E402

BUCKET = 6 << 20
"""Elements of gradients that are reduced at once: 24 MiB of float32."""

STATE = "adabatch"
"""The name under which the manager knows the state of the batches."""


@checked
def attach(
    manager: Any,
    model: torch.nn.Module,
    optimizer: Optimizer,
    criterion: Criterion,
    /,
    *,
    micro_batch_size: int,
    order: GlobalOrder,
    **options: Any,
) -> AdaptiveBatch:
    """An ``AdaptiveBatch`` whose global batch is shared by the replicas that are in torchft's quorum.

        manager = torchft.Manager(pg=torchft.ProcessGroupGloo(), min_replica_size=1, use_async_quorum=False,
                                  load_state_dict=load, state_dict=save)  # of model and optimizer
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        order = GlobalOrder(dataset)
        batches = attach(manager, model, optimizer, NormTest(eta=0.7), micro_batch_size=16, order=order,
                         limits=Limits(min=64, max=1024))
        for step in batches.steps(order, until=examples(100_000)):
            for x, y in step:
                step.backward(loss_fn(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    adabatch forms the quorum before each step, and calls ``should_commit`` at the end of its inner loop. Do not use
    ``torchft.Optimizer``, which does the same. ``optimizer.step()`` has no effect in a step that was not committed. A
    replica that joins or recovers receives plan, averages, progress and the place in the data from a replica that is
    ahead, together with the state that you registered with the manager.

    Args:
        manager: a ``torchft.Manager`` with ``use_async_quorum=False``, for a replica of one process.
        model: a plain model, whose gradients are then averaged over the replicas at the end of each step; or a model in
            ``torchft.DistributedDataParallel``, which averages them during the last backward. (The one of torchft 0.2.0
            raises an error if a replica dies during a reduction over Gloo.)
        optimizer: the optimizer of the model's parameters.
        criterion: which batch size to ask for.
        micro_batch_size: examples in one forward and backward on one replica.
        order: the ``GlobalOrder`` that is passed to ``steps``, the same on all replicas.
        options: all other arguments of ``AdaptiveBatch``, except ``engine``, ``probe`` and ``local_sgd``. Every replica
            writes its own ``journal``.

    Raises:
        ValueError: if the manager forms its quorum in the background, keeps spares or has a group of several
            processes, if the model is wrapped or sharded in another way, if an option is not possible for replicas that
            come and go, and for the reasons of ``AdaptiveBatch``.
        TypeError: if ``manager`` is not a ``torchft.Manager``, or ``order`` is not a ``GlobalOrder``.
    """
    _check_manager(manager)
    _check_parts(model, optimizer)
    _check_options(criterion, options)
    batches = AdaptiveBatch(
        model,
        optimizer,
        criterion,
        micro_batch_size=micro_batch_size,
        engine=ReplicatedEngine(manager, model),
        **options,
    )
    given = {"criterion": criterion, "micro_batch_size": micro_batch_size, **options}
    state = _ReplicaState(batches, order, {name: text_of(value) for name, value in given.items() if name != "journal"})
    manager.register_state_dict_fn(STATE, state.load_state_dict, state.state_dict)
    return batches


class _ReplicaState:
    """The state that a joining replica receives in addition to the weights.

    Args:
        batches, order: those of this replica.
        settings: settings by name, as text; they must be equal on all replicas.
    """

    def __init__(self, batches: AdaptiveBatch, order: GlobalOrder, settings: Mapping[str, str]) -> None:
        self._batches = batches
        self._order = order
        self._settings = dict(settings)

    def state_dict(self) -> dict[str, Any]:
        """The state of the next step."""
        return {
            "batches": self._batches.state_dict(),
            "order": self._order.state_dict(),
            "settings": self._settings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of another replica.

        Raises:
            ValueError: if the other replica has other settings than this one.
        """
        theirs = state["settings"]
        names = sorted(set(theirs) | set(self._settings))
        other = [name for name in names if theirs.get(name) != self._settings.get(name)]
        if other:
            told = "; ".join(
                f"{name}: {self._settings.get(name, 'not given')} here, {theirs.get(name, 'not given')} there"
                for name in other
            )
            raise ValueError(f"this replica was given different settings than the one whose state it takes ({told})")
        self._batches.load_state_dict(state["batches"])
        self._order.load_state_dict(state["order"])


@final
class ReplicatedEngine(Engine):
    """A model, plain or in ``torchft.DistributedDataParallel``, on the replicas of the present quorum.

    Args:
        manager: says before each step which replicas are present, and after it whether the step counts.
        model: the model whose gradients are averaged over the replicas.
    """

    def __init__(self, manager: Any, model: torch.nn.Module) -> None:
        self._manager = manager
        inner = uncompiled(model)
        self._ddp: Any = inner if isinstance(inner, torchft.DistributedDataParallel) else None
        device = next(model.parameters()).device
        super().__init__(model, Collectives(device=device, reducer=self._reduce))
        self._steps: int | None = None  # the manager's, as this engine left them
        self._replicas = 0  # in the last step
        self._repeated = 0  # steps since the last line of the journal that did not count

    def inner_model(self) -> torch.nn.Module:
        """The module, inside DDP if there is one."""
        return uncompiled(self.model if self._ddp is None else self._ddp.module)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own."""
        return nullcontext() if self._ddp is None else cast("AbstractContextManager[Any]", self._ddp.no_sync())

    def switched_off(self, *, last: bool) -> str | None:
        """DDP's own switch."""
        off = last and self._ddp is not None and not self._ddp.require_backward_grad_sync
        return "require_backward_grad_sync of DistributedDataParallel is False at the last micro-batch" if off else None

    def gradient_ready(self, weight: float) -> None:
        """Averages the gradients of a plain model over the replicas."""
        if self._ddp is None and self.collectives.size > 1:
            average_gradients(self._manager, [p for p in self.model.parameters() if p.requires_grad])

    def before_step(self) -> None:
        """Forms the quorum. A replica that is behind loads the state of one that is not.

        Raises:
            RuntimeError: if something else counts the manager's steps, or model and optimizer are not registered.
        """
        manager = self._manager
        if self._steps is None:
            _check_registered(manager)
        elif manager.current_step() != self._steps:
            raise RuntimeError(
                "the manager counted a step that adabatch did not run: leave out torchft.Optimizer and calls of "
                "should_commit(); adabatch asks by itself whether a step counts"
            )
        manager.start_quorum()
        rank = manager.participating_rank()
        if rank is None:
            raise RuntimeError("this replica is in the quorum but takes no part in the step: use WorldSizeMode.DYNAMIC")
        self._replicas = manager.num_participants()
        self.collectives.stand_at(rank, self._replicas)

    def commits(self) -> bool:
        """Whether the manager commits the step: no reduction failed here, and there are enough replicas."""
        committed = bool(self._manager.should_commit())
        self._steps = self._manager.current_step()
        self._repeated += not committed
        return committed

    def inner_loop_ended(self) -> None:
        """Between two steps a replica counts as alone."""
        # which of the others are still there is known only after the next quorum
        self.collectives.stand_at(0, 1)

    def journal_entry(self) -> dict[str, Any]:
        """The number of replicas, and of the steps before this one that did not count."""
        entry = {"replicas": self._replicas, "repeated": self._repeated}
        self._repeated = 0
        return entry

    def make_probe(self, parameters: Any, **options: Unpack[ProbeOptions]) -> Probe:
        """``MicroBatchProbe``."""
        return MicroBatchProbe(parameters, collectives=self.collectives, **options)

    def _reduce(self, values: Tensor, op: Any) -> Tensor:
        # After an error the manager returns whatever the broken reduction left, and the step will not count. This
        # replica's own numbers are used instead, so that nothing raises on garbage until the step is taken back.
        own = values.clone()
        self._manager.allreduce(values, reduce_op=op).wait()
        return values if self._manager.errored() is None else values.copy_(own)


@torch.no_grad()
def average_gradients(manager: Any, parameters: Sequence[Tensor]) -> None:
    """Averages gradients over the replicas, in buckets of one dtype and at most ``BUCKET`` elements.

    A parameter that has a gradient on some replicas only counts as zero on the others; one without any keeps none.
    """
    # The replicas must reduce the same buckets, so they agree first on who has a gradient.
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    manager.allreduce(used, reduce_op=dist.ReduceOp.SUM).wait()
    together: list[Tensor] = []
    num_elements = 0
    for parameter, found in zip(parameters, used.tolist(), strict=True):  # host sync
        if not found:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        if together and (grad.dtype != together[0].dtype or num_elements + grad.numel() > BUCKET):
            _average(manager, together)
            together, num_elements = [], 0
        together.append(grad)
        num_elements += grad.numel()
    if together:
        _average(manager, together)


def _average(manager: Any, grads: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    manager.allreduce(flat).wait()
    for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_manager(manager: Any) -> None:
    if not isinstance(manager, torchft.Manager):
        raise TypeError(f"attach takes a torchft.Manager first, got {type(manager).__name__}")
    # torchft has no public names for these settings; where a release has no such attribute, nothing is refused.
    if getattr(manager, "_use_async_quorum", False):
        raise ValueError(
            "the manager forms its quorum during the forward, when the step's micro-batches are already dealt: make it "
            "with use_async_quorum=False"
        )
    if getattr(manager, "_replica_world_size_mode", None) == WorldSizeMode.FIXED_WITH_SPARES:
        raise ValueError(
            "the manager keeps spare replicas, which would run a step for nothing: use WorldSizeMode.DYNAMIC, which "
            "keeps the global batch at any number of replicas"
        )
    if getattr(manager, "_group_world_size", 1) != 1:
        raise ValueError(
            f"the manager's replica is a group of {manager._group_world_size} processes, and only replicas of one "
            f"process are supported: start one manager for each process, with world_size=1"
        )


def _check_registered(manager: Any) -> None:
    others = set(getattr(manager, "_user_state_dicts", {"unknown": None})) - {STATE}
    if not others:
        raise RuntimeError(
            "the manager knows no state but that of the batches, so a replica that joins would keep its own weights: "
            "give the Manager load_state_dict= and state_dict= of model and optimizer, or use register_state_dict_fn"
        )


def _check_parts(model: Any, optimizer: Any) -> None:
    wrapped = isinstance(uncompiled(model), DistributedDataParallel)
    if is_sharded(model) or (wrapped and not isinstance(uncompiled(model), torchft.DistributedDataParallel)):
        raise ValueError(
            "the model is sharded, or in DistributedDataParallel of torch, over ranks that stay the same: give the "
            "plain model, or torchft.DistributedDataParallel(manager, model)"
        )
    if isinstance(optimizer, torchft.Optimizer):
        raise ValueError(
            "torchft.Optimizer forms the quorum and asks should_commit() by itself, at other places than adabatch: "
            "give attach the optimizer inside it, and use that in the loop"
        )
    if isinstance(optimizer, ChecksRanks):
        raise ValueError(
            f"{type(optimizer).__name__} shares its work among ranks that stay the same: use an optimizer of "
            f"torch.optim"
        )


def _check_options(criterion: Any, options: Mapping[str, Any]) -> None:
    for name in ("engine", "probe", "local_sgd"):
        if options.get(name) is not None:
            raise ValueError(f"attach chooses {name}= by the manager: leave it out")
    needs = getattr(criterion, "needs", None)
    if getattr(needs, "seconds", False):
        raise ValueError(
            f"{type(criterion).__name__} compares the seconds of steps, which change with the number of replicas: use "
            f"a criterion of the noise, such as NormTest"
        )
    if getattr(needs, "noise", None) not in (None, EUCLIDEAN) or getattr(needs, "quantile", None) is not None:
        raise ValueError(
            f"{type(criterion).__name__} adds up whole gradients over the ranks, which has not been tested with "
            f"replicas that come and go: use a criterion in the Euclidean norm, such as NormTest or NoiseScale()"
        )
    guard = options.get("guard", Guard())
    if isinstance(guard, Guard) and (guard.trial is not None or guard.check_every not in (None, "auto")):
        raise ValueError(
            "Guard(trial=) and Guard(check_every=) ask all ranks, of which some may be gone: leave them out; torchft "
            "copies the state to replicas that are behind"
        )
