"""Shampoo's roots by leading eigenvectors, against all eigenvectors in float64."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adabatch.optim import Shampoo
from adabatch.optim.shampoo import leading
from adabatch.optim.shampoo.leading import Root, followed, root_rows
from adabatch.optim.shampoo.roots import Eigen

SIDE, EPSILON = 160, 1e-2
OPTIONS = {"lr": 0.05, "momentum": 0.9, "refresh_warmup": 2, "refresh_every": 2}


def spectrum(count: int, least: float = 0.01, rest: float = 1e-4) -> Tensor:
    """So many eigenvalues from 1 to ``least``, and the others ``rest``; ascending."""
    values = torch.full((SIDE,), rest, dtype=torch.float64)
    values[-count:] = torch.logspace(np.log10(least), 0, count, dtype=torch.float64)
    return values


def basis(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)).Q


def matrix(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * values) @ vectors.mT


def exact_root(whole: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(whole.double())
    return matrix((values + EPSILON * values[..., -1:]).pow(-exponent), vectors)


def rooted(matrices: Tensor, eigen: Eigen | None, exponent: float) -> Root:
    assert eigen is not None
    rows, scale = root_rows(matrices, eigen, exponent=exponent, epsilon=EPSILON)
    values = torch.zeros_like(matrices)
    values[:, : rows.shape[1]] = rows
    return Root(values, scale, rows.shape[1])


def error(root: Root, whole: Tensor, exponent: float) -> float:
    """The largest, in any direction, in units of the largest root."""
    exact = exact_root(whole, exponent)
    off = torch.linalg.matrix_norm(root.matrix().double() - exact, 2)
    return float((off / torch.linalg.matrix_norm(exact, 2)).max())


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_hidden_eigenvalues_count_as_their_mean(exponent: float) -> None:
    equal = matrix(spectrum(20), basis(0)).float()[None]
    found = leading.leading(Eigen(*torch.linalg.eigh(equal)), epsilon=EPSILON)
    assert error(rooted(equal, found, exponent), equal, exponent) < 2e-5, "all the others are equal"
    values = spectrum(20)
    values[:-20] = torch.linspace(0, leading.HIDDEN * EPSILON, SIDE - 20)
    spread = matrix(values, basis(0)).float()[None]
    found = leading.leading(Eigen(*torch.linalg.eigh(spread)), epsilon=EPSILON)
    assert error(rooted(spread, found, exponent), spread, exponent) < leading.HIDDEN * exponent


def test_a_root_multiplies_as_its_matrix_does() -> None:
    stack = torch.stack([matrix(spectrum(count), basis(count)) for count in (5, 20)]).float()
    root = rooted(stack, leading.leading(Eigen(*torch.linalg.eigh(stack)), epsilon=EPSILON), 0.25)
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(2, SIDE, 7, generator=generator)
    torch.testing.assert_close(root.of_rows(tall), root.matrix() @ tall, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(root.of_columns(tall.mT), tall.mT @ root.matrix(), rtol=1e-5, atol=1e-5)
    whole = Root(root.matrix(), root.scale, 0)
    torch.testing.assert_close(whole.of_rows(tall), root.of_rows(tall), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.of_columns(tall.mT), root.of_columns(tall.mT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [0, 3])
def test_eigenvectors_are_followed_and_new_ones_found(new: int) -> None:
    before = matrix(spectrum(20), basis(0)).float()[None]
    rows = rooted(before, leading.leading(Eigen(*torch.linalg.eigh(before)), epsilon=EPSILON), 0.25)
    # The average moves on by a fifth: to other eigenvalues, and to vectors that the rows know nothing of.
    moved = basis(0)[:, -20:] @ torch.diag(torch.linspace(0, 1, 20, dtype=torch.float64)) @ basis(0)[:, -20:].T
    moved = moved + basis(1)[:, :new] @ basis(1)[:, :new].T
    after = (0.8 * before[0].double() + 0.2 * moved).float()[None]
    found = followed(after, rows.values[:, : rows.rank], epsilon=EPSILON, seed=0)
    assert error(rooted(after, found, 0.25), after, 0.25) < 0.01


def test_too_many_new_eigenvectors_are_left_to_the_whole_decomposition() -> None:
    before = matrix(spectrum(5), basis(0)).float()[None]
    rows = rooted(before, leading.leading(Eigen(*torch.linalg.eigh(before)), epsilon=EPSILON), 0.25)
    after = matrix(spectrum(60), basis(1)).float()[None]
    assert followed(after, rows.values[:, : rows.rank], epsilon=EPSILON, seed=0) is None
    assert leading.leading(Eigen(*torch.linalg.eigh(after)), epsilon=EPSILON) is None


def test_a_matrix_of_zeros_in_a_stack_has_the_root_zero() -> None:
    stack = torch.stack([matrix(spectrum(5), basis(0)).float(), torch.zeros(SIDE, SIDE)])
    root = rooted(stack, leading.leading(Eigen(*torch.linalg.eigh(stack)), epsilon=EPSILON), 0.25)
    assert torch.equal(root.matrix()[1], torch.zeros(SIDE, SIDE))
    again = rooted(stack, followed(stack, root.values[:, : root.rank], epsilon=EPSILON, seed=0), 0.25)
    assert torch.equal(again.matrix()[1], torch.zeros(SIDE, SIDE))
    first = Root(again.values[:1], again.scale[:1], again.rank)
    assert error(first, stack[:1], 0.25) < 1e-3


# --- in the optimizer -------------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((SIDE, 144), (SIDE,))]


def run(optimizer: Shampoo, params: list[nn.Parameter], steps: Iterable[int], noise: float = 0.0) -> None:
    """Gradients of rank six in directions that all steps share, as those of a layer with few outputs, and noise."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            shared = torch.Generator().manual_seed(1)
            factors = [torch.randn(side, 6, generator=shared, dtype=torch.float64) for side in param.shape]
            core = torch.randn(6, 6, generator=generator, dtype=torch.float64)
            grad = factors[0] @ core @ factors[1].T if param.dim() > 1 else factors[0] @ core[0]
            grad = grad + noise * torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = grad.to(param.dtype)
        optimizer.step()


@contextmanager
def decomposed_sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sides of all matrices that are decomposed inside."""
    sides, eigh = [], torch.linalg.eigh

    def counting(matrices: Tensor) -> tuple[Tensor, Tensor]:
        sides.append(matrices.shape[-1])
        values, vectors = eigh(matrices)
        return values, vectors

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", counting)
        yield sides


@pytest.mark.parametrize("block_size", [None, 150])
def test_steps_equal_those_in_float64_and_decompose_large_matrices_once(
    block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, double = parameters(), parameters(torch.float64)
    optimizer = Shampoo(single, block_size=block_size, **OPTIONS)
    run(Shampoo(double, block_size=block_size, **OPTIONS), double, range(9))
    with decomposed_sides(monkeypatch) as sides:
        run(optimizer, single, range(9))
    large = [side for side in sides if side >= 144]
    assert len(large) == 3, "each side at its first refresh only"
    assert len(sides) > 3 * len(large)
    for mine, theirs in zip(single, double, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)
    assert not any(optimizer.fallbacks.values())


def test_gradients_of_full_rank_take_whole_roots() -> None:
    params = parameters()
    optimizer = Shampoo(params, **OPTIONS)
    run(optimizer, params, range(3), noise=0.0)
    ranks = [int(optimizer.state[params[0]][f"{side}_rank"]) for side in ("left", "right")]
    assert all(6 <= rank <= leading.LARGEST_SHARE * SIDE for rank in ranks)
    run(optimizer, params, range(3, 8), noise=100.0)
    assert optimizer.state[params[0]]["left_rank"] == optimizer.state[params[0]]["right_rank"] == 0
    assert not any(optimizer.fallbacks.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(dtype: torch.dtype) -> None:
    params, resumed = parameters(dtype), parameters(dtype)
    optimizer, other = Shampoo(params, **OPTIONS), Shampoo(resumed, **OPTIONS)
    run(optimizer, params, range(4), noise=0.1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for mine, theirs in zip(resumed, params, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert int(other.state[resumed[0]]["left_rank"]) > 0
    run(optimizer, params, range(4, 8), noise=0.1)
    run(other, resumed, range(4, 8), noise=0.1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, params, strict=True))


def test_a_checkpoint_from_before_roots_had_ranks_holds_whole_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = parameters(), parameters()
    first, second = Shampoo(old, **OPTIONS), Shampoo(new, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(leading, "LARGEST_SHARE", 0.0)
        run(first, old, range(3))
    saved = copy.deepcopy(first.state_dict())
    for entry in saved["state"].values():
        for name in ("left_scale", "left_rank", "right_scale", "right_rank"):
            entry.pop(name, None)
    second.load_state_dict(saved)
    with torch.no_grad():
        for mine, theirs in zip(new, old, strict=True):
            mine.copy_(theirs)
    run(first, old, range(3, 7))
    run(second, new, range(3, 7))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(new, old, strict=True))
