"""Which learning rates of K-FAC are stable at small batches, and do kl_clip or a warm-up make more of them so?

    python benchmarks/kfac_clip.py

scikit-learn's digits without the last 297, a network 64-64-10 with ReLU, 19,200 examples drawn with replacement at a
constant batch and rate, three seeds; mean training loss over the last 2,000 examples, the median of the seeds, and how
many of them diverged (a loss above ten).
"""

from __future__ import annotations

import math
import statistics
from functools import cache

import torch
import torch.nn.functional as F
from _harness import Machine, Table, publish
from sklearn.datasets import load_digits
from torch import Tensor, nn

from adabatch.optim import KFAC

BATCHES, RATES, CLIPS, SEEDS = (16, 64, 256), (0.005, 0.01, 0.03, 0.06), (0.001, 0.01, 0.03, 0.1), (0, 1, 2)
DEFAULT = 0.03
TOTAL, LAST, WARMUP, DIVERGED = 19_200, 2_000, 2_500, 10.0
SETTINGS: dict[str, tuple[float | None, int, float]] = {  # kl_clip, examples of the warm-up, momentum
    "no clip": (None, 0, 0.0),
    f"no clip, warm-up over {WARMUP:,} examples": (None, WARMUP, 0.0),
    **{f"kl_clip={clip:g}": (clip, 0, 0.0) for clip in CLIPS},
    f"kl_clip={DEFAULT:g}, momentum 0.9": (DEFAULT, 0, 0.9),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data[:1500], dtype=torch.float32) / 16, torch.tensor(found.target[:1500])


def last_loss(seed: int, batch: int, rate: float, clip: float | None, warmup: int, momentum: float) -> float:
    """Infinite where the run ended in numbers that are not finite."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = KFAC(model.parameters(), model, lr=rate, kl_clip=clip, momentum=momentum, seed=seed)
    losses = []
    for step in range(TOTAL // batch):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) * batch / warmup) if warmup else rate
        rows = torch.randint(len(labels), (batch,))
        outputs = model(images[rows])
        optimizer.observe(outputs)
        loss = F.cross_entropy(outputs, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
    return statistics.fmean(losses[-(LAST // batch) :])


def shown(losses: list[float]) -> str:
    """The median, and how many diverged."""
    diverged = sum(loss > DIVERGED for loss in losses)
    middle = statistics.median(losses)
    text = "" if middle > DIVERGED else f"{middle:.3f}"
    return f"{text} ({diverged} div.)".strip() if diverged else text


def main() -> None:
    torch.set_num_threads(1)
    machine = Machine.here()
    found = {
        (name, batch): [[last_loss(seed, batch, rate, *setting) for seed in SEEDS] for rate in RATES]
        for name, setting in SETTINGS.items()
        for batch in BATCHES
    }
    rows = [[name, str(batch), *map(shown, losses)] for (name, batch), losses in found.items()]
    stable = {
        name: sum(loss < DIVERGED for batch in BATCHES for losses in found[name, batch] for loss in losses)
        for name in SETTINGS
    }
    publish(
        "kfac_clip",
        question="Which learning rates of K-FAC are stable at small batches, and do kl_clip or a warm-up help?",
        machine=machine,
        tables=[
            Table(
                "Training loss, last 2,000 examples, median of three seeds", ["K-FAC", "batch", *map(str, RATES)], rows
            )
        ],
        findings=[
            f"{name}: {count} of {len(BATCHES) * len(RATES) * len(SEEDS)} runs are stable."
            for name, count in stable.items()
        ],
        data={"losses": [[*key, losses] for key, losses in found.items()]},
    )


if __name__ == "__main__":
    main()
