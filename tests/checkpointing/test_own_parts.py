"""A checkpoint holds the parts of the run that it resumes, or says that it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loops import network, regression, train
from torch.optim import SGD

from adabatch import AdaptiveBatch, Checkpoints, Constant, GlobalOrder, load


class Run:
    """A run of three steps, with momentum."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.batches = AdaptiveBatch(self.model, self.optimizer, Constant(8), micro_batch_size=4)
        self.order = GlobalOrder(regression(64))

    def saved(self, folder: Path, **parts: Any) -> list[str]:
        """The warnings of the first and the second save."""
        train(self.batches, self.model, self.optimizer, self.order)
        given = {"model": self.model, "optimizer": self.optimizer, "batches": self.batches, "order": self.order} | parts
        with (
            warnings.catch_warnings(record=True) as told,
            Checkpoints(folder, **given, background=False) as checkpoints,
        ):
            warnings.simplefilter("always")
            checkpoints.save()
            first = [str(each.message) for each in told]
            checkpoints.save()
        assert [str(each.message) for each in told] == first
        assert all(each.filename == __file__ for each in told)
        return first


def test_parts_that_a_resumed_run_would_begin_again_are_said_once(tmp_path: Path) -> None:
    run = Run()
    assert run.saved(tmp_path / "whole") == []
    (order,) = Run().saved(tmp_path / "order", order=None)
    assert "the GlobalOrder that steps() reads is not among the parts of the checkpoint" in order
    (another,) = Run().saved(tmp_path / "another", order=GlobalOrder(regression(64)))
    assert another == order
    assert Run().saved(tmp_path / "name", order=None, others={"data": (mine := Run()).order}) == [order]
    assert mine.saved(tmp_path / "own name", order=None, others={"data": mine.order}) == []
    (optimizer,) = Run().saved(tmp_path / "optimizer", optimizer=None)
    assert "the state of the SGD is not among the parts of the checkpoint" in optimizer


def test_parts_of_another_run_are_refused(tmp_path: Path) -> None:
    run, other = Run(), Run()
    with pytest.raises(ValueError, match="the Sequential has none of the parameters that the AdaptiveBatch trains"):
        Checkpoints(tmp_path, model=other.model, batches=run.batches)
    rebuilt = SGD(run.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the SGD is another object than the SGD that the AdaptiveBatch was given"):
        Checkpoints(tmp_path, model=run.model, optimizer=rebuilt, batches=run.batches)
    compiled = torch.compile(run.model, backend="eager")
    Checkpoints(tmp_path, model=compiled, optimizer=[run.optimizer], batches=run.batches).close()
    assert load(tmp_path, model=other.model, missing_ok=True) is None
