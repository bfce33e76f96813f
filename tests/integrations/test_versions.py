"""Hosts that are missing or too old give one clear error, and ``import adabatch`` imports none of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from support.ranks import run_ranks

from adabatch.integrations.versions import require_version

HOSTS = (
    "accelerate",
    "deepspeed",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "transformers",
    "trl",
    "torchft",
)


def hosts_imported(rank: int) -> list[str]:
    importlib.import_module("adabatch")
    return [name for name in HOSTS if name in sys.modules]


@pytest.mark.distributed
def test_import_adabatch_imports_no_host(tmp_path: Path) -> None:
    assert run_ranks(hosts_imported, 1, tmp_path, connect=False) == [[]]


def test_a_host_that_is_missing_or_too_old() -> None:
    require_version("torch", "2.6")
    with pytest.raises(ImportError, match=r"needs no-such-host 1.2 or newer: pip install 'no-such-host>=1.2'"):
        require_version("no-such-host", "1.2")
    with pytest.raises(ImportError, match=r"needs torch 99.1 or newer, and .* is installed: pip install 'torch>=99.1'"):
        require_version("torch", "99.1")
