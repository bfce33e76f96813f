"""The arguments of a run with the Trainer of Transformers that concern its batch, beside ``TrainingArguments``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from adabatch.batch.control import Limits
from adabatch.batch.criteria import Criterion, NoiseScale, NormTest
from adabatch.batch.plan import Duration
from adabatch.batch.schedules import Constant, Stage, Stages

_FIRST = re.compile(r"\s*(\d+)\s*")
_NEXT = re.compile(r"\s*(\d+)\s+from\s+(\d+)\s+(examples|steps)\s*")


# HfArgumentParser reads Optional[...] in every release, and `X | None` in some.
@dataclass
class AdaptiveArguments:
    """Which batch size a run uses, and how its learning rate follows.

    For ``HfArgumentParser((AdaptiveArguments, TrainingArguments))``, which reads them from the command line, JSON or
    YAML. Batch sizes are in examples over all ranks.

    Raises:
        ValueError: if a size is below 1 or missing, if sizes are crossed, or if ``batch_stages`` cannot be read.
    """

    criterion: Literal["norm_test", "noise_scale", "constant", "stages"] = field(
        default="norm_test",
        metadata={"help": "Which batch size to ask for. norm_test: NormTest(eta); noise_scale: NoiseScale(multiple)."},
    )
    eta: float = field(
        default=0.7,
        metadata={"help": "Tolerated ratio of noise to gradient, for norm_test."},
    )
    multiple: float = field(default=1.0, metadata={"help": "Batch size over noise scale, for noise_scale."})
    batch_stages: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "For stages: '32; 64 from 10000 examples; 128 from 40000 examples' (or steps)."},
    )
    min_batch_size: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Smallest global batch, the first of the run; the batch of constant. By default one micro-batch "
            "per rank, and two on a single rank if noise is measured."
        },
    )
    max_batch_size: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "Largest global batch; needed for norm_test and noise_scale."}
    )
    max_micro_batch_size: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "How far per_device_train_batch_size may grow, by doubling, before steps accumulate. By default it "
            "does not grow."
        },
    )
    lr_rule: Optional[Literal["none", "linear", "sqrt", "gain", "sqrt_gain"]] = field(  # noqa: UP045
        default=None,
        metadata={"help": "How the learning rate follows the batch; by default as AdaptiveBatch says."},
    )
    follow: Optional[list[str]] = field(  # noqa: UP045
        default=None,
        metadata={"help": "What else follows the batch: betas, eps, weight_decay; by default as AdaptiveBatch says."},
    )
    reference_batch_size: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "Global batch size that learning_rate was tuned for; by default the first one."}
    )
    journal: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "File that gets one JSON line per step; for adabatch report and adabatch tail."}
    )
    monitor_only: bool = field(
        default=False,
        metadata={"help": "Measure the noise and change nothing: same batches, same updates, to the bit."},
    )

    def __post_init__(self) -> None:
        for name in ("min_batch_size", "max_batch_size", "max_micro_batch_size", "reference_batch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1 example, got {size}")
        if self.monitor_only:
            return
        if self.criterion in ("norm_test", "noise_scale") and self.max_batch_size is None:
            raise ValueError(f"criterion={self.criterion!r} needs max_batch_size, the largest global batch in examples")
        if None not in (self.min_batch_size, self.max_batch_size) and self.min_batch_size > self.max_batch_size:  # type: ignore[operator]
            raise ValueError(
                f"min_batch_size={self.min_batch_size} is above max_batch_size={self.max_batch_size}: exchange them"
            )
        if (self.criterion == "stages") != (self.batch_stages is not None):
            raise ValueError(
                f"batch_stages belongs to criterion='stages', got criterion={self.criterion!r} and "
                f"batch_stages={self.batch_stages!r}: give both or neither"
            )
        if self.batch_stages is not None:
            stages_from(self.batch_stages)

    def criterion_for(self, smallest: int) -> Criterion:
        """The criterion.

        Args:
            smallest: the smallest global batch that can be run, in examples.
        """
        if self.criterion == "norm_test":
            return NormTest(eta=self.eta)
        if self.criterion == "noise_scale":
            return NoiseScale(multiple=self.multiple)
        if self.batch_stages is not None:
            return stages_from(self.batch_stages)
        return Constant(self.min_batch_size or smallest)

    def options_for(self, criterion: Criterion, smallest: int) -> dict[str, Any]:
        """Keyword arguments of ``AdaptiveBatch``.

        Args:
            criterion: the criterion of the run.
            smallest: the smallest global batch that can be run, in examples.
        """
        options: dict[str, Any] = {
            "max_micro_batch_size": self.max_micro_batch_size,
            "lr_rule": self.lr_rule,
            "follow": None if self.follow is None else tuple(self.follow),
            "reference_batch_size": self.reference_batch_size,
            "journal": self.journal,
        }
        if self.max_batch_size is not None:
            options["limits"] = Limits(min=self.min_batch_size or smallest, max=self.max_batch_size)
        return options


def stages_from(text: str) -> Stages:
    """A table of batch sizes from a line of text, such as "32; 64 from 10000 examples; 128 from 40000 examples".

    Raises:
        ValueError: if it cannot be read, and for the reasons of ``Stages``.
    """
    first, *rest = text.split(";")
    begin, steps = _FIRST.fullmatch(first), [_NEXT.fullmatch(part) for part in rest]
    if begin is None or None in steps:
        raise ValueError(
            f"batch_stages must be a size, then sizes with their milestones, such as '32; 64 from 10000 examples; 128 "
            f"from 40000 examples', got {text!r}"
        )
    return Stages(int(begin[1]), _stages([step for step in steps if step is not None]))


def _stages(steps: Sequence[re.Match[str]]) -> list[Stage]:
    return [Stage(Duration(int(step[2]), step[3]), int(step[1])) for step in steps]  # type: ignore[arg-type]
