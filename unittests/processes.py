"""Python in a process of its own."""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def run_python(code, *arguments, threads=2, **variables):
    path = os.pathsep.join([HERE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=path, **variables)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
