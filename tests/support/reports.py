"""Reports of made-up runs in which everything is there that a page or a picture can show."""

from __future__ import annotations

import numpy as np

from adabatch.report.page import Reported, report_on
from adabatch.report.steps import read_steps


def journal(num_steps: int, *, layers: int = 0, seed: int = 0, **other) -> list[dict]:
    """Lines of a run in which everything is there that a page can show."""
    random = np.random.default_rng(seed)
    lines, examples, batch = [], 0, 16
    for step in range(num_steps):
        scale = float(40 * (1 + step / 50) * random.lognormal(0, 0.2))
        after = 2 * batch if step % max(1, num_steps // 5) == max(1, num_steps // 5) - 1 and batch < 256 else batch
        measured = {"noise": scale, "signal": 1.0, "noise_scale": scale}
        lines.append(
            {
                "format": 1,
                "step": step,
                "examples": examples,
                "plan": {"micro_batch_size": 8, "accumulation_steps": 2, "dp_size": 1, "global_batch_size": batch},
                "loss": 2 / (1 + step / 20) * float(random.lognormal(0, 0.1)),
                "moments": measured,
                "averages": measured,
                "wanted": 3 * scale,
                "low": 2 * scale,
                "high": None if step < 3 else 5 * scale,
                "freedom": 4.0 + step,
                "next": after,
                "reason": ("grow" if after > batch else ("not significant", "within hysteresis", "hold")[step % 3]),
                "lr": {"base": [0.1], "shape": [1 - step / num_steps], "factor": (batch / 16) ** 0.5, "applied": [0.1]},
                "applied": step != 5,
                "layers": {
                    f"blocks.{i}.mlp": {"noise": scale * (i + 1), "signal": 1.0 - 0.4 * i, "noise_scale": scale}
                    for i in range(layers)
                },
                "seconds": 0.1 * batch,
                "run": f"{seed}",
                **other,
            }
        )
        examples, batch = examples + batch, after
        if step % 50 == 49:
            metrics = {"loss": 2.1 / (1 + step / 20), "accuracy": 1 - 1 / (2 + step / 20)}
            lines.append({"format": 1, "step": step + 1, "examples": examples, "evaluation": metrics, "run": f"{seed}"})
    return lines


def two_runs() -> list[Reported]:
    config = {
        "limits.min": 16,
        "limits.max": 256,
        "tokens_per_example": 128,
        "optimizer.init_args.weight_decay": 0.1,
        "optimizer.init_args.betas": [0.9, 0.95],
        "lr_rule": "sqrt",
    }
    first = read_steps(journal(300, layers=3), "first <run>")
    second = read_steps(journal(200, seed=1), "second")
    return [report_on(first, {**config, "seed": 0}, price=64), report_on(second, {**config, "seed": 1}, price=64)]
