"""Pictures from a journal. Needs matplotlib, the extra ``adabatch[report]``."""

from adabatch.report.picture import draw

__all__ = ["draw"]
