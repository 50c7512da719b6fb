"""The fused attention block as a layer."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from ._block import TENSORS, Block, scores_of
from ._caches import Cache, StaticCache, attention_with_cache
from ._checks import (
    INFINITY,
    check_count,
    check_heads,
    check_number,
    check_switches,
    check_tensor,
    check_text,
    check_window,
    shown,
)
from ._composed_attention import Projections, Source, projected_keys, results_of
from ._descriptions import MODES
from ._initializers import param_attr_of
from ._keys import other_keys
from ._loading import LoadsAnyFloat
from ._parts import is_plain, origin_of_forward, parameters_of, reason_against_linear
from ._wide_norms import WideNorms
from .functional import self_attention
from .weights import pack_qkv_bias, pack_qkv_weight, unpack_qkv_bias, unpack_qkv_weight

_PARAMETERS = TENSORS[1:-1]  # all but x and the mask
_UNPACKED = Projections._fields[:-1]  # in the place of qkv_weight and qkv_bias


class FusedMultiHeadAttention(WideNorms, LoadsAnyFloat):
    """Attention with layer norm, projections, dropout and residual, self-attention as one operator: see
    :func:`fused_multi_head_attention` for the meaning.

    Parameters, None where they are absent: ``qkv_weight`` [3, num_heads, head_dim, embed_dim] and ``qkv_bias``
    [3, num_heads, head_dim], with fewer ``num_kv_heads`` [num_heads + 2 * num_kv_heads, head_dim, embed_dim] and
    [num_heads + 2 * num_kv_heads, head_dim]; ``linear_weight`` [embed_dim, embed_dim], ``linear_bias`` [embed_dim];
    with ``normalize_before`` also ``pre_ln_scale`` and ``pre_ln_bias`` [embed_dim], with ``final_layer_norm`` also
    ``ln_scale`` and ``ln_bias`` [embed_dim]. If kdim or vdim is another than embed_dim, ``q_weight`` [embed_dim,
    embed_dim], ``k_weight`` [kdim, num_kv_heads * head_dim] and ``v_weight`` [vdim, num_kv_heads * head_dim], in
    ``paddle.nn.Linear``'s layout, and ``q_bias``, ``k_bias`` and ``v_bias`` take the place of ``qkv_weight`` and
    ``qkv_bias``.

    Args:
        embed_dim: Width of the input and the output.
        num_heads: A divisor of embed_dim.
        dropout_rate: The probability of dropping an element of the output projection, in [0, 1].
        attn_dropout_rate: The probability of dropping an element of the attention, in [0, 1].
        kdim, vdim: Widths of keys and values; None: embed_dim.
        normalize_before: Whether the input is layer-normalised before the QKV projection.
        need_weights: Whether calls return the attention's weights as well, which an operator of their own computes
            from what attention saved. The result is the same as without, in training too.
        weight_attr: ParamAttr of all weights but the layer norms'; by default Xavier's uniform initialisation. An
            initializer, also one of ``paddle.nn.initializer.set_global_initializer``, is applied as to the separate
            weights of query, key and value, [embed_dim, embed_dim] (in, out), which are then packed. Layer-norm scales
            always begin at one.
        bias_attr: ParamAttr of every bias, those of the layer norms included, read likewise; False: no biases.
        name: Prefix of the parameters' names.
        epsilon: Of both layer norms.
        final_layer_norm: Whether the sum with the residual is layer-normalised.
        causal: Whether query i sees the keys up to i only.
        add_residual: Whether the input is added to the output.
        num_kv_heads: The heads of keys and values, a divisor of num_heads; None: num_heads. Query head h reads head
            ``h // (num_heads // num_kv_heads)`` of them.
        window_size, scale: As in :func:`fused_multi_head_attention`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit: ``normalize_before`` needs keys and
            values as wide as the query.
    """

    Cache = Cache
    StaticCache = StaticCache

    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    num_kv_heads: int
    window_size: tuple[int, int] | None
    scale: float | None
    need_weights: bool
    dropout_rate: float
    attn_dropout_rate: float
    normalize_before: bool
    epsilon: float
    final_layer_norm: bool
    causal: bool
    add_residual: bool
    qkv_weight: paddle.Tensor | None
    qkv_bias: paddle.Tensor | None
    q_weight: paddle.Tensor | None
    k_weight: paddle.Tensor | None
    v_weight: paddle.Tensor | None
    q_bias: paddle.Tensor | None
    k_bias: paddle.Tensor | None
    v_bias: paddle.Tensor | None
    linear_weight: paddle.Tensor
    linear_bias: paddle.Tensor | None
    pre_ln_scale: paddle.Tensor | None
    pre_ln_bias: paddle.Tensor | None
    ln_scale: paddle.Tensor | None
    ln_bias: paddle.Tensor | None

    _norm_parameters = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")

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
        weight_attr: Any = None,
        bias_attr: Any = None,
        name: str | None = None,
        *,
        epsilon: float = 1e-5,
        final_layer_norm: bool = True,
        causal: bool = False,
        add_residual: bool = True,
        num_kv_heads: int | None = None,
        window_size: int | tuple[int, int] | None = None,
        scale: float | None = None,
    ) -> None:
        check_text("name", name)
        super().__init__(name_scope=name)
        embed_dim, num_heads = self.embed_dim, self.num_heads = check_heads(embed_dim, num_heads)
        self.head_dim = embed_dim // num_heads
        check_switches(
            normalize_before=normalize_before,
            need_weights=need_weights,
            final_layer_norm=final_layer_norm,
            causal=causal,
            add_residual=add_residual,
        )
        self.kdim, self.vdim = (
            embed_dim if width is None else check_count(argument, width)
            for argument, width in (("kdim", kdim), ("vdim", vdim))
        )
        is_narrow = self.kdim == self.vdim == embed_dim
        if normalize_before and not is_narrow:
            raise ValueError(
                f"normalize_before: expected False with kdim {self.kdim} and vdim {self.vdim}, since the layer norm is "
                f"over embed_dim {embed_dim}, got True"
            )
        self.num_kv_heads = num_heads if num_kv_heads is None else check_count("num_kv_heads", num_kv_heads)
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {num_heads}, got {self.num_kv_heads}")
        self.window_size = None if window_size is None else check_window("window_size", window_size)
        self.scale = None if scale is None else check_number("scale", scale, -INFINITY, INFINITY)
        self.need_weights = bool(need_weights)
        self.dropout_rate = check_number("dropout_rate", dropout_rate, 0.0, 1.0)
        self.attn_dropout_rate = check_number("attn_dropout_rate", attn_dropout_rate, 0.0, 1.0)
        self.normalize_before = bool(normalize_before)
        self.epsilon = check_number("epsilon", epsilon, 0.0, INFINITY)
        self.final_layer_norm = bool(final_layer_norm)
        self.causal = bool(causal)
        self.add_residual = bool(add_residual)

        head_dim, kv_heads = self.head_dim, self.num_kv_heads
        columns = [num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        heads = [3, num_heads] if kv_heads == num_heads else [num_heads + 2 * kv_heads]
        xavier = nn.initializer.XavierUniform()

        def weight(parameter_name: str, shape: list[int], columns: list[int] | None = None) -> Any:
            attr = param_attr_of("weight_attr", weight_attr, parameter_name, shape, False, columns, xavier)
            return self.create_parameter(shape, attr)

        def bias(parameter_name: str, shape: list[int], columns: list[int] | None = None) -> Any:
            attr = param_attr_of("bias_attr", bias_attr, parameter_name, shape, True, columns)
            return None if attr is False else self.create_parameter(shape, attr, is_bias=True)

        def norm_scale() -> Any:
            # As an attribute, since a global initializer replaces a default.
            ones = paddle.ParamAttr(initializer=nn.initializer.Constant(1.0))
            return self.create_parameter([embed_dim], ones)

        if is_narrow:
            self.qkv_weight = weight("qkv_weight", [*heads, head_dim, embed_dim], columns)
            self.qkv_bias = bias("qkv_bias", [*heads, head_dim], columns)
        else:
            self.qkv_weight = self.qkv_bias = None
        for name, width, count in zip("qkv", (embed_dim, self.kdim, self.vdim), columns):
            setattr(self, f"{name}_weight", None if is_narrow else weight(f"{name}_weight", [width, count]))
            setattr(self, f"{name}_bias", None if is_narrow else bias(f"{name}_bias", [count]))
        self.linear_weight = weight("linear_weight", [embed_dim, embed_dim])
        self.linear_bias = bias("linear_bias", [embed_dim])
        self.pre_ln_scale = norm_scale() if self.normalize_before else None
        self.pre_ln_bias = bias("pre_ln_bias", [embed_dim]) if self.normalize_before else None
        self.ln_scale = norm_scale() if self.final_layer_norm else None
        self.ln_bias = bias("ln_bias", [embed_dim]) if self.final_layer_norm else None

    def forward(
        self,
        query: paddle.Tensor,
        key: paddle.Tensor | None = None,
        value: paddle.Tensor | None = None,
        attn_mask: paddle.Tensor | None = None,
        cache: Any = None,
        cu_seqlens: paddle.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        """Applies the block to ``query``.

        Args:
            query: ``[batch, seq_len, embed_dim]``, in the parameters' dtype, or float32 beside 16-bit projections; with
                ``cu_seqlens`` ``[tokens, embed_dim]``.
            key, value: ``[batch, keys, kdim]`` and ``[batch, keys, vdim]``, in query's dtype; None: the query. One
                operator computes all if both are the query: the same tensor or, in dygraph if the three want no
                gradient, one of the same contents. Otherwise projections, attention and the rest are an operator each,
                with the same meaning, gradients and, in dygraph, dropout. ``causal`` is then aligned at the end, and
                ``normalize_before`` normalises all three. What is the same tensor is projected by one product.
            attn_mask: As in :func:`fused_multi_head_attention`, for ``[batch, num_heads, seq_len, keys]``, where keys
                are those of a Cache too.
            cache: A ``paddle.nn.MultiHeadAttention.Cache``, whose keys and values come before those of this call, or
                StaticCache, which holds them all, so that key and value are not read; see :meth:`gen_cache`.
            cu_seqlens, max_seqlen: Of packed sequences, as in :func:`fused_multi_head_attention`.

        Returns:
            The shape of query. With ``need_weights`` or a cache a tuple of that, the weights
            ``[batch, num_heads, seq_len, keys]`` after dropout if they are needed, and the new cache if there is one.

        Raises:
            NotImplementedError: Other keys are auto-parallel tensors, or packed sequences have other keys or are asked
                for weights.
            TypeError, ValueError: See :func:`fused_multi_head_attention`; or a cache does not fit.
        """
        key_value = None if isinstance(cache, StaticCache) else other_keys(query, key, value)
        block = self._block(query, attn_mask, cu_seqlens, max_seqlen)
        if key_value is None and cache is None and not self.need_weights and self.qkv_weight is not None:
            return self._run(block)
        return self._run_composed(block, self._source(*(key_value or (None, None))), cache)

    def gen_cache(self, key: paddle.Tensor, value: paddle.Tensor | None = None, type: Any = Cache) -> Any:
        """Makes a cache for :meth:`forward`, as ``paddle.nn.MultiHeadAttention.gen_cache`` does.

        Args:
            key, value: For a StaticCache ``[batch, keys, kdim]`` and ``[batch, keys, vdim]``, None for the key: the
                cache holds their projections. For a Cache the ``[batch, num_kv_heads, length, head_dim]`` that it
                holds; without a value it is empty, for the batch of key.
            type: ``paddle.nn.MultiHeadAttention.Cache`` or ``StaticCache``.

        Raises:
            TypeError, ValueError: An argument is of the wrong type, or does not fit.
        """
        check_tensor("key", key, required=True)
        check_tensor("value", value)
        if type is StaticCache:
            block = self._block(key, None, None, None)
            return StaticCache(*projected_keys(block, self._source(key, key if value is None else value)))
        if type is not Cache:
            raise TypeError(f"type: expected paddle.nn.MultiHeadAttention.Cache or StaticCache, got {shown(type)}")
        if value is not None:
            return Cache(key, value)
        batch = key.shape[0] if key.shape[0] >= 0 else paddle.shape(key)[0]
        weight = self.linear_weight
        empty = paddle.zeros([batch, self.num_kv_heads, 0, self.head_dim], weight.dtype)
        return Cache(empty, empty)

    @paddle.jit.not_to_static
    def _source(self, key: Any, value: Any) -> Source:
        projections = None
        if self.qkv_weight is None:
            projections = Projections._make((*parameters_of(self, _UNPACKED), self.num_heads))
        return Source(key, value, projections, needs_weights=self.need_weights)

    @paddle.jit.not_to_static
    def _block(
        self,
        query: paddle.Tensor,
        attn_mask: paddle.Tensor | None,
        cu_seqlens: paddle.Tensor | None,
        max_seqlen: int | None,
    ) -> Block:
        epsilon = self.epsilon
        qkv_weight, *others = parameters_of(self, _PARAMETERS)
        if qkv_weight is None:  # the source has the projections
            (qkv_weight,) = parameters_of(self, _UNPACKED[:1])
        # fmt: off
        return Block._make((
            query, qkv_weight, *others, attn_mask,
            epsilon, epsilon, self.dropout_rate, self.attn_dropout_rate,
            self.normalize_before, self.training, self.final_layer_norm, self.add_residual, self.causal, MODES[0], None,
            cu_seqlens, scores_of(self.scale, self.window_size, max_seqlen, cu_seqlens),
        )).checked()
        # fmt: on

    def _run(self, block: Block) -> paddle.Tensor:
        return self_attention(block)

    def _run_composed(self, block: Block, source: Source, cache: Any) -> Any:
        return results_of(*attention_with_cache(block, source, cache))

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments for such a layer, but for its parameters' attributes."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "dropout_rate": self.dropout_rate,
            "attn_dropout_rate": self.attn_dropout_rate,
            "normalize_before": self.normalize_before,
            "epsilon": self.epsilon,
            "final_layer_norm": self.final_layer_norm,
            "causal": self.causal,
            "add_residual": self.add_residual,
            **{name: value for name, value in self._further_settings().items() if value is not None},
        }

    def _further_settings(self) -> dict[str, Any]:
        """Those that most layers leave out, None where they do."""
        return {
            "kdim": None if self.kdim == self.embed_dim else self.kdim,
            "vdim": None if self.vdim == self.embed_dim else self.vdim,
            "need_weights": self.need_weights or None,
            "num_kv_heads": None if self.num_kv_heads == self.num_heads else self.num_kv_heads,
            "window_size": self.window_size,
            "scale": self.scale,
        }

    def extra_repr(self) -> str:
        shown = {**self._settings(), "bias": self.linear_bias is not None}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    @classmethod
    def from_multi_head_attention(
        cls,
        mha: nn.MultiHeadAttention,
        norm: nn.LayerNorm | None = None,
        normalize_before: bool = False,
        *,
        dropout_rate: float = 0.0,
        causal: bool = False,
        add_residual: bool = True,
    ) -> FusedMultiHeadAttention:
        """The block that a MultiHeadAttention and the layer norm beside it make up, with copies of their parameters.

        Without ``normalize_before`` the layer computes ``norm(x + dropout(mha(x)))``, with it
        ``x + dropout(mha(norm(x)))``; where ``norm`` is None there is no layer norm.

        Args:
            mha: With or without biases. Its dropout becomes ``attn_dropout_rate``.
            norm: A LayerNorm over embed_dim, with or without scale and bias, or None.
            normalize_before: Where the layer norm stands.
            dropout_rate: Of the output projection.
            causal, add_residual: As in the constructor.

        Raises:
            TypeError: mha or norm is not of exactly its class, since a subclass may compute something else, or a
                projection is no ``paddle.nn.Linear``.
            ValueError: The layer norm is over another shape, only some projections have biases, or a layer has hooks, a
                forward of its own or, as under weight_norm, parameters beside its weight and bias; or see the
                constructor.
        """
        if type(mha) is not nn.MultiHeadAttention:
            raise TypeError(f"mha: expected a paddle.nn.MultiHeadAttention, got {type(mha).__name__}")
        if norm is not None and type(norm) is not nn.LayerNorm:
            raise TypeError(f"norm: expected a paddle.nn.LayerNorm or None, got {type(norm).__name__}")
        for argument, part in (("mha", mha), ("norm", norm)):
            if part is not None and (not is_plain(part, type(part)) or origin_of_forward(type(part)) is not None):
                raise ValueError(
                    f"{argument}: expected a layer without hooks and with its class's own forward, got another"
                )
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        extra = sorted({*mha._parameters, *mha._buffers, *mha._sub_layers} - set(names))
        if extra:
            raise ValueError(
                f"mha: expected a layer as paddle.nn.MultiHeadAttention makes it, got one that has {extra[0]} beside "
                "its parts"
            )
        for projection in names:
            reason = reason_against_linear(projection, getattr(mha, projection))
            if reason is not None:
                error = TypeError if type(getattr(mha, projection)) is not nn.Linear else ValueError
                raise error(
                    f"mha: expected projections as paddle.nn.MultiHeadAttention makes them, got one of which {reason}"
                )
        if norm is not None and list(norm._normalized_shape) != [mha.embed_dim]:
            raise ValueError(
                f"norm: expected a layer norm over [{mha.embed_dim}], mha's embed_dim, got one over "
                f"{list(norm._normalized_shape)}"
            )
        projections = (mha.q_proj, mha.k_proj, mha.v_proj, mha.out_proj)
        biases = [projection.bias for projection in projections]
        if any((bias is None) != (biases[0] is None) for bias in biases):
            raise ValueError("mha: expected biases in all four projections or in none")
        check_switches(normalize_before=normalize_before)
        normalize_before = bool(normalize_before) and norm is not None
        layer = cls(
            mha.embed_dim,
            mha.num_heads,
            dropout_rate,
            mha.dropout or 0.0,
            mha.kdim,
            mha.vdim,
            normalize_before,
            mha.need_weights,
            epsilon=1e-5 if norm is None else norm._epsilon,
            final_layer_norm=norm is not None and not normalize_before,
            causal=causal,
            add_residual=add_residual,
        )
        weights = [projection.weight for projection in projections[:3]]
        bq, bk, bv = biases[:3]
        parameters = {"linear_weight": mha.out_proj.weight, "linear_bias": mha.out_proj.bias}
        if layer.qkv_weight is None:
            parameters.update(zip(_UNPACKED, (*weights, bq, bk, bv)))
        else:
            with paddle.no_grad():
                wq, wk, wv = weights
                parameters["qkv_weight"] = pack_qkv_weight(wq, wk, wv, mha.num_heads)
                parameters["qkv_bias"] = None if bq is None else pack_qkv_bias(bq, bk, bv, mha.num_heads)
        if norm is not None:
            prefix = "pre_ln" if normalize_before else "ln"
            parameters.update({f"{prefix}_scale": norm.weight, f"{prefix}_bias": norm.bias})
        layer._assign_parameters(parameters, {"qkv_weight": weights, "qkv_bias": biases[:3]})
        layer.training = mha.training
        return layer

    def to_multi_head_attention(self) -> tuple[nn.MultiHeadAttention, nn.LayerNorm | None]:
        """The inverse of :meth:`from_multi_head_attention`: the attention and its layer norm, or None, with copies of
        the parameters.

        Raises:
            ValueError: The layer has two layer norms, which no single LayerNorm can stand for, or other than
                MultiHeadAttention fewer heads of keys, a window or a scale.
        """
        for name in ("num_kv_heads", "window_size", "scale"):
            value = self._further_settings()[name]
            if value is not None:
                raise ValueError(
                    f"to_multi_head_attention: expected a layer without {name}, which paddle.nn.MultiHeadAttention "
                    f"does not have, got {value}"
                )
        if self.normalize_before and self.final_layer_norm:
            raise ValueError(
                "to_multi_head_attention: expected a layer with at most one layer norm, got normalize_before=True and "
                "final_layer_norm=True"
            )
        has_bias = self.linear_bias is not None
        mha = nn.MultiHeadAttention(
            self.embed_dim,
            self.num_heads,
            self.attn_dropout_rate,
            self.kdim,
            self.vdim,
            self.need_weights,
            bias_attr=None if has_bias else False,
        )
        projections = (mha.q_proj, mha.k_proj, mha.v_proj)
        if self.qkv_weight is None:
            found = parameters_of(self, _UNPACKED)
            weights, biases = found[:3], found[3:]
        else:
            with paddle.no_grad():
                weights = list(unpack_qkv_weight(self.qkv_weight))
                biases = list(unpack_qkv_bias(self.qkv_bias)) if has_bias else [None] * 3
        for projection, weight, bias in zip(projections, weights, biases):
            _copy_parameter(projection, "weight", weight, None if self.qkv_weight is None else [self.qkv_weight])
            _copy_parameter(projection, "bias", bias, None if self.qkv_bias is None else [self.qkv_bias])
        _copy_parameter(mha.out_proj, "weight", self.linear_weight)
        _copy_parameter(mha.out_proj, "bias", self.linear_bias)
        norm = None
        if self.normalize_before or self.final_layer_norm:
            scale, bias = (
                (self.pre_ln_scale, self.pre_ln_bias) if self.normalize_before else (self.ln_scale, self.ln_bias)
            )
            norm = nn.LayerNorm(
                self.embed_dim,
                self.epsilon,
                weight_attr=None if scale is not None else False,
                bias_attr=None if bias is not None else False,
            )
            norm.training = self.training
            _copy_parameter(norm, "weight", scale)
            _copy_parameter(norm, "bias", bias)
        mha.training = self.training
        for projection in (*projections, mha.out_proj):
            projection.training = self.training
        return mha, norm

    def _assign_parameters(self, parameters: dict[str, Any], origins: dict[str, Any]) -> None:
        """Copies values into parameters. `origins` are the parameters that a value was made of, if it is not one
        itself."""
        for name, value in parameters.items():
            _copy_parameter(self, name, value, origins.get(name))


def _copy_parameter(layer: nn.Layer, name: str, value: Any, origins: Any = None) -> None:
    """Gives a layer's parameter the value and dtype of a tensor, or removes it if the value is None. It is frozen if
    all `origins` are, which are by default the value itself."""
    if value is None:
        setattr(layer, name, None)
        return
    parameter = getattr(layer, name)
    if parameter.dtype != value.dtype:
        zeros = nn.initializer.Constant(0.0)
        parameter = layer.create_parameter(parameter.shape, dtype=value.dtype, default_initializer=zeros)
        setattr(layer, name, parameter)
    parameter.set_value(value.detach())
    parameter.stop_gradient = all(origin.stop_gradient for origin in (origins or [value]))
