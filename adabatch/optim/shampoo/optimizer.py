"""Shampoo: the gradient of each matrix is multiplied by inverse roots of its row and column statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from adabatch.arguments import checked
from adabatch.optim import multi_tensor
from adabatch.optim.mup.guard import check_ratios
from adabatch.optim.parameters import listed
from adabatch.optim.placement import Alone, Owner, Reduce, check_in_place
from adabatch.optim.products import check_bfloat16
from adabatch.optim.shampoo import statistics
from adabatch.optim.shampoo.blocks import Blocks
from adabatch.optim.shampoo.checks import check_group
from adabatch.optim.shampoo.stacks import Stack, divided


class Pending(NamedTuple):
    """A parameter whose gradient is in its averages, and whose update is still to come.

    Args:
        param: the parameter.
        group: its group.
        form: how it is cut into blocks.
        blocks: its whole gradient in blocks; None on the ranks that do not have it.
        refresh: whether its roots are due.
    """

    param: Tensor
    group: dict[str, Any]
    form: Blocks
    blocks: Tensor | None
    refresh: bool


class Shampoo(Optimizer):
    r"""Shampoo without grafting, with settings that transfer across widths.

    For a matrix with the gradient ``G`` (rows x columns), each step computes

        L <- average of G G^T          R <- average of G^T G
        U  = (L + rho_L)^-e G (R + rho_R)^-e
        v <- momentum * v + U
        W <- (1 - lr * weight_decay) * W - lr * v

    where ``rho`` is ``epsilon`` times the largest eigenvalue of the statistic, or ``epsilon`` itself. Convolutions are
    matrices of outputs x (inputs x kernel), and tensors with three or more dimensions are treated likewise. Vectors and
    scalars have only the left side, with exponent 1/2. ``v`` averages preconditioned gradients, each multiplied by the
    roots of its own step.

    *Width.* Pass ``plan.groups(model, "shampoo", lr=...)`` (``adabatch.optim.mup``). With e = 1/4 the learning rate is
    multiplied by sqrt(fan-out ratio / fan-in ratio). A relative epsilon does not change with width; an absolute one
    does.

    *Stale roots.* The roots are not computed in every step. In between, a gradient has components
    that the roots do not contain. These grow by up to ``epsilon^-2e`` more than the others, particularly in wide
    layers. With ``epsilon=1e-3`` and roots that are ten steps old, the largest stable learning
    rate falls with width; with 1e-2, or with fresh roots, it does not. So the default is 1e-2, or 1e-3 if
    ``refresh_every=1``.

    *Leading eigenvectors.* An eigenvalue below a tenth of the damping hardly changes the root. In float32, if these are
    three quarters or more of a side of at least 128, as in wide layers, they are all taken for their mean, which
    changes the root by at most a tenth of its exponent. Only the other eigenvectors are computed, by subspace iteration
    from those of the last refresh, in a tenth of the time. The whole statistic is decomposed again where that does not
    converge.

    *Ranks.* With ``Shampoo(params, **adabatch.across_ranks(model))`` one rank, the owner, computes the roots of each
    parameter; parameters are assigned such that costs are balanced. Under DDP the roots are sent to the other ranks,
    and the blocks of a parameter that costs more than half of a rank's share are divided among several owners. Under
    FSDP2 each gradient is gathered at its owner, which updates the statistics of all its blocks and scatters the
    update. The other ranks receive the statistics in ``state_dict``, which all ranks must call together. A state may be
    loaded at another number of ranks.

    Args:
        params: parameters, named parameters or groups of them. Groups may differ in all options.
        lr: learning rate, a number or a tensor of one element; optional if every group has its own.
        exponent: ``e`` of each side in (0, 0.5]. 1/4 is Shampoo; with 1/2 a step grows as the gradient falls.
        epsilon: damping of the statistics; by default 1e-2 with stale roots and 1e-3 with fresh ones.
        relative: whether epsilon is in units of the largest eigenvalue, or absolute, in squared units of the gradient.
        beta: factor of the moving averages per step, in [0, 1). The averages are running means at first, so they are
            not biased towards zero. May be changed during a run.
        observe_parts: each step after the refresh warm-up adds one in so many columns of a gradient to the left
            statistic and one in so many rows to the right one, in turn and with so many times the weight. Sides of
            fewer than 32 times as many are added whole. On MNIST 4 took as many steps as 1 or fewer, for a quarter of
            the time of the statistics (``benchmarks/LOG.md``).
        refresh_every: most steps between two computations of the roots. They are computed whenever a parameter has
            taken a quarter more steps, until this is the interval. On MNIST 3 took fewer steps than 5 at large batches,
            and with 10 some runs did not arrive (``benchmarks/LOG.md``).
        refresh_warmup: number of first steps of a parameter in which its roots are always computed.
        bfloat16_products: compute the products of gradients in the statistics from bfloat16; averages, roots and
            updates stay in float32. A statistic is then off by at most 1.2 % of its trace. Off by default, since it
            saves 7 % of a step where it was measured, and is slower on CPUs without such instructions
            (``docs/kfac.md``).
        block_size: longest side of a block. Larger matrices are cut into blocks with separate statistics, padded with
            zeros at the edges. The width rule then changes (``mup.ShampooLaw(block_size=...)``) and has a kink at the
            width where cutting begins: compare widths on one side of it only. None cuts nothing.
        momentum: heavy-ball factor in [0, 1) on the preconditioned gradients. On MNIST 0.8 had the lowest loss on
            held-out images at batches of 2,048 and 8,192, and about the same as others at 128 and 512
            (``benchmarks/results/shampoo_momentum.md``). The best learning rate was 0.2 to 0.4 of that without
            momentum.
        weight_decay: coefficient of the decoupled decay.
        foreach: True for multi-tensor kernels in momentum, decay and update, False for a loop; None selects
            automatically. Both give the same numbers.
        maximize: maximize the objective instead of minimizing it.
        reduce: sums a tensor over the ranks that see different data; None for one process. All ranks call it at each
            step that computes roots, so that statistics that are not finite stop all ranks together.
        owner: decides which rank computes the roots of which blocks; by default each rank computes all.

    Raises:
        ValueError: if an option is out of its range, if a parameter is complex, if a side is longer than 16,384
            without ``block_size``, or if ``bfloat16_products`` meets float64 or a device without bfloat16.
        RuntimeError: at ``step``, if a gradient is sparse, if statistics are not finite (at the next refresh), or if
            parameters were replaced (DeepSpeed flattens them from ZeRO 1 on: use stage 0, DDP or FSDP2).

    Attributes:
        fallbacks: counts of fallbacks in this process. "float64": the roots of one side in float32 were not exact
            enough, and were computed in float64. "jittered": the eigenvalues converged only after a small number
            was added to the diagonal. "kept": they did not converge, and the block kept its previous roots (or did not
            move, if it had none). The raw gradient is never used instead, since its learning rate has another unit.

    Limits: no grafting, no closed form for layers that share a weight, no fused or capturable form. Every rank
    allocates all statistics and roots. Under FSDP2 all blocks of a parameter have one owner. Without an ``owner`` every
    rank computes all roots; under FSDP2 each then holds all whole gradients. Roots are computed in float32, with a
    check, if epsilon is relative and at least 1e-3, else in float64 (on the CPU for devices without it); everything
    else in at least float32.

    Source: Gupta, Koren and Singer (2018), "Shampoo", ICML, algorithm 1 (sums there, averages here, as in Anil et al.
    2020); the width rule is in Ishikawa and Karakida (2024), arXiv:2312.12226, and Qiu et al. (2025), arXiv:2512.05620.
    """

    preferred_lr_rule: ClassVar[str] = "sqrt"
    """The default rule by which the learning rate follows the batch."""

    needs_whole_gradients: ClassVar[bool] = True
    """Each step reads the whole gradient matrices of parameters."""

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        exponent: float = 0.25,
        epsilon: float | None = None,
        relative: bool = True,
        beta: float = 0.95,
        observe_parts: int = 4,
        refresh_every: int = 3,
        refresh_warmup: int = 10,
        bfloat16_products: bool = False,
        block_size: int | None = None,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        reduce: Reduce | None = None,
        owner: Owner | None = None,
    ) -> None:
        self._reduce = reduce
        self._owner: Owner = owner or Alone()
        self._stacks: dict[Tensor, list[Stack]] = {}
        self.fallbacks = {"float64": 0, "jittered": 0, "kept": 0}
        defaults = {
            "lr": lr,
            "exponent": exponent,
            "epsilon": epsilon,
            "relative": relative,
            "beta": beta,
            "observe_parts": observe_parts,
            "refresh_every": refresh_every,
            "refresh_warmup": refresh_warmup,
            "bfloat16_products": bfloat16_products,
            "block_size": block_size,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(listed(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: if an option is out of its range, or if a parameter is not supported.
        """
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex():
                raise ValueError("Shampoo does not take complex parameters: give them to a first-order optimizer")
            if group["bfloat16_products"]:
                check_bfloat16(param.dtype, param.device, "Shampoo")
            self.state[param] = statistics.begin(param, group)
        self._catch_up()  # before the new assignment, which may give an older parameter another owner
        self._deal()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "fallbacks": self.fallbacks,
            "_reduce": self._reduce,
            "_owner": self._owner,
            "_stacks": self._stacks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # checkpoints from before these were options
            group.setdefault("observe_parts", 1)
            group.setdefault("bfloat16_products", False)
        for entry in self.state.values():
            statistics.complete(entry)

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
            RuntimeError: if a gradient is sparse, or if statistics are not finite.
            ValueError: if a scheduler has changed the ratios of a plan's learning rates (``mup.check_ratios``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_ratios(self)
        check_in_place((param for group in self.param_groups for param in group["params"]), self.state, "Shampoo")
        groups = [
            (group, params)
            for group in self.param_groups
            if (params := [param for param in group["params"] if param.grad is not None and param.numel()])
        ]
        pending = {param: self._observe(param, group) for group, params in groups for param in params}
        # Each rank computes its own roots before it meets the others, which compute theirs meanwhile.
        unfit = {param: not self._refresh(each) for param, each in pending.items() if each.refresh}
        updates = [(group, params, [self._direction(pending[param]) for param in params]) for group, params in groups]
        # Before any parameter moves, so that a step that raises leaves the weights as they were.
        self._check_finite(unfit)
        for group, params, directions in updates:
            self._apply(params, directions, group)
        return loss

    def state_dict(self) -> StateDict:
        """The state in torch's format, the same on every rank. Under FSDP2 all ranks must call it together."""
        self._catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the result of ``state_dict`` exactly.

        On another number of ranks the blocks of a parameter may be divided otherwise, and the run goes on within
        rounding.

        Raises:
            ValueError: if the state holds no statistics of some parameters, such as that of another optimizer.
        """
        saved: StateDict = {}

        # Read before torch casts it: Optimizer.load_state_dict casts all state to the dtype of its parameter.
        def remember(_: Optimizer, loaded: StateDict) -> None:
            saved.update(loaded)
            numbers = [number for group in loaded["param_groups"] for number in group["params"]]
            if any("left" not in loaded["state"].get(number, {}) for number in numbers):
                raise ValueError("the state holds no statistics: load one that Shampoo saved")

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [number for group in saved["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(ids, params, strict=True):
            for name, loaded in saved["state"][number].items():
                # Sharded checkpoints shard all that has the shape of its parameter, such as the scale of a vector of
                # one element.
                is_sharded = isinstance(loaded, DTensor) and name != "momentum_buffer"
                value = loaded.full_tensor() if is_sharded else loaded
                on_device = name not in statistics.COUNTS
                self.state[param][name] = value.to(self.state[param][name].device) if on_device else value.cpu()
        for param in params:
            statistics.complete(self.state[param])
        self._deal()  # the groups that were loaded may have blocks of another size

    def _deal(self) -> None:
        """Divides the blocks of the parameters into stacks, and gives each an owner."""
        params = [param for group in self.param_groups for param in group["params"]]
        costs = [statistics.cost(self.state[param]) for param in params]
        num_blocks = [statistics.num_blocks(self.state[param]) for param in params]
        # Named by number: wrappers change the names of parameters.
        stacks = divided(costs, num_blocks, num_owners=self._owner.owners_per_layer)
        self._stacks = dict(zip(params, stacks, strict=True))
        states = {stack.name: state for param in params for stack, state in self._stacks_of(param)}
        for state in states.values():
            statistics.unite(state)
        self._owner.deal({name: statistics.cost(state) for name, state in states.items()})

    def _stacks_of(self, param: Tensor) -> list[tuple[Stack, statistics.State]]:
        """The stacks of a parameter, each with its state."""
        state = self.state[param]
        return [(stack, statistics.stack(state, stack.blocks)) for stack in self._stacks[param]]

    def _catch_up(self) -> None:
        """Gets the statistics of every parameter that has taken a step from its owners."""
        for param in self._stacks:
            if int(self.state[param]["step"]):
                for stack, state in self._stacks_of(param):
                    self._owner.catch_up(stack.name, statistics.of_sides(state))

    def _observe(self, param: Tensor, group: dict[str, Any]) -> Pending:
        """Counts a step of a parameter, and adds its gradient to the averages on the ranks that have all of it."""
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                "Shampoo does not support sparse gradients: make the layer dense (nn.Embedding(sparse=False)), or give "
                "its parameters to torch.optim.SGD"
            )
        if state["left"].device != grad.device:  # the model was moved after this optimizer was made
            statistics.move(state, grad.device)
        # An owner that has to gather gives a parameter one stack.
        whole = self._owner.gather(self._stacks[param][0].name, grad)
        form = Blocks.of(param.shape, group["block_size"])
        blocks = None if whole is None else _blocks(whole, form, state["left"].dtype, negative=group["maximize"])
        # On every rank, with or without the gradient: the counts tell all of them when to meet in share().
        refresh = statistics.count(state, group)
        if blocks is not None:
            # Before the roots, so that those of a first step are not the roots of zeros.
            statistics.follow(state, group, blocks)
        return Pending(param, group, form, blocks, refresh)

    def _refresh(self, pending: Pending) -> bool:
        """Computes the roots of the stacks that this rank owns; returns whether all of these could be computed."""
        owned = (state for stack, state in self._stacks_of(pending.param) if self._owner.owns(stack.name))
        return all(statistics.refresh(state, pending.group, self.fallbacks) for state in owned)

    def _direction(self, pending: Pending) -> Tensor:
        """The update of a parameter in its shape and layout, by the owners' roots."""
        param, stacks = pending.param, self._stacks_of(pending.param)
        if pending.refresh:
            for stack, state in stacks:
                self._share(stack, state)
        assert param.grad is not None
        update = None
        if pending.blocks is not None:
            blocks = [statistics.precondition(state, pending.blocks[stack.blocks]) for stack, state in stacks]
            update = pending.form.join(torch.cat(blocks) if len(blocks) > 1 else blocks[0], param.shape)
        grad = param.grad.to(self.state[param]["left"].dtype)
        return _as(self._owner.scatter(self._stacks[param][0].name, update, grad), param)

    def _share(self, stack: Stack, state: statistics.State) -> None:
        """Sends the roots of a stack from its owner to the other ranks."""
        roots = statistics.roots_of(state)
        self._owner.share(stack.name, roots)
        if not self._owner.owns(stack.name):
            statistics.take_ranks(state, roots)

    def _check_finite(self, unfit: dict[Tensor, bool]) -> None:
        """Raises on all ranks if one of them found statistics that are not finite."""
        found = list(unfit.values())
        if self._reduce is not None and unfit:
            device = next(iter(unfit)).device
            # The same parameters are due on all ranks, in the same order. As numbers, since `reduce` adds.
            counts = torch.tensor(found, dtype=torch.float32, device=device)
            found = [count > 0 for count in self._reduce(counts).tolist()]  # host sync
        for param, is_unfit in zip(unfit, found, strict=True):
            if is_unfit:
                raise RuntimeError(
                    f"the statistic of a parameter of shape {tuple(param.shape)} is not finite: a gradient was not, "
                    f"and averages do not recover. Leave such a step out (GradScaler, clip_grad_norm_ with "
                    f"error_if_nonfinite=True) and resume from a checkpoint"
                )

    def _apply(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        """Applies momentum, decay and the updates of a group."""
        lr = group["lr"]
        # A number where that costs no sync; otherwise the tensor is used as it is.
        if isinstance(lr, Tensor) and lr.is_cpu:
            lr = lr.item()
        foreach = multi_tensor.are_plain(params) if group["foreach"] is None else group["foreach"]
        # No multi-tensor kernel adds float32 to half precision, and none takes tensors of two devices.
        foreach = foreach and len({(p.device, p.dtype, u.dtype) for p, u in zip(params, updates, strict=True)}) == 1
        foreach = foreach and params[0].dtype == updates[0].dtype
        if group["momentum"] != 0:
            buffers = [self._buffer(param) for param in params]
            multi_tensor.multiply(buffers, group["momentum"], foreach=foreach)
            multi_tensor.add(buffers, updates, 1.0, foreach=foreach)
            updates = buffers
        if group["weight_decay"] != 0:
            multi_tensor.multiply(params, 1 - lr * group["weight_decay"], foreach=foreach)
        multi_tensor.add(params, updates, -lr, foreach=foreach)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:  # a scheduler turned momentum on
            state["momentum_buffer"] = torch.zeros_like(param, dtype=state["left"].dtype)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _blocks(grad: Tensor, form: Blocks, dtype: torch.dtype, *, negative: bool) -> Tensor:
    """A gradient, or its negative, in blocks."""
    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
    blocks = form.cut(whole.to(dtype))
    return -blocks if negative else blocks


def _as(update: Tensor, param: Tensor) -> Tensor:
    """The update in the layout of its parameter. It has that layout already, or every rank has the whole update."""
    if not isinstance(param, DTensor) or isinstance(update, DTensor):
        return update
    mesh = param.device_mesh
    return DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        mesh, param.placements
    )
