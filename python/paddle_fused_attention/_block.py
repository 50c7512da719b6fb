"""The description of an attention block: its tensors, numbers and switches.

A function or a layer makes and checks it from the user's arguments. It is handed on whole to whatever computes the
block: the operator, ordinary ops, or both where the heads are spread over processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ._descriptions import MODES, checked_fields, without_fields


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

    mode: str = MODES[0]
    seed: int | None = None

    @property
    def tensors(self) -> tuple:
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
        return checked


OF_TENSORS = slice(Block._fields.index("pre_ln_epsilon"))
OF_NUMBERS = slice(OF_TENSORS.stop, Block._fields.index("pre_layer_norm"))
_OF_BOOLS = slice(OF_NUMBERS.stop, Block._fields.index("mode"))
TENSORS = Block._fields[OF_TENSORS]
