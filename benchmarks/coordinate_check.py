"""Which laws keep every layer's update the same size at every width, and which do not?

    python benchmarks/coordinate_check.py [--seeds 3] [--rows kfac] [--device cuda]

Four weight layers 32 -> M -> M -> M -> 10 without bias, tanh, cross-entropy, 64 random inputs; hidden weights with
deviation 1/sqrt(fan_in), the readout with sqrt(64)/M under the width plan and 1/sqrt(M) under the standard
parameterization; learning rate 0.05, one step or five on the same batch, curvature from that batch alone (empirical
Fisher), base width 64. Measured is the own update of each layer, RMS((W_new - W_old) h_old), and the total, RMS of the
change of its output; the slope is that of its logarithm against the logarithm of M, over widths and seeds.

A row passes where all four own slopes lie within 0.12. Rows that must fail are half of the table: a check that passes
everything shows nothing. Widths go to 4,096 where the cost of a step is that of products, to 1,024 where it is that of
eigenvalues (Shampoo, K-FAC with the damped product) or of bfloat16 on a processor (torch's Muon).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from _harness import Machine, Table, publish
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from adabatch.optim import KFAC, Shampoo, mup
from adabatch.optim.kfac import Damping, FactorPair
from adabatch.optim.mup.coordinates import TOLERANCE

QUESTION = (
    "Under which law of initialization, learning rate and damping does every layer's own update keep its size while "
    "the width grows? Slopes of log2 RMS against log2 width; base width 64."
)
BASE, LR = 64, 0.05
NARROW = (64, 128, 256, 512, 1024)
WIDE = (*NARROW, 2048, 4096)

Make = Callable[[nn.Module, mup.Plan], Optimizer]


class Row(NamedTuple):
    """A row of the table.

    Args:
        make: a model and its plan -> optimizer.
        passes: whether it must.
        standard: whether the plan is that of the standard parameterization.
        widths: to compare.
        steps: on the same batch.
    """

    make: Make
    passes: bool
    standard: bool = False
    widths: tuple[int, ...] = WIDE
    steps: int = 1


class Net(nn.Module):
    """32 -> M -> M -> M -> 10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (32, width, width, width, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 32, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def sgd(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.SGD(plan.groups(model, "sgd", lr=LR))


def adam(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.AdamW(plan.groups(model, "adamw", lr=LR))


def muon(model: nn.Module, plan: mup.Plan) -> Optimizer:
    return torch.optim.Muon(plan.groups(model, "muon", lr=LR), momentum=0.0, nesterov=False)


def plain_muon(model: nn.Module, plan: mup.Plan) -> Optimizer:
    """Spectral descent with one rate: torch's own adjustment, which has the law of the input layer in it, undone."""
    groups = [
        {"params": [p], "lr": LR / math.sqrt(max(1.0, p.shape[0] / p.shape[1])), "weight_decay": 0.0}
        for p in model.parameters()
    ]
    return torch.optim.Muon(groups, momentum=0.0, nesterov=False)


def shampoo(law: mup.ShampooLaw, **mistake: Any) -> Make:
    def make(model: nn.Module, plan: mup.Plan) -> Optimizer:
        groups = plan.groups(model, law, lr=LR, damping=1e-3)
        return Shampoo([{**group, **mistake} for group in groups], refresh_every=1)

    return make


def kfac(form: Any, damping: float = 0.01, *, exponents: tuple[float, float] = (1.0, 1.0), **mistake: Any) -> Make:
    def make(model: nn.Module, plan: mup.Plan) -> Optimizer:
        groups = plan.groups(model, mup.KFACLaw(exponents), lr=LR, damping=damping)
        return KFAC(
            [{**group, **mistake} for group in groups],
            model,
            damping_form=form,
            exponents=exponents,
            fisher="empirical",
            kl_clip=None,  # one factor for all layers, which would spread the power of a wrong one
            # One step knows one batch; without memory a matrix of its 64 examples stands for the factors.
            memory=1.0 if form == "kronecker" else 0.0,
        )

    return make


def by_mean_eigenvalue(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """In units of trace/dimension: a mistake that is found in the wild."""
    d = group["damping"]
    return Damping(d * pair.input.trace / pair.input.dim, d * pair.output.trace / pair.output.dim)


def by_largest_eigenvalue(pair: FactorPair, group: Mapping[str, Any]) -> Damping:
    """In units of the largest eigenvalue."""
    largest = [
        float(torch.linalg.matrix_norm(factor.values.double(), 2)) ** (2 if factor.in_rows else 1) for factor in pair
    ]
    return Damping(*(group["damping"] * value for value in largest))


ABSOLUTE, HALF = mup.ShampooLaw(relative=False), mup.ShampooLaw(exponent=0.5)
HALF_ABSOLUTE = mup.ShampooLaw(exponent=0.5, relative=False)
UNSCALED = {"fan_in_ratio": 1.0, "fan_out_ratio": 1.0}
"""The mistake: one constant at every width."""

ROWS: dict[str, Row] = {
    "SGD, standard": Row(sgd, False, standard=True),
    "SGD, plan": Row(sgd, True),
    "Adam, standard": Row(adam, False, standard=True),
    "Adam, plan": Row(adam, True),
    "K-FAC, standard, split .01": Row(kfac("split"), False, standard=True),
    "K-FAC, standard, constant .01": Row(kfac("absolute"), False, standard=True),
    "K-FAC, plan, constant .01": Row(kfac("absolute", **UNSCALED), False),
    "K-FAC, plan, split .01": Row(kfac("split"), False),
    "K-FAC, plan, trace/dim .1": Row(kfac(by_mean_eigenvalue, 0.1), False),
    "K-FAC, plan, trace .01": Row(kfac("trace"), True),
    "K-FAC, plan, absolute with ratios": Row(kfac("absolute"), True),
    "K-FAC, plan, largest eigenvalue .01": Row(kfac(by_largest_eigenvalue), True),
    "K-FAC, plan, largest eigenvalue .1": Row(kfac(by_largest_eigenvalue, 0.1), True),
    "K-FAC, plan, Kronecker constant": Row(kfac("kronecker", **UNSCALED), False, widths=NARROW),
    "K-FAC, plan, Kronecker with ratios": Row(kfac("kronecker"), True, widths=NARROW),
    "K-FAC, plan, input side only": Row(kfac("absolute", exponents=(0.0, 1.0)), True),
    "K-FAC, plan, half powers": Row(kfac("absolute", exponents=(0.5, 0.5)), True),
    "Shampoo 1/4, standard": Row(shampoo(mup.ShampooLaw()), False, standard=True, widths=NARROW),
    "Shampoo 1/4, plan": Row(shampoo(mup.ShampooLaw()), True, widths=NARROW),
    "Shampoo 1/4, plan, constant epsilon": Row(shampoo(ABSOLUTE, epsilon=1e-3), False, widths=NARROW),
    "Shampoo 1/4, plan, absolute with ratios": Row(shampoo(ABSOLUTE), True, widths=NARROW),
    "Shampoo 1/2, standard": Row(shampoo(HALF), False, standard=True, widths=NARROW),
    "Shampoo 1/2, plan": Row(shampoo(HALF), True, widths=NARROW),
    "Shampoo 1/2, plan, constant epsilon": Row(shampoo(HALF_ABSOLUTE, epsilon=1e-3), False, widths=NARROW),
    "Shampoo 1/2, plan, absolute with ratios": Row(shampoo(HALF_ABSOLUTE), True, widths=NARROW),
    "Shampoo 1/4 in blocks of 32, plan": Row(shampoo(mup.ShampooLaw(block_size=32)), True, widths=NARROW),
    "Shampoo 1/4 in blocks of 32, rule of none": Row(shampoo(mup.ShampooLaw(), block_size=32), False, widths=NARROW),
    "Muon, standard": Row(plain_muon, False, standard=True, widths=NARROW),
    "Muon, standard, torch's adjustment": Row(muon, False, standard=True, widths=NARROW),
    "Muon, plan": Row(muon, True, widths=NARROW),
    "SGD, plan, 5 steps": Row(sgd, True, steps=5),
    "K-FAC, plan, trace .01, 5 steps": Row(kfac("trace"), True, steps=5),
    "K-FAC, plan, split .01, 5 steps": Row(kfac("split"), False, steps=5),
    "Shampoo 1/4, plan, 5 steps": Row(shampoo(mup.ShampooLaw()), True, widths=NARROW, steps=5),
    "Shampoo 1/4, standard, 5 steps": Row(shampoo(mup.ShampooLaw()), False, standard=True, widths=NARROW, steps=5),
}


def observe(optimizer: Optimizer, outputs: Tensor, targets: Tensor) -> None:
    if isinstance(optimizer, KFAC):
        optimizer.observe(outputs, targets)


def measured(row: Row, *, seeds: int, device: str) -> mup.CoordinateCheck:
    return mup.coordinate_check(
        Net,
        row.make,
        data,
        loss=F.cross_entropy,
        widths=row.widths,
        base=BASE,
        steps=row.steps,
        seeds=range(seeds),
        parameterization="standard" if row.standard else "mup",
        observe=observe,
        device=device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="", help="only rows whose name holds this; nothing is saved")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    machine = Machine.here()
    cells, records, surprises = [], {}, []
    for name, row in ROWS.items():
        if arguments.rows.lower() not in name.lower():
            continue
        result = measured(row, seeds=arguments.seeds, device=arguments.device)
        own = [result.own_slope(each) for each in result.coordinates]
        total = [result.total_slope(each) for each in result.coordinates]
        if result.passed != row.passes:
            surprises.append(name)
        verdict = "passed" if result.passed else "failed"
        expected = "pass" if row.passes else "fail"
        cells.append(
            [name, *(f"{value:+.2f}" for value in own), f"{total[-1]:+.2f}", f"{max(row.widths):,}", expected, verdict]
        )
        print(*cells[-1], flush=True)
        records[name] = {
            "widths": row.widths,
            "own": [each.own for each in result.coordinates],
            "total": [each.total for each in result.coordinates],
            "own_slopes": own,
            "total_slopes": total,
            "passed": result.passed,
        }
    columns = ["row", "input", "hidden 1", "hidden 2", "output", "total, output", "widths to", "must", "result"]
    publish(
        "coordinate_check",
        question=QUESTION,
        machine=machine,
        tables=[Table(f"Own slopes, {arguments.seeds} seeds, tolerance {TOLERANCE:g}", columns, cells)],
        findings=[
            f"{len(cells) - len(surprises)} of {len(cells)} rows do what they must"
            + (f"; not so: {', '.join(surprises)}" if surprises else "; none does otherwise")
        ],
        data={"rows": records},
        save=not arguments.rows,
    )


if __name__ == "__main__":
    main()
