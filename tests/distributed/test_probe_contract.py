"""One contract for all probes: their moments, and those of each layer, are those of the parts computed one by one,
however the model is wrapped; in the norms of optimizers and coordinate by coordinate too, where a probe gives that.

A new probe, or a new way to wrap a model, joins with a line in ``CONTENDERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.hard_models import CASES, CONVOLVED, Case, Checkpointed
from support.ranks import run_ranks
from support.wrapped import Parts, check, ddp, fsdp, hsdp, made, measured, part_by_part, parts_of, plain
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from adabatch.batch.moments import GradientMoments, from_matrices, from_signs
from adabatch.runtime.collectives import collectives_of
from adabatch.runtime.engines.engine import GradientSync
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.layers import layers_of
from adabatch.runtime.probes.metrics import AdamMetric, SpectralNorm
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.per_example import PerExampleProbe
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe

pytestmark = pytest.mark.distributed


def micro_batch(model: nn.Module, **options: Any) -> Probe:
    return MicroBatchProbe(model.parameters(), collectives=collectives_of(model), **options)


def single_examples(model: nn.Module, *, record_l1: bool = False, **options: Any) -> Probe:
    return PerExampleProbe(model, **options)


def fused_examples(model: nn.Module, *, record_l1: bool = False, **options: Any) -> Probe:
    return PerExampleProbe(model, fused=True, **options)


class Contender(NamedTuple):
    """A way to wrap a model and measure it.

    ``joined``: the micro-batches of a rank are one part. ``ranks``: on how many it runs. ``examples``: they are parts.
    ``norms``: whether it measures in the norms of optimizers.
    """

    wrap: Callable[[nn.Module, Case], nn.Module]
    probe: Callable[..., Probe]
    sync: GradientSync | None = None
    joined: bool = False
    ranks: Sequence[int] = (1, 2, 4)
    examples: bool = False
    norms: bool = True


CONTENDERS = {
    "plain": Contender(plain, micro_batch, ranks=[1]),
    "DDP, tensor hooks": Contender(ddp, micro_batch),
    "DDP, communication hook": Contender(ddp, CommHookProbe, joined=True, ranks=[1, 2, 4, 8], norms=False),
    "FSDP2, each": Contender(fsdp, ReduceScatterProbe, "each"),
    "FSDP2, last": Contender(fsdp, ReduceScatterProbe, "last", joined=True, ranks=[1, 2, 4, 8]),
    "HSDP, each": Contender(partial(hsdp, shape=(2, 2)), ReduceScatterProbe, ranks=[4]),
    "HSDP, last": Contender(partial(hsdp, shape=(2, 2)), ReduceScatterProbe, "last", joined=True, ranks=[4]),
    "HSDP, one shard": Contender(partial(hsdp, shape=(2, 1)), ReduceScatterProbe, ranks=[2]),
    "plain, examples": Contender(plain, single_examples, ranks=[1], examples=True),
    "DDP, examples": Contender(ddp, single_examples, ranks=[1, 2], examples=True),
    "FSDP2, examples": Contender(fsdp, single_examples, "each", ranks=[1, 2], examples=True, norms=False),
    "DDP, examples, fused": Contender(ddp, fused_examples, ranks=[1, 2], examples=True, norms=False),
    "FSDP2, examples, fused": Contender(fsdp, fused_examples, "each", ranks=[1, 2], examples=True, norms=False),
    "FSDP2, last, examples": Contender(fsdp, single_examples, "last", ranks=[2], examples=True, norms=False),
    "HSDP, examples": Contender(partial(hsdp, shape=(2, 2)), single_examples, ranks=[4], examples=True, norms=False),
}

# By the number of ranks, the steps: examples in the micro-batches of each rank. They make 1, 2, 4 and 8 parts where
# each micro-batch is one, and as many as ranks where those of a rank are joined.
STEPS = {
    1: [[4], [2, 4], [3] * 4, [1, 5, 4, 2, 2, 3, 7, 8]],
    2: [[4], [4, 2], [3, 3, 5, 1]],
    4: [[4], [5, 1]],
    8: [[4, 2]],
}
Numbers = tuple[Any, ...]


def contract(rank: int, ranks: int) -> dict[str, tuple[Numbers, Numbers]]:
    """What was found and what is right, for all that runs on so many ranks."""
    results = {}
    for name, contender in CONTENDERS.items():
        # The single examples of a convolution are formed in another way, which may be fused.
        for case_name, case in (CASES | ({"convolved": CONVOLVED} if contender.examples else {})).items():
            if ranks not in contender.ranks or (ranks == 8 and case_name != "network"):
                continue
            model = contender.wrap(made(case), case)
            layers = layers_of(model, SGD(model.parameters(), lr=0.1), "module")
            probe = contender.probe(model, record_l1=True, layers=layers)
            assert isinstance(probe, Probe)
            for sizes in STEPS[ranks]:
                found = measured(model, probe, case, sizes, sync=contender.sync)
                oracle = part_by_part(case, sizes, ranks, joined=contender.joined, examples=contender.examples)
                results[f"{name}: {case_name}, {ranks} x {sizes}"] = tuple(found), tuple(oracle)
            probe.remove()
    return results


@pytest.mark.parametrize("ranks", STEPS)
def test_moments_are_those_of_the_parts_computed_one_by_one(ranks: int, tmp_path: Path) -> None:
    results = run_ranks(contract, ranks, tmp_path, ranks, timeout=150)
    assert {name.split(":")[0] for name in results[0]} == {n for n, each in CONTENDERS.items() if ranks in each.ranks}
    for name, (found, oracle) in results[0].items():
        try:
            check(GradientMoments(*found), GradientMoments(*oracle))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert all(result == results[0] for result in results), "the ranks disagree"


# --- the norms of optimizers, and quantiles over coordinates ---------------------------------------------------------

# Fewer than above: what makes parts is the same. The last two parts are of unequal size.
FEW_STEPS = {1: [[3] * 4, [2, 4]], 2: [[4], [4, 2]], 4: [[2, 5]]}
QUANTILES = [0.6, 1.0]


def adam(parameters: Any) -> AdamW:
    """The large eps keeps the first step, whose second moments are the gradient's squares, from being one of signs."""
    return AdamW(parameters, lr=0.05, eps=0.01)


def at_quantile(parts: Parts, quantile: float) -> float:
    """``|g|^2`` times the quantile of the noise of coordinates over their squared gradient, in which anything moves."""
    shares, counts = parts.weights, torch.tensor(parts.counts)
    per_example = 1 / float((shares / counts).sum() - (shares**2 / counts).sum())
    mean_sq = parts.mean.square()
    noise = (parts.weights[:, None] * (parts.grads - parts.mean).square()).sum(0) * per_example
    ratios = (noise / mean_sq)[(noise > 0) | (mean_sq > 0)]
    return float(np.quantile(ratios.numpy(), quantile, method="inverted_cdf") * mean_sq.sum())


def in_signs(parts: Parts, columns: Tensor) -> GradientMoments:
    deviations = (parts.weights[:, None] * (parts.grads - parts.mean).square()).sum(0).sqrt()[columns].sum()
    plain = parts.moments()
    sizes = {"part_size": plain.part_size, "num_examples": plain.num_examples}
    return from_signs(float(deviations), float(parts.mean[columns].abs().sum()), num_parts=plain.num_parts, **sizes)


def in_singular_values(parts: Parts, columns: Tensor, *, per_rank: int) -> GradientMoments:
    """Of the matrices among these columns, by decompositions of the parts' own deviations."""
    plain, roots, lengths, first = parts.moments(), 0.0, 0.0, 0.0
    firsts = range(0, len(parts.grads), per_rank)
    for p, where in parts.where.items():
        if p.ndim != 2 or not bool(torch.isin(where, columns).all()):
            continue
        k, n = min(p.shape), max(p.shape)
        mean = parts.mean[where].view_as(p)
        apart = [w.sqrt() * (g[where].view_as(p) - mean) for w, g in zip(parts.weights, parts.grads, strict=True)]
        # Side by side along the longer side, they are one matrix whose singular values are the roots.
        joined = torch.cat(apart, dim=1 if p.shape[0] <= p.shape[1] else 0)
        roots += float(torch.linalg.matrix_norm(joined, "nuc")) / short((k + 1) / (n * (plain.num_parts - 1)))
        lengths += float(torch.linalg.matrix_norm(mean, "nuc"))
        first += sum(float(torch.linalg.matrix_norm(parts.grads[j][where].view_as(p), "nuc")) for j in firsts)
    sizes = {"part_size": plain.part_size, "num_examples": plain.num_examples}
    first_size = len(firsts) / sum(1 / parts.counts[j] for j in firsts)
    return from_matrices(
        roots, lengths, first=first / len(firsts), first_size=first_size, num_parts=plain.num_parts, **sizes
    )


def short(aspect: float) -> float:
    """The mean singular value of a normal matrix: F(-1/2, 1/2; 2; x) to its second term, and the rest as a third."""
    x = min(1.0, aspect)
    return 1 - x / 8 - x**2 / 64 - 0.0106 * x**3


def with_layers(parts: Parts, moments_of: Callable[[Tensor], GradientMoments]) -> GradientMoments:
    layers = {name: moments_of(columns) for name, columns in parts.layers().items()}
    length = float(parts.mean.norm())
    return moments_of(torch.arange(parts.grads.shape[1]))._replace(layers=layers, grad_l2=length)


def found_by(contender: Contender, model: nn.Module, case: Case, sizes: Sequence[int], **asked: Any) -> GradientMoments:
    """By a new probe; the gradient is left."""
    model.zero_grad()
    probe = contender.probe(model, layers=layers_of(model, SGD(model.parameters(), lr=0.1), "module"), **asked)
    moments = measured(model, probe, case, sizes, sync=contender.sync, keep=True, dtype=torch.float64)
    probe.remove()
    return moments


def both_ways(contender: Contender, case: Case, sizes: Sequence[int], ranks: int) -> dict[str, tuple[Numbers, Numbers]]:
    """What was found and what is right in each norm, before and after an update by Adam."""
    wide: dict[str, Any] = {"dtype": torch.float64}
    model, alone = contender.wrap(made(case, **wide), case), made(case, **wide)
    optimizer, by_hand = adam(model.parameters()), adam(alone.parameters())
    found = partial(found_by, contender, model, case, sizes)
    options: dict[str, Any] = {"joined": contender.joined, "examples": contender.examples, "model": alone, **wide}
    parts = parts_of(case, sizes, ranks, **options)
    results: dict[str, tuple[Numbers, Numbers]] = {}

    plain = with_layers(parts, parts.moments)._replace(grad_l2=None)
    for quantile in QUANTILES:
        right = plain._replace(noise_at_quantile=at_quantile(parts, quantile))
        results[f"quantile {quantile}"] = tuple(found(quantile=quantile)), tuple(right)
    results["signs"] = tuple(found(norm="sign")), tuple(with_layers(parts, partial(in_signs, parts)))

    if contender.probe is micro_batch:
        right = with_layers(parts, partial(in_singular_values, parts, per_rank=len(sizes)))
        results["spectral"] = tuple(found(norm=SpectralNorm(optimizer))), tuple(right)

    unknown = found(norm=AdamMetric(optimizer))
    assert (unknown.norm, unknown.num_parts, unknown.is_finite) == ("adam", 0, True)
    assert unknown.grad_sq == pytest.approx(plain.grad_sq, rel=1e-10)
    optimizer.step()
    for p, columns in parts.where.items():
        p.grad = parts.mean[columns].view_as(p) if bool(parts.grads[:, columns].any()) else None
    by_hand.step()
    parts = parts_of(case, sizes, ranks, **options)
    image = torch.zeros(parts.grads.shape[1], dtype=torch.float64)
    for p, columns in parts.where.items():
        if p in by_hand.state:
            second = by_hand.state[p]["exp_avg_sq"] / (1 - 0.999)
            image[columns] = 1 / (second.sqrt() + 0.01).flatten()
    right = with_layers(parts, partial(parts.moments, image=image))._replace(norm="adam")
    results["adam"] = tuple(found(norm=AdamMetric(optimizer))), tuple(right)
    return results


def contract_of_norms(rank: int, ranks: int) -> dict[str, tuple[Numbers, Numbers]]:
    """All that runs on so many ranks."""
    results = {}
    if ranks == 2:
        with pytest.raises(ValueError, match="use ReduceScatterProbe, or the model in DistributedDataParallel"):
            PerExampleProbe(fsdp(made(CASES["network"]), CASES["network"]), quantile=0.5)
    for name, contender in CONTENDERS.items():
        for case_name, case in CASES.items():
            for sizes in FEW_STEPS[ranks]:
                one_part = contender.joined and ranks == 1
                if (
                    ranks not in contender.ranks
                    or not contender.norms
                    or one_part
                    or (ranks == 4 and case.make is Checkpointed)
                ):
                    continue
                for what, pair in both_ways(contender, case, sizes, ranks).items():
                    results[f"{name}: {case_name}, {ranks} x {sizes}, {what}"] = pair
    return results


@pytest.mark.parametrize("ranks", FEW_STEPS)
def test_norms_and_quantiles_are_those_of_the_parts_computed_one_by_one(ranks: int, tmp_path: Path) -> None:
    results = run_ranks(contract_of_norms, ranks, tmp_path, ranks, timeout=150)
    assert len(results[0]) >= 4 * len(FEW_STEPS[ranks])
    for name, (found, oracle) in results[0].items():
        try:
            # A singular value of zero comes out of a Gram matrix as the root of its rounding, 1e-8.
            check(GradientMoments(*found), GradientMoments(*oracle), 1e-6 if name.endswith("spectral") else 1e-9)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert GradientMoments(*found).norm == GradientMoments(*oracle).norm
    assert all(result == results[0] for result in results), "the ranks disagree"
