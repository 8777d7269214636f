"""python -m minidit: the `minidit` command, also where it is not installed."""

import sys

from minidit.cli import main

sys.exit(main())
