"""A layer with parameters that are not initial ones, an input for it, and its gradients; attention of separate
projections in NumPy."""

import attention_reference
import numpy as np
import paddle
from paddle_fused_attention import FusedMultiHeadAttention

IS_PADDLE_2 = paddle.__version__.startswith("2.")
NORMS = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")
DTYPES = {"float16": paddle.float16, "bfloat16": paddle.bfloat16}


def make_layer(dropout_rate=0.0, seed=1, **arguments):
    """All eight parameters, none of them with its initial value."""
    paddle.seed(seed)
    layer = FusedMultiHeadAttention(24, 4, dropout_rate, dropout_rate, **dict(dict(normalize_before=True), **arguments))
    rng = np.random.default_rng(seed)
    layer.set_state_dict(
        {n: (p.numpy() + 0.2 * rng.standard_normal(p.shape)).astype("float32") for n, p in layer.state_dict().items()}
    )
    return layer


def make_x(batch=4, seq_len=7, seed=3):
    return np.random.default_rng(seed).standard_normal((batch, seq_len, 24)).astype("float32")


def as_float(tensor):
    return tensor.astype("float32").numpy()


def composed_attention(query, key, projections, num_heads, r):
    """A chain of ordinary ops whose results are rounded by `r`. The value is the key; the projections are weights
    ``[width, columns]`` and biases of query, key, value and output."""

    def project(x, weight, bias):
        return r(r(x @ weight) + bias)

    *inner, output = projections
    heads = {
        name: project(x, *projection).reshape(*x.shape[:2], num_heads, -1)
        for name, x, projection in zip(("query", "key", "value"), (query, key, key), inner)
    }
    out, _ = attention_reference.run(heads, attention_reference.Config(), r=r)
    return project(r(out).reshape(*query.shape[:2], -1), *output)


def gradients(layer):
    return {name: as_float(p.grad) for name, p in layer.named_parameters()}
