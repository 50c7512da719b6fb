"""Puts this package in the place of ``paddle.incubate.nn``'s fused layers and functions, and takes it out again.

Paddle hands functions and classes from module to module by name, so every module of Paddle that holds one of them is
given ours.
"""

from __future__ import annotations

import sys
from typing import Any

import paddle.incubate.nn.functional

from . import incubate

_REPLACEMENTS = (
    *(
        (getattr(paddle.incubate.nn, name), getattr(incubate, name))
        for name in incubate.__all__
        if name != "functional"
    ),
    *(
        (getattr(paddle.incubate.nn.functional, name), getattr(incubate.functional, name))
        for name in incubate.functional.__all__
    ),
)
_patch_depth = 0


def _replace(pairs: Any) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "paddle":
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            for old, new in pairs:
                if value is old:
                    setattr(module, name, new)


class _Patched:
    """What patch() returns: a context at whose end that patch() is undone."""

    def __init__(self) -> None:
        self._active = True

    def __enter__(self) -> None:
        if not self._active:
            raise RuntimeError("patch: expected a new patch() for every with statement, got one that has ended")

    def __exit__(self, *_: Any) -> None:
        self._active = False
        unpatch()


def patch() -> _Patched:
    """Makes the fused layers of ``paddle.incubate.nn`` and the fused functions of ``paddle.incubate.nn.functional``
    those that :mod:`paddle_fused_attention.incubate` has.

    It holds at once wherever Paddle itself uses them (layers that exist already, too) and
    in code that imports them from Paddle afterwards. A module that imported them before keeps Paddle's. Calls may be
    nested: each :func:`unpatch` undoes one, and after the last Paddle has its own objects again.

    Returns:
        A context manager: ``with patch(): ...`` calls :func:`unpatch` at its end.
    """
    global _patch_depth
    if _patch_depth == 0:
        _replace(_REPLACEMENTS)
    _patch_depth += 1
    return _Patched()


def unpatch() -> None:
    """Undoes the last :func:`patch`.

    Raises:
        RuntimeError: There is none to undo.
    """
    global _patch_depth
    if _patch_depth == 0:
        raise RuntimeError("unpatch: expected a patch() to undo, got none")
    _patch_depth -= 1
    if _patch_depth == 0:
        _replace([(new, old) for old, new in _REPLACEMENTS])
