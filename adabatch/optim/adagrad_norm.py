"""AdaGrad-Norm: gradient descent with one step size, determined by the norms of all gradients so far.

It accumulates one number for the whole model, the sum of the squared gradient norms, where AdaGrad accumulates one per
coordinate. So it has no state of the size of the gradient, and a step costs as much as one of SGD plus another read of
the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from adabatch.arguments import checked, require
from adabatch.optim import multi_tensor
from adabatch.optim.parameters import listed
from adabatch.optim.placement import Reduce

# On the CPU, torch sums the squares of a tensor in a few float32 lanes and in one thread, whatever its size: for
# standard normal numbers, |x|^2 came out 0.07 % too small at 10 million elements and 0.8 % at 50 million. So large
# tensors are cut into blocks, which threads share and whose norms are added in float64. At the limit for one thread the
# error is 3e-6, or 3e-5 if all elements are equal. Cutting smaller tensors too takes a quarter more time.
_BLOCK = 1 << 14
_LIMIT_ONE_THREAD = 1 << 18
_LIMIT_THREADS = 1 << 15


class KnownNorm(Protocol):
    """The measured norm of certain gradients."""

    @property
    def grad_sq(self) -> float:
        """The squared Euclidean norm of all these gradients together."""
        ...

    def is_of(self, grads: Sequence[Tensor]) -> bool:
        """Whether ``grads`` are exactly the gradients that were measured, unchanged since."""
        ...


class AdaGradNorm(Optimizer):
    r"""AdaGrad-Norm, the scalar AdaGrad: one accumulator for the whole model, all parameter groups together.

    With the gradient ``g`` of all parameters, each step computes

        b^2 <- b^2 + |g|^2                        b_0^2 = initial_accumulator_value
        x   <- x - lr / (b + eps) * g

    and with ``weight_decay`` or ``momentum`` ::

        v   <- momentum * v + g / (b + eps)       v_0 = 0
        x   <- (1 - lr / (b + eps) * weight_decay) * x - lr * v

    Without momentum and weight decay, no step is longer than ``lr``. Multiplying the loss by a constant has no effect
    once ``b`` is much larger than its initial value. A norm that is already known is not computed again
    (``take_norm``).

    *Momentum* is heavy-ball momentum on the normalized gradient. Each gradient is divided by the ``b`` of its own step,
    and a new ``lr`` applies to the whole buffer at once, as in ``torch.optim.SGD`` (with dampening 0). In a stationary
    state, steps are ``1 / (1 - momentum)`` times as long.

    *Weight decay* is decoupled: it enters neither ``|g|^2`` nor the momentum. It is scaled by ``lr / b``, not by
    ``lr``, because decoupled decay follows the schedule of the step (Loshchilov and Hutter 2019, algorithm 2), and
    ``1 / b`` is a schedule, which falls as one over the square root of the steps. A decay by ``lr`` alone would stay
    constant while the gradient's part fades, and finally pull every weight to zero. With the same scale, decay and
    gradient balance where ``g + (1 - momentum) * weight_decay * x = 0`` for every ``b``, so ``weight_decay`` means the
    same as in SGD. With ``lr * weight_decay <= b_0`` no step overshoots zero.

    Args:
        params: parameters, named parameters or groups of them, as for every torch optimizer. Groups may differ in all
            options except ``initial_accumulator_value``; the norm is always that of all groups together.
        lr: length of the longest step, in the unit of the parameters; a number or a tensor of one element.
        momentum: heavy-ball factor in [0, 1).
        weight_decay: coefficient of the decoupled decay.
        initial_accumulator_value: ``b_0^2``, in squared units of the gradient. It damps the first steps, and loses its
            influence once the accumulated norms exceed it.
        eps: added to ``b``; it matters only if ``b`` is zero.
        foreach: True for the multi-tensor path, False for a loop over the parameters; None selects the multi-tensor
            path if all tensors of a group are plain ones. On the CPU both give the same numbers, bit for bit. On
            accelerators the multi-tensor path needs memory for another gradient. Half precision always uses the loop,
            which keeps the step size in float32.
        maximize: maximize the objective instead of minimizing it.
        differentiable: must be False; present for compatibility with torch's optimizers.
        reduce: sums a 0-dim tensor over the ranks that hold different pieces of the model, and returns the sum. Needed
            only if a rank's *plain* gradients are a piece of the whole gradient (ZeRO's flat partitions, pipeline
            stages). It is called once in every step, also by a rank without gradients. Leave it None on one process,
            under DDP (where each rank's gradient is already the mean) and for DTensors (FSDP2, tensor parallelism),
            whose placements tell which pieces are shared: shards are summed over their mesh, and replicas are counted
            once.

    Raises:
        ValueError: if an option is out of its range, if ``initial_accumulator_value`` and ``eps`` are both zero, or if
            a group has its own ``initial_accumulator_value``.
        NotImplementedError: if ``differentiable=True``.
        RuntimeError: at ``step``, if a gradient is sparse.

    Limits: a gradient that is not finite is not skipped. As in torch's optimizers it ruins the state, but it does so
    visibly: an infinite norm (in float32, above 1e19) turns every parameter into NaN instead of shrinking all later
    steps to zero. Check before the step (``GradScaler``, ``clip_grad_norm_`` with ``error_if_nonfinite=True``). There
    is no ``lr_decay`` (use a scheduler), no Nesterov momentum, no fused or capturable form, and no autograd through the
    step. Parameters whose gradient is None do not change, not even by decay; without any gradient, a step does nothing.
    Norms are taken in at least float32 and added in float64 (float32 on MPS). ``step`` never waits for a device.

    State: the accumulator is in the state of every parameter, as one shared tensor ``sum`` of shape (1,). FSDP1
    flattens such state and is not supported.

    Source: Ward, Wu and Bottou (2020), "AdaGrad stepsizes: sharp convergence over nonconvex landscapes", JMLR 21(219),
    algorithm 1 (``lr`` is its eta; it has neither eps, momentum nor decay). The defaults 1.0, 1e-2 and 1e-10 are those
    of the AdaGrad-Norm in the AdAdaGrad experiments (Lau, Liu and Kolar 2024, public code), which accumulates one
    number per output row instead.
    """

    needs_whole_gradients: ClassVar[bool] = True
    """Each step reads the norm of the whole gradient."""

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 1e-2,
        eps: float = 1e-10,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        reduce: Reduce | None = None,
    ) -> None:
        if differentiable:
            raise NotImplementedError(
                "AdaGradNorm cannot differentiate through its step: leave differentiable=False, "
                "or unroll the update by hand on functional parameters"
            )
        self._reduce = reduce
        self._known: KnownNorm | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(listed(params), defaults)

    @property
    def accumulator(self) -> Tensor:
        """``b^2``, the live tensor of shape (1,)."""
        first = next(self._params(), None)
        if first is None:
            raise RuntimeError("an optimizer without parameters has no accumulator")
        total: Tensor = self.state[first]["sum"]
        return total

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which share the accumulator at its present value.

        Raises:
            ValueError: if an option is out of its range, or if the group has its own ``initial_accumulator_value``.
        """
        start = self.defaults["initial_accumulator_value"]
        _validate({**self.defaults, **param_group}, start)
        first = next(self._params(), None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["params"]:
            return
        if first is None:
            device = group["params"][0].device
            total = torch.full((1,), start, dtype=_sum_dtype(device), device=device)
        else:
            total = self.state[first]["sum"]
        # In the state of every parameter, because torch's format has no place for a number of the whole model. In the
        # state of one parameter it would be lost with it (frozen, on another pipeline stage, missing from a partial
        # checkpoint). In param_groups it would leave the state empty, and torch.distributed.checkpoint then fills it by
        # an additional step, which fires the step hooks; with a key that is not a parameter, that module fails. Shape
        # (1,) and not (): its full_state_dict=True then works without momentum buffers too.
        for param in group["params"]:
            self.state[param]["sum"] = total
            if group["momentum"] != 0:  # now, not at the first step: checkpoints are loaded into existing tensors
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    def take_norm(self, measured: KnownNorm) -> None:
        """Offers the measured norm of the gradients of all parameters to the next step.

        The step uses it if ``measured.is_of(...)`` its gradients and ``reduce`` was not given. Otherwise it computes
        the norm itself.
        """
        self._known = measured

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: computes the loss and its gradients again, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        loss = None
        known, self._known = self._known, None  # it holds references to gradients, so it must not outlive the step
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [batch for group in self.param_groups for batch in self._collect(group)]
        if batches or self._reduce is not None:
            b = self._accumulate(batches, None if known is None else self._checked(known))
            for batch in batches:
                _update(batch, b)
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the result of ``state_dict``; the accumulator is restored exactly.

        Raises:
            ValueError: if the state is that of another optimizer.
        """
        saved: list[Tensor] = []

        # Read before torch casts it: Optimizer.load_state_dict casts all state to the dtype of its parameter.
        def remember(_: Optimizer, loaded: StateDict) -> None:
            saved.extend(entry["sum"] for entry in loaded["state"].values() if "sum" in entry)
            if not saved or any(total.numel() != 1 for total in saved):
                raise ValueError("the state holds no accumulator: load one that AdaGradNorm saved")

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # If the copies differ, the largest is right: b only grows, so a smaller one belongs to a parameter that the
        # checkpoint did not contain.
        self._share(torch.stack([total.detach().cpu().double().reshape(1) for total in saved]).amax(0))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reduce": self._reduce, "_known": None}

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _share(self, total: Tensor) -> Tensor:
        """Makes ``total`` the accumulator, on the device of the first parameter."""
        device = next(self._params()).device
        shared = total.to(device, _sum_dtype(device))
        for param in self._params():
            self.state[param]["sum"] = shared
        return shared

    def _collect(self, group: dict[str, Any]) -> list[_Batch]:
        """This process's pieces of the group's tensors that have a gradient, by device, dtype and spread."""
        batches: dict[_Kind, _Batch] = {}
        kind: _Kind | None = None
        momentum = group["momentum"] != 0
        for param in group["params"]:
            local, grad, spread = param, param.grad, None
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    "AdaGradNorm does not support sparse gradients: make the layer dense "
                    "(nn.Embedding(sparse=False)), or give its parameters to torch.optim.SGD"
                )
            if isinstance(param, DTensor):
                # A gradient may be a sum that is still to be made (Partial), whose local norm would mean nothing.
                if grad.placements != param.placements:
                    grad = grad.redistribute(param.device_mesh, param.placements)
                local, grad, spread = param.to_local(), grad.to_local(), _Spread.of(param)
            # Looked up only where it changes: neighbouring parameters mostly have the same.
            if kind != (local.device, local.dtype, spread):
                kind = (local.device, local.dtype, spread)
                batch = batches.setdefault(kind, _Batch(group, spread, [], [], []))
            batch.params.append(local)
            batch.grads.append(grad)
            if momentum:
                buffer = self.state[param].get("momentum_buffer")
                if buffer is None:  # a scheduler turned momentum on
                    buffer = self.state[param]["momentum_buffer"] = torch.zeros_like(param)
                batch.buffers.append(buffer.to_local() if isinstance(buffer, DTensor) else buffer)
        return [batch.real() for batch in batches.values()]

    def _checked(self, known: KnownNorm) -> float | None:
        """The known squared norm if it is that of this step's gradients; else None."""
        grads = [param.grad for param in self._params() if param.grad is not None]
        return known.grad_sq if self._reduce is None and known.is_of(grads) else None

    def _accumulate(self, batches: list[_Batch], grad_sq: float | None) -> float | Tensor:
        """Adds the squared norm of the whole gradient, computed here if not given, and returns the new ``b``."""
        total = self.accumulator
        device = next(self._params()).device
        if total.device != device:  # the model was moved after this optimizer was made
            total = self._share(total)
        # In place: this tensor is in the state of every parameter.
        total.add_(self._read(batches, total) if grad_sq is None else grad_sq)
        # An infinite norm must show at once, as NaN. As infinity it would silently make all steps zero from now on. On
        # the CPU b is a number; elsewhere it stays a tensor of shape (1,), since reading a number would wait.
        if total.is_cpu:
            value = total.item()
            return math.sqrt(value) if math.isfinite(value) else math.nan
        return torch.add(total.sqrt(), total, alpha=0)  # 0 x inf is NaN

    def _read(self, batches: list[_Batch], total: Tensor) -> Tensor:
        """The squared norm of the whole gradient, 0-dim, on the device and in the dtype of ``total``."""
        norms: dict[_Spread | None, list[Tensor]] = {}
        if self._reduce is not None:  # first and always: the other ranks wait even if this one has no gradient
            norms[None] = [torch.zeros_like(total)]
        for batch in batches:
            norms.setdefault(batch.spread, []).extend(_norms(batch.grads, total))
        grads_sq = [self._piece_sq(spread, torch.cat(pieces)) for spread, pieces in norms.items()]
        return sum(grads_sq[1:], start=grads_sq[0])

    def _piece_sq(self, spread: _Spread | None, norms: Tensor) -> Tensor:
        """The squared norm of a piece of the gradient, summed over all processes that hold a part of it; 0-dim."""
        local = torch.dot(norms, norms)
        if spread is not None:
            return spread.sum(local).to(norms)
        return local if self._reduce is None else self._reduce(local).to(norms)


class _Spread(NamedTuple):
    """How the pieces of a DTensor are summed: over the mesh dimensions that are Partial here, not over replicas."""

    mesh: DeviceMesh
    placements: tuple[Partial | Replicate, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> _Spread:
        return cls(
            tensor.device_mesh,
            tuple(Replicate() if placement.is_replicate() else Partial() for placement in tensor.placements),
        )

    def sum(self, local: Tensor) -> Tensor:
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False).full_tensor()


_Kind = tuple[torch.device, torch.dtype, _Spread | None]


class _Batch(NamedTuple):
    """Local tensors of one group, device, dtype and spread; ``buffers`` is empty without momentum."""

    group: dict[str, Any]
    spread: _Spread | None
    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]

    def real(self) -> _Batch:
        """The same memory as real tensors."""
        if not self.params[0].is_complex():
            return self
        views = [[torch.view_as_real(tensor.resolve_conj()) for tensor in tensors] for tensors in self[2:]]
        return _Batch(self.group, self.spread, *views)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for tensors of ``dtype``: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norms(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    """Norms of pieces of the tensors, 1-dim, in the dtype and on the device of ``like``.

    The tensors must have the same device and dtype.
    """
    dtype = _real_dtype(tensors[0].dtype)
    norms: list[Tensor] = []
    if tensors[0].is_cpu:
        limit = _LIMIT_ONE_THREAD if torch.get_num_threads() == 1 else _LIMIT_THREADS
        wholes: list[Tensor] = []
        short: list[Tensor] = []
        for tensor in tensors:
            size = tensor.numel()
            if size > limit:
                flat, even = tensor.reshape(-1), size // _BLOCK * _BLOCK
                norms.append(torch.linalg.vector_norm(flat[:even].view(-1, _BLOCK), dim=1, dtype=dtype))
                short.append(flat[even:])
            elif size <= _BLOCK and tensor.dim() == 1:
                short.append(tensor)
            else:
                wholes.append(tensor)
        # One call for all short vectors: they are most of a model's tensors, but few of its elements.
        tensors = [*wholes, *torch.split(torch.cat(short), limit)] if short else wholes
    if multi_tensor.are_plain(tensors):
        norms.append(torch.stack(torch._foreach_norm(tensors, 2, dtype)))
    else:
        norms.append(torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors]))
    return [norm.to(like) for norm in norms]


def _update(batch: _Batch, b: float | Tensor) -> None:
    """Applies the formula to a batch."""
    group, _, params, grads, buffers = batch
    first = params[0]
    foreach = multi_tensor.are_plain(params) if group["foreach"] is None else group["foreach"]
    if first.dtype != _real_dtype(first.dtype):
        foreach = False  # no multi-tensor kernel takes a float32 factor for half precision
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.squeeze()
    rate = lr if group["maximize"] else -lr
    inverse = 1 / (b + group["eps"])
    if group["weight_decay"] != 0:
        multi_tensor.multiply(params, _factor(1 - inverse * lr * group["weight_decay"], first), foreach=foreach)
    if buffers:
        multi_tensor.multiply(buffers, _factor(group["momentum"], first), foreach=foreach)
        multi_tensor.add(buffers, grads, _factor(inverse, first), foreach=foreach)
        multi_tensor.add(params, buffers, _factor(rate, first), foreach=foreach)
    else:
        # One factor, so that the gradient is read once.
        multi_tensor.add(params, grads, _factor(inverse * rate, first), foreach=foreach)


def _factor(value: float | Tensor, like: Tensor) -> float | Tensor:
    """``value`` as a factor for tensors like this one: a number if that needs no sync, else a tensor."""
    dtype = _real_dtype(like.dtype)
    # Half precision needs a float32 tensor of shape (1,): torch rounds numbers and 0-dim tensors to the dtype of the
    # other operand before it computes, and small ones become zero.
    if like.dtype != dtype:
        return torch.as_tensor(value, dtype=dtype, device=like.device).reshape(1)
    if isinstance(value, Tensor):
        return value.item() if like.is_cpu else value.to(like.device, dtype).squeeze()
    return value


def _validate(options: dict[str, Any], start: float) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay", "initial_accumulator_value", "eps"):
        require(0 <= options[name] < math.inf, f"{name} must be finite and not negative", options[name])
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {options['momentum']}; 0 turns it off")
    if options["initial_accumulator_value"] != start:
        raise ValueError(
            f"the whole model has one accumulator, which starts at {start}, got "
            f"{options['initial_accumulator_value']} for a group: give it to AdaGradNorm itself"
        )
    if start == 0 and options["eps"] == 0:
        raise ValueError(
            "initial_accumulator_value and eps are both 0, so a zero gradient would divide by zero: raise one"
        )
