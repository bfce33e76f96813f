"""The command line: the ``adabatch`` command, and one module or folder per family of its commands."""
