"""What all tests share: repeatable random numbers, one torch thread, and a watch over what a test leaves behind."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch._dynamo  # the first optimizer imports it, thus before what is kept from the search for garbage
import torch.distributed as dist

# "repeatable", which is loaded: the same examples on every machine, and no time limit on a busy one, so that a red test
# can be run again as it was. Sixty examples a property keep the pure core well under a minute; properties with rarer
# corners ask for more themselves. "fast" is that of `make fast`. "seeded" draws other examples for each
# --hypothesis-seed, which "repeatable" would ignore.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=60, **_COMMON)
hypothesis.settings.register_profile("fast", derandomize=True, max_examples=15, **_COMMON)
hypothesis.settings.register_profile("seeded", max_examples=60, print_blob=True, **_COMMON)
hypothesis.settings.load_profile("repeatable")

# Reductions over more threads would be summed in another order, and several workers share the cores.
torch.set_num_threads(1)

NOT_OURS = (
    "PYTEST_",  # pytest names the current test there
    "TORCHINDUCTOR_",  # the compiler's cache folder is set when it is first imported
    "_MLFLOW_",  # MLflow numbers the process there
    "KMP_",  # scikit-learn and OpenMP set theirs when they are first imported
)


def pytest_runtest_setup() -> None:
    """Seeds the random numbers before the fixtures of a test, so that no test depends on those which ran before it."""
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: with one of those at the end, all but one worker would stand idle."""
    slow = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Hosts and tests collect garbage; a search through all that was imported takes them half a second each time."""
    gc.freeze()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}


def _threads() -> set[threading.Thread]:
    # torch's compiler shows a progress bar where tqdm is installed, whose monitor lives as long as the process.
    return {thread for thread in threading.enumerate() if thread.is_alive() and thread.name != "tqdm_monitor"}


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


@pytest.fixture(autouse=True)
def leaks_nothing() -> Iterator[None]:
    """A test must leave environment, folder, threads and process groups as it found them."""
    environment, folder, threads, grouped = _environment(), os.getcwd(), _threads(), _grouped()
    yield
    assert grouped or not _grouped(), "the test left a process group behind"
    assert os.getcwd() == folder, "the test changed the working directory"
    after = _environment()
    changed = {name for name in environment | after if environment.get(name) != after.get(name)}
    assert not changed, f"the test changed environment variables: {sorted(changed)}"
    deadline = time.monotonic() + 5  # a thread that was told to end needs a moment
    while (left := _threads() - threads) and time.monotonic() < deadline:
        gc.collect()  # what holds loading processes may itself be held by an error in a cycle
        time.sleep(0.01)
    assert not left, f"the test left threads behind: {sorted(thread.name for thread in left)}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk is mounted, which needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
