"""The helper that the distributed tests stand on: a failing or hanging rank must show, and must not hold the others."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.distributed


def summed(rank: int, offset: float) -> dict[str, Any]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "total": total}


def one_fails_while_the_other_waits(rank: int) -> None:
    if rank == 1:
        raise ValueError("the sky over rank one")
    dist.all_reduce(torch.zeros(1))


def one_dies(rank: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def one_never_comes(rank: int) -> None:
    if rank == 0:
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))


def test_each_rank_returns_its_result(tmp_path):
    results = run_ranks(summed, 2, tmp_path, 0.5)
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["total"].item() for result in results] == [2.0, 2.0]


def test_a_failing_rank_shows_its_traceback_and_ends_the_others(tmp_path):
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match="the sky over rank one") as failure:
        run_ranks(one_fails_while_the_other_waits, 2, tmp_path, timeout=30)
    assert "in one_fails_while_the_other_waits" in str(failure.value)
    assert time.monotonic() - begin < 20


def test_a_dead_rank_shows_its_exit_code(tmp_path):
    with pytest.raises(RanksFailed, match="rank 0: ended with code 7"):
        run_ranks(one_dies, 2, tmp_path, timeout=30)


def test_a_hanging_rank_shows_where_it_stands(tmp_path):
    with pytest.raises(RanksFailed, match=r"rank 0 \(hang\)") as failure:
        run_ranks(one_never_comes, 2, tmp_path, timeout=4)
    assert "one_never_comes" in str(failure.value)
