"""Feed-forward layers that run the operator.

Nothing in them is packed: Paddle stores weights as the operator takes them. Such a layer stays the same object, of a
class derived from its own, and every parameter stays where it is. A call runs the operator if all parts are as their
classes make them, else the class's own forward, so that no later change of a part is passed over.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._descriptions import MODES
from .._feed_forward import FeedForward, feed_forward
from .._loading import OwnEntries
from .._parts import is_plain, is_plain_dropout, parameters_of, reason_against_class, reason_against_linear
from ..weights import KINDS
from .activations import reason_against_activation
from .adapters import FeedForwardAdapter
from .packed import active_rate, adapter_of_pickle, derived_class

NO_NORM = (None, None, None, None)


def describe(
    layer: Any,
    adapter: FeedForwardAdapter,
    x: Any,
    norms: tuple[Any, ...] = NO_NORM,
    epsilon: float = 0.0,
    before: Any = None,
) -> FeedForward | None:
    """The description of what a layer's parts compute; None if the operator can't compute it.

    Args:
        norms: Scale and bias of the layer norm before, and of the one after.
        before: Whether the layer norm stands before, with the residual around all; None: neither norm nor residual.
    """
    parts = layer._sub_layers
    linear1, linear2 = parts.get(adapter.linear1), parts.get(adapter.linear2)
    if not is_plain(linear1, nn.Linear) or not is_plain(linear2, nn.Linear):
        return None
    activation = adapter.activation_name(layer)
    if activation is None:
        return None
    rates = []
    for name in (adapter.dropout1, adapter.dropout2):
        if name is None:
            rates.append(0.0)
            continue
        dropout = parts.get(name)
        if not is_plain_dropout(dropout):
            return None
        rates.append(active_rate(dropout))
    dropout1_rate, dropout2_rate = rates
    training = layer.training or dropout1_rate > 0.0 or dropout2_rate > 0.0
    weight1, bias1 = parameters_of(linear1, KINDS)
    weight2, bias2 = parameters_of(linear2, KINDS)
    # fmt: off
    return FeedForward._make((
        x, weight1, weight2, *norms, bias1, bias2, epsilon, epsilon, dropout1_rate, dropout2_rate,
        before is True, training, before is False, before is not None, adapter.gated, activation, MODES[0], None,
    )).checked()
    # fmt: on


class FusedFeedForward(OwnEntries):
    """The base that a fused feed-forward's class has beside the layer's own. It sets ``_adapter`` and ``_original``,
    the layer's own class."""

    _adapter: FeedForwardAdapter
    _original: type[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        description = self._describe(args, kwargs)
        if description is None:
            return self._original.forward(self, *args, **kwargs)
        return feed_forward(description)

    @paddle.jit.not_to_static
    def _describe(self, args: tuple, kwargs: dict) -> FeedForward | None:
        x = self._adapter.inputs(self, *args, **kwargs)
        return None if x is None else describe(self, self._adapter, x)

    def _own_entries(self, state: dict, prefix: str) -> dict:
        return state

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds no class by name that is made at run time.
        return _new_fused, (self._original,), self.__dict__


def _new_fused(original: type) -> Any:
    kind: Any = _fused_class(original, adapter_of_pickle(original, FeedForwardAdapter))
    return kind.__new__(kind)


def _fused_class(original: type, adapter: FeedForwardAdapter) -> type[Any]:
    return derived_class(FusedFeedForward, original, adapter, "Fused", "that runs the operator")


def fuse_feed_forward(layer: nn.Layer, adapter: FeedForwardAdapter) -> None:
    """Converts, in place, a layer that the registry has nothing against."""
    layer.__class__ = _fused_class(type(layer), adapter)


def unfuse_feed_forward(layer: FusedFeedForward) -> None:
    """The inverse of :func:`fuse_feed_forward`."""
    layer.__class__ = layer._original


def reason_against_feed_forward(layer: Any, adapter: FeedForwardAdapter) -> str | None:
    """Why the operator can't compute what the parts of a layer do; None if it can."""
    reason = adapter.reason_against(layer)
    if reason is not None:
        return reason
    for name in (adapter.linear1, adapter.linear2):
        reason = reason_against_linear(name, getattr(layer, name, None))
        if reason is not None:
            return reason
    reason = reason_against_class(nn.Dropout) if adapter.dropouts() else None
    if reason is not None:
        return reason
    for name in adapter.dropouts():
        part = getattr(layer, name, None)
        if not isinstance(part, nn.Dropout) or not is_plain_dropout(part):
            return (
                f"its {name} is a {type(part).__name__}, not a paddle.nn.Dropout of mode 'upscale_in_train' without "
                "hooks"
            )
    if adapter.activation is not None:
        reason = reason_against_activation(adapter.activation, adapter.activation_of(layer))
        if reason is not None:
            return reason
    return _reason_against_shapes(layer, adapter)


def _reason_against_shapes(layer: Any, adapter: FeedForwardAdapter) -> str | None:
    first, second = (list(getattr(layer, name).weight.shape) for name in (adapter.linear1, adapter.linear2))
    embed_dim, columns = first
    if adapter.gated and columns % 2:
        return f"its {adapter.linear1} has a weight of shape {first}, with an odd number of columns"
    expected = [columns // 2 if adapter.gated else columns, embed_dim]
    return None if second == expected else f"its {adapter.linear2} has a weight of shape {second}, not {expected}"
