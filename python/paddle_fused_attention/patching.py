"""Puts this package in the place of ``paddle.incubate.nn``'s fused layers and functions, and of Paddle's functions of
attention, and takes it out again.

Paddle hands functions and classes from module to module by name, so every module of Paddle that holds one of them is
given ours.
"""

from __future__ import annotations

import sys
from typing import Any

import paddle.incubate.nn.functional
import paddle.incubate.nn.memory_efficient_attention
import paddle.nn.functional.flash_attention

from . import attention_functional, functional, incubate, varlen_functional
from ._checks import check_switches

_BLOCKS = (
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


def _functions_of_attention() -> tuple:
    """Those that the installed Paddle has, with ours."""
    # By sys.modules: the attributes paddle.nn.functional.flash_attention and the like may be other objects of the name.
    names = ("nn.functional", "nn.functional.flash_attention", "incubate.nn.memory_efficient_attention")
    modules = [vars(sys.modules[f"paddle.{name}"]) for name in names]
    return tuple(
        (module[name], getattr(functional, name))
        for module in modules
        for name in (*attention_functional.__all__, *varlen_functional.__all__)
        if callable(module.get(name))
    )


_ATTENTION = _functions_of_attention()
_patches: list[bool] = []  # of each that holds, whether it has attention


def _replace(pairs: Any) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "paddle":
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            for old, new in pairs:
                if value is old:
                    setattr(module, name, new)


def _undo(pairs: Any) -> None:
    _replace([(new, old) for old, new in pairs])


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


def patch(attention: bool = False) -> _Patched:
    """Makes the fused layers of ``paddle.incubate.nn`` and the fused functions of ``paddle.incubate.nn.functional``
    those that :mod:`paddle_fused_attention.incubate` has.

    It holds at once wherever Paddle itself uses them (layers that exist already, too) and
    in code that imports them from Paddle afterwards. A module that imported them before keeps Paddle's. Calls may be
    nested: each :func:`unpatch` undoes one, and after the last Paddle has its own objects again.

    Args:
        attention: Whether also ``scaled_dot_product_attention``, ``flash_attention``, ``flash_attn_qkvpacked``,
            ``flash_attn_unpadded``, ``flash_attn_varlen_qkvpacked``, ``flashmask_attention`` and
            ``memory_efficient_attention``, as far as Paddle has them, become those of
            :mod:`paddle_fused_attention.functional`.

    Returns:
        A context manager: ``with patch(): ...`` calls :func:`unpatch` at its end.

    Raises:
        TypeError: `attention` is not a bool.
    """
    check_switches(attention=attention)
    if not _patches:
        _replace(_BLOCKS)
    if attention and not any(_patches):
        _replace(_ATTENTION)
    _patches.append(bool(attention))
    return _Patched()


def unpatch() -> None:
    """Undoes the last :func:`patch`.

    Raises:
        RuntimeError: There is none to undo.
    """
    if not _patches:
        raise RuntimeError("unpatch: expected a patch() to undo, got none")
    had_attention = _patches.pop()
    if had_attention and not any(_patches):
        _undo(_ATTENTION)
    if not _patches:
        _undo(_BLOCKS)
