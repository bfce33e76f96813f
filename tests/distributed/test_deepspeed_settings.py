"""What a resumed run on a DeepSpeed engine makes of other settings: the table in docs/checkpoints.md, at each stage.

One job of two ranks runs all of it, as each start takes long; the tests read what it found.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.deepspeed_engines import as_launched, connect, engine_of, whole
from support.loops import lines, regression
from support.ports import free_port
from support.ranks import run_ranks
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW

import adabatch
from adabatch import GlobalOrder, Limits, NormTest, ProgressLR, lr
from adabatch.checkpointing import CheckpointError
from adabatch.checkpointing.checkpoints import Loaded
from adabatch.checkpointing.lock import LOCK, FolderLock, read_lock

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # many engines, which a busy machine starts slowly

if find_spec("deepspeed") is None:  # an import would change the environment of this process
    pytest.skip("needs DeepSpeed", allow_module_level=True)

STAGES = (0, 1, 3)  # 2 shards as 1 does
TOTAL = adabatch.examples(2000)


class Run:
    """A run of AdamW on an engine with a ``ProgressLR``, or with what is given in its place."""

    def __init__(
        self,
        place: Path,
        stage: int,
        *,
        rate: float = 0.01,
        schedule: bool = True,
        seed: int = 5,
        reference: int | None = None,
        total: adabatch.batch.Duration = TOTAL,
        model: nn.Module | None = None,
        optimizer_of: Any = None,
        groups: Any = nn.Module.parameters,
        keep: int = 3,
        warmup: float | None = None,
        ordered: bool = True,
        **options: Any,
    ) -> None:
        from adabatch.integrations.deepspeed import attach
        from adabatch.integrations.deepspeed_checkpoints import DeepSpeedCheckpoints

        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": warmup}}
        self.engine = engine_of(
            stage,
            optimizer_of or partial(AdamW, lr=rate, **options),
            model=model,
            groups=groups,
            **({} if warmup is None else {"scheduler": scheduler}),
        )
        self.batches = attach(
            self.engine,
            NormTest(eta=0.3),
            limits=Limits(min=8, max=64),
            lr_rule="sqrt",
            reference_batch_size=reference,
            journal=place.with_suffix(".jsonl"),
        )
        optimizer = self.engine.basic_optimizer
        self.schedule = ProgressLR(optimizer, lr.cosine(), self.batches, total=total) if schedule else None
        self.order = GlobalOrder(regression(300), seed=seed)
        order = self.order if ordered else None
        parts = {"batches": self.batches, "schedule": self.schedule, "order": order}
        self.saving = DeepSpeedCheckpoints(place, engine=self.engine, keep=keep, **parts)

    def train(self, number: int) -> None:
        until = adabatch.steps(self.batches.consumed.steps + number)
        for step in self.batches.steps(self.order, until=until):
            for x, y in step:
                step.backward(functional.mse_loss(self.engine(x), y))
            self.engine.step()
            if self.schedule is not None:
                self.schedule.step()

    def save(self) -> None:
        with self.saving:
            self.saving.save()

    def load(self) -> Loaded:
        with self.saving:
            loaded = self.saving.load()
        assert loaded is not None
        return loaded

    def group(self) -> dict[str, Any]:
        group = self.engine.basic_optimizer.param_groups[0]
        return {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}


def said(loaded: Loaded) -> list[str]:
    return [str(each) for each in (*loaded.differences, *loaded.kept)]


def saved(place: Path, stage: int, **options: Any) -> Run:
    run = Run(place, stage, **options)
    run.train(4)
    run.save()
    run.batches.remove()
    return run


def other_settings(place: Path, stage: int) -> dict[str, Any]:
    first = saved(place, stage, weight_decay=0.1, betas=(0.9, 0.99))
    again = Run(place, stage, weight_decay=0.1, betas=(0.9, 0.99))
    same = said(again.load())
    same_group = again.group()
    again.batches.remove()
    second = Run(place, stage, rate=0.003, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-6, seed=6)
    found = said(second.load())
    loaded = second.group()
    second.train(2)
    return {
        "same": same,
        "same group": same_group == first.group(),
        "said": found,
        "group": loaded,
        "shape": first.group()["lr"] / 0.01,
        "seed": second.order.state_dict()["seed"],
        "journal": str(place.with_suffix(".jsonl")),
    }


def without_a_schedule(place: Path) -> dict[str, Any]:
    saved(place, 1, schedule=False)
    second = Run(place, 1, schedule=False, rate=0.003)
    return {"said": said(second.load()), "lr": second.group()["lr"]}


def with_the_engines_scheduler(place: Path) -> dict[str, Any]:
    first = saved(place, 1, schedule=False, warmup=0.01)
    again = Run(place, 1, schedule=False, warmup=0.01)
    found = {"same": said(again.load()), "lr": again.group()["lr"] == first.group()["lr"]}
    return found | {"other": refusal(Run(place, 1, schedule=False, warmup=0.02))}


def refusal(run: Run) -> str:
    """The error, which must come before anything is changed."""
    before = whole(run.engine)
    try:
        run.load()
    except (ValueError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}" if torch.equal(whole(run.engine), before) else "changed"
    return "accepted"


def reversed_order(model: nn.Module) -> list[nn.Parameter]:
    return [*model[2].parameters(), *model[0].parameters()]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]


def refused(place: Path) -> dict[str, str]:
    saved(place, 1, reference=16)
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))
    found = {
        "reference": refusal(Run(place, 1, reference=32)),
        "kind": refusal(Run(place, 1, reference=16, optimizer_of=partial(SGD, lr=0.01))),
        "order": refusal(Run(place, 1, reference=16, groups=reversed_order)),
        "groups": refusal(Run(place, 1, reference=16, groups=two_groups)),
        "model": refusal(Run(place, 1, reference=16, model=wider)),
        "stage": refusal(Run(place, 2, reference=16)),
    }
    try:  # by the schedule itself, once the weights are loaded
        Run(place, 1, reference=16, total=adabatch.examples(4000)).load()
    except ValueError as error:
        found["total"] = f"ValueError: {error}"
    without = place.with_name("without")
    saved(without, 1, schedule=False)
    found["part"] = refusal(Run(without, 1))
    return found


def not_finite(place: Path, stage: int) -> dict[str, Any]:
    """A number that is not finite in the state of the second rank's optimizer, and in its weights."""
    run = Run(place, stage, schedule=False)
    run.train(2)
    found: dict[str, Any] = {}
    with run.saving:
        run.saving.save()
        for name, spoil in {
            "state": lambda: next(iter(run.engine.basic_optimizer.state.values()))["exp_avg"],
            "weights": lambda: next(iter(run.engine.basic_optimizer.state)).data,
        }.items():
            tensor = spoil().flatten()
            kept = float(tensor[0])
            if dist.get_rank() == 1:
                tensor[0] = math.inf
            try:
                run.saving.save()
            except CheckpointError as error:
                found[f"{name} {dist.get_rank()}"] = str(error)
            tensor[0] = kept
        run.train(1)
        run.saving.save()
    found["left"] = sorted(path.name for path in place.glob("step*"))
    return found


def stuck(place: Path) -> list[str]:
    """The checkpoints of a run whose first rank cannot remove the old one."""
    run = Run(place, 1, keep=1)
    with run.saving:
        for removes in (None, OSError("in use")):
            run.train(1)
            with patch.object(shutil, "rmtree", side_effect=removes):
                run.saving.save()
    return sorted(path.name for path in place.glob("step*"))


def warned(place: Path) -> list[list[str]]:
    """What the saves of a run with and without its order warn of, and whether they name the line that calls them."""
    found = []
    for ordered in (True, False):
        run = Run(place / str(ordered), 1, schedule=False, ordered=ordered)
        run.train(1)
        with run.saving, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.saving.save()
            run.train(1)
            run.saving.step(now=True)
        ours = [each for each in told if "checkpoint" in str(each.message)]
        found.append([f"{Path(each.filename).name}: {each.message}" for each in ours])
    return found


def begun_again(place: Path) -> dict[str, Any]:
    """A new run in the folder of an old one that had come further; of each only the newest checkpoint is kept."""
    saved(place, 1, keep=1)
    (place / "step_pictures").mkdir(exist_ok=True)  # the user's
    (place / "steps.txt").touch()
    second = Run(place, 1, keep=1)
    with second.saving:
        second.saving.start_over()
        second.train(2)
        second.saving.save()
    third = Run(place, 1, keep=1)
    with third.saving:
        third.saving.start_over()
        third.train(2)
        third.saving.save()  # the newest is that of the same step of another run
    fourth = Run(place, 1)
    path = fourth.load().path
    return {
        "loaded": path.name,
        "steps": fourth.batches.consumed.steps,
        "left": sorted(each.name for each in place.glob("s*")),
    }


def after_a_killed_run(place: Path) -> dict[str, Any]:
    """Its lock is all that a run leaves which is killed before its first checkpoint; successors begin in its folder."""
    if dist.get_rank() == 0:
        FolderLock(place).claim("0123456789ab")
        said = json.loads((place / LOCK).read_text())
        said["holder"]["started"] = 1  # another process of this number, which runs no longer
        (place / LOCK).write_text(json.dumps(said))
    dist.barrier()
    first = Run(place, 1)
    with first.saving:
        assert first.saving.load() is None
        first.train(2)
        first.saving.save()
    token = read_lock(place).run
    first.save()
    second = Run(place, 1)
    with second.saving:
        loaded = second.saving.load()
        second.saving.save()
    return {
        "of the first": token == first.batches.journal.run or dist.get_rank() > 0,
        "loaded": loaded is not None,
        "run": second.batches.journal.run == first.batches.journal.run or dist.get_rank() > 0,
    }


def everything(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    place = Path(folder)
    connect()
    found = {
        "other": {f"ZeRO {stage}": other_settings(place / f"zero{stage}", stage) for stage in STAGES},
        "no schedule": without_a_schedule(place / "no_schedule"),
        "scheduler": with_the_engines_scheduler(place / "scheduler"),
        "refused": refused(place / "refused"),
        "not finite": {f"ZeRO {stage}": not_finite(place / f"bad{stage}", stage) for stage in (0, 3)},
        "again": begun_again(place / "again"),
        "killed": after_a_killed_run(place / "killed"),
        "warned": warned(place / "warned"),
        "stuck": stuck(place / "stuck"),
    }
    dist.barrier()
    return found


def on_rank(rank: int, port: int, folder: str) -> dict[str, Any]:
    return as_launched(everything, rank, 2, port, folder)  # type: ignore[no-any-return]


# --- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("deepspeed")
    return run_ranks(on_rank, 2, place, free_port(), str(place), timeout=560, connect=False)


@pytest.fixture(scope="module")
def found(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[0]


def test_nothing_is_said_of_a_run_that_is_the_same(found: dict[str, Any]) -> None:
    for stage, seen in found["other"].items():
        assert seen["same"] == [], stage
        assert seen["same group"], stage


def test_learning_rate_and_weight_decay_are_taken_over(found: dict[str, Any]) -> None:
    for stage, seen in found["other"].items():
        for each in (
            "optimizer.lr was 0.01 when the checkpoint was saved, and is 0.003 now",
            "optimizer.weight_decay was 0.1 when the checkpoint was saved, and is 0.3 now",
        ):
            assert each in seen["said"], stage
        assert seen["group"]["lr"] == pytest.approx(0.003 * seen["shape"], rel=1e-12), stage
        assert seen["group"]["weight_decay"] == 0.3, stage
        last = lines(Path(seen["journal"]))[-1]["lr"]
        assert last["base"] == [0.003], stage
        assert last["applied"][0] == pytest.approx(0.003 * last["shape"][0] * last["factor"], rel=1e-12), stage


def test_other_settings_and_the_seed_are_kept_and_said(found: dict[str, Any]) -> None:
    for stage, seen in found["other"].items():
        kept = [each for each in seen["said"] if " stays " in each]
        assert [each.split()[0] for each in kept] == ["optimizer.betas", "optimizer.eps", "data.seed"], stage
        assert len(seen["said"]) == 5, stage
        assert (seen["group"]["betas"], seen["group"]["eps"], seen["seed"]) == ([0.9, 0.99], 1e-8, 5), stage


def test_a_learning_rate_without_a_schedule_is_kept(found: dict[str, Any]) -> None:
    seen = found["no schedule"]
    assert len(seen["said"]) == 1
    assert seen["said"][0].startswith("optimizer.lr stays 0.01, as it was saved, and the 0.003 of this run is not used")
    assert seen["lr"] == 0.01


def test_another_scheduler_of_the_engine_is_refused(found: dict[str, Any]) -> None:
    seen = found["scheduler"]
    assert (seen["same"], seen["lr"]) == ([], True)
    assert re.search(r"^ValueError: .*the scheduler WarmupLR .*0\.01.* this run has WarmupLR .*0\.02", seen["other"])


def test_what_must_not_differ_is_refused_by_name(found: dict[str, Any]) -> None:
    expected = {
        "reference": "saved with reference_batch_size=16, but this one was built with 32",
        "kind": "saved with the optimizer AdamW, this run has SGD",
        "order": r"parameter 0 was 0\.weight of shape \(7, 6\) .* is 2\.weight",
        "groups": r"groups of \[4\] parameters, this AdamW of \[2, 2\]",
        "model": r"another model than this Sequential; 3 tensor\(s\) differ \(0\.weight: \[7, 6\] saved, \[9, 6\] her",
        "stage": "saved with zero_stage=1, this run has 2: .* universal checkpoints",
        "total": "saved with total=",
        "part": "holds no schedule .* leave it out",
    }
    assert set(found["refused"]) == set(expected)
    for name, words in expected.items():
        assert re.search(f"^ValueError: .*{words}", found["refused"][name]), (name, found["refused"][name])


def test_numbers_that_are_not_finite_do_not_displace_a_good_checkpoint(both: list[dict[str, Any]]) -> None:
    for stage in both[0]["not finite"]:
        first, second = (found["not finite"][stage] for found in both)
        assert first["left"] == second["left"] == ["step00000002", "step00000003"], stage
        for name, words in {"state": "the optimizer's state['exp_avg'] of", "weights": ""}.items():
            assert "another rank could not use" in first[f"{name} 0"], (stage, name)
            assert words in second[f"{name} 1"], (stage, name)
            assert "holds numbers that are not finite" in second[f"{name} 1"], (stage, name)


def test_an_old_checkpoint_that_cannot_be_removed_stops_no_rank(found: dict[str, Any]) -> None:
    assert found["stuck"] == ["step00000001", "step00000002"]


def test_an_order_that_is_not_saved_is_a_warning_at_the_first_save(found: dict[str, Any]) -> None:
    with_order, without = found["warned"]
    assert with_order == []
    (said,) = without
    assert said.startswith("test_deepspeed_settings.py: the GlobalOrder that steps() reads is not among the parts")


def test_a_run_that_begins_again_keeps_its_own_newest_checkpoint(found: dict[str, Any]) -> None:
    left = ["step00000002-1", "step_pictures", "steps.txt"]
    assert found["again"] == {"loaded": "step00000002-1", "steps": 2, "left": left}


def test_a_run_killed_before_its_first_checkpoint_leaves_its_folder_to_the_next(found: dict[str, Any]) -> None:
    assert found["killed"] == {"of the first": True, "loaded": True, "run": True}
