"""``python -m examples.fine_tuning``."""

import sys

from .cli import main

sys.exit(main())
