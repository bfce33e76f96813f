"""Random configs for `adabatch train`, sound ones and spoilt ones, and what the command makes of them.

A config is drawn field by field from values that are allowed each by itself; many do not go together. Then half of them
are spoilt in up to two places: a field left out, misspelt or put into another, a value of another type, size or name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset

from adabatch.cli.job import Checkpointing, Job
from adabatch.cli.main import main

NUM_EXAMPLES = 96


class Few(Dataset[Any]):
    """Regression data."""

    def __init__(self, num_examples: int = NUM_EXAMPLES) -> None:
        self.x = torch.randn(num_examples, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.x[index].sin().sum(0, keepdim=True)


class _Enough(Exception):
    """A run went as far as it should."""


class Tiny(nn.Module):
    """Two layers that serve so often, and no longer.

    Raises:
        _Enough: from ``forward``.
    """

    forwards_left = 0

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        if Tiny.forwards_left == 0:
            raise _Enough
        Tiny.forwards_left -= 1
        return self.layers(x)


def _class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments} if arguments else {"class_path": name}


def _length(rng: random.Random, most: int = 10**9) -> dict[str, Any]:
    unit = rng.choice(["examples"] * 5 + ["steps"] * 3 + ["tokens", "gain_steps"])
    return {"count": rng.choice([7, 400, 10**4, most, most]), "unit": unit}


def _size(rng: random.Random) -> int:
    return rng.choice([6, 8, 16, 16, 24, 32, 48, 64, NUM_EXAMPLES])


def _shape(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            _class("adabatch.lr.constant"),
            _class("adabatch.lr.cosine", floor=rng.choice([0, 0.1, 1])),
            _class("adabatch.lr.wsd", cooldown=rng.choice([0.2, 1]), decay=rng.choice(["linear", "1-sqrt"])),
            _class("adabatch.lr.inverse_sqrt", timescale=rng.choice([0.01, 5])),
            _class("adabatch.lr.polynomial", power=rng.choice([0.5, 2])),
            _class("adabatch.lr.piecewise", milestones=[0.3, 0.7], factors=[1, 0.1, 0.01]),
            _class("adabatch.lr.hyperbolic", upper_bound=2.0, infimum=0.1),
            _class("adabatch.lr.exp_hyperbolic", upper_bound=2.0, infimum=0.1),
            _class("adabatch.lr.tabulated", values=[1.0, 0.5, 0.0]),
        ]
    )


def _schedule(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            _class("adabatch.Constant", global_batch_size=_size(rng)),
            _class("adabatch.LinearRamp", first=_size(rng), last=_size(rng), over=_length(rng)),
            _class(
                "adabatch.Stages", first=_size(rng), then=[{"after": _length(rng), "global_batch_size": _size(rng)}]
            ),
            _class("adabatch.Seesaw", first=_size(rng), shape=_shape(rng), total=_length(rng)),
        ]
    )


def _criterion(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            _schedule(rng),
            _class("adabatch.NormTest", eta=rng.choice([0.1, 0.5, 3]), population=rng.choice([None, NUM_EXAMPLES])),
            _class("adabatch.NormTest", eta=0.5),
            _class("adabatch.batch.CoordinateNormTest", eta=0.5, quantile=rng.choice([0.5, 1.0])),
            _class("adabatch.NoiseScale", norm=rng.choice(["euclidean", "euclidean", "adam", "sign", "kfac"])),
            _class("adabatch.batch.InnerProductTest", theta=0.9),
            _class("adabatch.Goodput", min_speedup=0.1),
        ]
    )


def _optimizer(rng: random.Random) -> dict[str, Any]:
    lr = rng.choice([1e-4, 0.1, 1])
    return rng.choice(
        [
            _class("torch.optim.SGD", lr=lr, momentum=rng.choice([0, 0.9])),
            _class("torch.optim.AdamW", lr=lr, weight_decay=0.1),
            _class("torch.optim.Adam", lr=lr, betas=[0.9, 0.95]),
            _class("adabatch.optim.AdaGradNorm", lr=lr),
            _class("adabatch.optim.Shampoo", lr=lr),
        ]
    )


def _local_sgd(rng: random.Random) -> dict[str, Any]:
    outer = rng.choice([None, _class("adabatch.local_sgd.Nesterov", lr=0.7), _class("adabatch.local_sgd.SlowMo")])
    chosen = {"sync_every": rng.choice([1, 4]), "warmup": rng.choice([None, _length(rng)]), "outer": outer}
    return _class("adabatch.LocalSGD", **{name: value for name, value in chosen.items() if value is not None})


def sound_fields(rng: random.Random) -> dict[str, Any]:
    """A config whose values are allowed, each by itself."""
    low, high = sorted((_size(rng), _size(rng)))
    needed = {
        "format": 1,
        "model": _class("support.random_configs.Tiny", width=rng.choice([1, 5])),
        "loss": _class("torch.nn.MSELoss"),
        "optimizer": _optimizer(rng),
        "train_data": _class("support.random_configs.Few"),
        "criterion": _criterion(rng),
        "micro_batch_size": rng.choice([1, 2, 2, 4, 8]),
        "limits": {"min": low, "max": high},
        "total": _length(rng),
    }
    if "tokens" in str(needed):
        needed["tokens_per_example"] = 512
    some = {
        "test_data": _class("support.random_configs.Few", num_examples=5),
        "limits": {"min": _schedule(rng), "max": high},
        "max_micro_batch_size": _size(rng),
        "control": {
            "interval": rng.choice([1, 3]),
            "memory": rng.choice([1, 2, 10, math.inf]),
            "confidence": rng.choice([0.5, 0.9]),
            "growth": rng.choice([1.5, math.inf]),
            "monotone": rng.random() < 0.5,
        },
        "lr_rule": rng.choice(["none", "linear", "sqrt", "gain", "sqrt_gain"]),
        "reference_batch_size": _size(rng),
        "shape": _shape(rng),
        "warmup": _length(rng, most=10**4),
        "clock": rng.choice(["total", "gain"]),
        "tokens_per_example": rng.choice([1, 512]),
        "measure": {"monitor": True, "l1": rng.random() < 0.5, "layers": rng.choice([None, "module", "group"])},
        "follow": rng.choice([["betas"], ["eps", "weight_decay"]]),
        "engine_options": {"gradient_sync": rng.choice(["each", "last"])},
        "local_sgd": _local_sgd(rng),
        "engine": rng.choice(["ddp", "fsdp2", "fsdp2", "deepspeed"]),
        "seed": rng.choice([0, 7, 2**40]),
        "checkpoint": {"every": _length(rng), "keep": rng.choice([1, 3]), "resume": rng.random() < 0.5},
        "hang_timeout": rng.choice([None, 60.0]),
        "guard": {"check_every": rng.choice([1, 100]), "skip_nonfinite": rng.choice([True, False, "probed"])},
    }
    share = rng.choice([0.03, 0.15])
    return needed | {name: value for name, value in some.items() if rng.random() < share}


JUNK = (
    None, True, -1, 0, 1, 0.5, -0.5, 1e30, 10**30, 2**63, -(2**70), math.nan, math.inf, -math.inf, "", "eight", "1e3",
    "é\0", "no.such.Class", "torch.nn.Linear", "adabatch.NormTest", "random_configs", "examples", "/dev/null/there",
    [], {}, [1], [None], {"count": -3, "unit": "steps"}, {"count": 5, "unit": "epochs"}, {"count": 5},
    {"count": math.inf, "unit": "examples"}, {"class_path": 3}, {"class_path": "adabatch.Constant"},
    {"init_args": {"eta": 0.5}},
)  # fmt: skip
"""What stands in a config where something else should."""


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Each value's container and its key there."""
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from _places(node[key])


def spoil(config: dict[str, Any], rng: random.Random) -> None:
    """One mistake at a random place."""
    container, key = rng.choice(list(_places(config)))
    mistake = rng.choice(["another value", "another value", "another value", "left out", "misspelt", "misplaced"])
    if mistake == "another value":
        container[key] = copy.deepcopy(rng.choice(JUNK))
    elif mistake == "left out":
        del container[key]
    elif isinstance(container, dict):
        value = container.pop(key)
        places = [container] if mistake == "misspelt" else [c for c, _ in _places(config) if isinstance(c, dict)]
        rng.choice(places or [config])[f"{key}s" if mistake == "misspelt" else key] = value


def random_config(rng: random.Random) -> dict[str, Any]:
    """A config, spoilt or not."""
    config = copy.deepcopy(sound_fields(rng))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        spoil(config, rng)
    return config


FIELDS = {name for job in (Job, Checkpointing) for name in job.__dataclass_fields__}


class Outcome(NamedTuple):
    """What came of a config.

    Args:
        kind: "planned", "refused", or what must not be: "crashed", "unclear" or "no plan".
        message: what the command said, or where it crashed.
    """

    kind: str
    message: str


def outcome(config: dict[str, Any]) -> Outcome:
    """Gives a config to `adabatch train`, and ends it after its first step or a few more."""
    with tempfile.TemporaryDirectory() as place:
        path, out = Path(place, "config.yaml"), Path(place, "run")
        path.write_text(yaml.safe_dump(config, allow_unicode=True))
        said, Tiny.forwards_left = io.StringIO(), NUM_EXAMPLES + 1
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng([]):
            try:
                status: Any = main(["train", "--config", str(path), f"--out={out}"])
            except _Enough:
                status = 0
            except SystemExit as stopped:
                status = stopped.code
            except Exception:
                return Outcome("crashed", traceback.format_exc())
        return _planned(config, out / "journal.jsonl") if status == 0 else _refusal(config, said.getvalue(), status)


def _refusal(config: dict[str, Any], message: str, status: Any) -> Outcome:
    """A refusal is clear if it names a field, a class or a value of the config, or the field that it lacks."""
    words = {str(part) for container, key in _places(config) for part in (key, container[key])} | FIELDS
    words |= {word.rpartition(".")[2] for word in words} | ({"null"} if "\0" in "".join(words) else set())
    error = message.rpartition("error: ")[2]  # what comes before says how to use the command, and names every field
    said = {part for word in re.findall(r"[^\s'\"`,:;=()\[\]{}]+", error) for part in (word, *word.split("."))}
    named = {word for word in words & said if len(word) > 1}
    return Outcome("refused" if status == 2 and named else "unclear", error)


def _planned(config: dict[str, Any], journal: Path) -> Outcome:
    """Whether each step's plan was one that can be run, within the limits, at a rate that is a number."""
    lines = [line for text in journal.read_text().splitlines() if "plan" in (line := json.loads(text))]
    limits = config.get("limits") or {}
    low, high = (
        limit if isinstance(limit := limits.get(name), int) else default
        for name, default in (("min", 1), ("max", NUM_EXAMPLES))
    )
    for line in lines:
        plan = line["plan"]
        size = plan["micro_batch_size"] * plan["accumulation_steps"] * plan["dp_size"]
        if size != plan["global_batch_size"] or not (low <= size <= high and low <= line["next"] <= high):
            return Outcome("no plan", json.dumps(line))
        if line["applied"] and None in [line["lr"]["factor"], *line["lr"]["base"], *line["lr"]["applied"]]:
            return Outcome("no plan", json.dumps(line))  # the journal's word for NaN
    return Outcome("planned" if lines else "no plan", f"{len(lines)} steps")
