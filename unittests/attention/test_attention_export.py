"""Models with attention by itself as files, and graphs that may hold no operator of ours."""

import numpy as np
import paddle
import pytest
from attention_cases import FEATURES, check, make_inputs, stored
from graphs import call
from paddle.static import InputSpec
from paddle_fused_attention.functional import flash_attn_unpadded, scaled_dot_product_attention
from runners import static_mode

IS_PADDLE_2 = paddle.__version__.startswith("2.")


class Attention(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = paddle.nn.Linear(16, 48), paddle.nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = paddle.unbind(self.qkv(x).reshape([0, 0, 3, 2, 8]), axis=2)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3, training=self.training)
        return self.out(out.reshape([0, 0, 16]))


class Packed(Attention):
    def forward(self, x, starts):
        q, k, v = paddle.unbind(self.qkv(x).reshape([0, 3, 2, 8]), axis=1)
        return self.out(flash_attn_unpadded(q, k, v, starts, starts, 64, 64, None)[0].reshape([0, 16]))


@pytest.mark.parametrize("kind", [Attention, Packed])
def test_jit_save_load_and_predictor(kind, tmp_path):
    """With unknown sizes."""
    network, path = kind(), str(tmp_path / "network")
    network.eval()
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((3, 6, 16) if kind is Attention else (9, 16)).astype("float32")}
    spec = [InputSpec([None] * (feed["x"].ndim - 1) + [16], "float32", "x")]
    if kind is Packed:
        feed["starts"] = np.array([0, 4, 9], "int32")
        spec.append(InputSpec([None], "int32", "starts"))
    paddle.jit.save(network, path, input_spec=spec)
    tensors = list(map(paddle.to_tensor, feed.values()))
    expected = network(*tensors).numpy()
    np.testing.assert_allclose(paddle.jit.load(path)(*tensors).numpy(), expected, rtol=1e-5, atol=1e-6)
    program = path + (".pdmodel" if IS_PADDLE_2 else ".json")
    predictor = paddle.inference.create_predictor(paddle.inference.Config(program, path + ".pdiparams"))
    for name, array in feed.items():
        predictor.get_input_handle(name).copy_from_cpu(array)
    predictor.run()
    result = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", [name for name, case in FEATURES.items() if not case.config.dropout_rate])
def test_ordinary_ops_for_onnx(feature):
    """Where Paddle's exporter builds the graph, there is none of our operators in it, and the numbers are the same."""
    case = FEATURES[feature].but(dtype="float32")
    inputs = make_inputs(case)
    feed = {n: a for n, a in stored(case, inputs).items() if n != "d_out"}
    exporter = {"__name__": "paddle2onnx.convert"}
    exec("def export(build):\n    return build()", exporter)
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in feed.items()}
            out = exporter["export"](lambda: call(variables, case.config, case.lengths and case.longest))
        assert "custom_" not in str(main)
        (found,) = paddle.static.Executor(paddle.CPUPlace()).run(main, feed=feed, fetch_list=[out])
    check(case, inputs, found, {})
