"""Shampoo's blocks divided among owners: the division itself, and roots of blocks that were computed apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import with_examples
from torch import Tensor, nn

from adabatch.optim import Shampoo
from adabatch.optim.placement import Alone
from adabatch.optim.shampoo import statistics
from adabatch.optim.shampoo.stacks import divided
from adabatch.runtime.collectives import Collectives
from adabatch.runtime.optimizers.matrix_owners import ReplicatedMatrices, ShardedMatrices, dealt_out

MATRICES = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([1, 27, 1000, 64**3])), min_size=1, max_size=8)


@with_examples(200)
@given(matrices=MATRICES, num_owners=st.integers(1, 8))
def test_stacks_cover_the_blocks_in_order_and_no_rank_has_much_more_than_its_share(
    matrices: list[tuple[int, int]], num_owners: int
) -> None:
    num_blocks = [number for number, _ in matrices]
    costs = [float(number * each) for number, each in matrices]
    found = divided(costs, num_blocks, num_owners=num_owners)
    share = sum(costs) / num_owners
    dealt: dict[str, float] = {}
    unit = 0.0  # the largest stack that could not be smaller: one block, or as many stacks as owners
    for stacks, number, (_, each) in zip(found, num_blocks, matrices, strict=True):
        assert [block for stack in stacks for block in range(*stack.blocks.indices(number))] == list(range(number))
        assert 1 <= len(stacks) <= max(1, min(number, num_owners))
        sizes = [stack.blocks.stop - stack.blocks.start for stack in stacks]
        assert max(sizes) - min(sizes) <= 1
        if number * each <= share / 2:
            assert len(stacks) == 1
        # As many stacks of half a share as are needed, rounded up to whole blocks.
        unit = max(unit, each * max(sizes) if len(stacks) in (number, num_owners) else share / 2 + each)
        dealt |= {stack.name: float(each * size) for stack, size in zip(stacks, sizes, strict=True)}
    assert len(dealt) == sum(len(stacks) for stacks in found), "every stack has its own name"
    loads = [0.0] * num_owners
    for name, rank in dealt_out(dealt, num_owners).items():
        loads[rank] += dealt[name]
    assert max(loads) <= (share + unit) * (1 + 1e-9)


def test_a_single_stack_is_named_by_its_parameter() -> None:
    """Under FSDP2 gradients are gathered by that name."""
    for num_owners, names in ((1, ["0", "1"]), (2, ["0.0", "0.1", "1"])):
        found = divided([8.0, 1.0], [4, 1], num_owners=num_owners)
        assert [stack.name for stacks in found for stack in stacks] == names


def shares(params: Sequence[Tensor], num_ranks: int, kind: type[ReplicatedMatrices | ShardedMatrices]) -> list[float]:
    """The share of all costs that each rank owns, in a job that is not run."""
    loads = []
    for rank in range(num_ranks):
        ranks = Collectives(reducer=lambda values, op: values)
        ranks.stand_at(rank, num_ranks)
        noted = Noted(kind(ranks))
        Shampoo(params, lr=0.1, block_size=1024, owner=noted)
        loads.append(sum(cost for name, cost in noted.costs.items() if noted.owner.owns(name)))
    return [load / sum(noted.costs.values()) for load in loads]


class Noted(Alone):
    """Deals as another owner, and keeps the costs."""

    def __init__(self, owner: ReplicatedMatrices | ShardedMatrices) -> None:
        self.owner = owner
        self.owners_per_layer = owner.owners_per_layer
        self.costs: Mapping[str, float] = {}

    def deal(self, costs: Mapping[str, float]) -> None:
        self.costs = costs
        self.owner.deal(costs)


def test_each_of_four_ranks_owns_about_a_quarter_of_one_large_matrix() -> None:
    """On the device "meta", since the statistics would take gigabytes."""
    large = [torch.empty(8192, 8192, device="meta")]
    assert shares(large, 4, ReplicatedMatrices) == pytest.approx([0.25] * 4, abs=1e-12)
    assert sorted(shares(large, 4, ShardedMatrices)) == pytest.approx([0, 0, 0, 1], abs=1e-12)
    # Five equal matrices are divided into two stacks each: two ranks have three of the ten, where two matrices would be
    # four.
    assert max(
        shares([torch.empty(2048, 2048, device="meta") for _ in range(5)], 4, ReplicatedMatrices)
    ) == pytest.approx(0.3)
    # 25 blocks: three ranks have six, and one has seven.
    assert max(shares([torch.empty(5000, 5000, device="meta")], 4, ReplicatedMatrices)) == pytest.approx(0.28)
    # An embedding of 50 blocks beside three layers of four blocks: no rank has more than an eighth above its share.
    mixed = [torch.empty(shape, device="meta") for shape in ((50_304, 768), (2048, 2048), (2048, 2048), (2048, 2048))]
    assert max(shares(mixed, 4, ReplicatedMatrices)) < 0.25 * 9 / 8


# --- blocks whose roots were computed in different stacks -------------------------------------------------------------

SIDE = 144
OPTIONS = {"lr": 0.05, "refresh_warmup": 2, "refresh_every": 2, "block_size": SIDE}


def give_gradient(param: Tensor, step: int, *, noise: float) -> None:
    """Of rank six in directions that all steps share; in the lower half with noise of this size."""
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(step)
    rows, columns = (torch.randn(side, 6, generator=shared, dtype=torch.float64) for side in param.shape)
    grad = rows @ torch.randn(6, 6, generator=own, dtype=torch.float64) @ columns.T
    grad[len(grad) // 2 :] += noise * torch.randn(len(grad) // 2, SIDE, generator=own, dtype=torch.float64)
    param.grad = grad.to(param.dtype)


def trained(ranks: Sequence[float], noise: float) -> tuple[nn.Parameter, Shampoo]:
    """Two blocks after some steps, with roots that were computed apart; their ranks must be those expected."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(2 * SIDE, SIDE))
    optimizer = Shampoo([param], **OPTIONS)
    for step in range(3):
        give_gradient(param, step, noise=noise)
        optimizer.step()
    state = optimizer.state[param]
    for block in range(2):
        statistics.refresh(
            statistics.stack(state, slice(block, block + 1)), optimizer.param_groups[0], optimizer.fallbacks
        )
    assert [bool(rank) for rank in state["left_rank"]] == [bool(rank) for rank in ranks]
    return param, optimizer


def preconditioned(optimizer: Shampoo, param: Tensor, block: slice) -> Tensor:
    give_gradient(param, 9, noise=1.0)
    assert param.grad is not None
    state = statistics.stack(optimizer.state[param], block)
    return statistics.precondition(state, param.grad.view(2, SIDE, SIDE)[block])


def test_a_leading_and_a_whole_root_are_united_as_whole_ones() -> None:
    """As after a checkpoint of two ranks was loaded in one process, where both blocks are one stack."""
    param, optimizer = trained([1, 0], noise=100.0)
    apart = [preconditioned(optimizer, param, slice(block, block + 1)) for block in range(2)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer.state[param]["left_rank"].any()
    together = preconditioned(optimizer, param, slice(0, 2))
    # Roots in float32 that are multiplied by numbers up to a thousand.
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4 * float(torch.cat(apart).abs().max()))


def test_leading_roots_of_different_ranks_multiply_as_each_alone() -> None:
    param, optimizer = trained([1, 1], noise=0.0)
    state = optimizer.state[param]
    # One block follows fewer eigenvectors than the other: its rows beyond them are zeros.
    state["left_rank"][0] -= 2
    state["left_root"][0, int(state["left_rank"][0]) :] = 0
    apart = [preconditioned(optimizer, param, slice(block, block + 1)) for block in range(2)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ranks = optimizer.state[param]["left_rank"]
    assert 0 < ranks[0] < ranks[1]
    together = preconditioned(optimizer, param, slice(0, 2))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5 * float(torch.cat(apart).abs().max()))


def test_a_checkpoint_with_one_rank_for_all_blocks_goes_on_to_the_bit() -> None:
    param, optimizer = trained([1, 1], noise=0.0)
    give_gradient(param, 3, noise=0.0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for side in ("left", "right"):
        (rank,) = saved["state"][0][f"{side}_rank"].unique()
        saved["state"][0][f"{side}_rank"] = rank.clone()
    again = nn.Parameter(param.detach().clone())
    other = Shampoo([again], **OPTIONS)
    other.load_state_dict(saved)
    assert torch.equal(other.state[again]["left_rank"], optimizer.state[param]["left_rank"])
    for step in range(4, 8):
        for each, runs in ((param, optimizer), (again, other)):
            give_gradient(each, step, noise=0.0)
            runs.step()
    assert torch.equal(again, param)


def test_a_state_without_the_statistics_of_a_parameter_is_refused() -> None:
    param, optimizer = trained([1, 1], noise=0.0)
    saved = {**optimizer.state_dict(), "state": {}}
    with pytest.raises(ValueError, match="no statistics"):
        Shampoo([param], lr=0.1).load_state_dict(saved)
