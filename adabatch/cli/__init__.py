"""The command line: ``adabatch train``, ``adabatch compare`` and ``adabatch schedule``."""
