"""The description of an attention block: its tensors, numbers and switches.

A function or a layer makes and checks it from the user's arguments. It is handed on whole to whatever computes the
block: the operator, ordinary ops, or both where the heads are spread over processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
from paddle.base.framework import EagerParamBase

from ._checks import INFINITY, check_number, check_seed, check_switches, check_tensor

MODES = ("upscale_in_train", "downscale_in_infer")


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
        # Each check tries the usual types first, to keep a call in dygraph at a few microseconds.
        fields: Any = self
        tensors, numbers, switches = fields[OF_TENSORS], fields[OF_NUMBERS], fields[OF_SWITCHES]
        x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, _, _, _ = tensors
        if x is None or qkv_weight is None or linear_weight is None or not _USUAL_TYPES.issuperset(map(type, tensors)):
            for i, value in enumerate(tensors):
                check_tensor(TENSORS[i], value, required=i < 3)
        changes: dict[str, Any] = {}
        pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate = numbers
        if not (
            type(pre_ln_epsilon) is type(ln_epsilon) is type(dropout_rate) is type(attn_dropout_rate) is float
            and 0.0 <= pre_ln_epsilon < INFINITY
            and 0.0 <= ln_epsilon < INFINITY
            and 0.0 <= dropout_rate <= 1.0
            and 0.0 <= attn_dropout_rate <= 1.0
        ):
            for name, value in zip(Block._fields[OF_NUMBERS], numbers):
                changes[name] = check_number(name, value, 0.0, 1.0 if name.endswith("_rate") else INFINITY)
        pre_layer_norm, training, final_layer_norm, add_residual, causal, mode, seed = switches
        if not isinstance(mode, str) or mode not in MODES:
            raise ValueError(f"mode: expected {MODES[0]!r} or {MODES[1]!r}, got {mode!r}")
        if seed is not None and check_seed("seed", seed) is not seed:
            changes["seed"] = int(seed)
        if not (
            type(pre_layer_norm)
            is type(training)
            is type(final_layer_norm)
            is type(add_residual)
            is type(causal)
            is bool
        ):
            named = dict(zip(Block._fields[OF_SWITCHES], switches[:-2]))
            check_switches(**named)
            changes.update((name, bool(value)) for name, value in named.items())
        block = self._replace(**changes) if changes else self
        if not pre_layer_norm and not (pre_ln_scale is pre_ln_bias is None):
            block = block._without_norm_parameters("pre_ln_scale")
        if not final_layer_norm and not (ln_scale is ln_bias is None):
            block = block._without_norm_parameters("ln_scale")
        return block

    def _without_norm_parameters(self, scale: str) -> Block:
        """The block without a layer norm's scale and bias, in a fraction of the time that _replace takes."""
        at = self._fields.index(scale)
        return Block._make((*self[:at], None, None, *self[at + 2 :]))


OF_TENSORS = slice(Block._fields.index("pre_ln_epsilon"))
OF_NUMBERS = slice(OF_TENSORS.stop, Block._fields.index("pre_layer_norm"))
OF_SWITCHES = slice(OF_NUMBERS.stop, None)
TENSORS = Block._fields[OF_TENSORS]
_USUAL_TYPES = frozenset((type(None), paddle.Tensor, EagerParamBase))
