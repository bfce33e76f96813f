"""Jobs on each engine: stopped by a signal they go on as if they had not been, and take the run that DDP takes."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deepspeed_engines import run_deepspeed
from support.loops import lines
from torch import Tensor, nn
from torch.optim import AdamW

from adabatch import EngineOptions, Limits, NormTest, examples
from adabatch.cli.display import Display
from adabatch.cli.engines import job_engine
from adabatch.cli.job import Job, run
from adabatch.recipes.digits import Digits
from adabatch.recipes.models import DigitsCNN
from adabatch.runtime.launch.world import World, connected

pytestmark = pytest.mark.distributed

ENGINES = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "ZeRO 2": ("deepspeed", {"zero_optimization": {"stage": 2}, "managed_gradient_accumulation": False}),
    "ZeRO 3": ("deepspeed", {"zero_optimization": {"stage": 3}}),
    "bf16": ("deepspeed", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}),
}


class Stops(nn.Module):
    """Cross-entropy, in whose so-manieth call a signal comes."""

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.calls = 0
        self.after = after

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return nn.functional.cross_entropy(outputs, targets)


def job(name: str, out: Path, *, stops_after: int | None = None) -> Job:
    torch.manual_seed(0)
    engine, settings = ENGINES[name]
    config = out / "engine.json"
    if engine == "deepspeed":
        out.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({"gradient_clipping": 0.0, **settings}))
    return Job(
        model=DigitsCNN(),
        loss=Stops(stops_after),
        optimizer=partial(AdamW, lr=3e-3),
        train_data=Digits(split="train"),
        test_data=Digits(split="test"),
        criterion=NormTest(eta=0.7),
        micro_batch_size=8,
        max_micro_batch_size=64,
        limits=Limits(min=16, max=128),
        lr_rule="sqrt",
        total=examples(1000),
        engine=engine,  # type: ignore[arg-type]
        engine_config=config if engine == "deepspeed" else None,
        out=out,
    )


def everything(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    world = World.from_environment()
    found = {}
    with connected(world, device=torch.device("cpu")):
        for name in ENGINES:
            results = []
            for part, stops_after in (("through", None), ("stopped", 12), ("stopped", None)):
                results.append(
                    run(
                        job(name, Path(folder, name, part), stops_after=stops_after),
                        world,
                        display=Display(world.rank),
                        label=name,
                    )
                )
            found[name] = [[each.preempted, each.examples, each.test_loss, each.accuracy] for each in results]
    return {"launcher": world.launcher, "found": found}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_every_engine_takes_the_same_run_and_goes_on_after_a_signal(tmp_path: Path) -> None:
    first, second = run_deepspeed(2, everything, str(tmp_path))
    assert first["launcher"] == "deepspeed"
    reference = lines(tmp_path / "ddp" / "through" / "journal.jsonl")
    assert reference[-1]["plan"]["global_batch_size"] > 16
    for name, (through, stopped, gone_on) in first["found"].items():
        assert second["found"][name][0] == through, name
        assert [each[0] for each in (through, stopped, gone_on)] == [False, True, False], name
        assert stopped[1] < through[1], name
        assert gone_on == through, name  # bit by bit, as the test loss tells
        journal = lines(tmp_path / name / "through" / "journal.jsonl")
        assert lines(tmp_path / name / "stopped" / "journal.jsonl") == journal, name
        assert through[3] > 0.5, name
        if name != "bf16":
            assert [line["next"] for line in journal] == [line["next"] for line in reference], name
            assert through[2] == pytest.approx(first["found"]["ddp"][0][2], rel=1e-3), name


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("ddp", "good.json", r"engine_config=.*good.json is for engine: deepspeed; ddp has none"),
        ("deepspeed", None, "engine: deepspeed needs engine_config"),
        ("deepspeed", "bad.json", "bad.json is not JSON"),
        ("deepspeed", "good.json", "runs under a launcher: launch/deepspeed.sh"),
    ],
)
def test_what_does_not_fit_the_engine_is_refused(name: Any, config: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "good.json").write_text("{}")
    path = None if config is None else tmp_path / config
    with pytest.raises(ValueError, match=says):
        job_engine(
            name,
            nn.Linear(2, 2),
            partial(AdamW, lr=0.1),
            World(),
            config=path,
            options=EngineOptions(),
            micro_batch_size=1,
        )
