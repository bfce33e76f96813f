"""The model of a worker under local SGD, and which parts of it are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adabatch.runtime.local_sgd.exchange import Exchange
from adabatch.runtime.observers.trained_parameters import held_parameters
from adabatch.runtime.wrappers.fsdp2 import own_piece

COUNT = "step"
"""Name of the optimizers' count of steps, which is equal on all workers and not averaged."""


class Replica:
    """The model of one worker, or this rank's part of it if it is sharded.

    Attributes:
        parameters: those that are trained.
        layers: the name of each one's module.
        device: of the parameters.

    Args:
        model: plain, or sharded by ``fully_shard`` over the ranks of the worker.
        optimizer: its parameters are averaged.

    Raises:
        ValueError: if the model is in ``DistributedDataParallel``, or the optimizer belongs to another model.
        TypeError: if ``optimizer`` is not an ``Optimizer``.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is in DistributedDataParallel, which averages the gradients of all workers at every step: "
                "give LocalSGD the plain model (model.module), or shard it inside a node with fully_shard"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.parameters = held_parameters(model, optimizer)
        self.device = own_piece(self.parameters[0])[0].device
        names = {id(p): name for name, p in model.named_parameters()}
        self.layers = [names[id(p)].rpartition(".")[0] for p in self.parameters]
        self._model = model
        self._optimizer = optimizer

    def pieces(self) -> list[Tensor]:
        """The parameters, or this rank's shards of them; to be changed in place."""
        return [own_piece(p.detach())[0] for p in self.parameters]

    def buffers(self) -> list[Tensor]:
        """The model's buffers of real numbers, such as running averages; integer buffers are equal on all workers."""
        # a mean of counts would be none: batch norm's num_batches_tracked is the same everywhere, and stays whole
        return [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]

    def everything(self) -> list[Tensor]:
        """Everything that must be equal when training begins: buffers and all parameters, including frozen ones."""
        return [own_piece(each.detach())[0] for each in (*self._model.parameters(), *self._model.buffers())]

    def optimizer_state(self, places: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The real numbers in the optimizer's state (momentum, second moments), by place and name; of some parameters
        or of all."""
        state = self._optimizer.state
        return {
            f"{place}.{name}": own_piece(value)[0]
            for place in (range(len(self.parameters)) if places is None else places)
            # Sorted, so that all workers send the same tensors in the same order.
            for name, value in sorted(state.get(self.parameters[place], {}).items())
            if isinstance(value, Tensor) and value.is_floating_point() and name != COUNT
        }

    @torch.no_grad()
    def mean_gradients(
        self, exchange: Exchange, *, weight: float, riding: Sequence[float] = ()
    ) -> tuple[list[Tensor | None], list[float]]:
        """The mean of the workers' gradients, one per parameter; None if no worker has a gradient.

        Args:
            exchange: with the other workers.
            weight: of this worker.
            riding: a few numbers that travel with the gradients, each 0 or 1.

        Returns:
            the gradients, and the means of the numbers, which are 0 only if all are.

        Raises:
            ValueError: if a gradient is sparse.
        """
        grads = [p.grad for p in self.parameters]
        if any(grad is not None and grad.is_sparse for grad in grads):
            raise ValueError(
                "a gradient is sparse, which local SGD does not average: use dense gradients (sparse=False of "
                "nn.Embedding), or, if they are averaged for the noise only, spread='within'"
            )
        pieces = [
            # Clones: the mean is formed in place, and each worker may need its own gradient again. Zeros where there is
            # none, because all workers must send tensors of the same shapes.
            torch.zeros_like(own_piece(p)[0]) if grad is None else own_piece(grad)[0].clone()
            for p, grad in zip(self.parameters, grads, strict=True)
        ]
        present = [grad is not None for grad in grads]
        # They travel in the same reduction, so that workers learn of gradients that only others have.
        flags = torch.tensor([*present, *riding], dtype=torch.float32).to(pieces[0])
        exchange.mean([*pieces, flags], weight=weight)
        # host sync, unless nothing rides along and another worker cannot have a gradient that this one lacks
        shares = [float(here) for here in present] if all(present) and not riding else flags.tolist()
        found = [
            _as_gradient(p, piece) if share > 0 else None
            for p, piece, share in zip(self.parameters, pieces, shares[: len(pieces)], strict=True)
        ]
        return found, shares[len(pieces) :]

    @contextmanager
    def with_gradients(self, gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """The parameters have these gradients within the block."""
        own = [p.grad for p in self.parameters]
        self.put_gradients(gradients)
        try:
            yield
        finally:
            self.put_gradients(own)

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """The parameters have these gradients from now on."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def _as_gradient(parameter: Tensor, piece: Tensor) -> Tensor:
    """This rank's piece of a gradient, as a tensor of the same kind as the parameter."""
    if not isinstance(parameter, DTensor):
        return piece
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        parameter.placements,
        # the check would be a collective
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
