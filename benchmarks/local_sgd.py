"""How many rounds of communication do adaptive batches save local SGD, and at what quality?

    ADABATCH_DATA=... python benchmarks/local_sgd.py [--cache FOLDER] [--minutes 60]

Four gloo processes of one thread each average every H local steps, through the library as anybody uses it (the constant
small batch at H = 1 runs on one process, which a test holds to be the same to 1e-6). Two small tasks: MnistCNN under
SGD with momentum, and a character transformer on tinyshakespeare under AdamW. Policies at equal examples: the smallest
batch, the largest, and between them the norm test and ``StepPrice`` at two prices, measured once per round at the first
local step. The base learning rate is tuned for the smallest batch at H = 1 (a grid of factor 2, a seed that serves no
other purpose). With the norm test and constant batches it follows the batch by a rule that each task names, so the
constant large batch has the rate that the rule gives it; the eta of the test, one for both tasks, was chosen on that
seed too. ``StepPrice`` runs with all defaults of the library: its rule, its control, and betas that follow. The rate
falls linearly to zero over the run. MnistCNN is also trained four times as long: how much of the price of a larger
batch is that of a run too short for it? Quality is accuracy for the one, loss for the other.

A second question: what the drift of workers apart adds to the noise that the test sees. At a constant batch, noise is
measured at the first and at the last local step of each round, across workers and within each.

Bytes are those that one worker sends when reductions run as a ring, for averages and measured gradients together.
Finished runs are kept in the cache folder by the settings that made them, and are not run again; nor are those of the
published ``.json``. Past ``--minutes`` no run is started, and what is published are the seeds that a policy has for
every H."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
import torch.distributed as dist
from _harness import RESULTS, T_95, Machine, Table, publish
from support.options import grouped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import Dataset

from adabatch import (
    AdaptiveBatch,
    Constant,
    Control,
    GlobalOrder,
    Limits,
    LocalSGD,
    NormTest,
    ProgressLR,
    StepPrice,
    examples,
)
from adabatch.lr import constant, linear
from adabatch.lr.rules import LRRule
from adabatch.recipes import Mnist, Text, collate
from adabatch.recipes.models import MnistCNN, Transformer

matplotlib.use("agg")
from matplotlib import pyplot as plt

QUESTION = (
    "Four workers, H in {1, 4, 16, 32}, equal examples: does the adaptive batch reach the quality of the constant "
    "small batch with at least 4 times fewer rounds? And how much of the noise seen at the end of a round is drift?"
)
WORKERS = 4
H = (1, 4, 16, 32)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 1000
SMALL, LARGE, MICRO = 4, 256, 1  # examples of all workers; the smallest micro-batch of one
ETA = 0.9
CONTROL = Control(memory=6, confidence=0.8)
AIM = 4.0
DRIFT_H, DRIFT_BATCH, DRIFT_MICRO, DRIFT_ROUNDS = (4, 16, 32), 64, 8, 8
MOST_EXTENSIONS = 3

Policy = Literal["small", "large", "norm test", "price 8", "price 32"]
CONSTANTS: tuple[Policy, ...] = ("small", "large")
FOLLOWING: tuple[Policy, ...] = ("norm test", "price 8", "price 32")
POLICIES = (*CONSTANTS, *FOLLOWING)


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizer.

    Args:
        about: the task in words, for the table's title.
        total: examples of a run.
        drifts: whether to measure drift, too.
        score: what its quality is read from beside the loss; "" for the loss alone.
        inputs, targets: to test on.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[Any, float], Optimizer]
    rule: LRRule
    grid: tuple[float, ...]
    total: int
    score: str
    data: Dataset[Any]
    inputs: Tensor
    targets: Tensor
    drifts: bool = True


@cache
def tasks() -> dict[str, Task]:
    images, unseen = Mnist("train"), Mnist("test")
    text, rest = Text("train", 32), Text("test", 32)
    some = torch.linspace(0, len(rest) - 1, 1280).long()
    cnn = Task(
        name="MNIST CNN",
        about="MnistCNN (28,938 parameters), SGD with momentum 0.9, rule gain, 4,096 images",
        model=lambda: MnistCNN().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        optimizer=lambda parameters, lr: SGD(parameters, lr, momentum=0.9),
        rule="gain",
        grid=(0.005, 0.01, 0.02),
        total=4_096,
        score="accuracy",
        data=images,
        inputs=unseen.tensors[0][::2],
        targets=unseen.tensors[1][::2],
    )
    longer = replace(
        cnn, name="MNIST CNN, longer", about=cnn.about.replace("4,096", "16,384"), total=16_384, drifts=False
    )
    transformer = Task(
        name="character transformer",
        about="2 layers of width 32, 2 heads (30,656 parameters), AdamW (0.9, 0.95, decay 0.1), rule sqrt, 4,096 "
        "x 32 characters of tinyshakespeare",
        model=lambda: Transformer(len(text.vocabulary), 32, width=32, depth=2, num_heads=2),
        optimizer=lambda parameters, lr: AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
        rule="sqrt",
        grid=(0.002, 0.004, 0.008),
        total=4_096,
        score="",
        data=text,
        inputs=rest.tensors[0][some],
        targets=rest.tensors[1][some],
    )
    return {task.name: task for task in (cnn, transformer, longer)}


class Job(NamedTuple):
    """One run; ``measure`` and ``spread`` differ from what is usual only where drift is measured."""

    task: str
    policy: Policy | Literal["drift"]
    sync_every: int
    seed: int
    lr: float
    measure: Literal["first", "last"] = "first"
    spread: Literal["across", "within"] = "across"

    def key(self) -> str:
        """Of everything that the run's result depends on."""
        drift = (DRIFT_BATCH, DRIFT_MICRO, DRIFT_ROUNDS)
        setting = (tasks()[self.task].about, SMALL, LARGE, MICRO, ETA, repr(CONTROL), drift, self)
        return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:24]


class Outcome(NamedTuple):
    """What one run came to; ``noise`` of each measurement, ``sizes`` of each step; CPU seconds of all workers.

    In the published file ``noise`` holds its mean alone, and only the runs that are drawn have ``sizes``.
    """

    loss: float
    accuracy: float
    steps: int
    rounds: int
    bytes_sent: int
    sizes: list[int]
    noise: list[float]
    seconds: float
    commit: str = ""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(job: Job) -> Outcome:
    """The run on one of the workers."""
    task, begin = tasks()[job.task], time.process_time()
    torch.manual_seed(job.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters(), job.lr)
    micro = MICRO
    constants = {"small": SMALL, "large": LARGE, "drift": DRIFT_BATCH}
    options: dict[str, Any] = {"limits": Limits(SMALL, LARGE), "max_micro_batch_size": LARGE // WORKERS}
    if job.policy.startswith("price"):
        options |= {"criterion": StepPrice(float(job.policy.removeprefix("price ")))}
    else:
        options |= {"criterion": NormTest(ETA), "control": CONTROL, "lr_rule": task.rule}
    if job.policy in constants:
        # As the adaptive run measures, a constant one does where its rule needs it.
        options |= {"criterion": Constant(constants[job.policy]), "monitor": True}
    if job.policy == "drift":
        micro = DRIFT_MICRO
        options |= {"limits": Limits(DRIFT_BATCH, DRIFT_BATCH), "max_micro_batch_size": None}
    sizes: list[int] = []
    noise: list[float] = []
    with LocalSGD(model, optimizer, sync_every=job.sync_every, measure=job.measure, spread=job.spread) as local:
        batches = AdaptiveBatch(
            model, optimizer, local_sgd=local, micro_batch_size=micro, reference_batch_size=SMALL, **grouped(options)
        )
        until, shape = examples(task.total), linear()
        if job.policy == "drift":
            until, shape = examples(DRIFT_ROUNDS * job.sync_every * DRIFT_BATCH), constant()
        schedule = ProgressLR(optimizer, shape, batches, total=until)
        order = GlobalOrder(task.data, seed=job.seed, collate_fn=collate)
        for step in batches.steps(order, until=until):
            for inputs, targets in step:
                step.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            sizes.append(step.global_batch_size)
            if step.moments is not None:
                noise.append(step.moments.noise)
    loss, accuracy = evaluate(model, task)
    seconds = torch.tensor(time.process_time() - begin)
    dist.all_reduce(seconds)
    return Outcome(loss, accuracy, local.steps, local.rounds, local.bytes_sent, sizes, noise, float(seconds))


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> tuple[float, float]:
    """Mean loss and share of right answers over the test set, each worker on its share; infinite where no number."""
    mine = slice(dist.get_rank(), None, WORKERS)
    sums = torch.zeros(3, dtype=torch.float64)
    for inputs, targets in zip(task.inputs[mine].split(64), task.targets[mine].split(64), strict=True):
        logits = model(inputs)
        right = (logits.argmax(-1) == targets).double().mean()
        sums += len(inputs) * torch.stack([cross_entropy(logits, targets).double(), right, torch.ones_like(right)])
    dist.all_reduce(sums)
    loss, right, count = sums.tolist()
    return loss / count if math.isfinite(loss) else math.inf, right / count


def work(rank: int, meeting: str, jobs: Queue[Job | None], outcomes: Queue[Outcome]) -> None:
    """One worker: runs what it is told, and the first one tells what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS, timeout=timedelta(minutes=10))
    while (job := jobs.get()) is not None:
        outcome = train(job)
        if rank == 0:
            outcomes.put(outcome)
    dist.destroy_process_group()


class OutOfTimeError(Exception):
    """No further run may start."""


class Runner:
    """Four workers that run jobs, unless their outcomes are known.

    Args:
        folder: the cache.
        published: outcomes of an earlier run, by the keys of their jobs.
        deadline: in seconds of the monotonic clock.
        commit: of the code that runs.

    Attributes:
        used: the outcomes that were asked for.
        seconds: CPU time that all of them took.
    """

    def __init__(self, folder: Path, published: Mapping[str, Any], deadline: float, commit: str) -> None:
        self.folder = folder
        self.published = published
        self.deadline = deadline
        self.commit = commit
        self.used: dict[Job, Outcome] = {}
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        self.outcomes: Queue[Outcome] = context.Queue()
        self.jobs: list[Queue[Job | None]] = [context.Queue() for _ in range(WORKERS)]
        self.workers = [
            context.Process(target=work, args=(rank, meeting, queue, self.outcomes), daemon=True)
            for rank, queue in enumerate(self.jobs)
        ]
        for worker in self.workers:
            worker.start()

    def __call__(self, job: Job) -> Outcome:
        key = job.key()
        file = self.folder / f"{key}.json"
        if file.exists():
            outcome = Outcome(**json.loads(file.read_text()))
        elif key in self.published:
            outcome = Outcome(**self.published[key])
        elif time.monotonic() > self.deadline:
            raise OutOfTimeError
        else:
            outcome = self.run(job)._replace(commit=self.commit)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(outcome._asdict()))
            part.replace(file)
        self.used[job] = outcome
        self.seconds += outcome.seconds
        return outcome

    def run(self, job: Job) -> Outcome:
        if job.policy == "small" and job.sync_every == 1:
            return alone(tasks()[job.task], job.seed, job.lr)
        for queue in self.jobs:
            queue.put(job)
        return self.outcomes.get(timeout=3600)

    def close(self) -> None:
        for queue in self.jobs:
            queue.put(None)
        for worker in self.workers:
            worker.join(30)


def alone(task: Task, seed: int, lr: float) -> Outcome:
    """The constant small batch on one process: what four workers at H = 1 come to, up to rounding."""
    begin = time.process_time()
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters(), lr)
    batches = AdaptiveBatch(model, optimizer, Constant(SMALL), micro_batch_size=SMALL)
    schedule = ProgressLR(optimizer, linear(), batches, total=examples(task.total))
    order = GlobalOrder(task.data, seed=seed, collate_fn=collate)
    for step in batches.steps(order, until=examples(task.total)):
        for inputs, targets in step:
            step.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        logits = model(task.inputs)
        loss = cross_entropy(logits, task.targets).item()
        accuracy = (logits.argmax(-1) == task.targets).double().mean().item()
    # What four workers send: the gradient, and a flag for each parameter.
    sent = sum(p.numel() + 1 for p in model.parameters()) * 4 * 2 * (WORKERS - 1) // WORKERS
    num_steps = batches.progress.steps
    sizes = [SMALL] * num_steps
    return Outcome(loss, accuracy, num_steps, num_steps, num_steps * sent, sizes, [], time.process_time() - begin)


def tune(task: Task) -> dict[float, float]:
    """Losses of the constant small batch by learning rate; the grid grows while an end of it is the best."""
    tried = {lr: alone(task, TUNING_SEED, lr).loss for lr in task.grid}
    for _ in range(MOST_EXTENSIONS):
        best = min(tried, key=lambda lr: tried[lr])
        if min(tried) < best < max(tried):
            break
        new = best / 2 if best == min(tried) else best * 2
        tried[new] = alone(task, TUNING_SEED, new).loss
    return dict(sorted(tried.items()))


@dataclass
class Study:
    """All that is known of a task: rates tried, and outcomes by policy, H and seed."""

    task: Task
    tried: dict[float, float]
    runs: dict[tuple[Policy, int, int], Outcome]

    @property
    def lr(self) -> float:
        return min(self.tried, key=lambda lr: self.tried[lr])

    def seeds(self, policy: Policy) -> list[int]:
        """Those that this policy and the constant small batch have at every H."""
        return [s for s in SEEDS if all((each, h, s) in self.runs for each in ("small", policy) for h in H)]

    @property
    def policies(self) -> list[Policy]:
        """Those with at least three seeds; an interval of two is too wide to tell anything."""
        return [policy for policy in POLICIES if len(self.seeds(policy)) > 2]

    def of(self, policy: Policy, h: int, field: str, seeds: Sequence[int] | None = None) -> list[float]:
        """One number per seed; by default of all that the policy has."""
        seeds = self.seeds(policy) if seeds is None else seeds
        return [float(getattr(self.runs[policy, h, seed], field)) for seed in seeds]


class Verdict(NamedTuple):
    """A batch that follows the noise against the constant small one at the same H, seed by seed.

    Args:
        loss: how much higher its loss is, and half the width of the 95 % interval.
        accuracy: how much lower its accuracy is, alike, in points; None for a task that is judged by its loss.
        rounds: how many times fewer rounds.
    """

    loss: tuple[float, float]
    accuracy: tuple[float, float] | None
    rounds: float

    @property
    def reached(self) -> bool:
        """Whether the quality is reached: it is not clearly worse."""
        worse, half_width = self.loss if self.accuracy is None else self.accuracy
        return worse <= half_width


def judge(study: Study, policy: Policy, h: int) -> Verdict:
    seeds = study.seeds(policy)

    def interval(of: str, scale: float) -> tuple[float, float]:
        pairs = zip(study.of(policy, h, of), study.of("small", h, of, seeds), strict=True)
        worse = [scale * (mine - theirs) for mine, theirs in pairs]
        return statistics.fmean(worse), T_95[len(worse)] * statistics.stdev(worse) / math.sqrt(len(worse))

    ratio = statistics.fmean(study.of("small", h, "rounds")) / statistics.fmean(study.of(policy, h, "rounds"))
    return Verdict(interval("loss", 1), interval("accuracy", -100) if study.task.score else None, ratio)


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table_of(study: Study) -> Table:
    rows = []
    for h in H:
        for policy in study.policies:
            cells = [str(h), policy, spread(study.of(policy, h, "loss"), 4)]
            if study.task.score:
                cells.append(spread([100 * each for each in study.of(policy, h, study.task.score)], 2))
            counts = [statistics.fmean(study.of(policy, h, field)) for field in ("steps", "rounds", "bytes_sent")]
            cells += [f"{counts[0]:,.0f}", f"{counts[1]:,.0f}", f"{counts[2] / 1e6:,.1f}"]
            cells += [f"{study.task.total / counts[0]:.0f}", str(len(study.seeds(policy)))]
            rows.append(cells)
    score = ["test accuracy, %"] if study.task.score else []
    columns = ["H", "batch", "test loss", *score, "steps", "rounds", "MB sent", "mean batch", "seeds"]
    title = f"{study.task.name}: {study.task.about}; base rate {study.lr:g}"
    return Table(title, columns, rows)


def verdicts_of(studies: Sequence[Study]) -> Table:
    rows = []
    for study in studies:
        for policy, h in following(study):
            verdict = judge(study, policy, h)
            rows.append(
                [
                    study.task.name, policy, str(h), "{:+.4f} ± {:.4f}".format(*verdict.loss),
                    "" if verdict.accuracy is None else "{:+.2f} ± {:.2f}".format(*verdict.accuracy),
                    "yes" if verdict.reached else "no", f"{verdict.rounds:.1f}",
                    "met" if verdict.reached and verdict.rounds >= AIM else "missed",
                ]
            )  # fmt: skip
    columns = [
        "task",
        "batch",
        "H",
        "loss above small (95 %)",
        "accuracy below, points",
        "reached",
        "times fewer rounds",
        "aim of 4",
    ]
    return Table("Beside constant small, at equal H", columns, rows)


def following(study: Study) -> list[tuple[Policy, int]]:
    """The policies that follow the noise, at each H."""
    return [(policy, h) for policy in study.policies if policy in FOLLOWING for h in H]


Drift = dict[tuple[str, int, str, str], float]


def drift(run: Runner, studies: Sequence[Study]) -> Drift:
    """Mean noise of a run by task, H, measured step and spread."""
    found = {}
    for study in studies:
        for h in DRIFT_H:
            for measure in ("first", "last"):
                for spread_of in ("across", "within"):
                    job = Job(study.task.name, "drift", h, TUNING_SEED, study.lr, measure, spread_of)  # type: ignore[arg-type]
                    found[study.task.name, h, measure, spread_of] = statistics.fmean(run(job).noise)
    return found


def drift_table(found: Drift) -> Table:
    rows = []
    for task, h in dict.fromkeys((task, h) for task, h, _, _ in found):
        of = {(m, s): found[task, h, m, s] for m in ("first", "last") for s in ("across", "within")}
        rows.append(
            [
                task, str(h),
                *(f"{of[m, s]:.3g}" for m in ("first", "last") for s in ("across", "within")),
                f"{of['last', 'across'] / of['last', 'within']:.2f}",
            ]
        )  # fmt: skip
    columns = ["task", "H", "first, across", "first, within", "last, across", "last, within", "drift at the last"]
    about = f"constant batch of {DRIFT_BATCH} in micro-batches of {DRIFT_MICRO}, constant rate, {DRIFT_ROUNDS} rounds"
    return Table(f"Mean noise (trace of the covariance of an example's gradient) measured: {about}", columns, rows)


def findings_of(studies: Sequence[Study], found: Drift, seconds: float) -> list[str]:
    lines = []
    for study in studies:
        for policy in (each for each in study.policies if each in FOLLOWING):
            verdicts = {h: judge(study, policy, h) for h in H}
            met = ", ".join(str(h) for h, each in verdicts.items() if each.reached and each.rounds >= AIM)
            short = "; ".join(
                f"H = {h}: {verdict.rounds:.1f} times fewer rounds, loss {verdict.loss[0]:+.4f} ± {verdict.loss[1]:.4f}"
                for h, verdict in verdicts.items()
            )
            lines.append(f"{study.task.name}, {policy}: the aim is met at {f'H = {met}' if met else 'no H'}. {short}.")
            wide = judge_wide(study, policy)
            lines.append(
                f"{study.task.name}, {policy}: at H = {wide[0]} it needs {wide[1]:.0f} times fewer rounds than "
                f"constant small at H = 1, at a loss {wide[2]:+.4f} above it."
            )
    ratios = [
        found[task, h, "last", "across"] / found[task, h, "last", "within"]
        for task, h, measure, spread_of in found
        if (measure, spread_of) == ("last", "across")
    ]
    if ratios:
        lines.append(
            f"At the last local step noise across workers is {min(ratios):.2f} to {max(ratios):.2f} times that within "
            f"them, at the same parameters: that share is drift. At the first the two agree up to their spread."
        )
    for policy in POLICIES:
        ran = {each.commit[:7] for study in studies for (name, _, _), each in study.runs.items() if name == policy}
        lines.append(f"{policy} ran at commit {', '.join(sorted(ran))}.")
    lines.append(f"All runs together took {seconds / 60:.0f} minutes of CPU.")
    return lines


def judge_wide(study: Study, policy: Policy) -> tuple[int, float, float]:
    """The largest H, its rounds and loss against the small batch at H = 1."""
    h, seeds = max(H), study.seeds(policy)
    ratio = statistics.fmean(study.of("small", 1, "rounds")) / statistics.fmean(study.of(policy, h, "rounds"))
    loss = statistics.fmean(study.of(policy, h, "loss")) - statistics.fmean(study.of("small", 1, "loss", seeds))
    return h, ratio, loss


def draw(studies: Sequence[Study], path: Path) -> None:
    """Test loss over rounds, a line a policy and a point an H; and batch sizes of the adaptive runs."""
    figure, axes = plt.subplots(len(studies), 2, figsize=(9, 3.4 * len(studies)), squeeze=False)
    for (left, right), study in zip(axes, studies, strict=True):
        for policy in study.policies:
            rounds = [statistics.fmean(study.of(policy, h, "rounds")) for h in H]
            losses = [study.of(policy, h, "loss") for h in H]
            left.errorbar(
                rounds, [statistics.fmean(each) for each in losses], [statistics.stdev(each) for each in losses],
                marker="o", capsize=3, label=policy,
            )  # fmt: skip
        left.set(xscale="log", xlabel="rounds of communication", ylabel="test loss", title=study.task.name)
        left.legend()
        drawn, seed = study.policies[-1], study.seeds(study.policies[-1])[0]
        for h in H:
            sizes = study.runs[drawn, h, seed].sizes
            right.step(torch.tensor([0, *sizes]).cumsum(0)[:-1], sizes, where="post", label=f"H = {h}")
        right.set(yscale="log", xlabel="examples", ylabel="global batch", title=f"{drawn}, seed {seed}")
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shortened(job: Job, outcome: Outcome) -> dict[str, Any]:
    """An outcome for the published file, with the batch sizes that are drawn."""
    sizes = outcome.sizes if (job.policy, job.seed) == (FOLLOWING[-1], SEEDS[0]) else []
    noise = [statistics.fmean(outcome.noise)] if outcome.noise else []
    return outcome._replace(noise=noise, sizes=sizes)._asdict()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "adabatch_local_sgd")
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    machine = Machine.here()
    torch.set_num_threads(1)
    record = RESULTS / "local_sgd.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    run = Runner(options.cache, known.get("outcomes", {}), time.monotonic() + 60 * options.minutes, machine.commit)
    studies = []
    for task in tasks().values():
        before = known.get("tuned", {}).get(task.about, {})
        tried = {float(lr): loss for lr, loss in before.items()} or tune(task)
        studies.append(Study(task, tried, {}))
        print(f"{task.name}: {tried}", flush=True)
    found = drift(run, [study for study in studies if study.task.drifts])
    for seed in SEEDS:
        for study, policy, h in itertools.product(studies, POLICIES, H):
            with suppress(OutOfTimeError):  # what is known costs no time
                study.runs[policy, h, seed] = run(Job(study.task.name, policy, h, seed, study.lr))
        print(f"seed {seed}: {run.seconds:.0f} s of CPU so far", flush=True)
    run.close()
    studies = [study for study in studies if {*CONSTANTS} < {*study.policies}]
    draw(studies, RESULTS / "local_sgd.png")
    publish(
        "local_sgd",
        question=QUESTION,
        machine=machine,
        tables=[*(table_of(study) for study in studies), verdicts_of(studies), drift_table(found)],
        findings=[
            *findings_of(studies, found, run.seconds),
            "![test loss over rounds, and batch sizes](local_sgd.png)",
        ],
        data={
            "tuned": {study.task.about: study.tried for study in studies},
            "outcomes": {job.key(): shortened(job, outcome) for job, outcome in run.used.items()},
        },
    )


if __name__ == "__main__":
    main()
