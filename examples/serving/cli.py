"""The command line. It checks the arguments before the slow imports and turns failures into one line and an exit
status."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Sequence

from ..startup import explain_missing, import_paddle

DEFAULT_DIRECTORY = Path("build/serving")
DEFAULT_PORT = 8760
TIMEOUT = 60  # seconds that a query waits for its answer


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return `command` and its arguments; bad ones end the program with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.serving", description="Serve the all-MiniLM-L6-v2 sentence encoder from a saved model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="save | serve | query")
    save = commands.add_parser("save", help="save the encoder as a static program")
    serve = commands.add_parser("serve", help="answer requests on 127.0.0.1")
    for command in (save, serve):
        command.add_argument("directory", nargs="?", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")
    query = commands.add_parser("query", help="ask the service how like the first text the others are")
    query.add_argument("texts", nargs="+", metavar="text")
    for command in (serve, query):
        command.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="P", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.command == "query" and len(arguments.texts) < 2:
        query.error("text: expected at least two texts, got one")
    lowest = 0 if arguments.command == "serve" else 1
    if arguments.command != "save" and not lowest <= arguments.port <= 65535:
        parser.error(f"--port: expected {lowest} to 65535, got {arguments.port}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    arguments = parse_arguments(argv)
    try:
        if arguments.command == "query":
            return query(arguments.texts, arguments.port)
        return _save_or_serve(arguments)
    except KeyboardInterrupt:
        print("Stopped", flush=True)
        return 0 if arguments.command == "serve" else 130


def _save_or_serve(arguments: argparse.Namespace) -> int:
    serving = arguments.command == "serve"
    if serving:  # SIGTERM waits until Paddle is imported, which sets a handler that prints a traceback
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        import_paddle()
        from ..semantic_search.model_files import ModelFilesError
        from . import saved_model
    except ModuleNotFoundError as error:
        return explain_missing(error)
    finally:
        if serving:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        if serving:
            serve(arguments.directory, arguments.port)
        else:
            saved_model.save(arguments.directory)
            print(f"Saved in {arguments.directory}")
    except (ModelFilesError, saved_model.SavedModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve(directory: Path, port: int) -> None:
    """Answer requests until KeyboardInterrupt comes, and then those in work."""
    from .saved_model import SavedEncoder
    from .server import Server

    encoder = SavedEncoder(directory)
    encoder.embed(["warm up"])  # the first run makes thread pools and caches
    with Server(port, encoder.embed) as server:
        # Not in this thread, where a signal's exception could come between a connection and its thread.
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            print(f"Serving {directory} on http://127.0.0.1:{server.server_port}, Ctrl-C stops", flush=True)
            while True:
                signal.pause()
        finally:
            server.shutdown()


def query(texts: Sequence[str], port: int) -> int:
    """Print the cosine similarity of each further text to the first one, best first."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/embed",
        data=json.dumps({"texts": texts}).encode(),
        headers={"Content-Type": "application/json"},
    )
    # No proxy: it is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            embeddings = json.load(response)["embeddings"]
    except urllib.error.HTTPError as error:
        print(json.load(error)["error"], file=sys.stderr)
        return 1
    except (urllib.error.URLError, OSError) as error:
        print(f"No answer on port {port} ({error}): python -m examples.serving serve --port {port}", file=sys.stderr)
        return 1
    scores = [sum(a * b for a, b in zip(embeddings[0], embedding)) for embedding in embeddings[1:]]
    for score, text in sorted(zip(scores, texts[1:]), reverse=True):
        print(f"{score:6.3f}  {text}")
    return 0
