"""States that every rank has one of, such as that of a data loader: all together, for one checkpoint."""

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
        ranks: call this together.
        name: of what has the state.

    Raises:
        TypeError: a state that cannot be read back without running code that is in it.
    """
    file = io.BytesIO()
    torch.save(state, file)
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
    """This rank's own of the states that ``states_of_all`` gave.

    Raises:
        ValueError: there are more or fewer ranks than were saved.
    """
    if len(states) != ranks.size:
        raise ValueError(
            f"{name} was saved with a state for each of {len(states)} rank(s), and there are {ranks.size}: resume with "
            f"as many, or leave it out of load and begin a pass; a GlobalOrder goes on with any number of ranks"
        )
    return states[ranks.rank]
