"""`python -m unstilted`, for launchers that take a module."""

import sys

from unstilted.cli import main

sys.exit(main())
