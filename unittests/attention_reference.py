"""Attention by itself in float64 NumPy, straight from its definition, one sequence after another:

scores = scale * q @ k^T + mask, where the query sees the key
p      = softmax(scores); a row that sees no key gives zeros
out    = dropout(p, dropout_rate) @ v

`Config` holds the switches. `forward` and `backward` take a dict of arrays under the names of the operator's inputs;
`composed_16bit` is the same as a chain of 16-bit ops. The numbers of dropout are those of reference.py.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np
import reference

DIFFERENTIABLE = ("query", "key", "value", "attn_mask")


@dataclass(frozen=True)
class Config:
    """The switches, named as in the package's description; `offset` counts draws of the random generator."""

    scale: Optional[float] = None  # None: head_dim ** -0.5
    dropout_rate: float = 0.0
    training: bool = True
    mode: str = "upscale_in_train"
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    seed: int = 0
    offset: int = 0


def seen_by_place(config, queries, keys):
    """Which keys a query sees by causal and windows, [queries, keys]."""
    seen = np.zeros((queries, keys), bool)
    for i in range(queries):
        for j in range(keys):
            behind = j - (i + keys - queries)
            seen[i, j] = (
                not (config.causal and behind > 0)
                and (config.window_left < 0 or behind >= -config.window_left)
                and (config.window_right < 0 or behind <= config.window_right)
            )
    return seen


def hidden_by_ranges(ranges, causal, queries):
    """Which queries do not see a key, of ranges [heads, keys, columns]: [heads, queries, keys]."""
    heads, keys, columns = ranges.shape
    hidden = np.zeros((heads, queries, keys), bool)
    for h in range(heads):
        for j in range(keys):
            bounds = [int(max(bound, 0)) for bound in ranges[h, j]]
            if columns == 1:
                hidden[h, bounds[0] :, j] = True
            elif columns == 2 and not causal:
                hidden[h, bounds[0] :, j] = True
                hidden[h, : bounds[1], j] = True
            else:
                for first, end in zip(bounds[::2], bounds[1::2]):
                    hidden[h, first:end, j] = True
    return hidden


def _sequences(inputs, config):
    """Of each sequence: where its queries and its keys lie, what is added to its scores [heads, queries, keys] or less,
    and its number."""
    query, key = inputs["query"], inputs["key"]
    starts = inputs.get("cu_seqlens_q")
    if starts is not None:
        other_starts = inputs["cu_seqlens_k"]
        for b in range(len(starts) - 1):
            rows = slice(int(starts[b]), int(starts[b + 1])), slice(int(other_starts[b]), int(other_starts[b + 1]))
            seen = seen_by_place(config, *(s.stop - s.start for s in rows))
            yield rows, np.where(seen, 0.0, -np.inf), b
        return
    batch, queries, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    seen = np.where(seen_by_place(config, queries, keys), 0.0, -np.inf)
    mask, ranges = inputs.get("attn_mask"), inputs.get("startend_row_indices")
    for b in range(batch):
        added = seen
        if mask is not None:
            values = mask if mask.dtype.kind == "f" else np.where(mask != 0, 0.0, -np.inf)
            added = added + np.broadcast_to(values, (batch, heads, queries, keys))[b].astype(np.float64)
        if ranges is not None:
            hidden = hidden_by_ranges(ranges[b], config.causal, queries)
            if len(hidden) > 1:
                hidden = np.repeat(hidden, heads // kv_heads, axis=0)
            added = np.where(hidden, -np.inf, added)
        yield (b, b), added, b


def _factors(config, count, heads, longest):
    """What dropout multiplies the weights by, [count, heads, longest, longest] or a number."""
    return reference.drop_factor(
        config.dropout_rate,
        config,
        lambda: reference.attention_random(config.seed, config.offset, count, heads, longest),
    )


def exact(a):
    return a


def run(inputs, config, d_out=None, r=exact):
    """The result, and with d_out the gradients by name, every op's result rounded by `r`."""
    query, key, value = (inputs[name] for name in DIFFERENTIABLE[:3])
    mask = inputs.get("attn_mask")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if config.scale is None else config.scale
    sequences = list(_sequences(inputs, config))
    longest = max([1, query.shape[1], key.shape[1]]) if query.ndim == 4 else 1
    if query.ndim == 3:
        longest = max([1] + [s.stop - s.start for rows, _, _ in sequences for s in rows])
    factors = _factors(config, len(sequences), heads, longest)
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    gradients = {"query": np.zeros(query.shape), "key": np.zeros(key.shape), "value": np.zeros(value.shape)}
    d_scores_of_all = None
    if mask is not None and mask.dtype.kind == "f":
        d_scores_of_all = np.zeros((query.shape[0], heads, query.shape[1], key.shape[1]))
    for (of_query, of_key), added, b in sequences:
        q = query[of_query].swapaxes(0, 1)  # [heads, queries, head_dim]
        k, v = (np.repeat(a[of_key].swapaxes(0, 1), heads // kv_heads, axis=0) for a in (key, value))
        factor = factors if np.ndim(factors) == 0 else factors[b][:, : q.shape[1], : k.shape[1]]
        scaled = r(q * np.asarray(scale, q.dtype))
        p = r(reference.softmax(r(r(scaled @ k.swapaxes(-1, -2)) + added)))
        dropped = r(p * factor)
        out[of_query] = r(dropped @ v).swapaxes(0, 1)
        if d_out is None:
            continue
        d_o = d_out[of_query].swapaxes(0, 1)
        d_v = r(dropped.swapaxes(-1, -2) @ d_o)
        d_p = r(r(d_o @ v.swapaxes(-1, -2)) * factor)
        d_scores = r(p * (d_p - (p * d_p).sum(-1, keepdims=True)))
        d_q = r(r(d_scores @ k) * np.asarray(scale, q.dtype))
        d_k = r(d_scores.swapaxes(-1, -2) @ scaled)
        gradients["query"][of_query] = d_q.swapaxes(0, 1)
        for name, of_heads in (("key", d_k), ("value", d_v)):
            grouped = of_heads.reshape(kv_heads, heads // kv_heads, *of_heads.shape[1:]).sum(1)
            gradients[name][of_key] = r(grouped).swapaxes(0, 1)
        if d_scores_of_all is not None:
            d_scores_of_all[b] = d_scores
    if d_scores_of_all is not None:
        gradients["attn_mask"] = r(summed_like(d_scores_of_all, mask))
    return out, gradients


def summed_like(a, mask):
    """Sums over what the mask broadcasts over."""
    shape = (1,) * (4 - mask.ndim) + mask.shape
    over = tuple(axis for axis in range(4) if shape[axis] == 1 and a.shape[axis] != 1)
    return a.sum(over, keepdims=True).reshape(mask.shape)


def forward(inputs, config):
    return run(inputs, config)[0]


def backward(inputs, config, d_out):
    """The gradient of every input that has one, by name."""
    return run(inputs, config, d_out)[1]


def composed_16bit(inputs, config, d_out, dtype):
    """Result and gradients as a chain of ordinary ops on tensors of `dtype` gives them."""

    def in_float32(name, a):
        return np.asarray(a, np.float32) if a.dtype.kind == "f" else a

    arrays = {name: in_float32(name, a) for name, a in inputs.items()}
    return run(arrays, config, np.asarray(d_out, np.float32), lambda a: reference.round_to(a, dtype))
