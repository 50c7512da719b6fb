"""Soak: calls by the million, sizes of all kinds for hours, and a server under many clients. Results must not drift,
and memory must not grow.

    make soak                                   # all, nearly three hours
    make soak SOAK="--parts small --calls 100000"
    make gpu-soak                               # the calls, on a GPU
"""

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading

import paddle
import soak_calls
import soak_clients
from soak_calls import MEBIBYTE

MOST_GROWTH = 4 * MEBIBYTE  # of a run's last quarter: 16 bytes a call would be seen in a million

# What is freed goes back to the system, from one arena for all threads: else a process of many grows without a leak.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def say(text):
    print(f"  {text}", flush=True)


def soak_small(arguments):
    calls = soak_calls.make_calls(soak_calls.SMALL)
    return describe_calls(soak_calls.repeat(calls, arguments.calls, say=say))


def soak_mixed(arguments):
    calls = soak_calls.make_calls(soak_calls.mixed_sizes(arguments.sizes, arguments.seed))
    return describe_calls(soak_calls.repeat(calls, sys.maxsize, 60 * arguments.mixed_minutes, say=say))


def describe_calls(report):
    """The lines that tell of it, and whether all was well."""
    lines = [
        f"{report.calls} calls in {report.seconds:.0f} s: {len(report.differing)} differ from their first",
        f"memory grew by {report.grown / MEBIBYTE:.1f} MiB in the last quarter",
        *sorted(set(report.differing)),
    ]
    return lines, not report.differing and report.grown <= MOST_GROWTH


def soak_serving(arguments):
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "examples.serving"]
        subprocess.run([*command, "save", f"{directory}/model"], check=True, stdout=subprocess.DEVNULL)
        serve = [*command, "serve", f"{directory}/model", "--port", "0"]
        environment = dict(os.environ, **GIVES_BACK)
        with subprocess.Popen(
            serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as server:
            try:
                port = int(re.search(r":(\d+)", server.stdout.readline()).group(1))
                seconds = 60 * arguments.serving_minutes
                with Sampler(server.pid, seconds / soak_calls.SAMPLES) as sampler:
                    report = soak_clients.drive(port, arguments.clients, seconds)
            finally:
                server.send_signal(signal.SIGTERM)
                status = server.wait(60)
    times = ", ".join(f"{name} {ms:.0f}" for name, ms in report.percentiles().items())
    lines = [
        f"{report.good} good and {report.bad} bad requests in {report.seconds:.0f} s: {len(report.faults)} faults",
        f"milliseconds: {times}",
        f"the server's memory grew by {sampler.grown / MEBIBYTE:.1f} MiB in the last quarter; it ended with {status}",
        *report.faults[:20],
    ]
    return lines, not report.faults and sampler.grown <= MOST_GROWTH and status == 0


class Sampler:
    """Looks at the memory of another process every so many seconds."""

    def __init__(self, process, seconds):
        self.process, self.seconds, self.samples = process, seconds, []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.wait(self.seconds):
            with open(f"/proc/{self.process}/statm") as file:
                self.samples.append(int(file.read().split()[1]) * resource.getpagesize())
            say(f"{self.samples[-1] / MEBIBYTE:.1f} MiB")

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        self.grown = soak_calls.grown_bytes(self.samples)


PARTS = {"small": soak_small, "mixed": soak_mixed, "serving": soak_serving}


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="unittests/soak")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--calls", type=int, default=1_000_000, help="small calls, forward and backward")
    parser.add_argument("--mixed-minutes", type=float, default=120)
    parser.add_argument("--sizes", type=int, default=60, help="that are mixed")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes")
    parser.add_argument("--serving-minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args(given)
    if paddle.is_compiled_with_cuda():
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})
    well = True
    for part in arguments.parts:
        print(part, flush=True)
        lines, passed = PARTS[part](arguments)
        well = well and passed
        print(*lines, "passed" if passed else "FAILED", sep="\n  ", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
