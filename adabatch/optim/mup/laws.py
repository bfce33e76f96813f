"""How learning rate and damping of each method follow the width: the fan ratios of a parameter to two multipliers.

The laws keep the size of every layer's own update per coordinate constant while the width grows (maximal update
parameterization), and the damping in proportion to the eigenvalues that it damps. Weights are not scaled in the forward
pass: the laws change only initialization, learning rate and damping. At the base width every multiplier is one.

Sources: Ishikawa and Karakida (2024), arXiv:2312.12226 (K-FAC, Shampoo); Yang et al. (2021), arXiv:2203.03466 (SGD,
Adam); Everett et al. (2024), arXiv:2407.05872 (Adam's epsilon); Qiu et al. (2025), arXiv:2512.05620 (Muon, blocks).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from adabatch.arguments import check_fields, require
from adabatch.optim.mup.entry import Entry

MuonAdjust = Literal["original", "match_rms_adamw"]


class Law(ABC):
    """The width law of one method. A law holds the settings of its method that change the law."""

    name: str

    @abstractmethod
    def lr(self, entry: Entry) -> float:
        """Multiplier on the learning rate."""

    @abstractmethod
    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """Further options of a parameter's group: the damping, and settings of the law that the method must share.

        Args:
            entry: the parameter.
            damping: tuned at the base width; None for the method's default.

        Raises:
            ValueError: if a damping is given but the method has none, or is missing but needed.
        """

    @abstractmethod
    def takes(self, entry: Entry) -> bool:
        """Whether the method can take this parameter."""


@dataclass(frozen=True)
class SGDLaw(Law):
    """Gradient descent: learning rate x r_out / r_in."""

    name = "sgd"

    def lr(self, entry: Entry) -> float:
        """``r_out / r_in``."""
        # an output sums fan_in changes, each as large as an entry of the gradient, which falls as 1 / fan_out
        return entry.r_out / entry.r_in

    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """No options: SGD has no damping."""
        if damping is not None:
            raise ValueError(f"sgd has no damping, got damping={damping}: leave it out")
        return {}

    def takes(self, entry: Entry) -> bool:
        """Everything."""
        return True


@dataclass(frozen=True)
class AdamLaw(Law):
    """Adam: learning rate / r_in, epsilon / r_out. ``AdamW`` differs only in its decay.

    Args:
        decoupled: whether the weight decay is AdamW's.
    """

    decoupled: bool = True
    name = "adam"

    def __post_init__(self) -> None:
        check_fields(self)

    def lr(self, entry: Entry) -> float:
        """``1 / r_in``."""
        # every entry moves by about the learning rate, however large its gradient, and an output sums fan_in of them
        return 1 / entry.r_in

    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """``eps / r_out``; torch's default is 1e-8."""
        # added to the root mean square of the gradient's entries, which falls as 1 / fan_out
        return {"eps": (1e-8 if damping is None else damping) / entry.r_out}

    def takes(self, entry: Entry) -> bool:
        """Everything."""
        return True


@dataclass(frozen=True)
class MuonLaw(Law):
    """Muon: each update has spectral norm one, so the learning rate is x sqrt(r_out / r_in).

    Torch's Muon multiplies the rate by a function of the shape; the law compensates the difference to the base model.

    Args:
        adjust_lr_fn: the argument of ``torch.optim.Muon``; None is its default, "original".
    """

    adjust_lr_fn: MuonAdjust | None = None
    name = "muon"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.adjust_lr_fn not in (None, *get_args(MuonAdjust)):
            raise ValueError(
                f"adjust_lr_fn must be one of {', '.join(get_args(MuonAdjust))} or None, got {self.adjust_lr_fn!r}"
            )

    def lr(self, entry: Entry) -> float:
        """``sqrt(r_out / r_in)``, over what torch's own adjustment adds to it."""
        # an update of spectral norm one moves an output by |input| / sqrt(fan_out), and |input| grows as sqrt(fan_in)
        own = self._adjustment(entry.base_shape) / self._adjustment(entry.shape)
        return math.sqrt(entry.r_out / entry.r_in) * own

    def _adjustment(self, shape: tuple[int, ...]) -> float:
        # What torch.optim.Muon multiplies the rate by.
        rows, columns = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))

    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """The floor of the normalization, ``eps x sqrt(r_in / r_out)``; torch's default is 1e-7."""
        # added to the gradient's Frobenius norm: fan_in x fan_out entries that fall as 1 / fan_out
        floor = 1e-7 if damping is None else damping
        return {"eps": floor * math.sqrt(entry.r_in / entry.r_out), "adjust_lr_fn": self.adjust_lr_fn}

    def takes(self, entry: Entry) -> bool:
        """Matrices."""
        return len(entry.shape) == 2 and entry.role != "vector" and "stack" not in entry.layout


@dataclass(frozen=True)
class ShampooLaw(Law):
    """Shampoo: learning rate x (r_out / r_in)^(1 - 2e); with e = 1/4 that is Muon's square root.

    An update of the block form consists of blocks of norm one, so the ratio of their numbers enters the law. If the
    block size is fixed, the law has a kink at the width from which matrices are cut into blocks.

    Args:
        exponent: of each side, 1/4 or 1/2. Vectors have one side, always with 1/2.
        relative: whether epsilon is in units of the largest eigenvalue; it then does not change with width.
        block_size: longest side of a block; None for no blocks.
    """

    exponent: float = 0.25
    relative: bool = True
    block_size: int | None = None
    name = "shampoo"

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 < self.exponent <= 0.5, "exponent must be in (0, 0.5], 0.25 for classical Shampoo", self.exponent)
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size must be 1 or more, or None for no blocks, got {self.block_size}")

    def lr(self, entry: Entry) -> float:
        """``(r_out / r_in)^(1 - 2e) x blocks^(-2e)``, where ``blocks`` is the ratio of the numbers of blocks."""
        both = 0.5 if entry.role == "vector" else 2 * self.exponent
        return float((entry.r_out / entry.r_in) ** (1 - both) * self._blocks(entry) ** -both)

    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """Epsilon: a relative one as it is, an absolute one ``x r_in / (r_out x blocks)``; and the law's settings."""
        settings = {"exponent": self.exponent, "relative": self.relative, "block_size": self.block_size}
        if damping is None:
            if not self.relative:
                raise ValueError("an absolute epsilon has no default: give damping=, in squared units of the gradient")
            return settings
        # the statistics are squares of the gradient, whose total r_in / r_out the blocks share
        scale = 1.0 if self.relative else entry.r_in / (entry.r_out * self._blocks(entry))
        return {"epsilon": damping * scale, **settings}

    def takes(self, entry: Entry) -> bool:
        """Everything except stacks of matrices, which it would treat as one matrix."""
        return "stack" not in entry.layout

    def _blocks(self, entry: Entry) -> float:
        """Number of blocks over that of the base model."""
        size = self.block_size
        if size is None:
            return 1.0
        now = math.ceil(entry.fan_in / size) * math.ceil(entry.fan_out / size)
        return now / (math.ceil(entry.base_fan_in / size) * math.ceil(entry.base_fan_out / size))


@dataclass(frozen=True)
class KFACLaw(Law):
    """K-FAC: the learning rate is the same at every width, and so is a damping in units of each factor's trace.

    Args:
        exponents: (e_B, e_A) of the output side and the input side; (1, 1) is K-FAC, (0, 1) the input side only,
            (1, 0) the output side only.
    """

    exponents: tuple[float, float] = (1.0, 1.0)
    name = "kfac"

    def __post_init__(self) -> None:
        check_fields(self)
        if any(not 0 <= e <= 1 for e in self.exponents):
            raise ValueError(f"exponents (e_B, e_A) must be in [0, 1], (1, 1) for K-FAC, got {self.exponents}")

    def lr(self, entry: Entry) -> float:
        """``r_out^(1 - e_B) r_in^(e_A - 1)``, which is 1 for K-FAC itself."""
        e_b, e_a = self.exponents
        return float(entry.r_out ** (1 - e_b) * entry.r_in ** (e_a - 1))

    def options(self, entry: Entry, damping: float | None) -> dict[str, Any]:
        """The damping, and the ratios with which the optimizer scales forms that are not a share of a trace."""
        given = {} if damping is None else {"damping": damping}
        return {**given, "fan_in_ratio": entry.r_in, "fan_out_ratio": entry.r_out}

    def takes(self, entry: Entry) -> bool:
        """Weights of linear layers, convolutions and embeddings, and biases; norms and unknown ones are first-order."""
        return entry.kind in ("weight", "conv", "embedding", "bias")


Method = Literal["sgd", "adam", "adamw", "muon", "shampoo", "kfac"]

LAWS: Mapping[str, Law] = MappingProxyType(
    {
        "sgd": SGDLaw(),
        "adam": AdamLaw(decoupled=False),
        "adamw": AdamLaw(),
        "muon": MuonLaw(),
        "shampoo": ShampooLaw(),
        "kfac": KFACLaw(),
    }
)


def law_of(method: Method | Law) -> Law:
    """A law, by its name or the law itself.

    Raises:
        ValueError: if the name is unknown.
    """
    if isinstance(method, Law):
        return method
    if method not in LAWS:
        raise ValueError(f"method must be one of {', '.join(LAWS)}, or a law such as ShampooLaw(); got {method!r}")
    return LAWS[method]
