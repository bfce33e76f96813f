"""``monitor``: measures the noise of the gradient in a loop that stays as it is, and changes nothing in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from adabatch.adaptive.options import JournalOption
from adabatch.adaptive.planning import Measured, Planner, Policy
from adabatch.arguments import checked_but, require_type, whole
from adabatch.batch.control import Control, Limits
from adabatch.batch.criteria import NoiseScale
from adabatch.batch.efficiency import efficiency
from adabatch.batch.moments import GradientMoments
from adabatch.batch.plan import BatchPlan, PlanGrid, Progress
from adabatch.journal.writer import Journal, line
from adabatch.lr.follow import Followers, UpdateRules
from adabatch.runtime.engines.choice import engine_for
from adabatch.runtime.observers.trained_parameters import held_parameters
from adabatch.runtime.optimizers.ownership import owners_of, release, remove_all, take_over
from adabatch.runtime.optimizers.step_hooks import rates_of
from adabatch.runtime.probes.norms import norms
from adabatch.runtime.wrappers.backward import factor_of
from adabatch.runtime.wrappers.fabric import inside_fabric, without_fabric
from adabatch.runtime.wrappers.fsdp2 import is_sharded

_log = logging.getLogger("adabatch")


@checked_but("model", "optimizer", "micro_batch_size")
def monitor(
    model: torch.nn.Module,
    optimizer: Optimizer,
    *,
    micro_batch_size: int,
    journal: JournalOption = None,
    scaler: GradScaler | None = None,
) -> NoiseMonitor:
    """Measures the noise scale of a run, in whatever loop or host trains the model.

        adabatch.monitor(model, optimizer, micro_batch_size=16, journal="runs/noise.jsonl")

    The loop stays as it is, and trains to the same bits. The gradients of a step's micro-batches, on all ranks, are
    compared with each other, so a step needs at least two of them: by accumulation, or on two ranks. The model runs on
    one process or in ``DistributedDataParallel``, also as Accelerate, Fabric, Lightning or the Trainer of Transformers
    run it. The cost is a pass over the gradients and one over their sum per micro-batch and, per step, 16 bytes per
    rank and a host sync. A newer monitor of the same optimizer replaces an older one.

    Args:
        model: as it is trained: the ``DistributedDataParallel`` on several ranks.
        optimizer: each ``step()`` ends a step. Without the wrapper of Accelerate (its ``optimizer``).
        micro_batch_size: examples in one backward on one rank.
        journal: where the first rank writes one JSON line per step, which ``adabatch report`` and ``adabatch tail``
            read: a path, or a tracker, or a list of both.
        scaler: of a run in float16, whose factor changes, so that moments of different steps can be averaged. That of
            Fabric is found.

    Returns:
        The monitor, which lives as long as the optimizer and may be dropped.

    Raises:
        ValueError: if the model is sharded or runs on DeepSpeed, if the optimizer holds none of its parameters or has
            an ``AdaptiveBatch``, which measures by itself, or if ``micro_batch_size`` is below 1.
        TypeError: if ``optimizer`` is not an optimizer, or is the wrapper of a host.
    """
    require_type(isinstance(model, torch.nn.Module), "model must be a torch.nn.Module", model)
    return NoiseMonitor(model, without_fabric(optimizer), micro_batch_size, journal, scaler)


class NoiseMonitor:
    """The averages so far, and the hooks, which keep this object alive. ``monitor`` returns it.

    Each backward is a part. With ``c_j`` what part j added to the gradient of its rank, and k parts per rank, the
    gradient of the step is the mean over all ``J`` parts of ``k c_j``, whatever factor the loop puts on its losses: so
    the mean square of the parts is ``k^2 sum_j |c_j|^2 / J``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        micro_batch_size: int,
        journal: JournalOption,
        scaler: GradScaler | None,
    ) -> None:
        fabric = inside_fabric(model)
        model = model if fabric is None else fabric.model
        micro_batch_size = whole("micro_batch_size", micro_batch_size, at_least=1)
        _check(model, optimizer)
        self._collectives = engine_for(model).collectives
        self._parameters = held_parameters(model, optimizer)
        # Its micro-batches may grow, which cannot be seen from here.
        if owners_of([optimizer, *self._parameters], kind="AdaptiveBatch"):
            raise ValueError(
                f"the {type(optimizer).__name__} has an AdaptiveBatch, which measures the noise by itself: read its "
                f"noise_scale and its journal (with Constant(...) or a schedule, give it Measure(monitor=True)), or "
                f"call its remove() first"
            )
        self._optimizer = optimizer
        self._micro_batch_size = micro_batch_size
        self._scale = None if scaler is None else factor_of(scaler)
        if fabric is not None:
            self._scale = fabric.backward.scale
        self._journal = Journal(journal if self._collectives.rank == 0 else None)
        self._planner: Planner | None = None
        self._norms: dict[int, Tensor] = {}
        self._in_backward = False
        self._parts_sq: list[Tensor] = []
        self._grad_sq: Tensor | None = None
        self._in_pieces = False
        self._said = False
        self._handles: list[RemovableHandle] = [
            p.register_hook(partial(self._listen, index))  # type: ignore[no-untyped-call]
            for index, p in enumerate(self._parameters)
        ]
        take_over(self, [optimizer, *self._parameters], kind="monitor")
        # After the step, since Lightning runs the last backward inside it.
        self._handles.append(optimizer.register_step_post_hook(self._step_over))

    # --- what was found ---------------------------------------------------------------------------------------------

    @property
    def noise_scale(self) -> float:
        """Averaged noise over averaged signal, in examples; NaN until it has been measured."""
        return math.nan if self._planner is None else self._planner.state.averages.noise_scale

    @property
    def efficiency(self) -> float:
        """What an example is worth at the present batch, over one at a small batch: ``1 / (1 + b / B)``."""
        return math.nan if self._planner is None else efficiency(self._planner.plan.global_batch_size, self.noise_scale)

    @property
    def consumed(self) -> Progress:
        """Steps and examples that were seen."""
        return Progress() if self._planner is None else self._planner.consumed

    @property
    def journal(self) -> Journal:
        """The journal; its ``path`` is None on all ranks but the first."""
        return self._journal

    def record_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Writes numbers of an evaluation, such as ``{"loss": 0.31}``, into the journal; see ``AdaptiveBatch``.

        Raises:
            ValueError: if there are no numbers, or a name is empty.
            TypeError: if a name is not a string, or a value is not a number.
        """
        self._journal.record_evaluation(metrics, after=self.consumed)

    def give_way(self) -> None:
        """A newer monitor, or an ``AdaptiveBatch``, measures this model."""
        self.remove()

    def remove(self) -> None:
        """Takes all hooks off model and optimizer."""
        release(self)
        remove_all(self._handles)
        self._journal.close()

    # --- during a step ----------------------------------------------------------------------------------------------

    def _listen(self, index: int, grad: Tensor) -> None:
        """The gradient of one backward on this rank, before it is accumulated or reduced."""
        if not self._in_backward:
            self._in_backward = True
            if all(p.grad is None for p in self._parameters):  # of a step that a gradient scaler left out
                self._forget()
            # The end of a backward has no public hook; DDP and FSDP2 use this one.
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)
        # a second gradient for the same parameter in one backward: the norm of their sum is not known from their norms
        self._in_pieces |= index in self._norms
        with torch.no_grad():
            # a number on the device for each parameter, and no copy of its gradient: the monitor adds no memory
            self._norms[index] = norms(grad).double()

    def _backward_over(self) -> None:
        self._in_backward = False
        if self._norms:
            self._parts_sq.append(torch.cat(list(self._norms.values())).square().sum())
            self._norms.clear()
        # DDP completes its reduction in a callback too, which was queued after this one, and is run before the next.
        torch.autograd.Variable._execution_engine.queue_callback(self._reduced)

    def _reduced(self) -> None:
        # Now, and not when the optimizer steps: by then the loop has clipped.
        with torch.no_grad():
            found = [norms(p.grad).double() for p in self._parameters if p.grad is not None]
            # each backward of a step overwrites it, and the last one has the whole gradient
            self._grad_sq = torch.cat(found).square().sum() if found else None

    def _forget(self) -> None:
        self._parts_sq.clear()
        self._norms.clear()
        self._grad_sq, self._in_pieces = None, False

    # --- after a step -----------------------------------------------------------------------------------------------

    def _step_over(self, optimizer: Optimizer, *_: Any) -> None:
        """The update was made."""
        if not self._parts_sq or self._grad_sq is None:
            return
        parts, grad, num_own, in_pieces = sum(self._parts_sq), self._grad_sq, len(self._parts_sq), self._in_pieces
        self._forget()
        assert isinstance(parts, Tensor)
        local = torch.stack([parts, parts.new_full((), num_own)]).to(self._collectives.device)
        # ranks may accumulate different numbers of micro-batches, so the number of parts is summed too
        parts_sq, counted = self._collectives.sum(local).tolist()  # host sync
        num_parts = round(counted)
        if num_parts < 2 or in_pieces:
            self._say_once(in_pieces)
            return
        # the factor as it was in the backward: the scaler changes it only in its update(), after this hook
        scale = 1.0 if self._scale is None else float(self._scale(parts.device)) ** -2
        moments = GradientMoments(
            part_sq=num_own**2 * parts_sq / num_parts * scale,
            part_size=self._micro_batch_size,
            # not summed over the ranks: DDP has made it equal on all of them
            grad_sq=float(grad) * scale,
            num_examples=self._micro_batch_size * num_parts,
            num_parts=num_parts,
        )
        self._note(moments, num_own)

    def _note(self, moments: GradientMoments, accumulation_steps: int) -> None:
        size, ranks = round(moments.num_examples), self._collectives.size
        plan = BatchPlan(micro_batch_size=self._micro_batch_size, accumulation_steps=accumulation_steps, dp_size=ranks)
        if self._planner is None:
            self._planner = _planner_for(plan)
        before = self._planner.consumed
        ended = self._planner.end_step(Measured(size, moments, moments.is_finite, False, None, None))
        self._planner.applied(size, ended.gain)
        entry = line(
            plan=plan,
            num_examples=size,
            before=before,
            loss=None,
            moments=moments,
            averages=self._planner.state.averages,
            decision=ended.decision,
        )
        stored, base, shape = rates_of(self._optimizer.param_groups)
        rate = {"base": base, "shape": shape, "factor": 1.0, "applied": stored}
        self._journal.write({**entry, "lr": rate, "applied": True})

    def _say_once(self, in_pieces: bool) -> None:
        if self._said:
            return
        self._said = True
        why = "one micro-batch on one rank has no spread: accumulate two or more per step, or use more ranks"
        if in_pieces:
            why = "gradients come in several pieces per backward: torch.utils.checkpoint needs use_reentrant=False"
        _log.warning("the noise of the gradient is not measured: %s", why)


def _planner_for(plan: BatchPlan) -> Planner:
    """Averages and estimates of a run whose batch stays what it is."""
    size = plan.global_batch_size
    policy = Policy(
        criterion=NoiseScale(),
        control=Control(),
        limits=Limits(min=size, max=size),
        rules=UpdateRules("none", Followers.of(())),
        reference_batch_size=None,
        tokens_per_example=None,
        counts_gain=True,
        layer_weights=None,
    )
    grid = PlanGrid(
        dp_size=plan.dp_size, micro_sizes=(plan.micro_batch_size,), min_accumulation=plan.accumulation_steps
    )
    return Planner(policy, grid)


def _check(model: torch.nn.Module, optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} is not an optimizer with step hooks: give the one inside it (with Accelerate, "
            f"its `optimizer`)"
        )
    if is_sharded(model) or type(model).__name__ == "DeepSpeedEngine":
        raise ValueError(
            "monitor compares gradients before they are reduced, which FSDP2 and DeepSpeed do not show: use "
            "AdaptiveBatch, or a host's attach, with Constant(...) and measure=Measure(monitor=True), which keeps the "
            "batch as it is"
        )
