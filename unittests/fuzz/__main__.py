"""Random cases of attention, its weights, the attention block and the feed-forward block on the core, against float64.

    make fuzz [FUZZ_CASES=10000] [FUZZ="--seed 7"]
    make fuzz FUZZ="--seed 7 --case 1234"       # one case again
    make gpu-fuzz                               # the CUDA core

A case is a function of the seed and its number alone.
"""

import argparse
import sys
import time
import traceback

import random_cases
from comparison import complaints


def core_of(device):
    """What runs a case on the device.

    Raises:
        ImportError: pfa_core, or for a GPU PyTorch or a core that was built with CUDA, is not there.
    """
    if device == "gpu":
        import core_on_gpu as core
    else:
        import core_on_cpu as core
    return core


def check(seed, number, core):
    """What is wrong with a case, a line each. An exception is wrong too."""
    drawn = random_cases.draw(seed, number)
    try:
        found = complaints(drawn, core)
    except Exception:
        found = traceback.format_exc().splitlines()
    return [str(drawn), *found] if found else []


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="unittests/fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, default=10000, help="how many")
    parser.add_argument("--case", type=int, help="the number of one case, in place of --first and --cases")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins after so many")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    arguments = parser.parse_args(given)
    core = core_of(arguments.device)
    target = "fuzz" if arguments.device == "cpu" else "gpu-fuzz"
    numbers = range(arguments.first, arguments.first + arguments.cases)
    if arguments.case is not None:
        numbers = [arguments.case]
        print(random_cases.draw(arguments.seed, arguments.case))

    start, done, failed, left_out = time.monotonic(), 0, 0, 0
    for number in numbers:
        if time.monotonic() - start > arguments.seconds:
            break
        if core.why_not(random_cases.draw(arguments.seed, number)):
            left_out += 1
            continue
        wrong = check(arguments.seed, number, core)
        done += 1
        if wrong:
            failed += 1
            print(f'make {target} FUZZ="--seed {arguments.seed} --case {number}"', *wrong, sep="\n  ", flush=True)
        if done % 1000 == 0:
            print(f"{done} cases, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{done} cases on {', '.join(core.ways())}: {failed} failed, {left_out} left out")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
