"""What a criterion needs, and what a probe measures: one frozen type for both.

A statistic is a field here: its default means that it is not needed, and its metadata names it in errors.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from adabatch.arguments import check_fields, require
from adabatch.batch.moments import EUCLIDEAN


def _need(default: Any, words: str, way_out: str = "another probe") -> Any:
    return field(default=default, metadata={"words": words, "way_out": way_out})


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What must be measured in a step. ``Needs()`` means nothing, as for a schedule, and is false.

        class MyCriterion:
            needs = Needs(noise="euclidean")

            def wanted(self, observation): ...

    Args:
        noise: the norm in which noise and signal are measured: one of ``Norm``, or the ``name`` of your own metric.
            None for no noise.
        products: inner products of single examples with the gradient, for ``noise_along``.
        quantile: of the noise over coordinates, for ``noise_at_quantile``; None for none.
        l1: the l1 norm of the step's gradient.
        layers: noise and signal of each layer as well.
        examples: whether the parts are single examples, so that there is a spread within one micro-batch.
        seconds: how long steps take. No probe measures it: ``AdaptiveBatch`` times the steps.
    """

    noise: str | None = _need(None, "noise in the norm {}", "a probe made with norm= for {!r}, as the default probe is")
    products: bool = _need(False, "inner products", "another probe, such as PerExampleProbe(model, products=True)")
    quantile: float | None = _need(
        None, "coordinates at quantile {}", "a probe made with quantile={}, as the default probe is"
    )
    l1: bool = _need(False, "the l1 norm of the gradient", "a probe made with record_l1=True")
    layers: bool = _need(False, "layers", "a probe made with layers=")
    examples: bool = _need(False, "single examples", "another probe, such as PerExampleProbe(model)")
    seconds: bool = _need(False, "the seconds of a step")

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.quantile is None or 0 < self.quantile <= 1, "quantile must be above 0 and at most 1.0", self.quantile
        )

    @property
    def euclidean(self) -> bool:
        """Whether a criterion with these needs lets the batch follow the Euclidean noise, which the rule "gain" reads.

        One that reads step times and names no norm (`Goodput`) does too.
        """
        return self.noise == EUCLIDEAN or (self.seconds and self.noise is None)

    def __bool__(self) -> bool:
        """Whether anything is needed."""
        return bool(self._asked())

    def __or__(self, other: Needs) -> Needs:
        """Both.

        Raises:
            ValueError: if there are two norms or two quantiles, because a probe measures only one.
        """
        for each in self._asked():
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if theirs not in (each.default, mine):
                raise ValueError(f"a probe measures one {each.name} only, got {mine!r} and {theirs!r}: leave one out")
        return replace(other, **{each.name: getattr(self, each.name) for each in self._asked()})

    def with_noise(self) -> Needs:
        """The same, with noise and signal in the Euclidean norm if no norm is named."""
        return self if self.noise is not None else replace(self, noise=EUCLIDEAN)

    def lacking(self, gives: Needs) -> Needs:
        """The needs that a probe with ``gives`` does not measure."""
        missing = {each.name: getattr(self, each.name) for each in self._asked()}
        return Needs(**{name: value for name, value in missing.items() if getattr(gives, name) != value})

    def words(self) -> list[str]:
        """Each need as an error names it."""
        # the user of a Euclidean criterion chose no norm, and should not have to read of one
        if self.noise == EUCLIDEAN:
            return ["noise", *replace(self, noise=None).words()]
        return [each.metadata["words"].format(getattr(self, each.name)) for each in self._asked()]

    def ways_out(self) -> list[str]:
        """What to use if a probe does not measure them."""
        return [each.metadata["way_out"].format(getattr(self, each.name)) for each in self._asked()]

    def _asked(self) -> list[Field[Any]]:
        return [each for each in fields(self) if getattr(self, each.name) != each.default]
