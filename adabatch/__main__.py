"""``python -m adabatch``: the same as the ``adabatch`` command."""

import sys

from adabatch.cli.main import main

sys.exit(main())
