"""The state of a worker of local SGD between steps, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adabatch.arguments import require_format
from adabatch.runtime.collectives import Started
from adabatch.runtime.local_sgd.meetings import Place
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round
from adabatch.runtime.local_sgd.transfers import Arrived, Errors, Transfer

STATE_FORMAT = 1


@dataclass
class Pending:
    """An average of a fragment that is under way.

    Args:
        since: the step after which it began.
        lr: of the round in which it began.
        parameters, buffers: what is averaged.
        told: what the workers tell each other with it; None once it has been read.
        counts: their weights, from then on.
    """

    since: int
    lr: float
    parameters: Transfer
    buffers: Transfer
    told: Started | None = None
    counts: list[float] = field(default_factory=list)

    def arrive(self, counts: Sequence[float]) -> None:
        """Waits for the means, by the weights of the workers."""
        self.parameters = Arrived(self.parameters.mean(counts))
        self.buffers = Arrived(self.buffers.mean(counts))

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, after its arrival."""
        means = {name: getattr(self, name).mean(self.counts) for name in _EXCHANGED}
        return {"since": self.since, "lr": self.lr, **means}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Pending:
        """The inverse."""
        parameters, buffers = ([tensor.to(device, copy=True) for tensor in state[name]] for name in _EXCHANGED)
        return cls(state["since"], state["lr"], Arrived(parameters), Arrived(buffers))


@dataclass
class Fragment:
    """The state of the parameters that are averaged together.

    Args:
        places: of its parameters.
        anchors: the parameters after their last average, one tensor each, if the next one needs them; empty until the
            next step begins.
        momenta: of the outer optimizer.
        errors: of the compression.
        agreed_at: the last step after which all workers held the same parameters.
        counted: the examples that this rank had consumed at the last average.
        pending: the average that is under way, if there is one.
    """

    places: tuple[int, ...]
    anchors: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)
    errors: Errors = field(default_factory=Errors)
    agreed_at: int = 0
    counted: float = 0.0
    pending: Pending | None = None

    def of(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Its parameters among all."""
        return [pieces[place] for place in self.places]

    @property
    def carries(self) -> bool:
        """Whether something of the last average is kept for the next."""
        return bool(self.momenta) or self.errors.sent.numel() > 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; an average that is under way has arrived."""
        # with the places, by which a run with other fragments, or another model, is recognized when it loads
        lists = {name: list(getattr(self, name)) for name in ("places", *_PER_PARAMETER)}
        pending = None if self.pending is None else self.pending.state_dict()
        numbers = {"agreed_at": self.agreed_at, "counted": self.counted}
        return {**lists, **numbers, "errors": asdict(self.errors), "pending": pending}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], pieces: Sequence[Tensor]) -> Fragment:
        """The inverse.

        Raises:
            ValueError: if it has other shapes than the parameters, ``pieces``.
        """
        found = cls(tuple(state["places"]), agreed_at=state["agreed_at"], counted=state["counted"])
        own = found.of(pieces)
        for name in _PER_PARAMETER:
            if state[name] and [tensor.shape for tensor in state[name]] != [piece.shape for piece in own]:
                raise ValueError(
                    f"the {name} in the state have other shapes than the parameters: resume with the model, and the "
                    f"sharding, that the run began with"
                )
            # copies: the caller may load the same state again, and these are changed in place
            setattr(found, name, [tensor.to(own[0].device, copy=True) for tensor in state[name]])
        found.errors = Errors(**{name: value.to(own[0].device) for name, value in state["errors"].items()})
        if state["pending"] is not None:
            found.pending = Pending.from_state_dict(state["pending"], own[0].device)
        return found


@dataclass
class Memory:
    """The state of a worker.

    Args:
        fragments: of its model.
        steps: local steps so far.
        rounds: rounds so far.
        step_in_round: local steps since the last round.
        examples: consumed by this rank so far.
        states_agree: whether the optimizer states of all workers are equal.
        bytes_synchronous: bytes that averaging the gradient at every step would have sent so far.
        seconds: of a step of each worker, as they told each other last; empty if they did not.
        round: the current round; None before its first step.
    """

    fragments: list[Fragment]
    steps: int = 0
    rounds: int = 0
    step_in_round: int = 0
    examples: float = 0.0
    states_agree: bool = True
    bytes_synchronous: int = 0
    seconds: list[float] = field(default_factory=list)
    round: Round | None = None

    @property
    def apart(self) -> list[Fragment]:
        """The fragments in which the workers differ."""
        return [each for each in self.fragments if each.agreed_at < self.steps or each.pending is not None]

    def place(self, present: Round | None = None) -> Place:
        """Where this worker stands; in a round, or between two."""
        if present is None:
            return Place(self.rounds, self.steps)
        lr = present.lr if present.needs_anchor else 0.0
        return Place(self.rounds, self.steps, 0, present.local_steps, present.by_gradient, lr)

    def agree_on(self, fragment: Fragment) -> None:
        """All workers hold the same parameters of a fragment now."""
        # without anchors until the next step: it is known only then whether its round needs any
        fragment.agreed_at, fragment.counted, fragment.anchors = self.steps, self.examples, []

    def end_round(self) -> None:
        """The round is over; the next one begins with the next step."""
        self.rounds += 1
        self.step_in_round, self.round = 0, None

    def state_dict(self, num_workers: int, settings: LocalSGDSettings) -> dict[str, Any]:
        """Numbers and tensors."""
        # Between two rounds there is none to save: the next begins with the next step, wherever the run continues.
        present = self.round if self.step_in_round else None
        return {
            "format": STATE_FORMAT,
            "num_workers": num_workers,
            "outer": type(settings.outer).__name__,
            "compression": settings.compression,
            "by_speed": settings.by_speed,
            **{name: getattr(self, name) for name in _NUMBERS},
            "local_steps": None if present is None else present.local_steps,
            "lr": None if present is None else present.lr,
            "seconds": list(self.seconds),
            "fragments": [fragment.state_dict() for fragment in self.fragments],
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        *,
        num_workers: int,
        dealt: Sequence[tuple[int, ...]],
        pieces: Sequence[Tensor],
        settings: LocalSGDSettings,
    ) -> Memory:
        """The inverse.

        Args:
            state: the saved state.
            num_workers: the present number of workers.
            dealt: the places of each fragment's parameters.
            pieces: the parameters, as this rank holds them.
            settings: of the run that loads.

        Raises:
            ValueError: if the state has a newer format, or belongs to workers that stepped by their speed, while these
                do not; or to another model, outer optimizer or number of fragments; or to another number of workers,
                although they held different parameters when it was saved or it contains compression errors.
        """
        require_format("the state of local SGD", state["format"], STATE_FORMAT)
        if state.get("by_speed", False) and not settings.by_speed and num_workers > 1:
            raise ValueError(
                "the state was saved with by_speed=True, so that the workers have taken different numbers of steps, "
                "and workers that step alike would wait for each other at different places: give by_speed=True"
            )
        same_parts = [tuple(each["places"]) for each in state["fragments"]] == list(dealt)
        if not same_parts and sum(len(each["places"]) for each in state["fragments"]) != len(pieces):
            raise ValueError(
                f"the state is for {sum(len(each['places']) for each in state['fragments'])} parameters, and "
                f"this model trains {len(pieces)}: resume with the model that the run began with"
            )
        found = cls(
            [Fragment.from_state_dict(each, pieces) for each in state["fragments"]],
            **{name: state[name] for name in _NUMBERS},
        )
        # those of other workers say nothing of these, and earlier versions saved none
        found.seconds = list(state.get("seconds", [])) if state["num_workers"] == num_workers else []
        lossy = any(fragment.errors.sent.numel() for fragment in found.fragments)
        if state["num_workers"] != num_workers and (found.apart or lossy):
            raise ValueError(
                f"the state was saved by {state['num_workers']} workers, and there are {num_workers}: in the middle of "
                f"a round, or with compression, resume with as many; or save after synchronize(), uncompressed"
            )
        # Only these depend on the outer optimizer and on the compression; without them a run may change both.
        kept = found.apart or any(fragment.carries for fragment in found.fragments)
        for name, then, now in (
            ("outer", state["outer"], type(settings.outer).__name__),
            ("compression", state["compression"], settings.compression),
            ("fragments", len(found.fragments), len(dealt)),
        ):
            if kept and then != now:
                raise ValueError(
                    f"the state was saved with {name}={then}, this run has {now}, which cannot use it: use the same, "
                    f"or start local SGD again from the averaged model"
                )
        if not same_parts:
            found.fragments = [Fragment(places, agreed_at=found.steps, counted=found.examples) for places in dealt]
        if found.step_in_round:
            # Never by the gradient: such a round has a single step, so it is never saved in its middle.
            found.round = Round(
                state["local_steps"], state["lr"], settings.outer, settings.compression, settings.overlap, False
            )
        return found


_NUMBERS = ("steps", "rounds", "step_in_round", "examples", "states_agree", "bytes_synchronous")
_PER_PARAMETER = ("anchors", "momenta")
_EXCHANGED = ("parameters", "buffers")
