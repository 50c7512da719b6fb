"""Tensor parallelism: attention with its heads, and the feed-forward block with its hidden numbers, spread over the
processes of a communication group.

Each process computes the operator for its own heads or hidden numbers, from the whole input to their part of the last
projection. The parts are summed over the group. Then bias, dropout, residual and final layer norm run alike on every
process. Backward sums the gradients of what all processes share before the sum: the input and the first layer norm's
parameters. Dropout masks are those of the whole layer for any number of processes, since all draw from generators with
the same seed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.framework import in_dynamic_mode

from ._block import TENSORS, Block
from ._checks import INFINITY, check_count, check_heads, check_model, check_number, check_switches, check_text
from ._composed_attention import Source
from ._descriptions import MODES
from ._feed_forward import FEED_FORWARD, FeedForward, check_activation, feed_forward_over_processes
from ._groups import check_dygraph, check_seeds, resolve_group, sums_over
from ._initializers import param_attr_of
from ._loading import LoadsAnyFloat
from ._op import is_constant_mask
from ._parts import parameters_of
from ._split_heads import attention_over_processes
from ._types import Activation, Group
from ._wide_norms import WideNorms
from .layer import FusedMultiHeadAttention


def _mask_of_heads(mask: Any, x: Any, first_head: int, num_heads: int, total_heads: int) -> Any:
    if mask is None or len(mask.shape) < 3 or mask.shape[-3] == 1:
        return mask
    if mask.shape[-3] != total_heads:
        scores = [x.shape[0], total_heads, x.shape[1], x.shape[1]]
        raise ValueError(
            "attn_mask: expected a shape that broadcasts to [batch, num_heads, seq_len, seq_len] = "
            f"{scores}, got {list(mask.shape)}"
        )
    return mask if num_heads == total_heads else mask[..., first_head : first_head + num_heads, :, :]


@paddle.jit.not_to_static
def parallel_attention(block: Block, group: Group | None, key_value: tuple[Any, Any] | None = None) -> paddle.Tensor:
    """Computes a checked block of which each process of `group` holds an equal share of the heads, in the order of
    ranks.

    With n processes ``qkv_weight`` is [3, num_heads / n, head_dim, embed_dim], ``qkv_bias``
    [3, num_heads / n, head_dim] and ``linear_weight`` [num_heads / n * head_dim, embed_dim]; all else is whole and the
    same on every process, ``attn_mask`` included. The process belongs to `group`; None: no communication. A seed of
    the block fixes both dropouts' masks. `key_value` are a key and a value other than x, as for
    :class:`paddle_fused_attention._composed_attention.Source`.
    """
    check_dygraph(group, TENSORS, block.tensors)
    qkv_weight = block.qkv_weight
    if len(qkv_weight.shape) != 4:
        raise ValueError(
            f"qkv_weight: expected shape [3, num_heads, head_dim, embed_dim], got {list(qkv_weight.shape)}"
        )
    num_heads = qkv_weight.shape[1]
    total_heads = num_heads if group is None else num_heads * group.nranks
    first_head = 0 if group is None else num_heads * group.rank
    sums = sums_over(group)
    mask = block.attn_mask
    if not is_constant_mask(mask):
        mask = sums["sum_gradient"](mask)
    mask = _mask_of_heads(mask, block.x, first_head, num_heads, total_heads)
    return attention_over_processes(
        block._replace(attn_mask=mask), first_head, total_heads, key_value=key_value, **sums
    )


@paddle.jit.not_to_static
def parallel_feed_forward(description: FeedForward, group: Group | None) -> paddle.Tensor:
    """Computes a checked description of which each process of `group` holds an equal share of the hidden numbers, in
    the order of ranks.

    With n processes ``linear1_weight`` is [E, F / n], ``linear1_bias`` [F / n] and ``linear2_weight`` [F / n, E]; with
    ``gated`` ``linear1_weight`` is [E, 2 * F / n] and ``linear1_bias`` [2 * F / n], of both halves of the whole the
    process's columns. All else is whole and the same on every process. The process belongs to `group`; None: no
    communication.
    """
    check_dygraph(group, FEED_FORWARD.tensors, description.tensors)
    weight = description.linear2_weight
    if len(weight.shape) != 2:
        raise ValueError(f"linear2_weight: expected shape [dim_feedforward, d_model], got {list(weight.shape)}")
    hidden = weight.shape[0]
    first_hidden, total_hidden = (0, hidden) if group is None else (hidden * group.rank, hidden * group.nranks)
    return feed_forward_over_processes(description, first_hidden, total_hidden, **sums_over(group))


class _Split(NamedTuple):
    """How a parameter is shared out: by ranges of dimension `axis`, of each of `parts` equal pieces of it."""

    axis: int
    parts: int = 1

    def share(self, value: Any, rank: int, degree: int) -> Any:
        """One of `degree` processes' share of a whole parameter, Tensor or array."""
        piece = value.shape[self.axis] // self.parts
        size = piece // degree
        begins = [piece * part + size * rank for part in range(self.parts)]
        shares = [value[(slice(None),) * self.axis + (slice(begin, begin + size),)] for begin in begins]
        if len(shares) == 1:
            return shares[0]
        return np.concatenate(shares, self.axis) if isinstance(value, np.ndarray) else paddle.concat(shares, self.axis)

    def whole(self, shares: list[paddle.Tensor]) -> paddle.Tensor:
        """The whole parameter of all processes' shares."""
        pieces = [paddle.split(share, self.parts, axis=self.axis) for share in shares]
        return paddle.concat([piece[part] for part in range(self.parts) for piece in pieces], axis=self.axis)


class _SpreadLayer(nn.Layer):
    """A layer of whose parameters some are spread over the processes of a group.

    It makes its parameters as one process would, and cuts those of `_splits` to the process's share.
    """

    _group_id: int | None = None

    def _splits(self) -> dict[str, _Split]:
        """By the names of the parameters that are spread."""
        raise NotImplementedError

    def _spread(self, group: Group | None, argument: str, count: int) -> None:
        """Cuts the whole parameters to this process's part, if there is a group; `argument` is what `count` is
        called, the number of things that are shared out."""
        if group is None:
            return
        # Layers can be copied and pickled, groups can't.
        self._group_id = group.id
        if count % group.nranks:
            raise ValueError(f"{argument}: expected a multiple of the group's {group.nranks} processes, got {count}")
        if not in_dynamic_mode():
            raise NotImplementedError(f"{type(self).__name__}: expected dygraph for a group, got a static graph")
        check_seeds(group)
        for name in self._splits():
            self._reduce_to_share(name)

    @property
    def group(self) -> Any:
        """The group, or None where the layer is not split."""
        return None if self._group_id is None else dist.get_group(self._group_id)

    @property
    def degree(self) -> int:
        """The number of processes that the layer is spread over."""
        return 1 if self._group_id is None else self.group.nranks

    def _share_of(self, name: str, value: Any) -> Any:
        """This process's part of a whole parameter."""
        group, split = self.group, self._splits().get(name)
        return value if group is None or split is None else split.share(value, group.rank, group.nranks)

    def _reduce_to_share(self, name: str) -> None:
        """Cuts a whole parameter to this process's part. Its name, attributes and initial values stay the whole
        layer's."""
        parameter = getattr(self, name)
        if parameter is None:
            return
        with paddle.no_grad():
            share = self._share_of(name, parameter).clone()
        # As Paddle's Layer.to() gives a parameter other data.
        parameter.value().get_tensor()._share_data_with(share.value().get_tensor())
        parameter.is_distributed = True

    def full_state_dict(self) -> dict[str, paddle.Tensor]:
        """The state dict of the whole layer, on every process: see :func:`full_state_dict`."""
        return full_state_dict(self)

    def load_full_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Sets this process's part of the whole layer's state dict: see :func:`load_full_state_dict`."""
        return load_full_state_dict(self, state_dict)


class ParallelFusedMultiHeadAttention(_SpreadLayer, FusedMultiHeadAttention):
    """:class:`FusedMultiHeadAttention` with its heads spread over the processes of a communication group.

    Every process of the group makes the layer, with the same arguments and the same ``paddle.seed``, and calls it with
    the same input; each gets the whole result. Initial values, dropout masks, results and gradients are then the same,
    up to rounding, for every number of processes, one included. Dropout masks are not those of
    :class:`FusedMultiHeadAttention`.

    With n processes ``qkv_weight`` is [3, num_heads / n, head_dim, embed_dim], ``qkv_bias``
    [3, num_heads / n, head_dim] and ``linear_weight`` [num_heads / n * head_dim, embed_dim]: the process's share,
    marked ``is_distributed`` as by Paddle's own tensor-parallel layers. The other parameters are whole and alike on
    every process, and so are their gradients. Clipping by a global norm must add up the squares of the shares, as
    :class:`ParallelClipGradByGlobalNorm` does.

    With more than one process the layer works in dygraph only.

    Args:
        group: A group of ``paddle.distributed.new_group`` that this process belongs to; None: all processes, or the one
            that there is without ``paddle.distributed.init_parallel_env``.
        The others are those of :class:`FusedMultiHeadAttention`.

    Raises:
        TypeError, ValueError, NotImplementedError: As from :class:`FusedMultiHeadAttention`; and: num_heads is not a
            multiple of the number of processes, this process is not in the group, or the processes' seeds differ.
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
        weight_attr: Any = None,
        bias_attr: Any = None,
        name: str | None = None,
        *,
        epsilon: float = 1e-5,
        final_layer_norm: bool = True,
        causal: bool = False,
        add_residual: bool = True,
        window_size: int | tuple[int, int] | None = None,
        scale: float | None = None,
        group: Group | None = None,
    ) -> None:
        group = resolve_group(group)
        embed_dim, num_heads = check_heads(embed_dim, num_heads)
        for argument, value in (("kdim", kdim), ("vdim", vdim)):
            if value is not None and check_count(argument, value) != embed_dim:
                raise NotImplementedError(f"{argument}: expected None or embed_dim {embed_dim}, got {value}")
        check_switches(need_weights=need_weights)
        if need_weights:
            raise NotImplementedError("need_weights: expected False where heads are spread over processes, got True")
        super().__init__(
            embed_dim,
            num_heads,
            dropout_rate,
            attn_dropout_rate,
            kdim,
            vdim,
            normalize_before,
            need_weights,
            weight_attr,
            bias_attr,
            name,
            epsilon=epsilon,
            final_layer_norm=final_layer_norm,
            causal=causal,
            add_residual=add_residual,
            window_size=window_size,
            scale=scale,
        )
        self._spread(group, "num_heads", num_heads)

    def _splits(self) -> dict[str, _Split]:
        return {"qkv_weight": _Split(1), "qkv_bias": _Split(1), "linear_weight": _Split(0)}

    def _assign_parameters(self, parameters: dict[str, Any], origins: dict[str, Any]) -> None:
        shares = {name: None if value is None else self._share_of(name, value) for name, value in parameters.items()}
        super()._assign_parameters(shares, {**{name: [value] for name, value in parameters.items()}, **origins})

    def gen_cache(self, key: Any, value: Any = None, type: Any = None) -> Any:
        """Raises NotImplementedError: spread layers take no caches."""
        raise NotImplementedError("gen_cache: expected a layer whose heads are not spread over processes")

    def _run(self, block: Block) -> paddle.Tensor:
        return parallel_attention(block, self.group)

    def _run_composed(self, block: Block, source: Source, cache: Any) -> Any:
        if cache is not None:
            raise NotImplementedError(
                f"cache: expected None where heads are spread over processes, got {type(cache).__name__}"
            )
        return parallel_attention(block, self.group, (source.key, source.value))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"

    @classmethod
    def from_full(cls, layer: FusedMultiHeadAttention, group: Group | None = None) -> ParallelFusedMultiHeadAttention:
        """Makes the layer of this process's part of `layer`, which is the same on every process, with copied
        parameters.

        Raises:
            TypeError: `layer` is not a FusedMultiHeadAttention, or is split itself.
            ValueError: See the constructor.
            NotImplementedError: The layer has kdim, vdim, need_weights or fewer heads of keys.
        """
        if not isinstance(layer, FusedMultiHeadAttention) or getattr(layer, "degree", 1) > 1:
            raise TypeError(f"layer: expected a FusedMultiHeadAttention with all heads, got {type(layer).__name__}")
        if layer.num_kv_heads != layer.num_heads:
            raise NotImplementedError(
                f"layer: expected as many heads of keys as of queries, {layer.num_heads}, got {layer.num_kv_heads}"
            )
        return _copy_of(layer, cls, group=group)

    def to_full(self) -> FusedMultiHeadAttention:
        """The whole layer, with copies of all processes' parameters, on every process. All of the group must call
        it."""
        return _copy_of(self, FusedMultiHeadAttention)

    @classmethod
    def from_multi_head_attention(
        cls,
        mha: nn.MultiHeadAttention,
        norm: nn.LayerNorm | None = None,
        normalize_before: bool = False,
        *,
        group: Group | None = None,
        **kwargs: Any,
    ) -> ParallelFusedMultiHeadAttention:
        """As :meth:`FusedMultiHeadAttention.from_multi_head_attention`, spread over `group`."""
        whole = FusedMultiHeadAttention.from_multi_head_attention(mha, norm, normalize_before, **kwargs)
        return cls.from_full(whole, group)

    def to_multi_head_attention(self) -> tuple[nn.MultiHeadAttention, nn.LayerNorm | None]:
        """As :meth:`FusedMultiHeadAttention.to_multi_head_attention`, of the whole layer. All of the group must call
        it."""
        return FusedMultiHeadAttention.to_multi_head_attention(self if self.degree == 1 else self.to_full())


class ParallelFusedFeedForward(_SpreadLayer, WideNorms, LoadsAnyFloat):
    """The feed-forward half of a transformer layer with its hidden numbers spread over the processes of a communication
    group: see :func:`fused_feedforward` for the meaning.

    As with :class:`ParallelFusedMultiHeadAttention`, every process of the group makes the layer, with the same
    arguments and the same ``paddle.seed``, calls it with the same input and gets the whole result. Initial values,
    dropout masks, results and gradients are then the same, up to rounding, for every number of processes, one included.
    Dropout masks are not those of :func:`fused_feedforward`. A call takes one sum over the group forward and one
    backward, there with two small ones for a trained first layer norm.

    Parameters, None where they are absent, with n processes: ``linear1_weight`` [d_model, dim_feedforward / n] and
    ``linear1_bias`` [dim_feedforward / n], with ``gated`` twice as many columns, the process's share of each half;
    ``linear2_weight`` [dim_feedforward / n, d_model], all three marked ``is_distributed``. Whole and alike on every
    process, as are their gradients, are ``linear2_bias`` [d_model]; with ``normalize_before`` ``ln1_scale`` and
    ``ln1_bias`` [d_model]; with ``final_layer_norm`` ``ln2_scale`` and ``ln2_bias`` [d_model]. Clipping by a global
    norm is for :class:`ParallelClipGradByGlobalNorm`.

    With more than one process the layer works in dygraph only.

    Args:
        d_model: Width of the input and the output.
        dim_feedforward: The number of hidden numbers, a multiple of the number of processes.
        dropout_rate: The probability of dropping an element of the second projection, in [0, 1].
        epsilon: Of both layer norms.
        activation: "relu", "gelu" (exact), "gelu_tanh" (approximate) or "silu".
        act_dropout_rate: The probability of dropping a hidden number, in [0, 1]; None: dropout_rate.
        normalize_before: Whether the input is layer-normalised before the first projection.
        weight_attr: ParamAttr of ``linear1_weight`` and ``linear2_weight``, which are initialised as whole weights of
            ``paddle.nn.Linear``. Layer-norm scales always begin at one.
        bias_attr: ParamAttr of every bias, those of the layer norms included; False: no biases.
        name: Prefix of the parameters' names.
        final_layer_norm: Whether the sum with the residual is layer-normalised. None: where ``normalize_before`` is
            False.
        add_residual: Whether the input is added to the output.
        gated: Whether the first projection's columns are two halves (a, b), of which ``activation(a) * b`` takes the
            activation's place.
        group: A group of ``paddle.distributed.new_group`` that this process belongs to; None: all processes, or the one
            that there is without ``paddle.distributed.init_parallel_env``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type or does not fit, dim_feedforward is not a multiple of
            the number of processes, this process is not in the group, or the processes' seeds differ.
        NotImplementedError: A group of several processes in a static graph.
    """

    d_model: int
    dim_feedforward: int
    dropout_rate: float
    epsilon: float
    activation: Activation
    act_dropout_rate: float
    normalize_before: bool
    final_layer_norm: bool
    add_residual: bool
    gated: bool
    linear1_weight: paddle.Tensor
    linear1_bias: paddle.Tensor | None
    linear2_weight: paddle.Tensor
    linear2_bias: paddle.Tensor | None
    ln1_scale: paddle.Tensor | None
    ln1_bias: paddle.Tensor | None
    ln2_scale: paddle.Tensor | None
    ln2_bias: paddle.Tensor | None

    _norm_parameters = ("ln1_scale", "ln1_bias", "ln2_scale", "ln2_bias")

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout_rate: float = 0.1,
        epsilon: float = 1e-5,
        activation: Activation = "relu",
        act_dropout_rate: float | None = None,
        normalize_before: bool = False,
        weight_attr: Any = None,
        bias_attr: Any = None,
        name: str | None = None,
        *,
        final_layer_norm: bool | None = None,
        add_residual: bool = True,
        gated: bool = False,
        group: Group | None = None,
    ) -> None:
        group = resolve_group(group)
        check_text("name", name)
        super().__init__(name_scope=name)
        self.d_model = check_count("d_model", d_model)
        self.dim_feedforward = check_count("dim_feedforward", dim_feedforward)
        self.dropout_rate = check_number("dropout_rate", dropout_rate, 0.0, 1.0)
        self.epsilon = check_number("epsilon", epsilon, 0.0, INFINITY)
        check_activation(activation)
        self.activation = activation
        if act_dropout_rate is None:
            act_dropout_rate = self.dropout_rate
        self.act_dropout_rate = check_number("act_dropout_rate", act_dropout_rate, 0.0, 1.0)
        check_switches(normalize_before=normalize_before, add_residual=add_residual, gated=gated)
        self.normalize_before = bool(normalize_before)
        if final_layer_norm is None:
            final_layer_norm = not self.normalize_before
        check_switches(final_layer_norm=final_layer_norm)
        self.final_layer_norm = bool(final_layer_norm)
        self.add_residual = bool(add_residual)
        self.gated = bool(gated)

        def weight(parameter_name: str, shape: list[int]) -> Any:
            return self.create_parameter(shape, param_attr_of("weight_attr", weight_attr, parameter_name, shape))

        def bias(parameter_name: str, size: int) -> Any:
            attr = param_attr_of("bias_attr", bias_attr, parameter_name, [size], is_bias=True)
            return None if attr is False else self.create_parameter([size], attr, is_bias=True)

        def scale() -> Any:
            # As an attribute, since a global initializer replaces a default.
            ones = paddle.ParamAttr(initializer=nn.initializer.Constant(1.0))
            return self.create_parameter([self.d_model], ones)

        columns = self.dim_feedforward * (2 if self.gated else 1)
        self.linear1_weight = weight("linear1_weight", [self.d_model, columns])
        self.linear1_bias = bias("linear1_bias", columns)
        self.linear2_weight = weight("linear2_weight", [self.dim_feedforward, self.d_model])
        self.linear2_bias = bias("linear2_bias", self.d_model)
        self.ln1_scale = scale() if self.normalize_before else None
        self.ln1_bias = bias("ln1_bias", self.d_model) if self.normalize_before else None
        self.ln2_scale = scale() if self.final_layer_norm else None
        self.ln2_bias = bias("ln2_bias", self.d_model) if self.final_layer_norm else None
        self._spread(group, "dim_feedforward", self.dim_feedforward)

    def _splits(self) -> dict[str, _Split]:
        halves = 2 if self.gated else 1
        return {"linear1_weight": _Split(1, halves), "linear1_bias": _Split(0, halves), "linear2_weight": _Split(0)}

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Applies the block to ``x``.

        Args:
            x: ``[..., d_model]``, in the parameters' dtype, or float32 beside 16-bit projections.

        Returns:
            Shape and dtype of x.

        Raises:
            TypeError, ValueError: See :func:`fused_feedforward`.
            NotImplementedError: The layer is spread over processes, and the graph is static.
        """
        return parallel_feed_forward(self._description(x), self.group)

    @paddle.jit.not_to_static
    def _description(self, x: paddle.Tensor) -> FeedForward:
        # fmt: off
        return FeedForward._make((
            x, *parameters_of(self, FEED_FORWARD.tensors[1:]),
            self.epsilon, self.epsilon, self.act_dropout_rate, self.dropout_rate,
            self.normalize_before, self.training, self.final_layer_norm, self.add_residual, self.gated,
            self.activation, MODES[0], None,
        )).checked()
        # fmt: on

    def extra_repr(self) -> str:
        names = (
            *("d_model", "dim_feedforward", "dropout_rate", "epsilon", "activation", "act_dropout_rate"),
            *("normalize_before", "final_layer_norm", "add_residual", "gated"),
        )
        shown = {**{name: getattr(self, name) for name in names}, "bias": self.linear2_bias is not None}
        return ", ".join(f"{name}={value}" for name, value in {**shown, "degree": self.degree}.items())


def _copy_of(source: Any, cls: Any, **arguments: Any) -> Any:
    layer = cls(**source._settings(), **arguments)
    layer.to(dtype=source.qkv_weight.dtype)
    whole = full_state_dict(source)
    origins = {name: [parameter] for name, parameter in source._parameters.items() if parameter is not None}
    layer._assign_parameters({name: whole.get(name) for name in layer._parameters}, origins)
    layer.training = source.training
    return layer


class ParallelClipGradByGlobalNorm(nn.ClipGradByGlobalNorm):
    """Paddle's ClipGradByGlobalNorm over the whole model where layers are spread over `group`, in dygraph.

    Paddle's own takes every process's share for the whole and clips differently on each, which drives apart the
    parameters that the processes have in common.

    Args:
        clip_norm: The largest norm that gradients may have together.
        group: That of the layers; None: all processes.
    """

    def __init__(self, clip_norm: float, group: Group | None = None) -> None:
        super().__init__(check_number("clip_norm", clip_norm, 0.0, INFINITY))
        group = resolve_group(group)
        self._group_id = None if group is None else group.id

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: list) -> list:
        clipped = [(p, g) for p, g in params_grads if g is not None and getattr(p, "need_clip", True)]
        squares = {True: paddle.zeros([1]), False: paddle.zeros([1])}
        for parameter, gradient in clipped:
            kind = bool(getattr(parameter, "is_distributed", False))
            squares[kind] = squares[kind] + gradient.astype("float32").square().sum()
        if self._group_id is not None:
            dist.all_reduce(squares[True], group=dist.get_group(self._group_id))
        norm = paddle.sqrt(squares[True] + squares[False])
        factor = self.clip_norm / paddle.clip(norm, min=self.clip_norm)
        scaled = {id(p): g * factor.astype(g.dtype) for p, g in clipped}
        return [(p, scaled.get(id(p), g)) for p, g in params_grads]


def _split_parameters(model: nn.Layer) -> dict[str, tuple[_SpreadLayer, str, _Split]]:
    """The parameters of a model that are split, by their names in its state dict."""
    found = {}
    for prefix, layer in model.named_sublayers(include_self=True):
        if isinstance(layer, _SpreadLayer) and layer.degree > 1:
            for name, split in layer._splits().items():
                found[f"{prefix}.{name}" if prefix else name] = (layer, name, split)
    return found


def full_state_dict(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """The state dict that a model would have with all its :class:`ParallelFusedMultiHeadAttention` and
    :class:`ParallelFusedFeedForward` layers on one process.

    It fits a model of any number of processes through :func:`load_full_state_dict`, and one with
    :class:`FusedMultiHeadAttention` instead. All processes of the layers' groups must call it, and each gets the whole.

    Raises:
        TypeError: model is not a layer.
    """
    check_model(model)
    state = model.state_dict()
    for key, (layer, _, split) in _split_parameters(model).items():
        if key not in state:
            continue
        shares: list[paddle.Tensor] = []
        dist.all_gather(shares, state[key].detach(), group=layer.group)
        state[key] = split.whole(shares)
    return state


def load_full_state_dict(model: nn.Layer, state_dict: dict[str, Any]) -> Any:
    """Sets the parameters of a model from the state dict of the whole: of :func:`full_state_dict`, or of the same model
    with :class:`FusedMultiHeadAttention` layers. No communication takes place.

    Returns:
        What ``model.set_state_dict`` does: the missing and the unexpected names.

    Raises:
        TypeError: model is not a layer, or state_dict is not a dict of tensors or arrays.
        ValueError: A parameter that is to be split does not have the whole layer's shape.
    """
    check_model(model)
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
    state = dict(state_dict)
    for key in model.state_dict():
        if key in state and not isinstance(state[key], (paddle.Tensor, np.ndarray)):
            raise TypeError(f"{key}: expected a Tensor or a NumPy array, got {type(state[key]).__name__}")
    for key, (layer, name, split) in _split_parameters(model).items():
        if key not in state or getattr(layer, name) is None:
            continue
        expected = list(getattr(layer, name).shape)
        expected[split.axis] *= layer.degree
        if list(state[key].shape) != expected:
            raise ValueError(f"{key}: expected shape {expected}, that of the whole layer, got {list(state[key].shape)}")
        state[key] = layer._share_of(name, state[key])
    return model.set_state_dict(state)
