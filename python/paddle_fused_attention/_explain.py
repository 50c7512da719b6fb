"""Which implementation of attention a call takes, and why not a faster one. The compiled library answers, from the
lists by which it chooses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import paddle

from ._checks import check_count, shown
from ._op import library

# What the library calls the dtypes.
ELEMENTS = {"float32": 32, "float64": 64, "float16": 16, "bfloat16": -16}

_explain = library.custom_fused_attention_explain
_explain.restype = ctypes.c_char_p


@dataclass(frozen=True)
class Choice:
    """The implementation that one pass takes, and those that are faster, each with the reason why it does not serve."""

    implementation: str
    rejected: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; as a string, a line for each pass and for each implementation that it passes over."""

    device: str
    dtype: str
    head_dim: int
    forward: Choice
    backward: Choice

    def __str__(self) -> str:
        lines = [f"attention on {self.device}, {self.dtype}, head_dim {self.head_dim}"]
        for name, choice in (("forward", self.forward), ("backward", self.backward)):
            lines.append(f"  {name:10}{choice.implementation}")
            lines.extend(f"{'':12}not {rejected}: {reason}" for rejected, reason in choice.rejected.items())
        return "\n".join(lines)


def explain(head_dim: int, dtype: Any = None, device: str | None = None) -> Explanation:
    """Tells which implementation of attention a call takes, and why not a faster one. Computes nothing.

    On the CPU an implementation is the instruction set that all of the block is compiled for: "amx", "avx512_bf16",
    "avx512", "avx2" or "baseline". On a GPU it is a family of attention kernels: "hopper", "mma" or "plain". Masks,
    dropout and other sizes don't matter to the choice. Tensors are taken to begin at multiples of 16 bytes, as Paddle's
    do.

    Args:
        head_dim: The numbers of one head, at least 1 and less than 2^31.
        dtype: That of the weights: float32, float64, float16 or bfloat16, as a string or Paddle's dtype. None: Paddle's
            default dtype.
        device: "cpu", "gpu" or "gpu:N". None: Paddle's current device.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or out of its range, or the device is not there or has
            no kernels in this build.
    """
    check_count("head_dim", head_dim)
    name = _name_of(paddle.get_default_dtype() if dtype is None else dtype)
    if name not in ELEMENTS:
        raise ValueError(f"dtype: expected one of {', '.join(ELEMENTS)}, got {shown(dtype)}")
    where = paddle.get_device() if device is None else device
    if not isinstance(where, str):
        raise TypeError(f"device: expected a string, got {type(where).__name__}")
    answer = _explain(
        ctypes.c_int32(card_number(where)), ctypes.c_int32(ELEMENTS[name]), ctypes.c_int64(head_dim)
    ).decode()
    if answer.startswith("!"):
        raise ValueError(f"device: {shown(where)}: {answer[1:]}")
    choices: dict[str, Choice] = {}
    rejected: dict[str, str] = {}
    for line in answer.splitlines():
        direction, implementation, why_not = line.split("\t")
        if why_not:
            rejected[implementation] = why_not
        else:
            choices[direction] = Choice(implementation, rejected)
            rejected = {}
    if len(choices) < 2:
        raise ValueError(f"head_dim: no implementation serves {head_dim}: {'; '.join(rejected.values())}")
    return Explanation(where, name, int(head_dim), choices["forward"], choices["backward"])


def _name_of(dtype: Any) -> str:
    try:
        return str(dtype).split(".")[-1].lower()
    except Exception:  # of what is no dtype
        return ""


def card_number(device: str) -> int:
    """The GPU's number, or -1 for the CPU. Raises ValueError for what is no device, or not there."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "gpu") or (number and not number.isdecimal()) or (kind == "cpu" and number not in ("", "0")):
        raise ValueError(f"device: expected 'cpu', 'gpu' or 'gpu:N', got {shown(device)}")
    if kind == "cpu":
        return -1
    count = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if len(number) > 9 or int(number or 0) >= count:  # Python makes no int of thousands of digits
        raise ValueError(f"device: expected one of the {count} GPUs that Paddle sees, got {shown(device)}")
    return int(number or 0)
