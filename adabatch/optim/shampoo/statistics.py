"""Shampoo's state of one parameter: the statistics of its blocks on one or two sides, and their inverse roots.

The keys are "left" and "right", shape (num_blocks, side, side); "left_root", "left_scale" and "left_rank" (`Root`; the
rank of each block, shape (num_blocks,)), and those of the right; "step"; and "weight", the sum of the weights in the
averages so far. Vectors have no "right". What is saved does not depend on how the blocks were divided into stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from adabatch.optim.products import gram
from adabatch.optim.shampoo.blocks import Blocks
from adabatch.optim.shampoo.leading import Root, followed, leading, root_rows
from adabatch.optim.shampoo.roots import (
    SINGLE_EPSILON,
    decomposed,
    has_no_eigh,
    inverse_root,
    refreshed,
    root_matrix,
)

State = MutableMapping[str, Tensor]
Group = Mapping[str, Any]

COUNTS = frozenset({"step", "weight", "left_rank", "right_rank"})
"""Keys of the state that stay on the CPU, where reading them needs no sync."""

STALE_EPSILON = 1e-2
FRESH_EPSILON = 1e-3
SHARE_OF_AGE = 0.25
"""Age of the roots, as a share of the steps so far, at which new ones are computed."""
SHORTEST_PART = 32
"""Fewest columns or rows that a step adds to a statistic, if there are more; fewer would save no time."""
LONGEST_SIDE = 16384
"""Longest side of a statistic, which then takes a gigabyte in float32."""


def begin(param: Tensor, group: Group) -> dict[str, Tensor]:
    """The state of a parameter before its first step.

    Raises:
        ValueError: if a side is too long.
    """
    # Made now and not in the first step: a checkpoint is loaded into existing tensors.
    form = Blocks.of(param.shape, group["block_size"])
    if max(form.height, form.width) > LONGEST_SIDE:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} would have statistics of {max(form.height, form.width)} "
            f"squared: give block_size=1024 or so, with a width rule of its own (mup.ShampooLaw(block_size=...)), or "
            f"give the parameter to a first-order optimizer"
        )
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    down, across = form.grid
    lengths = {"left": form.height} if param.dim() < 2 else {"left": form.height, "right": form.width}
    state = {"step": torch.zeros(()), "weight": torch.zeros((), dtype=torch.float64)}
    for name, length in lengths.items():
        for key in (name, f"{name}_root"):
            # Roots of zero: without a first refresh nothing moves.
            state[key] = torch.zeros(down * across, length, length, dtype=dtype, device=param.device)
        state[f"{name}_scale"] = torch.zeros(down * across, dtype=dtype, device=param.device)
        state[f"{name}_rank"] = torch.zeros(down * across)
    if group["momentum"] != 0:
        state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
    return state


def stack(state: State, blocks: slice) -> State:
    """The state of some of the blocks, in the memory of the whole: what is written into one stands in the other."""
    if (blocks.start, blocks.stop) == (0, num_blocks(state)):
        return state  # views cost a quarter of the step of a small matrix
    keys = [key for side in _sides(state) for key in (side, f"{side}_root", f"{side}_scale", f"{side}_rank")]
    return {"step": state["step"], "weight": state["weight"], **{key: state[key][blocks] for key in keys}}


def move(state: State, device: torch.device) -> None:
    """Moves statistics and roots to a device."""
    for key in state.keys() - COUNTS:
        state[key] = state[key].to(device)


def of_sides(state: State) -> list[Tensor]:
    """The statistics of all sides."""
    return [state[side] for side in _sides(state)]


def roots_of(state: State) -> list[Tensor]:
    """All that a gradient is multiplied by, on its device: the roots of all sides, their scales and their ranks."""
    found = []
    for side in _sides(state):
        scale = state[f"{side}_scale"]
        found += [state[f"{side}_root"], scale, state[f"{side}_rank"].to(scale)]
    return found


def take_ranks(state: State, roots: list[Tensor]) -> None:
    """Sets the ranks, which stay on the CPU, to those in the result of ``roots_of``, which the owner has filled in."""
    for side, rank in zip(_sides(state), roots[2::3], strict=True):
        state[f"{side}_rank"].copy_(rank)  # host sync


def complete(state: State) -> None:
    """Adds what older checkpoints do not hold: those from before roots had ranks have none, later ones had one rank for
    all blocks of a side."""
    for side in _sides(state):
        roots = state[f"{side}_root"]
        state.setdefault(f"{side}_scale", roots.new_zeros(len(roots)))
        state[f"{side}_rank"] = state.get(f"{side}_rank", torch.zeros(())).expand(len(roots)).clone()


def unite(state: State) -> None:
    """Gives the blocks of a stack roots of one form, if they were computed in different stacks.

    If some have leading eigenvectors and others whole roots, all get whole ones.
    """
    for side in _sides(state):
        ranks = state[f"{side}_rank"]
        if not ranks.any() or ranks.all():
            continue
        for block in range(len(ranks)):
            one = stack(state, slice(block, block + 1))
            _set_whole(one, side, root(one, side).matrix())


def num_blocks(state: State) -> int:
    """The number of blocks."""
    return len(state["left"])


def cost(state: State) -> float:
    """The cost of computing the roots, in multiplications: the cubes of the sides of all blocks."""
    return float(sum(len(each) * each.shape[-1] ** 3 for each in of_sides(state)))


def count(state: State, group: Group) -> bool:
    """Counts a step; returns whether roots are computed in it."""
    state["step"] += 1
    state["weight"].mul_(group["beta"]).add_(1)
    return refreshes(int(state["step"]), warmup=int(group["refresh_warmup"]), every=int(group["refresh_every"]))


@lru_cache(maxsize=64)  # all parameters of a group ask for the same step
def refreshes(step: int, *, warmup: int, every: int) -> bool:
    """Whether roots are computed in a step, counted from 1.

    They are in all of the first ``warmup`` steps, then whenever the run has become a quarter longer, and at the latest
    after ``every`` steps.
    """
    latest = min(step, warmup)
    while latest < step:
        gap = max(1, min(every, int(latest * SHARE_OF_AGE)))
        if gap == every:
            return (step - latest) % every == 0
        latest += gap
    return latest == step


def follow(state: State, group: Group, blocks: Tensor) -> None:
    """Adds the gradient of the step that was counted last, in blocks, to the averages; after the warm-up a part of its
    columns to the left one, and of its rows to the right one."""
    # The new gradient has weight 1 of the sum of all weights: a running mean at first, then the moving average, so the
    # zeros of the beginning never enter, and beta may change at any step.
    # On the CPU like the count of steps, so this is no host sync.
    share = 1 / float(state["weight"])
    step, num_parts = int(state["step"]), int(group["observe_parts"])
    for side in _sides(state):
        factor, weight = (blocks if side == "left" else blocks.mT), share
        if step > group["refresh_warmup"] and factor.shape[-1] >= SHORTEST_PART * num_parts > SHORTEST_PART:
            # By the count of steps, so that all ranks and resumed runs take the same ones. Each has the weight
            # num_parts once in num_parts steps, which is 1 on average.
            factor, weight = factor[..., step % num_parts :: num_parts].contiguous(), share * num_parts
        if group["bfloat16_products"]:
            state[side].mul_(1 - share).add_(gram(factor.mT, bfloat16=True), alpha=weight)
        else:
            state[side].baddbmm_(factor, factor.mT, beta=1 - share, alpha=weight)


def refresh(state: State, group: Group, fallbacks: MutableMapping[str, int]) -> bool:
    """Computes the roots if the statistics are finite; returns whether they are."""
    epsilon = group["epsilon"]
    if epsilon is None:
        epsilon = FRESH_EPSILON if group["refresh_every"] == 1 else STALE_EPSILON
    exponent = group["exponent"] if "right" in state else 0.5
    root_of = partial(inverse_root, exponent=exponent, epsilon=epsilon, relative=group["relative"])
    for side in _sides(state):
        matrices = state[side]
        # No entry of such a matrix is larger than the largest on its diagonal, which so shows what is not finite.
        if not torch.isfinite(matrices.diagonal(dim1=-2, dim2=-1)).all():  # host sync
            return False
        single = group["relative"] and epsilon >= SINGLE_EPSILON and matrices.dtype is torch.float32
        if single and not has_no_eigh(matrices):
            if _refresh_single(state, side, exponent=exponent, epsilon=epsilon):
                continue
            fallbacks["float64"] += 1
        whole = root(state, side).matrix()
        _set_whole(state, side, refreshed(matrices, whole, fallbacks, root_of))
    return True


def _refresh_single(state: State, side: str, *, exponent: float, epsilon: float) -> bool:
    """Computes the roots of one side in float32, from the leading eigenvectors where they suffice; returns whether the
    decomposition was exact enough."""
    matrices, rank = state[side], root(state, side).rank
    few = None
    if rank:
        few = followed(matrices, state[f"{side}_root"][:, :rank], epsilon=epsilon, seed=int(state["step"]))
    if few is None:
        eigen = decomposed(matrices, epsilon=epsilon)
        if eigen is None:
            return False
        few = leading(eigen, epsilon=epsilon)
        if few is None:
            _set_whole(state, side, root_matrix(eigen, exponent=exponent, epsilon=epsilon, relative=True))
            return True
    rows, scale = root_rows(matrices, few, exponent=exponent, epsilon=epsilon)
    # The whole square is kept, so that checkpoints and broadcasts have one shape; a product reads only the rows.
    state[f"{side}_root"][:, : rows.shape[1]] = rows
    state[f"{side}_root"][:, rows.shape[1] :] = 0
    state[f"{side}_scale"].copy_(scale)
    state[f"{side}_rank"].fill_(rows.shape[1])
    return True


def _set_whole(state: State, side: str, roots: Tensor) -> None:
    # In place, since the state may be that of a stack, and so views.
    state[f"{side}_root"].copy_(roots)
    state[f"{side}_rank"].zero_()


def root(state: State, side: str) -> Root:
    """The roots of one side, of a stack whose roots have one form."""
    # Blocks that were computed in different stacks may have different ranks; beyond its own a block has rows of zeros.
    return Root(state[f"{side}_root"], state[f"{side}_scale"], int(state[f"{side}_rank"].max()))


def precondition(state: State, blocks: Tensor) -> Tensor:
    """The update for a gradient, both in blocks."""
    update = root(state, "left").of_rows(blocks)
    return root(state, "right").of_columns(update) if "right" in state else update


def _sides(state: State) -> Iterator[str]:
    """The sides on which the parameter has statistics."""
    return (side for side in ("left", "right") if side in state)
