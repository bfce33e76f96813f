"""The journal of a run: one line of JSON per step, in parts of bounded size."""

from adabatch.journal.parts import lines_of, parts_of
from adabatch.journal.writer import Journal, JournalTarget, line

__all__ = ["Journal", "JournalTarget", "line", "lines_of", "parts_of"]
