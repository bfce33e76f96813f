"""Shampoo on two ranks, under DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adabatch.checkpointing.sharded_state import Shards, put_back, taken_apart, write_shards
from adabatch.optim import Shampoo
from adabatch.optim.placement import Alone
from adabatch.optim.shampoo import roots, statistics
from adabatch.runtime.optimizers.matrix_owners import across_ranks

pytestmark = pytest.mark.distributed

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "block_size": 4, "refresh_warmup": 2}
OFTEN: dict[str, Any] = {**OPTIONS, "refresh_every": 2}
OFTEN_WIDE: dict[str, Any] = {**OFTEN, "block_size": 150}


def network() -> nn.Sequential:
    """An odd number of rows, so that the shards are uneven."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def wrapped(wrap: str) -> nn.Module:
    model = network()
    if wrap == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model[0])
    fully_shard(model)
    return model


def train(
    model: nn.Module,
    optimizer: Shampoo,
    steps: Iterable[int],
    rows: slice = slice(None),
    dtype: torch.dtype = torch.float64,
) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=dtype)
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many roots of matrices are computed inside, in this process."""
    calls, inverse_root = [0], statistics.inverse_root

    def counting(matrices: Tensor, **options: Any) -> Tensor:
        calls[0] += len(matrices)
        return inverse_root(matrices, **options)

    statistics.inverse_root = counting
    try:
        yield calls
    finally:
        statistics.inverse_root = inverse_root


def saved_state(model: nn.Module, optimizer: Shampoo, rank: int) -> Any:
    """As checkpoints of either wrapper do: the first rank alone under DDP; all under FSDP2, plain tensors from one."""
    if not isinstance(model, DistributedDataParallel):
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        for entry in saved["state"].values():
            for value in entry.values():
                if not isinstance(value, DTensor):
                    dist.broadcast(value, src=0)
        return saved
    held = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return copy.deepcopy(held[0])


def on_rank(rank: int, wrap: str, owned: bool) -> tuple[list[Tensor], list[Tensor], int]:
    rows = slice(4 * rank, 4 * rank + 4)
    model, again = wrapped(wrap), wrapped(wrap)
    optimizer, other = (
        Shampoo(net.parameters(), **OFTEN, **(across_ranks(net) if owned else {})) for net in (model, again)
    )
    with counted() as calls:
        train(model, optimizer, range(3), rows)
        saved = saved_state(model, optimizer, rank)
        again.load_state_dict(model.state_dict())
        if wrap == "ddp":
            other.load_state_dict(saved)
        else:
            set_optimizer_state_dict(again, other, saved)
        train(model, optimizer, range(3, 6), rows)
    train(again, other, range(3, 6), rows)
    return [whole(p).clone() for p in model.parameters()], [whole(p).clone() for p in again.parameters()], calls[0]


@pytest.mark.parametrize(("wrap", "owned"), [("ddp", True), ("fsdp2", True), ("fsdp2", False)])
def test_two_ranks_equal_one_process_and_resume(tmp_path: Path, wrap: str, owned: bool) -> None:
    ranks = run_ranks(on_rank, 2, tmp_path, wrap, owned)
    model = network()
    with counted() as calls:
        train(model, Shampoo(model.parameters(), **OFTEN), range(6))
    for through, resumed, _ in ranks:
        for mine, theirs, again in zip(model.parameters(), through, resumed, strict=True):
            torch.testing.assert_close(theirs, mine.detach(), rtol=1e-9, atol=1e-12)
            assert torch.equal(theirs, again)
    counts = [count for *_, count in ranks]
    if owned:
        assert sum(counts) == calls[0], "each root is computed once"
        assert min(counts) > 0
    else:
        assert counts == [calls[0]] * 2


def wide() -> nn.Sequential:
    """Sides long enough for roots by leading eigenvectors, and blocks of which some have whole roots."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 151), nn.Tanh(), nn.Linear(151, 140), nn.Tanh(), nn.Linear(140, 3))


def wide_on_rank(rank: int, wrap: str) -> tuple[list[Tensor], list[float], dict[str, int]]:
    model: nn.Module = wide()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = Shampoo(model.parameters(), **OFTEN_WIDE, **across_ranks(model))
    train(model, optimizer, range(6), slice(4 * rank, 4 * rank + 4), torch.float32)
    return [whole(p).clone() for p in model.parameters()], ranks_of_roots(model, optimizer), optimizer.fallbacks


def ranks_of_roots(model: nn.Module, optimizer: Shampoo) -> list[float]:
    """The rank of each block of each side."""
    states = [optimizer.state[param] for param in model.parameters()]
    found = [state[f"{side}_rank"].tolist() for state in states for side in ("left", "right") if side in state]
    return [rank for each in found for rank in each]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_roots_by_leading_eigenvectors_are_the_same_on_all_ranks(tmp_path: Path, wrap: str) -> None:
    model = wide()
    optimizer = Shampoo(model.parameters(), **OFTEN_WIDE)
    train(model, optimizer, range(6), dtype=torch.float32)
    (first, ranks, fallbacks), (second, others, _) = run_ranks(wide_on_rank, 2, tmp_path, wrap)
    assert ranks == others
    assert sum(rank > 0 for rank in ranks) >= 4
    assert not any(fallbacks.values())
    for mine, theirs, again in zip(model.parameters(), first, second, strict=True):
        assert torch.equal(theirs, again)
        torch.testing.assert_close(theirs, mine.detach(), rtol=1e-3, atol=1e-4)


class Recorded(Alone):
    """What an optimizer asked for, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def share(self, layer: str, roots: Sequence[Tensor]) -> None:
        self.calls.append("share")

    def owns(self, layer: str) -> bool:
        self.calls.append("owns")
        return True


@pytest.mark.parametrize(("owners_per_layer", "num_stacks"), [(1, 4), (2, 5)])
def test_ranks_compute_all_their_roots_before_they_wait_for_those_of_others(
    owners_per_layer: int, num_stacks: int
) -> None:
    owner, model = Recorded(), network()
    owner.owners_per_layer = owners_per_layer
    optimizer = Shampoo(model.parameters(), **OPTIONS, owner=owner)
    owner.calls.clear()
    train(model, optimizer, range(1))
    assert owner.calls[:num_stacks] == ["owns"] * num_stacks
    assert owner.calls.count("share") == num_stacks


def with_a_group_added(model: nn.Module, layers: nn.Sequential, rows: slice, **ranks: Any) -> None:
    optimizer = Shampoo(layers[2].parameters(), **OFTEN, **ranks)
    before = [optimizer._owner.owns(str(number)) for number in range(2)]
    train(model, optimizer, range(3), rows)
    optimizer.add_param_group({"params": list(layers[0].parameters())})
    if ranks:
        assert before != [optimizer._owner.owns(str(number)) for number in range(2)]
    train(model, optimizer, range(3, 6), rows)


def added_on_rank(rank: int) -> list[Tensor]:
    model = wrapped("fsdp2")
    assert isinstance(model, nn.Sequential)
    with_a_group_added(model, model, slice(4 * rank, 4 * rank + 4), **across_ranks(model))
    return [whole(p).clone() for p in model.parameters()]


def test_a_parameter_that_gets_another_owner_takes_its_statistics_along(tmp_path: Path) -> None:
    model = network()
    with_a_group_added(model, model, slice(None))
    for theirs in run_ranks(added_on_rank, 2, tmp_path):
        for mine, sharded in zip(model.parameters(), theirs, strict=True):
            torch.testing.assert_close(sharded, mine.detach(), rtol=1e-9, atol=1e-12)


def regrouped_on_rank(rank: int) -> tuple[list[int], list[Tensor]]:
    """The blocks of the last weight are two stacks while they are most of the work, then one."""
    model, rows = wrapped("ddp"), slice(4 * rank, 4 * rank + 4)
    layers = model.module
    optimizer = Shampoo(layers[2].parameters(), **OFTEN, **across_ranks(model))
    num_stacks = [len(optimizer._stacks[layers[2].weight])]
    train(model, optimizer, range(3), rows)
    optimizer.add_param_group({"params": list(layers[0].parameters())})
    num_stacks.append(len(optimizer._stacks[layers[2].weight]))
    train(model, optimizer, range(3, 6), rows)
    return num_stacks, [whole(p).clone() for p in model.parameters()]


def test_a_parameter_whose_blocks_come_together_in_one_stack_goes_on(tmp_path: Path) -> None:
    model = network()
    with_a_group_added(model, model, slice(None))
    for num_stacks, theirs in run_ranks(regrouped_on_rank, 2, tmp_path):
        assert num_stacks == [2, 1]
        for mine, again in zip(model.parameters(), theirs, strict=True):
            torch.testing.assert_close(again, mine.detach(), rtol=1e-9, atol=1e-12)


# --- blocks of one parameter on two owners ----------------------------------------------------------------------------

SIDE = 144
SINGLE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "block_size": SIDE, "refresh_warmup": 2, "refresh_every": 2}


def two_blocks(dtype: torch.dtype, parallel: bool) -> tuple[nn.Parameter, Shampoo]:
    """A matrix of two blocks, on two ranks one for each."""
    torch.manual_seed(0)
    layer = nn.Linear(SIDE, 2 * SIDE, bias=False, dtype=dtype)
    ranks = across_ranks(DistributedDataParallel(layer)) if parallel else {}
    return layer.weight, Shampoo([layer.weight], **SINGLE, **ranks)


def run_blocks(param: nn.Parameter, optimizer: Shampoo, steps: Iterable[int]) -> None:
    """Gradients of rank six, in the lower block beside much noise: so this has whole roots, the upper one leading ones.

    They are given as DDP's mean would be, the same on all ranks.
    """
    shared = [torch.randn(side, 6, generator=torch.Generator().manual_seed(1)).double() for side in param.shape]
    for step in steps:
        own = torch.Generator().manual_seed(step)
        grad = shared[0] @ torch.randn(6, 6, generator=own).double() @ shared[1].T
        grad[SIDE:] += 100 * torch.randn(SIDE, SIDE, generator=own).double()
        param.grad = grad.to(param.dtype)
        optimizer.step()


def blocks_on_rank(rank: int, dtype: torch.dtype, begun: tuple[Tensor, Any]) -> dict[str, Any]:
    """A run of six steps that is saved after three and resumed on two ranks, and one that one process has begun."""
    param, optimizer = two_blocks(dtype, parallel=True)
    owned = [optimizer._owner.owns(f"0.{block}") for block in range(2)]
    run_blocks(param, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    middle, ranks = param.detach().clone(), optimizer.state[param]["left_rank"].tolist()
    run_blocks(param, optimizer, range(3, 6))
    ends = []
    for values, saved in ((middle, state), begun):
        again, other = two_blocks(dtype, parallel=True)
        with torch.no_grad():
            again.copy_(values)
        other.load_state_dict(copy.deepcopy(saved))
        run_blocks(again, other, range(3, 6))
        ends.append(again.detach())
    return {
        "owned": owned, "ranks": ranks, "saved": (middle, state), "end": param.detach(), "resumed": ends[0],
        "from one process": ends[1], "fallbacks": optimizer.fallbacks,
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_blocks_of_one_parameter_on_two_owners_equal_one_process_and_resume_on_any_number(
    tmp_path: Path, dtype: torch.dtype, rtol: float
) -> None:
    """In float32 the roots of the blocks have different ranks on two owners, and one rank in one process."""
    param, optimizer = two_blocks(dtype, parallel=False)
    run_blocks(param, optimizer, range(3))
    begun = param.detach().clone(), copy.deepcopy(optimizer.state_dict())
    run_blocks(param, optimizer, range(3, 6))
    first, second = run_ranks(blocks_on_rank, 2, tmp_path, dtype, begun)
    assert [first["owned"], second["owned"]] == [[True, False], [False, True]]
    assert first["ranks"] == second["ranks"]
    assert [rank > 0 for rank in first["ranks"]] == [dtype is torch.float32, False]
    again, other = two_blocks(dtype, parallel=False)
    values, saved = first["saved"]
    with torch.no_grad():
        again.copy_(values)
    other.load_state_dict(saved)
    run_blocks(again, other, range(3, 6))
    for end in (first["end"], first["from one process"], again.detach()):
        torch.testing.assert_close(end, param.detach(), rtol=rtol, atol=rtol)
    for rank in (first, second):
        assert torch.equal(rank["end"], first["end"])
        assert torch.equal(rank["resumed"], first["end"])
        assert not any(rank["fallbacks"].values())
    shapes = [{key: value.shape for key, value in each["state"][0].items()} for each in (begun[1], saved)]
    assert shapes[0] == shapes[1], "what is saved has one form"


def fails_on_the_second(rank: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    param, optimizer = two_blocks(torch.float32, parallel=True)
    before, eigh = param.detach().clone(), torch.linalg.eigh

    def failing(matrices: Tensor) -> Any:
        raise roots.LinAlgError("did not converge")

    if rank == 1:
        torch.linalg.eigh = failing
    run_blocks(param, optimizer, range(1))
    torch.linalg.eigh = eigh
    after = param.detach().clone()
    run_blocks(param, optimizer, range(1, 3))
    return after - before, param.detach() - after, optimizer.fallbacks


def test_roots_that_one_owner_cannot_compute_leave_the_blocks_of_the_other_alone(tmp_path: Path) -> None:
    (first, then, well), (second, after, kept) = run_ranks(fails_on_the_second, 2, tmp_path)
    assert not any(well.values())
    assert kept == {"float64": 2, "jittered": 0, "kept": 2}, "both sides of its block"
    assert torch.equal(first, second)
    assert first[:SIDE].abs().min() > 0
    assert not first[SIDE:].any(), "it had no roots yet"
    assert torch.equal(then, after)
    assert then[SIDE:].abs().min() > 0


def unfit_block(rank: int) -> tuple[list[bool], str]:
    model = wrapped("ddp")
    optimizer = Shampoo(model.parameters(), **OPTIONS, **across_ranks(model))
    train(model, optimizer, range(1))
    before = [whole(p).clone() for p in model.parameters()]
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    weight = next(model.parameters())
    assert weight.grad is not None
    weight.grad[8, 5] = float("nan")
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))
    return [optimizer._owner.owns(f"0.{stack}") for stack in range(2)], str(caught.value)


def test_a_block_that_is_not_finite_ends_the_ranks_that_do_not_own_it_too(tmp_path: Path) -> None:
    (owned, first), (others, second) = run_ranks(unfit_block, 2, tmp_path)
    assert sorted([owned, others]) == [[False, True], [True, False]]
    assert first == second
    assert "shape (9, 6) is not finite" in first


def resumed_from_shards(rank: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """A head of one output, whose bias has the shape of its own scale and rank: one number."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1)).double()
        fully_shard(model)
        models.append(model)
        optimizers.append(Shampoo(model.parameters(), **OFTEN, **across_ranks(model)))
    rows, group = slice(4 * rank, 4 * rank + 4), dist.group.WORLD
    assert group is not None
    train(models[0], optimizers[0], range(3), rows)
    saved, fresh = (taken_apart(*each) for each in zip(models, optimizers, strict=True))
    write_shards(Path(folder), saved.tensors, group)
    shards = Shards(fresh.tensors, saved.model, saved.optimizer)
    put_back(models[1], optimizers[1], shards, Path(folder), group)
    for each, optimizer in zip(models, optimizers, strict=True):
        train(each, optimizer, range(3, 6), rows)
    through, resumed = ([whole(p).clone() for p in each.parameters()] for each in models)
    return through, resumed


def test_a_vector_of_one_element_resumes_from_shards(tmp_path: Path) -> None:
    for through, resumed in run_ranks(resumed_from_shards, 2, tmp_path, str(tmp_path / "shards")):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(through, resumed, strict=True))


def unfit(rank: int, wrap: str) -> str:
    model = wrapped(wrap)
    optimizer = Shampoo(model.parameters(), **OPTIONS, **across_ranks(model))
    train(model, optimizer, range(1))
    before = [whole(p).clone() for p in model.parameters()]
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    *_, bias = model.parameters()
    assert bias.grad is not None
    bias.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))
    return str(caught.value)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_statistics_that_are_not_finite_end_all_ranks_before_any_has_moved(tmp_path: Path, wrap: str) -> None:
    first, second = run_ranks(unfit, 2, tmp_path, wrap)
    assert first == second
    assert "shape (3,) is not finite" in first


def test_flattened_parameters_are_refused() -> None:
    model = network()
    optimizer = Shampoo(model.parameters(), lr=0.1)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"replaced by others.*use Shampoo with DDP or FSDP2"):
        optimizer.step()
