"""``python -m examples.serving save | serve | query``."""

import sys

from .cli import main

sys.exit(main())
