"""Files of results: written atomically, and settings in the form in which JSON gives them back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, and the folder that it is in: a reader sees the whole old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the file, since a rename is atomic only within a file system; with the process's number, so that two
    # commands that write the same file don't write into each other's
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def json_values(settings: Any) -> Any:
    """The settings as they will be read back from a JSON file, to compare them with those of one: tuples become lists,
    keys text, and what JSON does not know its ``str``."""
    return json.loads(json.dumps(settings, default=str))
