"""Python in a process of its own, which finds the modules that this one finds."""

import os
import subprocess
import sys


def run_python(code, *arguments, **options):
    """What `python -c CODE ARGUMENTS` ended with: `returncode`, `stdout`, `stderr`."""
    return _run("-c", code, *arguments, **options)


def run_script(path, *arguments, **options):
    """The same of `python PATH ARGUMENTS`."""
    return _run(path, *arguments, **options)


def run_module(name, *arguments, **options):
    """The same of `python -m NAME ARGUMENTS`."""
    return _run("-m", name, *arguments, **options)


def printed_with_threads(code, counts):
    """What `python -c CODE` prints with these numbers of threads: a set."""
    ends = [run_python(code, threads=threads) for threads in counts]
    for end in ends:
        assert end.returncode == 0, end.stderr
    return {end.stdout for end in ends}


def _run(*arguments, threads=2, directory=None, timeout=300, **variables):
    """`threads` None leaves OMP_NUM_THREADS unset; `directory` is the one to start in, `timeout` in seconds;
    `variables` are more of the environment's."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=os.pathsep.join(sys.path), **variables)
    if threads is None:
        del environment["OMP_NUM_THREADS"]
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=timeout)
