"""A rank that calls alone what all ranks must call says so after a while."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from support.loops import network
from support.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import adabatch
from adabatch.runtime import waiting

pytestmark = pytest.mark.distributed


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def saved_late(rank: int, folder: Path) -> list[list[str]]:
    """The second rank comes after the first one's patience has ended, then at once."""
    model = DistributedDataParallel(network())
    found = []
    for patience in (0.2, 60.0):
        waiting.PATIENCE = patience
        said = Said()
        logging.getLogger("adabatch").addHandler(said)
        time.sleep(2.0 if rank and patience < 1 else 0.0)
        adabatch.save(folder, model=model)
        logging.getLogger("adabatch").removeHandler(said)
        found.append([message for message in said.messages if "has waited" in message])
    return found


def test_a_save_that_waits_for_other_ranks_is_named(tmp_path: Path) -> None:
    first, _ = run_ranks(saved_late, 2, tmp_path, tmp_path / "saved")
    assert len(first[0]) == 1
    assert "has waited for 0.2 s in save() or step() of Checkpoints, which all ranks must call" in first[0][0]
    assert "call it on every rank" in first[0][0]
    assert first[1] == []
