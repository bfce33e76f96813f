"""States that differ between ranks, such as that of a data loader, gathered for one checkpoint."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from adabatch.runtime.collectives import Collectives


def states_of_all(state: Any, ranks: Collectives, *, name: str) -> list[Any]:
    """The states of all ranks, by rank, as a checkpoint will give them back.

    Args:
        state: of this rank, plain data and tensors.
        ranks: all of them must call this.
        name: of the part, for messages.

    Raises:
        TypeError: if a state cannot be read back without running code.
    """
    file = io.BytesIO()
    torch.save(state, file)
    # read back at once: an unreadable state must be an error when it is saved, not when a run wants to resume
    return [_read(data, name) for data in ranks.gather_bytes(file.getvalue())]


def _read(data: bytes, name: str) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"the state of {name} holds more than plain data and tensors, and a checkpoint would have to run code to "
            f"read it back: give an object whose state_dict() is plain ({str(error).splitlines()[0]})"
        ) from None


def state_of_rank(states: Any, ranks: Collectives, *, name: str) -> Any:
    """This rank's state among those from ``states_of_all``.

    Raises:
        ValueError: if the number of ranks differs from that of the saved states.
    """
    if len(states) != ranks.size:
        raise ValueError(
            f"{name} was saved with a state for each of {len(states)} rank(s), and there are {ranks.size}: resume with "
            f"as many, or leave it out of load and begin a pass; a GlobalOrder continues with any number of ranks"
        )
    return states[ranks.rank]
