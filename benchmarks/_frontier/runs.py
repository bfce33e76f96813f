"""One run: what it depends on, how it is trained, and the store that keeps what came out.

A ``Job`` holds everything that a result depends on, so a finished job is never run again, and a study may be
interrupted at any time. Constant batches, tables and ramps are trained by a plain loop with nothing of adabatch in it;
only what needs the noise of the gradient goes through ``AdaptiveBatch``."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from _harness import Machine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import adabatch
from _frontier.packages import RULES, PackageRule
from _frontier.search import Setting
from _frontier.workloads import WORKLOADS, Pair, splits_of
from adabatch.batch.criteria import Criterion, Observation
from adabatch.batch.efficiency import adaptive_limit, efficiency
from adabatch.batch.needs import Needs
from adabatch.recipes import InMemory, collate

OptimizerName = Literal["adamw", "sgd", "adagrad", "adagrad-norm"]
OPTIMIZERS: Mapping[OptimizerName, Callable[..., Optimizer]] = {
    "adamw": lambda parameters, lr: AdamW(parameters, lr, weight_decay=0.01, fused=True),
    "sgd": lambda parameters, lr: SGD(parameters, lr, momentum=0.9),
    "adagrad": lambda parameters, lr: Adagrad(parameters, lr),
    "adagrad-norm": lambda parameters, lr: adabatch.optim.AdaGradNorm(parameters, lr),
}
CriterionName = Literal["norm test", "price", "price for decay", "constant"]
TUNING_SEED = 100  # chosen by this one and those after it, whose test loss is never computed; reported are 0, 1, 2, ...
LARGEST = 1024  # batch of any run
MAX_MICRO_BATCH = 256
DECIDES = 3  # to be raised where a change of adabatch changes its decisions, so that what it decided is run again
HOPELESS = 10.0  # a training loss of so many times the first one ends the run


class Planned(NamedTuple):
    """Batch sizes that are fixed beforehand: ``sizes[i]`` from ``shares[i]`` of the examples on.

    Where ``glide`` is true the size moves in straight lines between them instead.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...] = (0.0,)
    glide: bool = False

    def at(self, share: float) -> int:
        """The batch size after this share of the examples."""
        if self.glide:
            return round(float(np.interp(share, self.shares, self.sizes)))
        return self.sizes[max(i for i, start in enumerate(self.shares) if share >= start)]


class Measured(NamedTuple):
    """A batch that follows the noise: a criterion with its number, from ``first`` examples on.

    Args:
        criterion: "norm test" (eta), "price" (a step costs as much as so many examples), "price for decay" (the same,
            and larger by the factor by which the schedule fell), or "constant" (a batch of so many examples; only the
            learning rate follows what is measured).
        hold: share of the examples in which the batch stays at its first size; None until the warm-up is over.
    """

    criterion: CriterionName
    number: float
    first: int
    hold: float | None = None


class Packaged(NamedTuple):
    """A batch under a rule of another package, which also says the learning rate.

    Args:
        rule: "adascale" (a constant batch) or "pollux" (the batch of the largest goodput).
        number: the batch, or what a step costs in examples.
        first: examples of the batch that the learning rate belongs to; Pollux begins with it.
    """

    rule: PackageRule
    number: int
    first: int


Batch: TypeAlias = Planned | Measured | Packaged


@dataclass(frozen=True)
class Job:
    """A run, by all that its result depends on.

    Args:
        lr: base learning rate, for a batch of ``reference`` examples.
        warmup: share of the examples.
        rule: how the learning rate follows the batch; a "seesaw" is a cosine traded for growth by a ``Planned``.
        follow: what of the optimizer follows the batch: "", "betas", or "betas 0.7 0.95" with floors of their own.
    """

    workload: str
    optimizer: OptimizerName
    examples: int
    seed: int
    batch: Batch
    lr: float
    warmup: float
    rule: str = "none"
    reference: int = 0
    follow: str = ""

    def key(self) -> str:
        """Of everything that the result depends on."""
        kind = type(self.batch).__name__
        about = WORKLOADS[self.workload].about
        decides = DECIDES if isinstance(self.batch, Measured) else ""
        return _hash([about, kind, {**asdict(self), "batch": self.batch._asdict()}, decides])

    def search_key(self) -> str:
        """Of the search for the best learning rate and warm-up of such a run, on whatever seeds."""
        others = {**asdict(self), "batch": self.batch._asdict(), "lr": 0, "warmup": 0, "seed": 0}
        return _hash([WORKLOADS[self.workload].about, type(self.batch).__name__, others, "search"])


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


class Noise(NamedTuple):
    """Means over the examples of a run, of what it knew of its noise scale B at each step of b examples.

    Args:
        scale: of B.
        efficiency: of what an example was worth of one at a small batch, ``1 / (1 + b / B)``.
        limit: no mean, but the most that any batch which follows the noise can win over a constant one
            (``adaptive_limit``).
    """

    scale: float
    efficiency: float
    limit: float


class Outcome(NamedTuple):
    """What came out; a loss is infinite where training failed, and the test loss too where nobody may look at it.

    Args:
        sizes: steps by batch size.
        seconds: of the processor.
        path: batch size at each tenth of the examples, for runs that measure.
        noise: what the noise scales of this run say, for runs that measure.
        commit: that it ran at.
    """

    validation: float
    test: float
    steps: int
    sizes: dict[int, int]
    seconds: float
    path: tuple[int, ...] = ()
    noise: Noise | None = None
    commit: str = ""

    def time(self, fixed: float, devices: int) -> float:
        """Modelled time in units of an example's: each step costs ``fixed + ceil(batch / devices)``."""
        return sum(count * (fixed + math.ceil(size / devices)) for size, count in self.sizes.items())


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, pair: Pair) -> float:
    """Mean loss; infinite where it is not a number."""
    parts = zip(pair[0].split(500), pair[1].split(500), strict=True)
    mean = sum(loss_of(model, x, y).item() * len(x) for x, y in parts) / len(pair[0])
    return mean if math.isfinite(mean) else math.inf


def shape(share: float, after: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero: the factor of a step from one share of the examples to another."""
    if share < warmup:
        return min(1.0, after / warmup)
    return 0.5 + 0.5 * math.cos(math.pi * (share - warmup) / (1 - warmup))


def decay(rule: str, share: float, after: float, warmup: float) -> float:
    """The shape; of a Seesaw its halvings only, as the batch stands for half of each."""
    factor = shape(share, after, warmup)
    if rule != "seesaw" or share < warmup:
        return factor
    return 2.0 ** -math.floor(-math.log2(max(factor, 1e-9)) + 1e-9)


def train(job: Job) -> Outcome:
    """Runs the job."""
    begin, data = time.process_time(), splits_of(job.workload)
    torch.manual_seed(job.seed)
    model = WORKLOADS[job.workload].model()
    optimizer = OPTIMIZERS[job.optimizer](model.parameters(), lr=job.lr)
    loop = LOOPS[type(job.batch)]
    sizes: Counter[int] = Counter()
    noise_scales: list[tuple[int, float]] = []
    first = math.nan
    path: list[int] = []
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size, loss, noise_scale in loop(job, model, optimizer, data.train):
            first = loss if not sizes else first
            sizes[size] += 1
            if seen * 10 >= len(path) * job.examples:
                path.append(size)
            seen += size
            if noise_scale > 0:
                noise_scales.append((size, noise_scale))
            if not loss <= HOPELESS * first:
                break
        else:
            test = evaluate(model, data.test) if job.seed < TUNING_SEED else math.inf
            return Outcome(
                evaluate(model, data.validation),
                test,
                sizes.total(),
                dict(sizes),
                time.process_time() - begin,
                () if isinstance(job.batch, Planned) else tuple(path),
                _noise(noise_scales),
            )
    return Outcome(math.inf, math.inf, sizes.total(), dict(sizes), time.process_time() - begin)


def _noise(known: Sequence[tuple[int, float]]) -> Noise | None:
    """Of pairs of batch size and noise scale."""
    if not known:
        return None
    sizes, scales = np.array(known).T
    worth = [efficiency(size, scale) for size, scale in known]
    return Noise(
        float(np.average(scales, weights=sizes)),
        float(np.average(worth, weights=sizes)),
        adaptive_limit(scales, sizes),
    )


Steps = Iterator[tuple[int, float, float]]  # examples of a step, its training loss, the noise scale where it is known


def _order(job: Job, num_examples: int) -> Tensor:
    """Places of the examples, in the order in which they are taken."""
    generator = torch.Generator().manual_seed(job.seed)
    epochs = job.examples // num_examples + 1
    return torch.cat([torch.randperm(num_examples, generator=generator) for _ in range(epochs)])


def _planned(job: Job, model: nn.Module, optimizer: Optimizer, data: Pair) -> Steps:
    assert isinstance(job.batch, Planned)
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0, "seesaw": 0.5}[job.rule]
    order, seen = _order(job, len(data[0])), 0
    while seen < job.examples:
        size = min(job.batch.at(seen / job.examples), job.examples - seen)
        rows = order[seen : seen + size]
        after = seen + size
        factor = (size / job.reference) ** power if power else 1.0
        factor *= decay(job.rule, seen / job.examples, after / job.examples, job.warmup)
        for group in optimizer.param_groups:
            group["lr"] = job.lr * factor
        optimizer.zero_grad()
        loss = loss_of(model, data[0][rows], data[1][rows])
        loss.backward()
        optimizer.step()
        yield size, loss.item(), math.nan
        seen = after


def _measured(job: Job, model: nn.Module, optimizer: Optimizer, data: Pair) -> Steps:
    assert isinstance(job.batch, Measured)
    batch = job.batch
    hold = None if batch.hold is None else adabatch.examples(round(batch.hold * job.examples))
    batches = adabatch.AdaptiveBatch(
        model,
        optimizer,
        _criterion(job, batch),
        micro_batch_size=batch.first // 2,  # two parts at least, so that their spread can be measured
        max_micro_batch_size=MAX_MICRO_BATCH,
        limits=_limits(batch),
        control=adabatch.Control(hold_until=hold),
        lr_rule=job.rule,  # type: ignore[arg-type]
        follow=_followers(job.follow),
        reference_batch_size=job.reference,
    )
    total = adabatch.examples(job.examples)
    warmup = adabatch.examples(round(job.warmup * job.examples))
    schedule = adabatch.ProgressLR(optimizer, adabatch.lr.cosine(), batches, total=total, warmup=warmup)
    order = adabatch.GlobalOrder(InMemory(*data), seed=job.seed, collate_fn=collate)
    for step in batches.steps(order, until=total):
        size, losses = 0, 0.0
        for x, y in step:
            loss = loss_of(model, x, y)
            step.backward(loss)
            size += len(x)
            losses += loss.item() * len(x)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield size, losses / size, batches.noise_scale


def _packaged(job: Job, model: nn.Module, optimizer: Optimizer, data: Pair) -> Steps:
    assert isinstance(job.batch, Packaged)
    rule = RULES[job.batch.rule](optimizer, job.batch.number, job.batch.first)
    order, seen = _order(job, len(data[0])), 0
    losses: list[float] = []

    def of_parts(rows: Tensor) -> Iterator[Tensor]:
        for part in rows.split(len(rows) // rule.parts):
            loss = loss_of(model, data[0][part], data[1][part])
            losses.append(loss.item())
            yield loss

    while seen < job.examples:
        size = min(rule.wanted(), job.examples - seen)
        after = seen + size
        for group in optimizer.param_groups:
            group["lr"] = job.lr * shape(seen / job.examples, after / job.examples, job.warmup)
        losses.clear()
        rule.step(size, of_parts(order[seen:after]))
        yield size, sum(losses) / len(losses), rule.noise_scale
        seen = after


LOOPS: Mapping[type, Callable[[Job, nn.Module, Optimizer, Pair], Steps]] = {
    Planned: _planned,
    Measured: _measured,
    Packaged: _packaged,
}


@dataclass(frozen=True)
class PriceForDecay:
    """``StepPrice``, and a batch larger by the factor by which the schedule fell since its peak.

    Below the noise scale the rule "gain" is linear, so it cancels the decay of the rate: growth stands in its place.
    """

    price: adabatch.StepPrice
    examples: int
    warmup: float

    @property
    def needs(self) -> Needs:
        return self.price.needs

    def wanted(self, observation: Observation) -> float:
        share = observation.progress.examples / self.examples
        fell = 1.0 if share < self.warmup else shape(share, share, self.warmup)
        return self.price.wanted(observation) / max(fell, 1 / LARGEST)


def _criterion(job: Job, batch: Measured) -> Criterion:
    if batch.criterion == "norm test":
        return adabatch.NormTest(eta=batch.number)
    if batch.criterion == "constant":
        return adabatch.Constant(int(batch.number))
    price = adabatch.StepPrice(batch.number)
    return price if batch.criterion == "price" else PriceForDecay(price, job.examples, job.warmup)


def _followers(follow: str) -> adabatch.lr.Followers:
    names, floors = follow.split()[:1], map(float, follow.split()[1:])
    return adabatch.lr.Followers(names, *floors)  # type: ignore[arg-type]


def _limits(batch: Measured) -> adabatch.Limits:
    if batch.criterion == "constant":
        return adabatch.Limits(min=int(batch.number), max=int(batch.number))
    return adabatch.Limits(min=batch.first, max=LARGEST)


class NotRunError(LookupError):
    """The store has no outcome of a job, and nothing is to be run."""


class Store:
    """Outcomes by job, and settings by search, in a file of JSON lines, one written as soon as a run or a search ends.

    Args:
        path: the file; several processes may append to it.
        results: the record of a report, which stands for whatever of it the file lacks: so a lost file is no loss.
        run: False only looks up.
        say: told of each run.
    """

    def __init__(
        self,
        path: Path,
        *,
        results: Path | None = None,
        run: bool = True,
        say: Callable[[Job, Outcome], None] = lambda *_: None,
    ) -> None:
        self.path = path
        self.run = run
        self.commit = Machine.here().commit if run else ""
        self.say = say
        self._read = 0
        self._outcomes: dict[str, Outcome] = {}
        self._settings: dict[str, Setting] = {}
        self._used: dict[str, Any] = {}
        if results is not None and results.exists():
            record = json.loads(results.read_text())
            self._outcomes = {key: _outcome(plain) for key, plain in record.get("runs", {}).items()}
            self._settings = {key: Setting(*pair) for key, pair in record.get("settings", {}).items()}

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """All that the file holds, by the keys of their jobs."""
        self._catch_up()
        return self._outcomes

    @property
    def used(self) -> dict[str, Any]:
        """What was asked for so far, ready for JSON: all that is needed to repeat the answers."""
        return {
            "runs": {key: _plain(self._outcomes[key]) for key in self._used if key in self._outcomes},
            "settings": {key: self._settings[key] for key in self._used if key in self._settings},
        }

    def __call__(self, job: Job) -> Outcome:
        """The outcome of a job, run now if it was not run before.

        Raises:
            NotRunError: it was not, and this store only looks up.
        """
        key = job.key()
        if key not in self._outcomes:
            self._catch_up()
        if key not in self._outcomes:
            if not self.run:
                raise NotRunError(f"{job} was not run")
            plain = _plain(train(job)._replace(commit=self.commit))
            self._append({"key": key, "job": _described(job), "outcome": plain})
            self._outcomes[key] = _outcome(plain)  # rounded, as whoever reads it will see it
            self.say(job, self._outcomes[key])
        self._used[key] = None
        return self._outcomes[key]

    def search(self, job: Job, find: Callable[[], Setting]) -> Setting:
        """The setting that a search found for runs like this one; it is made now if it was not made before."""
        key = job.search_key()
        if key not in self._settings:
            self._catch_up()
        if key not in self._settings:
            found = find()
            if self.run:
                self._append({"search": key, "job": _described(job), "setting": found})
            self._settings[key] = found
        self._used[key] = None
        return self._settings[key]

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _catch_up(self) -> None:
        """Reads what this or another process wrote since; a line that was cut short is left for its process to end."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote
                    continue
                if "search" in record:
                    self._settings[record["search"]] = Setting(*record["setting"])
                else:
                    self._outcomes[record["key"]] = _outcome(record["outcome"])


def _described(job: Job) -> dict[str, Any]:
    return {**asdict(job), "batch": job.batch._asdict()}


def _plain(outcome: Outcome) -> dict[str, Any]:
    """Ready for JSON, which has no infinities."""

    def number(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    noise = outcome.noise and {name: round(value, 4) for name, value in outcome.noise._asdict().items()}
    values = {**outcome._asdict(), "noise": noise}
    return {name: number(value) if isinstance(value, float) else value for name, value in values.items()}


def _outcome(plain: dict[str, Any]) -> Outcome:
    sizes = {int(size): count for size, count in plain["sizes"].items()}
    losses = {name: math.inf if plain[name] is None else plain[name] for name in ("validation", "test")}
    noise = None if plain.get("noise") is None else Noise(**plain["noise"])
    return Outcome(
        **losses,
        steps=plain["steps"],
        sizes=sizes,
        seconds=plain["seconds"],
        path=tuple(plain["path"]),
        noise=noise,
        commit=plain.get("commit", ""),
    )
