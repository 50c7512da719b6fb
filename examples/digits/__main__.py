"""``python -m examples.digits``."""

import sys

from .cli import main

sys.exit(main())
