"""`python -m zero2hero` is the `zero2hero` command."""

import sys

from zero2hero.cli import main

sys.exit(main())
