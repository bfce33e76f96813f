"""Checkpoints: a whole run on the disk and back; files, shards, background writing, and what differs on resume."""

from adabatch.checkpointing.checkpoints import Checkpoints, Loaded, load, save
from adabatch.checkpointing.differences import Difference
from adabatch.checkpointing.files import CheckpointError
from adabatch.checkpointing.lock import FolderInUse
from adabatch.checkpointing.settings import KeptSetting

__all__ = ["CheckpointError", "Checkpoints", "Difference", "FolderInUse", "KeptSetting", "Loaded", "load", "save"]
