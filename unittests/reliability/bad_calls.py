"""All tables of calls, and calls that are wrong, which must be found out."""

import os

from bad_values import Given, Variant
from call_kinds import Target
from calls_of_files import CHECKPOINTS
from calls_of_functions import ATTENTION, FUNCTIONS, OF_INCUBATE
from calls_of_layers import CALLS, CONSTRUCTORS
from calls_of_models import MODELS, PACKING


def _abort(x):
    if x == 2:
        os.abort()
    return float(x)


def _raise(error):
    def call(x):
        if x == 2:
            raise error
        return float(x)

    return call


# What must be found out: the verdicts on a call with 2, and on one with 1.0, which stands for 1.
_X = {"x": Given(lambda: 1, [Variant("2", lambda _: 2), Variant("1.0", lambda _: 1.0, lambda _: 1)])}
FAULTS = {
    "crash, right": Target(_abort, _X),
    "silent, right": Target(lambda x: float(x), _X),
    "silent, wrong": Target(lambda x: repr(x), _X),
    "unclear, right, by what it says": Target(_raise(ValueError("expected 1, got 2")), _X),
    "unclear, right, by its type": Target(_raise(AttributeError("x: expected 1, got 2")), _X),
    "unclear, right, by its lines": Target(_raise(ValueError("x: expected 1\ngot 2")), _X),
    "refused, right": Target(_raise(ValueError("x: expected 1, got 2")), _X),
}

TARGETS = {
    **FUNCTIONS,
    **ATTENTION,
    **OF_INCUBATE,
    **CONSTRUCTORS,
    **CALLS,
    **MODELS,
    **PACKING,
    **CHECKPOINTS,
}
