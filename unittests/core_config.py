"""How pfa_core describes a case of any block, for the suites of the core on the CPU and on GPUs."""

from dataclasses import asdict

import attention_cases
import numpy as np
from cases import Case, FeedForwardCase, LinearCase, ResidualNormCase


def config_of(case):
    """The core's config, and the seed and offset."""
    if isinstance(case, attention_cases.Case):
        return _config_of_bare_attention(case), case.config.seed % 2**64, case.config.offset
    config = asdict(case.config)
    seed, offset = config.pop("seed", 0), config.pop("offset", 0)
    if isinstance(case, Case):
        for name in ("batch", "seq_len", "embed_dim", "num_heads", "head_dim"):
            config[name] = getattr(case, name)
    else:
        config["rows"] = int(np.prod(case.shape))
    if isinstance(case, FeedForwardCase):
        config.update(
            block="feed_forward",
            embed_dim=case.width,
            hidden_dim=case.hidden,
            pre_ln_epsilon=config.pop("ln1_epsilon"),
            ln_epsilon=config.pop("ln2_epsilon"),
            hidden_dropout_rate=config.pop("dropout1_rate"),
            dropout_rate=config.pop("dropout2_rate"),
        )
    if isinstance(case, ResidualNormCase):
        config.update(block="residual_norm", embed_dim=case.width, add_residual="residual" not in case.absent)
    config["dtype"] = case.dtype
    if isinstance(case, LinearCase):
        config.update(block="linear", in_features=case.width, out_features=case.out_width)
        config["activation"] = config["activation"] or "none"
    else:
        config.update(residual_dtype=case.dtype_of("x"), norm_dtype=case.dtype_of("ln_scale"))
    return config, seed % 2**64, offset


def _config_of_bare_attention(case):
    given = case.config
    config = dict(
        block="bare_attention",
        batch=len(case.lengths) or case.batch,
        queries=case.longest[0] if case.lengths else case.queries,
        keys=case.longest[1] if case.lengths else case.keys,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    for name in ("dropout_rate", "training", "mode", "causal", "window_left", "window_right"):
        config[name] = getattr(given, name)
    if given.scale is not None:
        config["scale"] = given.scale
    if case.lengths:
        config["packed_queries"], config["packed_keys"] = (sum(side) for side in zip(*case.lengths))
    return config
