"""One contract for all probes: their moments, and those of each layer, are those of the parts computed one by one,
however the model is wrapped.

A new probe, or a new way to wrap a model, joins with a line in ``CONTENDERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hard_models import CASES, Case
from ranks import run_ranks
from torch import nn
from torch.optim import SGD
from wrapped import check, ddp, fsdp, hsdp, made, measured, part_by_part, plain

from adabatch.batch.moments import GradientMoments
from adabatch.runtime.layers import Layers, layers_of
from adabatch.runtime.probes.comm_hook import CommHookProbe
from adabatch.runtime.probes.micro_batch import MicroBatchProbe
from adabatch.runtime.probes.per_example import PerExampleProbe
from adabatch.runtime.probes.protocol import Probe
from adabatch.runtime.probes.reduce_scatter import ReduceScatterProbe
from adabatch.runtime.wrappers import GradientSync

pytestmark = pytest.mark.distributed


def micro_batch(model: nn.Module, **options: Any) -> Probe:
    return MicroBatchProbe(model.parameters(), **options)


def single_examples(model: nn.Module, *, record_l1: bool, layers: Layers) -> Probe:
    return PerExampleProbe(model, layers=layers)


class Contender(NamedTuple):
    """A way to wrap a model and measure it.

    ``joined``: the micro-batches of a rank are one part. ``ranks``: on how many it runs. ``examples``: they are parts.
    """

    wrap: Callable[[nn.Module, Case], nn.Module]
    probe: Callable[..., Probe]
    sync: GradientSync | None = None
    joined: bool = False
    ranks: Sequence[int] = (1, 2, 4)
    examples: bool = False


CONTENDERS = {
    "plain": Contender(plain, micro_batch, ranks=[1]),
    "DDP, tensor hooks": Contender(ddp, micro_batch),
    "DDP, communication hook": Contender(ddp, CommHookProbe, joined=True, ranks=[1, 2, 4, 8]),
    "FSDP2, each": Contender(fsdp, ReduceScatterProbe, "each"),
    "FSDP2, last": Contender(fsdp, ReduceScatterProbe, "last", joined=True, ranks=[1, 2, 4, 8]),
    "HSDP, each": Contender(partial(hsdp, shape=(2, 2)), ReduceScatterProbe, ranks=[4]),
    "HSDP, last": Contender(partial(hsdp, shape=(2, 2)), ReduceScatterProbe, "last", joined=True, ranks=[4]),
    "HSDP, one shard": Contender(partial(hsdp, shape=(2, 1)), ReduceScatterProbe, ranks=[2]),
    "plain, examples": Contender(plain, single_examples, ranks=[1], examples=True),
    "DDP, examples": Contender(ddp, single_examples, ranks=[1, 2], examples=True),
    "FSDP2, examples": Contender(fsdp, single_examples, "each", ranks=[1, 2], examples=True),
    "FSDP2, last, examples": Contender(fsdp, single_examples, "last", ranks=[2], examples=True),
    "HSDP, examples": Contender(partial(hsdp, shape=(2, 2)), single_examples, ranks=[4], examples=True),
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
        for case_name, case in CASES.items():
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
