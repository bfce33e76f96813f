"""What stands beside shards is read without the right to run anything; shards themselves: tests/distributed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from adabatch.checkpointing.files import Damaged
from adabatch.checkpointing.sharded_state import shapes_in


class Runs:
    """Makes a folder when it is unpickled, if it is allowed to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("what", [Metadata({"model/x": BytesStorageMetadata()}), {"no": "metadata"}, torch.nn.Linear])
def test_a_record_of_anything_but_tensors_is_refused(tmp_path: Path, what: Any) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(what))
    with pytest.raises(Damaged, match=r"\.metadata"):
        shapes_in(tmp_path)


def test_a_record_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    with pytest.raises(Damaged, match=r"names posix\.mkdir"):
        shapes_in(tmp_path)
    assert not (tmp_path / "made").exists()


def test_names_inside_of_torchs_modules_reach_no_further(tmp_path: Path) -> None:
    """Protocol 4 knows dotted names: the module that defines a record imports os too."""
    content = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(Damaged, match=r"names torch\.distributed\.checkpoint\.filesystem\.os\.system"):
        shapes_in(tmp_path)
