"""`python -m zero2hero` is the `zero2hero` command."""

import os
import sys

from zero2hero.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one of several ranks: its network threads may crash Python's own exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
