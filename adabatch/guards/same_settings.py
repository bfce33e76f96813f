"""Checks that all ranks of a run have the same settings, and raises an error of one rank on all of them.

If ranks differ in a setting, one may finish while the others wait, or each may train its own weights. Before the first
step of each ``steps()``, and therefore after a load too, everything that affects decisions is compared by one digest
of 16 bytes. If it differs, the ranks exchange their settings, and all of them raise the same error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from adabatch.guards.memory_trials import Trials
from adabatch.guards.votes import Votes
from adabatch.runtime.collectives import Collectives, digest_of
from adabatch.runtime.data import GlobalOrder, num_examples_in
from adabatch.runtime.differences import rank_differences
from adabatch.runtime.nested import text_of
from adabatch.runtime.optimizers.joined import each_of
from adabatch.runtime.probes.protocol import Probe

_LONGEST = 160
"""Characters of a value in an error; of a longer value its beginning and a digest are shown."""


def check_same_settings(collectives: Collectives, settings: Mapping[str, object]) -> None:
    """Checks that all ranks hold the same settings.

    Args:
        collectives: the ranks.
        settings: name -> value; compared as text, by ``text_of``.

    Raises:
        ValueError: on every rank, if they differ; names the settings, the values and the ranks that hold them.
    """
    if collectives.size == 1:
        return
    mine = {name: text_of(value) for name, value in settings.items()}
    # The digest first, since settings agree in nearly every run, and their texts may be long.
    if collectives.agree(sorted(mine.items())):
        return
    short = {name: _short(text) for name, text in mine.items()}
    ranks: list[dict[str, str]] = [json.loads(sent) for sent in collectives.gather_bytes(json.dumps(short).encode())]
    raise ValueError(
        f"the ranks were given different settings: {rank_differences(ranks)}. All ranks must be given the same data "
        f"set, seed, arguments, versions and saved state"
    )


@contextmanager
def failing_together(collectives: Collectives, what: str) -> Iterator[None]:
    """Raises an error that one rank raises in the block on all ranks; costs a reduction of 8 bytes.

    Args:
        collectives: the ranks, all of which enter the block.
        what: what the block does, for the message on the other ranks.

    Raises:
        RuntimeError: on the ranks without their own error, with the message of the first rank that has one.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    # Also without an error: the other ranks may have one, and wait in this reduction.
    if collectives.size > 1 and any(collectives.sum_of(float(own is not None))):
        rank, message = collectives.first_message(None if own is None else f"{type(own).__name__}: {own}")
        if own is None:
            raise RuntimeError(f"{what} failed on rank {rank}: {message}")
    if own is not None:
        raise own


def versions() -> dict[str, object]:
    """The versions of torch and of this package."""
    try:
        own = metadata.version("adabatch")
    except metadata.PackageNotFoundError:  # run from its sources
        own = "not installed"
    return {"version of torch": str(torch.__version__), "version of adabatch": own}


def loop_settings(
    loader: object,
    *,
    until: object,
    count: Callable[[Any], int],
    weigh: Callable[[Any], float] | None,
    allow_same_data: bool,
) -> dict[str, object]:
    """The arguments of ``steps()``. For functions, and for loaders that each rank has, only whether they were given."""
    ordered = isinstance(loader, GlobalOrder)
    place = loader.state_dict() if isinstance(loader, GlobalOrder) else {}
    return {
        "loader": "a GlobalOrder" if ordered else "a loader of the rank's own",
        **{f"{name} of the data order": value for name, value in place.items()},
        "until": until,
        "count= of steps()": count is not num_examples_in,
        "weigh= of steps()": weigh is not None,
        "allow_same_data": allow_same_data,
    }


def run_settings(
    given: Mapping[str, object], optimizer: Optimizer, *, probe: Probe | None, votes: Votes, trials: Trials
) -> dict[str, object]:
    """The arguments of a run and its optimizer, with what measures the run and listens to it."""
    return {
        "what the probe gives": None if probe is None else probe.gives,
        "whether Preemption or Checkpoints listen": votes.listening,
        "sizes that ran out of memory": trials.state_dict(),
        **given,
        **optimizer_settings(optimizer),
    }


def optimizer_settings(optimizer: Optimizer) -> dict[str, object]:
    """The settings of all groups of an optimizer, or of several."""
    found: dict[str, object] = {}
    for number, one in enumerate(each_of(optimizer)):
        name = "optimizer" if number == 0 else f"optimizer {number + 1}"
        found[name] = type(one).__qualname__
        found[f"{name}: number of groups"] = len(one.param_groups)
        for index, group in enumerate(one.param_groups):
            place = f" of {name} group {index}"
            found[f"number of parameters{place}"] = len(group["params"])
            # A rank that does not train a layer does not take part in its reduction, and the others wait there.
            found[f"frozen parameters{place}"] = [i for i, p in enumerate(group["params"]) if not p.requires_grad]
            found |= {f"{key}{place}": value for key, value in group.items() if key not in ("params", "param_names")}
    return found


def scaler_settings(scaler: GradScaler | None) -> object:
    """The settings of a scaler, without its scale, which differs between workers of local SGD."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... (digest {digest_of(text):012x})"
