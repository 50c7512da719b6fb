"""Judges bad calls, in a process of its own: whether each is refused by a clear error, or gives what the plain valid
call gives.

As a program it reads lines `["target", "mode", first case]` and answers with lines `[case, verdict, text]`, of which
the one before a case's own has the verdict "begun"; a line `[number of cases, "end", ""]` comes last. So the case that
ends the process is known.
"""

import contextlib
import faulthandler
import json
import os
import re
import sys
import warnings
from typing import NamedTuple

import bad_calls
import numpy as np
import paddle
from bad_values import ANY, ANY_EMPTY, EITHER, REFUSED, Variant
from paddle_fused_attention.checkpoint import CheckpointError

MODES = ("dygraph", "gradient", "auto_cast", "static")
GOOD = ("refused", "right")
_FEW = ("None", "object", "hostile", "str", "array", "-1", "10**5000")
_SECONDS = 240  # that the cases of a target may take
_ERRORS = (TypeError, ValueError, NotImplementedError, OverflowError, MemoryError, CheckpointError)
_LONGEST = 1500  # characters of a message


class Case(NamedTuple):
    argument: str
    variant: Variant

    def __str__(self):
        return f"{self.argument}: {self.variant.label}"


def target_of(name):
    return bad_calls.TARGETS.get(name) or bad_calls.FAULTS[name]


def cases_of(target, mode):
    """All in dygraph, those of tensors where these go another way. Static graphs, whose making takes longer, share the
    checks of what is no tensor with dygraph, so that a few of that will do."""
    kinds = target.kinds
    cases = [Case(name, v) for name, kind in kinds.items() for v in kind.variants(name, kinds, mode == "static")]
    if mode == "dygraph":
        return cases
    if mode == "static":
        return [case for case in cases if case.variant.is_tensor or case.variant.label in _FEW]
    return [case for case in cases if case.variant.is_tensor]


def targets_of(mode):
    """The targets by name that have cases in a mode."""
    return [
        name
        for name, target in bad_calls.TARGETS.items()
        if (mode != "static" or target.in_graphs) and cases_of(target, mode)
    ]


@contextlib.contextmanager
def _in_mode(mode):
    with contextlib.ExitStack() as stack:
        if mode == "static":
            paddle.enable_static()
            stack.callback(paddle.disable_static)
            stack.enter_context(paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()))
            stack.enter_context(paddle.utils.unique_name.guard())
        elif mode == "auto_cast":
            stack.enter_context(paddle.amp.auto_cast(dtype="bfloat16"))
        yield


_arguments = {}  # of targets by id and mode, in dygraph; no call changes them


def _valid(target, mode):
    if mode == "static":
        return _made(target, mode)
    key = (id(target), mode)
    if key not in _arguments:
        _arguments[key] = _made(target, mode)
    return _arguments[key]


def _made(target, mode):
    arguments = {name: kind.valid(mode == "static") for name, kind in target.kinds.items()}
    if mode == "gradient":
        for value in arguments.values():
            if isinstance(value, paddle.Tensor) and paddle.is_floating_point(value):
                value.stop_gradient = False
    return arguments


def _call(target, arguments):
    paddle.seed(7)
    return target.call(**arguments)


def _numbers(result):
    """What a result holds, to be compared: arrays, and anything else as text. Of a variable its shape and dtype."""
    if isinstance(result, dict):
        return [part for pair in sorted(result.items(), key=str) for part in _numbers(pair)]
    if isinstance(result, (tuple, list)):
        return [number for part in result for number in _numbers(part)]
    if isinstance(result, paddle.Tensor):
        if "complex" in str(result.dtype):
            return [result.numpy()]
        return [result.astype("float64").numpy()]
    if isinstance(result, np.ndarray):
        return [result]
    if hasattr(result, "shape") and hasattr(result, "dtype"):
        return [f"{list(result.shape)} {result.dtype}"]
    return [str(result)]


def _difference(found, wanted):
    """What tells two results apart; None if nothing does."""
    found, wanted = _numbers(found), _numbers(wanted)
    if len(found) != len(wanted):
        return f"{len(found)} results, not {len(wanted)}"
    for a, b in zip(found, wanted):
        if isinstance(a, str) or isinstance(b, str):
            if str(a) != str(b):
                return f"{a}, not {b}"
        elif a.shape != b.shape:
            return f"shape {a.shape}, not {b.shape}"
        # Half a result's digits may be lost where 16-bit tensors are as good as float32 ones.
        elif not np.allclose(a, b, rtol=2e-2, atol=2e-2, equal_nan=True):
            return f"numbers that differ by {np.abs(a - b).max()}"
    return None


def is_clear(error, case, target):
    """Whether an error names the argument, or where arguments do not fit each other one of them, in one line."""
    message = str(error)
    names = {case.argument, *target.called.get(case.argument, ())}
    if case.variant.blames_others:
        names |= {*target.kinds, *(name for called in target.called.values() for name in called)}
    return (
        isinstance(error, _ERRORS)
        and not isinstance(error, UnicodeError)
        and "\n" not in message
        and 10 < len(message) < _LONGEST
        and any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in names)
        and re.search(r"expected|needed|invalid|can't be|no such|exists|not|no ", message) is not None
    )


def judge(target, case, mode):
    """A verdict and what there is to say about it."""
    with _in_mode(mode):
        arguments = _valid(target, mode)
        valid = arguments[case.argument]
        value = case.variant.value(valid)
        if mode == "gradient" and isinstance(value, paddle.Tensor) and paddle.is_floating_point(value):
            with contextlib.suppress(Exception):
                value.stop_gradient = False
        try:
            found = _call(target, {**arguments, case.argument: value})
        except Exception as error:
            if case.variant.plain not in (REFUSED, EITHER):
                return "wrong", f"{type(error).__name__}: {error}"[:600]
            if not is_clear(error, case, target):
                return "unclear", f"{type(error).__name__}: {error}"[:600]
            return "refused", f"{type(error).__name__}: {error}"[:600]
        plain = case.variant.plain
        if plain is REFUSED:
            return "silent", f"gave {type(found).__name__}"
        if plain is ANY_EMPTY:
            empty = all(part.size == 0 for part in _numbers(found) if isinstance(part, np.ndarray))
            return ("right", "") if empty else ("wrong", "a result with elements, of none")
        if plain not in (ANY, EITHER):
            difference = _difference(found, _call(target, {**_valid(target, mode), case.argument: plain(valid)}))
            if difference is not None:
                return "wrong", difference
        return "right", ""


def _serve(requests, answer):
    for line in requests:
        name, mode, first = json.loads(line)
        target = target_of(name)
        cases = cases_of(target, mode)
        faulthandler.dump_traceback_later(_SECONDS, exit=True)
        for number in range(first, len(cases)):
            answer([number, "begun", ""])
            answer([number, *judge(target, cases[number], mode)])
        faulthandler.cancel_dump_traceback_later()
        answer([len(cases), "end", ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Paddle prints is no answer
    _serve(sys.stdin, lambda line: print(json.dumps(line), file=output))
