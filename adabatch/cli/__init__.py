"""The command line: ``adabatch train`` and ``adabatch compare``."""
