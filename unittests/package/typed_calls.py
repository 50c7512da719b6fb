"""A user's calls as checkers of types see them; nothing here is run. `make lint` has mypy read it: a right call that is
refused fails there, and so does a wrong one that no longer is, since its `type: ignore` is then unused."""

from typing import Any, Dict, List, Optional, Tuple

import paddle
import paddle_fused_attention as pfa
from paddle import nn
from paddle.distributed.communication.group import Group
from paddle_fused_attention import functional
from paddle_fused_attention.checkpoint import pack
from paddle_fused_attention.conversion.model import Report
from paddle_fused_attention.incubate import functional as incubate
from typing_extensions import assert_type


class Net(nn.Layer):
    def classes(self) -> int:
        return 2


def of_models(model: Net, wants_report: bool) -> None:
    assert_type(pfa.convert(model), Net)
    assert_type(pfa.convert(model, return_report=False), Net)
    assert_type(pfa.convert(model, return_report=True)[0].classes(), int)
    _, report = pfa.convert(model, True)
    assert_type(report, Report)
    assert_type(report.left_alone["encoder"], str)
    pfa.convert(model, return_report=wants_report)
    assert_type(pfa.revert(model), Net)
    assert_type(pfa.restore_weights(model), Net)
    assert_type(pfa.arrange_weights(model), List[str])

    pfa.convert("bert-base")  # type: ignore[call-overload]
    pfa.convert(model, return_report="yes")  # type: ignore[call-overload]
    pfa.convert(model, report=True)  # type: ignore[call-overload]
    _, report = pfa.convert(model)  # type: ignore[attr-defined]
    pfa.revert([model])  # type: ignore[type-var]
    pfa.restore_weights(None)  # type: ignore[type-var]
    pfa.register_adapter(int, pfa.AttentionAdapter())  # type: ignore[arg-type]
    pfa.register_adapter(Net, "bert")  # type: ignore[arg-type]


def of_functions(x: paddle.Tensor, weight: paddle.Tensor, text: str) -> None:
    assert_type(pfa.fused_multi_head_attention(x, weight, weight, mode="downscale_in_infer"), paddle.Tensor)
    pfa.fused_multi_head_attention(x, weight, weight, window_size=(16, -1), scale=0.5, seed=1)
    assert_type(pfa.fused_feedforward(x, weight, weight, activation="gelu_tanh"), paddle.Tensor)
    pfa.fused_linear_activation(x, weight, activation=None)
    incubate.fused_linear_activation(x, weight, None, activation="none")
    assert_type(functional.flash_attention(x, x, x, causal=True), Tuple[paddle.Tensor, None])
    packed = pfa.unpad(x, x)
    assert_type(packed.max_seqlen, int)

    pfa.fused_multi_head_attention(x, weight, weight, mode="upscale")  # type: ignore[arg-type]
    pfa.fused_multi_head_attention(x, weight, weight, mode=text)  # type: ignore[arg-type]
    pfa.fused_multi_head_attention(x, weight)  # type: ignore[call-arg]
    pfa.fused_multi_head_attention(x, weight, weight, dropout=0.1)  # type: ignore[call-arg]
    pfa.fused_multi_head_attention(x, weight, weight, attn_mask="causal")  # type: ignore[arg-type]
    pfa.fused_multi_head_attention(x, weight, weight, window_size=(1, 2, 3))  # type: ignore[arg-type]
    pfa.fused_multi_head_attention([1.0], weight, weight)  # type: ignore[arg-type]
    pfa.fused_feedforward(x, weight, weight, activation="swish")  # type: ignore[arg-type]
    pfa.fused_feedforward(x, weight, weight, mode="upscale")  # type: ignore[arg-type]
    pfa.fused_linear_activation(x, weight, activation="none")  # type: ignore[arg-type]
    pfa.fused_bias_dropout_residual_layer_norm(x, x, mode="upscale")  # type: ignore[arg-type]
    functional.scaled_dot_product_attention(x, x, x, backend="cudnn")  # type: ignore[arg-type]
    functional.flash_attn_unpadded(x, x, x, x, x, 5, 5)  # type: ignore[call-arg]
    incubate.fused_multi_head_attention(x, weight, weight, mode="upscale")  # type: ignore[arg-type]
    incubate.fused_feedforward(x, weight, weight, activation="tanh")  # type: ignore[arg-type]


def of_layers(mha: nn.MultiHeadAttention, group: Group) -> None:
    layer = pfa.FusedMultiHeadAttention(64, 4, window_size=8, num_kv_heads=2)
    assert_type(layer.head_dim, int)
    assert_type(layer.window_size, Optional[Tuple[int, int]])
    assert_type(layer.linear_weight, paddle.Tensor)
    assert_type(pfa.FusedMultiHeadAttention.from_multi_head_attention(mha), pfa.FusedMultiHeadAttention)
    pfa.ParallelFusedMultiHeadAttention(64, 4, group=group).to_full()
    assert_type(pfa.ParallelFusedFeedForward(64, 256, activation="silu", group=None).gated, bool)
    pfa.ParallelClipGradByGlobalNorm(1.0, group)

    pfa.FusedMultiHeadAttention(64)  # type: ignore[call-arg]
    pfa.FusedMultiHeadAttention(64, 4, window_size="8")  # type: ignore[arg-type]
    pfa.FusedMultiHeadAttention(64, 4, heads=2)  # type: ignore[call-arg]
    pfa.ParallelFusedMultiHeadAttention(64, 4, group=0)  # type: ignore[arg-type]
    pfa.ParallelFusedFeedForward(64, 256, activation="swish")  # type: ignore[arg-type]
    pfa.ParallelFusedFeedForward(64, 256, group=[0, 1])  # type: ignore[arg-type]
    pfa.ParallelClipGradByGlobalNorm(1.0, "data")  # type: ignore[arg-type]


def of_files(arrays: Dict[Any, Any]) -> None:
    pack(arrays, 12, layout="out-in")
    pack(arrays, 12, layout="out_in")  # type: ignore[arg-type]
    pfa.explain("64")  # type: ignore[arg-type]
