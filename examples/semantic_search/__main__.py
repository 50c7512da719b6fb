"""``python -m examples.semantic_search [--top K] ["query" ...]``."""

import sys

from .cli import main

sys.exit(main())
