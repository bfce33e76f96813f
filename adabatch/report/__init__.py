"""Pictures from a journal and of schedules. Needs matplotlib, the extra ``adabatch[report]``."""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError("adabatch.report draws with matplotlib: install it with pip install 'adabatch[report]'")

from adabatch.report.picture import draw

__all__ = ["draw"]
