"""Whether ranks still hold the same weights and plans, and which of them have drifted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.batch.plan import BatchPlan
from adabatch.runtime.collectives import Collectives, digest_of
from adabatch.runtime.data.permutation import mixed
from adabatch.runtime.engines.engine import Engine
from adabatch.runtime.observers.protocol import Moment, Phase, StepObserver
from adabatch.runtime.optimizers.step_hooks import host_value
from adabatch.runtime.wrappers.compiled import uncompiled
from adabatch.runtime.wrappers.fsdp2 import own_piece, units_of

_BLOCK = 1 << 18
"""Elements that are hashed at a time: 6 MiB of memory."""

AUTOMATIC = 1000
"""Default number of steps from one check to the next. A check takes about a fifth of the time of a small step
(4.8 M parameters, 512 tokens, on a CPU), so 0.02 % of a run, and less of larger steps."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_BEFORE_THE_END = 20
"""Steps since the last check from which the end of a loop is checked too, for a hundredth of their time at most."""


class RanksDrifted(RuntimeError):
    """Ranks that should hold the same weights or plans do not; the message names them."""


class ComparedRun(Protocol):
    """The run whose plans are compared."""

    @property
    def plan(self) -> BatchPlan:
        """The plan of the next step."""
        ...

    def held(self) -> object:
        """What must be equal on all ranks beside the weights, compared by its ``repr``."""
        ...


def check_interval(asked: int | Literal["auto"] | None, engine: Engine) -> int | None:
    """Steps from one check to the next; None for no checks.

    Raises:
        ValueError: if checks are asked for, and the engine lets copies differ, as local SGD does.
    """
    if asked == "auto":
        return AUTOMATIC if engine.copies and engine.collectives.size > 1 else None
    if asked is not None and not engine.copies:
        raise ValueError(
            "check_every compares weights, which differ between the workers of local_sgd: leave one of the two out"
        )
    return asked


class DriftCheck(StepObserver):
    """Checks every ``every`` steps that no rank has drifted.

    Args:
        engine: says which ranks hold copies of the same weights.
        optimizer: whose learning rates are compared.
        run: whose plans are compared.
        every: number of steps between checks.
        observers: are told that a check begins.
    """

    def __init__(
        self, engine: Engine, optimizer: Optimizer, run: ComparedRun, *, every: int, observers: StepObserver
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._run = run
        self._every = every
        self._observers = observers
        self._checked = 0  # the step before which the last check was made

    def before(self, step: int) -> None:
        """Runs the check if it is due.

        Raises:
            RanksDrifted: on all ranks, if some have drifted.
        """
        if step % self._every == 0:
            self._check(step)

    def end(self, step: int) -> None:
        """The loop over the steps is over: runs the check if some steps have passed since the last one.

        Raises:
            RanksDrifted: on all ranks, if some have drifted.
        """
        # Else a run of less than `every` steps, or the last steps of any run, would end without a word.
        if step - self._checked >= min(_BEFORE_THE_END, self._every):
            self._check(step)
            # what follows the loop may take any time
            self._observers.at(Phase.BETWEEN, Moment(step, self._run.plan))

    def _check(self, step: int) -> None:
        self._checked = step
        self._observers.at(Phase.DRIFT_CHECK, Moment(step, self._run.plan))
        # Learning rates too: ranks with different schedules drift in the next update, which is easier to find here.
        rates = [host_value(group["lr"]) for group in self._optimizer.param_groups]
        held = (self._run.held(), rates)
        check_same(self._engine.collectives, self._engine.model, plan=held, when=f"before step {step}")


_WHOLE = digest_of([])
"""The shard of a rank none of whose tensors is sharded."""


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A hash of the bits of this rank's pieces of some tensors: one pass over them, and one host sync.

    For each block, the bits of each element are multiplied by a pseudo-random odd number and summed modulo 2^64. The
    hash is 48 bits of the SHA-256 of these sums, so a difference is missed once in 2^48 times.
    """
    sums: list[Tensor] = []
    # Odd numbers are invertible modulo 2^64, so a change of a single element always changes the sum.
    odd = torch.from_numpy(mixed(np.arange(_BLOCK, dtype=np.uint64)).view(np.int64) | 1)
    for tensor in tensors:
        bits = _bits_of(own_piece(tensor)[0])
        odd = odd.to(bits.device)
        # int64 wraps around, which is arithmetic modulo 2^64
        sums += [(block.to(torch.int64) * odd[: len(block)]).sum() for block in torch.split(bits, _BLOCK)]
    return digest_of(torch.stack([each.to(odd.device) for each in sums]).tolist() if sums else [])  # host sync


def _bits_of(tensor: Tensor) -> Tensor:
    """The elements as integers of the same width, shape (num_elements,)."""
    # Bits, not numbers: 0.0 and -0.0 must differ, and equal NaNs must not.
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()])


def shard_of(tensors: Iterable[Tensor]) -> int:
    """A number for the piece of each tensor that this rank holds: ranks with the same number hold copies."""
    pieces = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            place: list[int] = list(tensor.device_mesh.get_coordinate() or ())
            cut = [not placement.is_replicate() for placement in tensor.placements]
            # Only the place along dimensions that cut: ranks that differ along the others hold copies (HSDP).
            pieces.append(tuple(at for at, is_cut in zip(place, cut, strict=True) if is_cut))
    return digest_of(sorted(set(pieces)))


def check_same(collectives: Collectives, model: nn.Module, *, plan: object, when: str) -> None:
    """Checks that all ranks hold the same plan, and that copies of the same weights have the same bits.

    If a model is sharded over all ranks, each weight exists once, and only the plans can be compared. If shards are
    replicated (HSDP), the copies of each shard are compared. It costs a pass over the weights, and 16 bytes where ranks
    hold whole copies that agree; else 24 bytes per rank, of all ranks on each of them.

    Args:
        collectives: the ranks.
        model: as it is trained.
        plan: what must be equal on all ranks, compared by its ``repr``.
        when: for the message, such as "before step 100".

    Raises:
        RanksDrifted: on all ranks, if some have drifted.
    """
    own = _own(model, plan)
    # Of 10,000 ranks the rows of all are 240 kB on each; where they are the same, one digest of them says so.
    if own[1] == _WHOLE and collectives.agree(own):
        return
    rows, copies = _gathered(collectives, own)
    compared = [
        ({rank: row[0] for rank, row in enumerate(rows)}, "plans"),
        *((held, "weights") for held in copies),
    ]
    found = [_apart(held, what) for held, what in compared if len(set(held.values())) > 1]
    if found:
        raise RanksDrifted(
            f"{when}, {'; '.join(found)}: go back to a checkpoint, and look for what only some ranks do (an update, a "
            f"load, a random draw) or have (another version of a library, a faulty device); if ranks may hold "
            f"different weights, give Guard(check_every=None)"
        )


def odd_ranks(collectives: Collectives, model: nn.Module) -> list[int]:
    """The ranks whose weights differ from those of most ranks with copies of the same weights; of two, the second."""
    _, copies = _gathered(collectives, _own(model, None))
    return sorted(rank for held in copies for group in _groups(held)[1:] for rank in group)


def _own(model: nn.Module, plan: object) -> tuple[int, int, int]:
    """What this rank holds: plan, shard, weights."""
    for unit in units_of(model).values():
        unit.reshard()  # after a forward without a backward its root holds whole parameters
    tensors = shared_parameters(model)
    return digest_of(plan), shard_of(tensors), fingerprint(tensors)


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, but for those that DDP was told to ignore, because each rank may train its own."""
    inner = uncompiled(model)
    if not isinstance(inner, DistributedDataParallel):
        return list(model.parameters())
    own = set(inner.parameters_to_ignore)
    return [parameter for name, parameter in inner.module.named_parameters() if name not in own]


def _gathered(collectives: Collectives, own: tuple[int, int, int]) -> tuple[list[list[float]], list[dict[int, float]]]:
    """What each rank holds, and, for each shard, the weights of the ranks that hold it."""
    rows = collectives.gather_of(*own)
    copies: dict[float, dict[int, float]] = defaultdict(dict)
    for rank, (_, shard, digest) in enumerate(rows):
        copies[shard][rank] = digest
    return rows, list(copies.values())


def _groups(held: dict[int, float]) -> list[list[int]]:
    """Ranks that hold the same, the most first; of equally many, the first."""
    groups: dict[float, list[int]] = defaultdict(list)
    for rank, digest in held.items():
        groups[digest].append(rank)
    # a stable sort: of two equally large groups, the one with the lowest rank stays first
    return sorted(groups.values(), key=len, reverse=True)


def _apart(held: dict[int, float], what: str) -> str:
    """Which ranks differ from the majority; all of them if there is no majority."""
    largest, *others = _groups(held)
    if 2 * len(largest) <= len(held):
        names = " and ".join(str(ranks)[1:-1] for ranks in (largest, *others))
        return f"ranks {names} hold different {what}, and there is no majority to say which are right"
    drifted = sorted(rank for ranks in others for rank in ranks)
    name = f"rank {drifted[0]} holds" if len(drifted) == 1 else f"ranks {str(drifted)[1:-1]} hold"
    return f"{name} other {what} than ranks {str(largest)[1:-1]}"
