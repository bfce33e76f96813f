"""The state of a worker of local SGD between steps, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from adabatch.runtime.local_sgd.exchange import Errors
from adabatch.runtime.local_sgd.settings import LocalSGDSettings, Round

STATE_FORMAT = 1


@dataclass
class Memory:
    """The state of a worker.

    Args:
        steps: local steps so far.
        rounds: averages so far.
        step_in_round: local steps since the last average.
        examples: consumed by this rank since then.
        states_agree: whether the optimizer states of all workers are equal.
        bytes_synchronous: bytes that averaging the gradient at every step would have sent so far.
        round: the current round; None before its first step.
        anchors: the parameters at its beginning, one tensor per parameter, if its end needs them.
        momenta: of the outer optimizer.
        errors: of the compression.
    """

    steps: int = 0
    rounds: int = 0
    step_in_round: int = 0
    examples: float = 0.0
    states_agree: bool = True
    bytes_synchronous: int = 0
    round: Round | None = None
    anchors: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)
    errors: Errors = field(default_factory=Errors)

    def end_round(self) -> None:
        """The round is over; the next one begins with the next step."""
        self.rounds += 1
        self.step_in_round, self.examples, self.round = 0, 0.0, None

    def state_dict(self, num_workers: int, settings: LocalSGDSettings) -> dict[str, Any]:
        """Numbers and tensors."""
        # Between two rounds there is none to save: the next begins with the next step, wherever the run continues.
        present = self.round if self.step_in_round else None
        return {
            "format": STATE_FORMAT,
            "num_workers": num_workers,
            "outer": type(settings.outer).__name__,
            "compression": settings.compression,
            **{name: getattr(self, name) for name in _NUMBERS},
            "local_steps": None if present is None else present.local_steps,
            "lr": None if present is None else present.lr,
            "anchors": [] if present is None else list(self.anchors),
            "momenta": list(self.momenta),
            "errors": asdict(self.errors),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, num_workers: int, pieces: Sequence[Tensor], settings: LocalSGDSettings
    ) -> Memory:
        """The inverse.

        Args:
            state: the saved state.
            num_workers: the present number of workers.
            pieces: the parameters, as this rank holds them.
            settings: of the run that loads.

        Raises:
            ValueError: if the state has a newer format, or belongs to another model or outer optimizer, or to another
                number of workers although it was saved in the middle of a round or contains compression errors.
        """
        if state["format"] > STATE_FORMAT:
            raise ValueError(
                f"the state of local SGD was saved in format {state['format']}, this version reads up to "
                f"{STATE_FORMAT}: upgrade adabatch"
            )
        device = pieces[0].device
        errors = Errors(**{name: value.to(device) for name, value in state["errors"].items()})
        if state["num_workers"] != num_workers and (state["step_in_round"] or errors.sent.numel()):
            raise ValueError(
                f"the state was saved by {state['num_workers']} workers, and there are {num_workers}: in the middle of "
                f"a round, or with compression, resume with as many; or save after synchronize(), uncompressed"
            )
        # Only these depend on the outer optimizer and on the compression; without them a run may change both.
        kept = state["step_in_round"] or state["momenta"] or errors.sent.numel()
        for name, now in (("outer", type(settings.outer).__name__), ("compression", settings.compression)):
            if kept and state[name] != now:
                raise ValueError(
                    f"the state was saved with {name}={state[name]}, this run has {now}, which cannot use it: "
                    f"use the same, or start local SGD again from the averaged model"
                )
        for name in ("anchors", "momenta"):
            if state[name] and [tensor.shape for tensor in state[name]] != [piece.shape for piece in pieces]:
                raise ValueError(
                    f"the {name} in the state have other shapes than the parameters: resume with the model, and the "
                    f"sharding, that the run began with"
                )
        under_way = None
        if state["step_in_round"]:
            # Never by the gradient: such a round has a single step, so it is never saved in its middle.
            under_way = Round(state["local_steps"], state["lr"], settings.outer, settings.compression, False)
        return cls(
            **{name: state[name] for name in _NUMBERS},
            round=under_way,
            # copies: the caller may load the same state again, and these are changed in place
            anchors=[tensor.to(device, copy=True) for tensor in state["anchors"]],
            momenta=[tensor.to(device, copy=True) for tensor in state["momenta"]],
            errors=errors,
        )


_NUMBERS = ("steps", "rounds", "step_in_round", "examples", "states_agree", "bytes_synchronous")
