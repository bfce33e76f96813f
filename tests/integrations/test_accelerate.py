"""``integrations.accelerate.attach``: equal to Accelerate's own loop, on one process and on ranks; what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosts import (
    LR,
    MICRO,
    Numbered,
    awkward,
    check_awkward,
    environment_kept,
    loss_of,
    needs,
    rank_variables,
)
from support.loops import all_lines, lines, network
from support.ports import free_port
from support.ranks import run_ranks
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import adabatch
from adabatch import AdaptiveBatch, Constant, GlobalOrder, Limits, Measure, NormTest, ProgressLR

needs("accelerate")

CLIP = 0.5
MONITOR = Measure(monitor=True)

environment = pytest.fixture(autouse=True)(environment_kept)


def forget() -> None:
    """Accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    forget()
    yield
    forget()


def accelerator_of(**options: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, **options)


def attached(accelerator: Any, model: Any, optimizer: Any, criterion: Any, **options: Any) -> AdaptiveBatch:
    from adabatch.integrations.accelerate import attach

    return attach(accelerator, model, optimizer, criterion, micro_batch_size=MICRO, **options)


class Run:
    """The loop of the documentation, the same on every engine, and what it saw."""

    def __init__(
        self, accelerator: Any, criterion: Any, *, kind: Any = SGD, spoiled: int | None = None, **options: Any
    ) -> None:
        self.accelerator = accelerator
        loader = DataLoader(Numbered(spoiled=spoiled), batch_size=MICRO)
        plain = network()
        optimizer = kind(plain.parameters(), lr=LR)
        self.model, self.optimizer, self.loader = accelerator.prepare(plain, optimizer, loader)
        self.batches = attached(accelerator, self.model, self.optimizer, criterion, **options)
        self.windows: list[int] = []
        self.served: list[int] = []
        self.syncs: list[list[bool]] = []

    def train(self, data: Any = None, *, clip: float | None = None, schedule: Any = None, **options: Any) -> Run:
        for step in self.batches.steps(self.loader if data is None else data, **options):
            self.syncs.append([])
            for batch in step:
                self.syncs[-1].append(self.accelerator.sync_gradients)
                self.served += batch[2].tolist()
                step.backward(loss_of(self.model, batch))
            assert self.accelerator.sync_gradients
            if clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            self.windows.append(len(self.syncs[-1]))
        return self

    def whole(self) -> Tensor:
        """All weights, gathered where they are sharded."""
        if hasattr(self.model, "zero_optimization_stage"):
            import deepspeed

            parameters = list(self.model.module.parameters())
            sharded = self.model.zero_optimization_stage() == 3
            with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
                return torch.cat([p.detach().float().flatten() for p in parameters]).clone()
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.model.parameters()]
        return torch.cat([p.detach().flatten() for p in full]).clone()

    def told(self) -> dict[str, Any]:
        return {"weights": self.whole().tolist(), "windows": self.windows, "served": self.served}


def host_alone(accelerator: Any, *, kind: Any = SGD, spoiled: int | None = None, journal: Path | None = None) -> Tensor:
    """Accelerate's own loop, as its documentation has it; with a journal it is monitored."""
    plain = network()
    optimizer: Any = kind(plain.parameters(), lr=LR)
    loader: Any = DataLoader(Numbered(spoiled=spoiled), batch_size=MICRO)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, loader)
    if journal is not None:
        adabatch.monitor(model, optimizer.optimizer, micro_batch_size=MICRO, journal=journal)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full]).clone()


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_constant_batch_is_accelerates_own_accumulation_to_the_bit(kind: Any) -> None:
    theirs = host_alone(accelerator_of(gradient_accumulation_steps=4), kind=kind)
    forget()
    run = Run(accelerator_of(), Constant(4 * MICRO), kind=kind, measure=MONITOR).train(clip=CLIP)
    assert run.windows == [4] * 16
    assert torch.equal(run.whole(), theirs)
    assert run.batches.noise_scale > 0


def test_a_monitor_measures_accelerates_own_accumulation_and_changes_nothing(tmp_path: Path) -> None:
    theirs = host_alone(accelerator_of(gradient_accumulation_steps=4), kind=AdamW)
    forget()
    watched = host_alone(accelerator_of(gradient_accumulation_steps=4), kind=AdamW, journal=tmp_path / "run.jsonl")
    assert torch.equal(watched, theirs)
    forget()
    run = Run(accelerator_of(), Constant(4 * MICRO), kind=AdamW, measure=MONITOR).train(clip=CLIP)
    last = lines(tmp_path / "run.jsonl")[-1]
    assert last["step"] == 15
    assert last["averages"]["noise_scale"] == pytest.approx(run.batches.noise_scale, rel=1e-5)


@pytest.mark.parametrize("spoiled", [None, 70])
def test_float16_uses_the_scaler_of_the_accelerator(spoiled: int | None) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)

    alone = accelerator_of(gradient_accumulation_steps=4)
    alone.scaler = scaler()  # it makes one on a GPU only
    theirs = host_alone(alone, kind=AdamW, spoiled=spoiled)
    forget()
    accelerator = accelerator_of()
    accelerator.scaler = scaler()
    run = Run(accelerator, Constant(4 * MICRO), kind=AdamW, spoiled=spoiled, measure=MONITOR)
    schedule = ProgressLR(run.batches.optimizer, adabatch.lr.constant(), run.batches, total=adabatch.examples(256))
    with warnings.catch_warnings():
        # Accelerate puts the optimizer's own `step` back after each update, so that torch's scheduler misses its mark.
        warnings.filterwarnings("ignore", message="(Seems like|Detected call of)")
        run.train(clip=CLIP, schedule=schedule)
    assert torch.equal(run.whole(), theirs)
    assert run.batches.consumed.steps == 16
    assert run.batches.progress.steps == (16 if spoiled is None else 15)
    assert accelerator.scaler.get_scale() == alone.scaler.get_scale()


def test_sync_gradients_says_where_a_step_ends() -> None:
    run = Run(accelerator_of(), awkward(1)).train(GlobalOrder(Numbered()), until=adabatch.steps(10), clip=CLIP)
    assert run.syncs == [[False] * (count - 1) + [True] for count in run.windows]
    check_awkward([run.told()], clip=CLIP)


def test_an_evaluation_of_a_loop_is_in_the_journal_and_is_cut_with_its_steps(tmp_path: Path) -> None:
    run = Run(accelerator_of(), Constant(4 * MICRO), measure=MONITOR, journal=tmp_path / "run.jsonl")
    losses = []
    for until in (2, 4, 6):
        run.train(until=adabatch.steps(until))
        losses.append(loss_of(run.model, next(iter(run.loader))).detach())
        run.batches.record_evaluation({"loss": losses[-1]})
        if until == 4:
            run.accelerator.save_state(str(tmp_path / "state"))
    told = [line for line in all_lines(tmp_path / "run.jsonl") if "evaluation" in line]
    assert [(line["step"], line["evaluation"]["loss"]) for line in told] == [
        (until, loss.item()) for until, loss in zip((2, 4, 6), losses, strict=True)
    ]
    run.accelerator.load_state(str(tmp_path / "state"))
    told = all_lines(tmp_path / "run.jsonl")
    assert [line["step"] for line in told if "evaluation" in line] == [2, 4]
    assert [line["step"] for line in told if "plan" in line] == [0, 1, 2, 3]


def test_save_state_and_load_state_resume_to_the_bit(tmp_path: Path) -> None:
    def made(name: str) -> tuple[Run, Any]:
        forget()
        accelerator = accelerator_of()
        order = GlobalOrder(Numbered(), seed=3)
        options: dict[str, Any] = {"limits": Limits(min=8, max=64), "lr_rule": "sqrt", "order": order}
        run = Run(accelerator, NormTest(eta=0.7), kind=AdamW, journal=tmp_path / f"{name}.jsonl", **options)
        total = adabatch.examples(1000)
        schedule = ProgressLR(run.batches.optimizer, adabatch.lr.cosine(), run.batches, total=total)
        accelerator.register_for_checkpointing(schedule)

        def train(until: int) -> None:
            run.train(order, until=adabatch.steps(until), schedule=schedule)

        return run, train

    whole, train = made("whole")
    train(20)
    first, train = made("resumed")
    train(9)
    first.accelerator.save_state(str(tmp_path / "state"))
    train(12)  # steps that the resumed run repeats
    first.batches.remove()
    resumed, train = made("resumed")
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.batches.consumed.steps == 9
    train(20)
    assert torch.equal(resumed.whole(), whole.whole())
    assert lines(tmp_path / "resumed.jsonl") == lines(tmp_path / "whole.jsonl")


def test_a_checkpoint_inside_a_step_is_refused(tmp_path: Path) -> None:
    run = Run(accelerator_of(), Constant(4 * MICRO))
    step = next(run.batches.steps(run.loader))
    step.backward(loss_of(run.model, next(iter(step))))
    with pytest.raises(RuntimeError, match="a checkpoint belongs between two steps"):
        run.accelerator.save_state(str(tmp_path))


def test_accelerates_own_test_of_synchronization_passes_beside_ours() -> None:
    from accelerate.test_utils.scripts import test_sync

    run = Run(accelerator_of(), awkward(1)).train(GlobalOrder(Numbered()), until=adabatch.steps(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test_sync.main()
    run.batches.remove()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_accumulation_of_the_accelerator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4, by which it would divide losses.*use 1"):
        Run(accelerator_of(gradient_accumulation_steps=4), Constant(16))
    run = Run(accelerator_of(), Constant(16))
    run.accelerator.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2"):
        run.train()


def test_accumulate_inside_the_loop_is_refused() -> None:
    run = Run(accelerator_of(), Constant(4 * MICRO))

    def train() -> None:
        for step in run.batches.steps(run.loader):
            for batch in step:
                with run.accelerator.accumulate(run.model):
                    step.backward(loss_of(run.model, batch))

    with pytest.raises(RuntimeError, match=r"accelerator.accumulate\(model\) counts micro-batches by itself.*leave it"):
        train()


class Growing(BatchSampler):
    """Batches of 4, then of 8: what a person would write for a batch that grows."""

    def __init__(self, *, honest: bool) -> None:
        super().__init__(SequentialSampler(range(48)), 4, drop_last=False)
        if not honest:
            self.batch_size = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[list[int]]:
        yield from (list(range(start, start + 4)) for start in range(0, 16, 4))
        yield from (list(range(start, start + 8)) for start in range(16, 48, 8))

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("late", [False, True])
def test_a_sampler_that_would_lose_examples_is_refused(late: bool) -> None:
    from accelerate.data_loader import prepare_data_loader

    def shard(*, honest: bool) -> Any:
        data = DataLoader(Numbered(48), batch_sampler=Growing(honest=honest))
        return [
            prepare_data_loader(data, num_processes=2, process_index=rank, even_batches=honest) for rank in range(2)
        ]

    def served(loaders: list[Any]) -> int:
        return len({number for loader in loaders for batch in loader for number in batch[2].tolist()})

    assert served(shard(honest=True)) < 48, "Accelerate deals all now: the refusal can go"
    assert served(shard(honest=False)) == 48
    accelerator = accelerator_of()
    run = Run(accelerator, Constant(4 * MICRO)) if late else None
    bad = shard(honest=True)[0]
    accelerator._dataloaders.append(bad)  # as `prepare` does on two processes
    with pytest.raises(ValueError, match=r"silently leave out.*batch_size=4.*None.*GlobalOrder"):
        run.train() if run is not None else Run(accelerator, Constant(4 * MICRO))
    accelerator._dataloaders.remove(bad)
    accelerator._dataloaders.append(shard(honest=False)[0])
    Run(accelerator, Constant(4 * MICRO)).train()


def test_what_is_no_accelerator_or_not_ours_to_choose_is_refused() -> None:
    with pytest.raises(TypeError, match=r"accelerator must be an Accelerator, got Sequential"):
        attached(network(), network(), None, Constant(16))
    with pytest.raises(ValueError, match="attach chooses engine= from the accelerator: leave it out"):
        Run(accelerator_of(), Constant(16), engine=adabatch.EngineOptions(gradient_sync="last"))


@pytest.mark.parametrize(("kind", "words"), [("FSDP", "fsdp_version=2"), ("MEGATRON_LM", "leave out Megatron-LM")])
def test_other_kinds_of_parallelism_are_refused(kind: str, words: str) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = accelerator_of()
    model = network()
    optimizer = SGD(model.parameters(), lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    accelerator.state.distributed_type = DistributedType[kind]
    with pytest.raises(ValueError, match=words):
        attached(accelerator, model, optimizer, Constant(16))


# --- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(rank: int, port: int) -> dict[str, Any]:
    """DDP, FSDP2 and Accelerate's own test, in one start of two processes."""
    warnings.simplefilter("ignore")
    rank_variables(rank, 2, port)
    from accelerate.test_utils.scripts import test_sync
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    found: dict[str, Any] = {}

    def sharding() -> Any:
        accelerator = accelerator_of()
        # Accelerate shards on accelerators only, and would take DDP in silence on a CPU.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        return accelerator

    for name, make in {"DDP": accelerator_of, "FSDP2": sharding}.items():
        order = GlobalOrder(Numbered(), seed=0)
        run = Run(make(), awkward(2), measure=MONITOR)
        run.train(order, until=adabatch.steps(10), clip=CLIP)
        found[name] = run.told()
        found[f"{name} model"] = type(run.model).__name__
        order = GlobalOrder(Numbered(), seed=0)
        run = Run(make(), awkward(2), max_micro_batch_size=2 * MICRO)
        run.train(order, until=adabatch.steps(10), clip=CLIP)
        found[f"{name}, micro-batch grows"] = run.told()
        forget()
    found["host alone"] = host_alone(accelerator_of(gradient_accumulation_steps=4), kind=AdamW).tolist()
    forget()
    run = Run(accelerator_of(), Constant(8 * MICRO), kind=AdamW, measure=MONITOR).train(clip=CLIP)
    found["constant"] = run.told()
    test_sync.main()  # destroys the process group
    return found


def on_deepspeed(rank: int, port: int) -> dict[str, Any]:
    """ZeRO 0, 2 and 3, clipped in the engine's config."""
    warnings.simplefilter("ignore")
    rank_variables(rank, 2, port)
    import deepspeed
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Any] = {}
    for stage in (0, 2, 3):
        config = {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
        run = Run(accelerator, awkward(2), measure=MONITOR)
        run.train(GlobalOrder(Numbered(), seed=0), until=adabatch.steps(10), clip=CLIP)
        found[f"ZeRO {stage}"] = run.told()
        found[f"ZeRO {stage} noise"] = run.batches.noise_scale
        run.batches.remove()
        forget()
    dist.destroy_process_group()
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    found = run_ranks(on_ranks, 2, tmp_path, free_port(), connect=False, timeout=250)
    for engine in ("DDP", "FSDP2"):
        check_awkward([rank[engine] for rank in found], clip=CLIP)
    assert found[0]["DDP model"] == "DistributedDataParallel"
    assert found[0]["FSDP2 model"] == "FSDPSequential"
    for engine in ("DDP", "FSDP2"):
        grown = [rank[f"{engine}, micro-batch grows"] for rank in found]
        check_awkward(grown, clip=CLIP, windows=[1] * 3 + [2] * 3 + [1] * 2 + [5] * 2)
    for rank in found:
        assert rank["constant"]["weights"] == pytest.approx(rank["host alone"], rel=1e-6, abs=1e-6)
        assert rank["constant"]["weights"] == found[0]["constant"]["weights"]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_of_deepspeed(tmp_path: Path) -> None:
    needs("deepspeed")
    found = run_ranks(on_deepspeed, 2, tmp_path, free_port(), connect=False, timeout=250)
    for engine in ("ZeRO 0", "ZeRO 2", "ZeRO 3"):
        check_awkward([rank[engine] for rank in found], clip=CLIP)
    for rank in found:
        assert rank["ZeRO 2 noise"] == pytest.approx(found[0]["ZeRO 0 noise"], rel=1e-5)
