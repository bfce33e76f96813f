"""Checkpoints: a whole run on the disk and back; files, shards, background writing, and what differs on resume."""
