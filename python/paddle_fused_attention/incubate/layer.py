"""``paddle.incubate.nn.FusedMultiHeadAttention`` on this package's operator."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.incubate.nn import FusedMultiHeadAttention as BuiltIn

from .._block import UNPACKED, Block
from .._checks import INFINITY, check_count, check_heads, check_number, check_switches, check_tensor, check_text
from .._composed_attention import Source, composed_attention
from .._descriptions import MODES
from .._groups import group_of_ring
from .._initializers import check_attr
from .._keys import other_keys
from .._loading import LoadsAnyFloat
from .._masks import additive_mask
from ..parallel import parallel_attention
from .functional import fused_multi_head_attention, pack_transposed, seed_of_program

__all__ = ["FusedMultiHeadAttention"]


class FusedMultiHeadAttention(LoadsAnyFloat, BuiltIn):
    """The built-in layer, with its parameters and attributes; only the computation is this package's.

    As a subclass of the built-in it has the same state dict, and whatever in Paddle looks for the built-in finds it:
    AMP's decorator, for one, keeps its layer-norm parameters in float32.

    Parameters: ``qkv_weight`` [3, num_heads, head_dim, embed_dim] and ``qkv_bias`` [3, num_heads, head_dim], with
    ``transpose_qkv_wb`` [embed_dim, 3 * embed_dim] and [3 * embed_dim]; ``linear_weight`` [embed_dim, embed_dim],
    ``linear_bias`` [embed_dim]; ``pre_ln_scale`` and ``pre_ln_bias`` [embed_dim] with ``normalize_before``, else
    ``ln_scale`` and ``ln_bias``.

    Args:
        embed_dim: Width of the input and the output.
        num_heads: A divisor of embed_dim.
        dropout_rate, attn_dropout_rate: The probability of dropping an element of the output projection and of the
            attention.
        kdim, vdim: Unused; the layer is for self-attention.
        normalize_before: Whether the input is layer-normalised (True) or the output (False).
        need_weights: False.
        qkv_weight_attr, qkv_bias_attr, linear_weight_attr, linear_bias_attr, pre_ln_scale_attr, pre_ln_bias_attr,
            ln_scale_attr, ln_bias_attr: ParamAttr of each parameter; False: the parameter is left out. Initializers are
            applied to the parameter as it is stored, as by Paddle: Xavier's and Kaiming's take the packed weight for
            that of a convolution.
        epsilon: Of the layer norm.
        nranks, ring_id: For tensor parallelism the number of processes of a group of ``paddle.distributed.new_group``,
            which divides num_heads, and its id: see the function. 1 and -1: none.
        transpose_qkv_wb: The form of qkv_weight and qkv_bias.
        name: Shown by ``repr``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: embed_dim, num_heads, a rate, epsilon, nranks or ring_id does not fit, or ``need_weights``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout_rate: float = 0.5,
        attn_dropout_rate: float = 0.5,
        kdim: int | None = None,
        vdim: int | None = None,
        normalize_before: bool = False,
        need_weights: bool = False,
        qkv_weight_attr: Any = None,
        qkv_bias_attr: Any = None,
        linear_weight_attr: Any = None,
        linear_bias_attr: Any = None,
        pre_ln_scale_attr: Any = None,
        pre_ln_bias_attr: Any = None,
        ln_scale_attr: Any = None,
        ln_bias_attr: Any = None,
        epsilon: float = 1e-5,
        nranks: int = 1,
        ring_id: int = -1,
        transpose_qkv_wb: bool = False,
        name: str | None = None,
    ) -> None:
        embed_dim, num_heads = check_heads(embed_dim, num_heads)
        check_switches(normalize_before=normalize_before, need_weights=need_weights, transpose_qkv_wb=transpose_qkv_wb)
        if need_weights:
            raise ValueError("need_weights: expected False, since the attention weights are never stored, got True")
        dropout_rate = check_number("dropout_rate", dropout_rate, 0.0, 1.0)
        attn_dropout_rate = check_number("attn_dropout_rate", attn_dropout_rate, 0.0, 1.0)
        epsilon = check_number("epsilon", epsilon, 0.0, INFINITY)
        for argument, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_count(argument, width)
        check_text("name", name)
        group_of_ring(ring_id, check_count("nranks", nranks))
        if num_heads % nranks:
            raise ValueError(f"num_heads: expected a multiple of nranks {nranks}, got {num_heads}")
        part, head_dim = num_heads // nranks, embed_dim // num_heads
        columns = 3 * part * head_dim
        check_attr(
            "qkv_weight_attr",
            qkv_weight_attr,
            [embed_dim, columns] if transpose_qkv_wb else [3, part, head_dim, embed_dim],
            is_needed=True,
        )
        check_attr("qkv_bias_attr", qkv_bias_attr, [columns] if transpose_qkv_wb else [3, part, head_dim])
        check_attr("linear_weight_attr", linear_weight_attr, [part * head_dim, embed_dim], is_needed=True)
        for argument, attr in (
            ("linear_bias_attr", linear_bias_attr),
            ("pre_ln_scale_attr", pre_ln_scale_attr),
            ("pre_ln_bias_attr", pre_ln_bias_attr),
            ("ln_scale_attr", ln_scale_attr),
            ("ln_bias_attr", ln_bias_attr),
        ):
            check_attr(argument, attr, [embed_dim])
        super().__init__(
            embed_dim,
            num_heads,
            dropout_rate,
            attn_dropout_rate,
            kdim,
            vdim,
            bool(normalize_before),
            False,
            qkv_weight_attr,
            qkv_bias_attr,
            linear_weight_attr,
            linear_bias_attr,
            pre_ln_scale_attr,
            pre_ln_bias_attr,
            ln_scale_attr,
            ln_bias_attr,
            epsilon,
            nranks,
            ring_id,
            bool(transpose_qkv_wb),
            name,
        )

    def forward(
        self,
        query: paddle.Tensor,
        key: paddle.Tensor | None = None,
        value: paddle.Tensor | None = None,
        attn_mask: paddle.Tensor | None = None,
        cache: paddle.Tensor | None = None,
    ) -> Any:
        """Applies the block to ``query``, in training or evaluation mode.

        Args:
            query: ``[batch, seq_len, embed_dim]``.
            key, value: ``[batch, keys, embed_dim]``; None: the query. Paddle's layer ignores others, which are attended
                to here: see :meth:`paddle_fused_attention.FusedMultiHeadAttention.forward`.
            attn_mask: As in :func:`paddle_fused_attention.incubate.functional.fused_multi_head_attention`; bool and
                integer masks are read as by Paddle's layers, where a query that may see no key attends to all alike.
            cache: ``cache_kv`` of the function, or None.

        Returns:
            ``[batch, seq_len, embed_dim]``, with a cache a tuple of that and the new cache.

        Raises:
            TypeError, ValueError: See the function.
            NotImplementedError: key or value is not the query, and there is a cache.
        """
        check_tensor("query", query, required=True)
        key_value = other_keys(query, key, value)
        if key_value is None:
            return self._attend_to_itself(query, attn_mask, cache)
        return self._attend_to_keys(query, attn_mask, cache, key_value)

    def _attend_to_itself(
        self, query: paddle.Tensor, attn_mask: paddle.Tensor | None, cache: paddle.Tensor | None
    ) -> Any:
        return fused_multi_head_attention(
            query,
            self.qkv_weight,
            self.linear_weight,
            self.normalize_before,
            self.pre_ln_scale,
            self.pre_ln_bias,
            self.ln_scale,
            self.ln_bias,
            self._epsilon,
            self.qkv_bias,
            self.linear_bias,
            cache,
            additive_mask("attn_mask", attn_mask, query),
            self.dropout_rate,
            self.attn_dropout_rate,
            self._epsilon,
            self.training,
            ring_id=self._ring_id,
            num_heads=self.num_heads,
            transpose_qkv_wb=self.transpose_qkv_wb,
            name=self.name,
        )

    @paddle.jit.not_to_static
    def _attend_to_keys(
        self, query: paddle.Tensor, attn_mask: paddle.Tensor | None, cache: paddle.Tensor | None, key_value: tuple
    ) -> paddle.Tensor:
        if cache is not None:
            raise NotImplementedError(
                f"cache: expected None with a key or a value other than query, got {type(cache).__name__}"
            )
        if len(query.shape) != 3:
            raise ValueError(f"query: expected shape [batch, seq_len, embed_dim], got {list(query.shape)}")
        group = group_of_ring(self._ring_id)
        weight, bias = self.qkv_weight, self.qkv_bias
        if self.transpose_qkv_wb:
            weight, bias = pack_transposed(query, weight, bias, self.num_heads, 1 if group is None else group.nranks)
        epsilon = self._epsilon
        mask, before = additive_mask("attn_mask", attn_mask, query), self.normalize_before
        # fmt: off
        block = Block._make((
            query, weight, self.linear_weight, self.pre_ln_scale, self.pre_ln_bias, self.ln_scale, self.ln_bias, bias,
            self.linear_bias, mask, epsilon, epsilon, self.dropout_rate, self.attn_dropout_rate,
            before, self.training, not before, True, False, MODES[0], seed_of_program(), *UNPACKED,
        )).checked()
        # fmt: on
        if group is None:
            return composed_attention(block, Source(*key_value)).out
        return parallel_attention(block, group, key_value)
