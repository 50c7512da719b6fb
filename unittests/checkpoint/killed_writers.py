"""Ends processes that write files at random times, and looks at what they leave.

    python killed_writers.py SIGKILL 200 FOLDER

Each process writes in a loop: a checkpoint of either kind, a new file where none may be, what the command converts, or
the training example's state. After each of them the file is a whole one. SIGKILL may leave one partial file, which the
next process removes; other signals leave none. The last line says how many processes were ended while they wrote.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import random
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
from families import bert_block
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint_files import Checkpoint, load_state, read, write

LONGEST = 0.1  # seconds that a process writes
NUMBERS = 1_000_000


def states():
    """Two contents of different lengths, in turn."""
    return [{"w": np.full(NUMBERS, i, "float32"), "more": np.full(i, i)} for i in (1, 2)]


def is_whole(arrays):
    return any(
        arrays.keys() == state.keys() and all((arrays[n] == state[n]).all() for n in state) for state in states()
    )


def checkpoints(path):
    for state in itertools.cycle(states()):
        write(path, Checkpoint(state))


def new_files(path):
    for state in itertools.cycle(states()):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        write(path, Checkpoint(state), replace=False)


def command(path):
    source = path.parent.parent / "source.safetensors"
    if not source.exists():
        write(source, Checkpoint({**bert_block("a."), "w": np.ones(NUMBERS, "float32")}, {"format": "pt"}))
    status = 0
    while status == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(["convert", str(source), str(path), "--num-heads", "4", "--force"])
    os._exit(status)


def examples_state(path):
    from examples.digits import training

    for step in itertools.count():
        losses = np.zeros(NUMBERS, "float32")
        training.save_checkpoint(path, "fused", training.Settings(), *model_and_optimizer(), step, losses)


@lru_cache(maxsize=None)
def model_and_optimizer():
    from examples.digits import training

    model = training.make_model("fused", 0.0, 0)
    return model, training.make_optimizer(model, 10)


WRITERS = [
    (checkpoints, "a.pdparams", lambda path: is_whole(read(path).arrays)),
    (checkpoints, "a.safetensors", lambda path: is_whole(read(path).arrays)),
    (new_files, "a.pdparams", lambda path: is_whole(read(path).arrays)),
    (command, "a.pdparams", lambda path: (read(path).arrays["w"] == 1).all()),
]
if all(importlib.util.find_spec(name) for name in ("sklearn", "tqdm")):
    WRITERS.append((examples_state, "a.checkpoint", lambda path: len(load_state(path)["losses"]) == NUMBERS))
    model_and_optimizer()


def writing_process(writer, path):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until its exception is caught
    process = os.fork()
    if process:
        return process
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.alarm(600)  # ends it if nobody else does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Paddle says there that it was ended
        writer(path)
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        os._exit(1)


def wait(process, number):
    """How it ended. Paddle's handler of SIGTERM allocates memory, so that it waits for ever where the signal came while
    memory was being allocated (docs/paddle.md). The signal is blocked while it runs, and in none of our own."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    with open(f"/proc/{process}/status") as lines:
        blocked = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    return number if number == signal.SIGTERM and blocked & 1 << (number - 1) else status


def run(name, count, folder):
    number = getattr(signal, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this in what nohup runs
    expected = 130 << 8 if number == signal.SIGINT else number
    times = random.Random(0)
    partial = whole = 0
    for i in range(count):
        writer, target, is_good = WRITERS[i % len(WRITERS)]
        path = folder / f"{i % len(WRITERS)}" / target
        path.parent.mkdir(exist_ok=True)
        process = writing_process(writer, path)
        time.sleep(times.uniform(0, LONGEST))
        os.kill(process, number)
        end = wait(process, number)
        assert end == expected, (i, name, end)
        beside = [other.name for other in path.parent.iterdir() if other != path]
        assert len(beside) <= (number == signal.SIGKILL), beside
        assert all(other.endswith(".partial") for other in beside), beside
        partial += len(beside)
        if path.exists():
            assert is_good(path), path
            whole += 1
    for i, (_, target, _) in enumerate(WRITERS[:count]):
        last = folder / f"{i}" / f"last{Path(target).suffix.replace('checkpoint', 'pdparams')}"
        write(last, Checkpoint(states()[0]))
        assert not list(last.parent.glob(".*")), list(last.parent.iterdir())
    print(
        f"{name}: {count} processes ended, {partial} of them left a partial file, {whole} a whole one, none half a one"
    )


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
