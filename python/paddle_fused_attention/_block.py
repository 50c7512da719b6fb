"""The description of an attention block: its tensors, numbers and switches.

A function or a layer makes and checks it from the user's arguments. It is handed on whole to whatever computes the
block: its operator, or the smaller ones.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

from paddle.framework import in_dynamic_mode

from ._checks import INFINITY, check_number, check_tensor, check_window, shown
from ._descriptions import MODES, checked_fields, without_fields
from ._types import Mode


class Scores(NamedTuple):
    """What is said of the scores beside the mask and `causal`.

    Only the result of :meth:`checked` is handed on.
    """

    scale: float | None = None  # None: head_dim ** -0.5
    window: Any = None  # how many keys before and after itself a query sees, -1: all; or None
    max_seqlen: int | None = None  # of packed sequences the longest

    def checked(self, cu_seqlens: Any) -> Scores:
        """With a pair for the window and an int for `max_seqlen`, which is 0 without cu_seqlens."""
        scale = self.scale if self.scale is None else check_number("scale", self.scale, -INFINITY, INFINITY)
        return Scores(
            scale,
            check_window("window_size", self.window),
            _checked_longest("max_seqlen", self.max_seqlen, "cu_seqlens", cu_seqlens),
        )


PLAIN_SCORES = Scores(None, (-1, -1), 0)
# What ends the description of a block of whole sequences without a window.
UNPACKED = (None, PLAIN_SCORES)


def scores_of(scale: Any, window: Any, max_seqlen: Any, cu_seqlens: Any) -> Scores:
    """What a call says of the scores: PLAIN_SCORES itself where it says nothing, to keep most calls short."""
    if scale is window is max_seqlen is cu_seqlens is None:
        return PLAIN_SCORES
    return Scores._make((scale, window, max_seqlen))


def _checked_longest(name: str, longest: Any, starts_name: str, starts: Any) -> int:
    """The length of the longest sequence, which in dygraph need not be given."""
    check_tensor(starts_name, starts)
    if starts is None:
        if longest is not None:
            raise ValueError(f"{name}: expected None without {starts_name}, got {shown(longest)}")
        return 0
    if longest is None:
        if not in_dynamic_mode():
            raise ValueError(f"{name}: expected an int beside {starts_name} while a graph is built, got None")
        lengths = starts[1:] - starts[:-1]
        return int(lengths.max()) if lengths.size else 0
    if isinstance(longest, bool) or not isinstance(longest, Integral) or not 0 <= int(longest) < 2**31:
        raise ValueError(f"{name}: expected an int of at least 0 and less than 2^31, got {shown(longest)}")
    return int(longest)


class Block(NamedTuple):
    """The arguments of :func:`paddle_fused_attention.fused_multi_head_attention`, which says what they mean.

    It is a tuple because every call makes one. Only the result of :meth:`checked` is handed on. Code that may be traced
    makes it by `_make`: Paddle 2.6's to_static with full_graph=False hands no arguments to a call of the class.
    """

    # The operator's inputs, in its order.
    x: Any
    qkv_weight: Any
    linear_weight: Any
    pre_ln_scale: Any = None
    pre_ln_bias: Any = None
    ln_scale: Any = None
    ln_bias: Any = None
    qkv_bias: Any = None
    linear_bias: Any = None
    attn_mask: Any = None

    pre_ln_epsilon: float = 1e-5
    ln_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    attn_dropout_rate: float = 0.0

    pre_layer_norm: bool = False
    training: bool = True
    final_layer_norm: bool = True
    add_residual: bool = True
    causal: bool = False

    mode: Mode = MODES[0]
    seed: int | None = None

    cu_seqlens: Any = None  # the operator's last input
    scores: Scores = PLAIN_SCORES

    @property
    def tensors(self) -> tuple[Any, ...]:
        fields: Any = self
        return fields[OF_TENSORS]

    def checked(self) -> Block:
        """The block with floats for numbers, bools for switches, and without the parameters of a layer norm that is
        off.

        Raises:
            TypeError, ValueError: A field is of the wrong type, or a number is out of its range. Whatever computes the
                block checks shapes and dtypes.
        """
        checked = checked_fields(self, 3, OF_NUMBERS, _OF_BOOLS)
        if not checked.pre_layer_norm and not (checked.pre_ln_scale is checked.pre_ln_bias is None):
            checked = without_fields(checked, "pre_ln_scale", "pre_ln_bias")
        if not checked.final_layer_norm and not (checked.ln_scale is checked.ln_bias is None):
            checked = without_fields(checked, "ln_scale", "ln_bias")
        if checked.scores is PLAIN_SCORES:
            return checked
        return checked._replace(scores=checked.scores.checked(checked.cu_seqlens))


OF_TENSORS = slice(Block._fields.index("pre_ln_epsilon"))
OF_NUMBERS = slice(OF_TENSORS.stop, Block._fields.index("pre_layer_norm"))
_OF_BOOLS = slice(OF_NUMBERS.stop, Block._fields.index("mode"))
TENSORS = Block._fields[OF_TENSORS]
