"""The command line. It checks the arguments before the slow imports and turns failures into one line and an exit
status."""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from ..startup import explain_missing, import_paddle

DEFAULT_QUERIES = (
    "how do I clip gradients by their norm",
    "attention over queries, keys and values",
    "randomly switch off neurons while training",
    "multiply two matrices",
    "how do I save a model",
    "convert a numpy array to a tensor",
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return `queries`, a list, and `top`; bad ones end the program with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.semantic_search",
        description=(
            "Search Paddle's API documentation by meaning, with all-MiniLM-L6-v2 on the fused attention operator."
        ),
    )
    parser.add_argument("queries", nargs="*", metavar="query", help="what to look for (default: some examples)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="answers to print for each query (default: 5)")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        parser.error(f"--top: expected at least 1, got {arguments.top}")
    for query in arguments.queries:
        if not query.strip():
            parser.error(f"query: expected some words, got {query!r}")
    arguments.queries = arguments.queries or list(DEFAULT_QUERIES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done, 1 failed, 2 bad arguments."""
    arguments = parse_arguments(argv)
    try:
        import_paddle()
        from . import demo
        from .model_files import ModelFilesError
    except ModuleNotFoundError as error:
        return explain_missing(error)
    try:
        demo.run(arguments.queries, arguments.top)
    except demo.RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except (ModelFilesError, demo.DifferenceError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
