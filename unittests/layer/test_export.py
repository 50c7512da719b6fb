"""to_static in both modes, jit.save and load, and the predictor give the numbers of dygraph, for any sizes."""

import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from paddle_fused_attention import FusedMultiHeadAttention
from processes import run_python

PADDLE_VERSION = (int(paddle.version.major), int(paddle.version.minor))
IS_PADDLE_2 = PADDLE_VERSION[0] == 2
SIZES = ((2, 7), (1, 1), (3, 50))
# What Paddle says of the operator where this package is not imported; the README quotes it.
UNKNOWN_OPERATOR = (
    "Operator (custom_fused_attention) is not registered"
    if IS_PADDLE_2
    else "kernel output args (0) defs should equal op outputs (2)"
)


class Network(paddle.nn.Layer):
    """A masked attention block before a linear layer."""

    def __init__(self, dropout_rate=0.2):
        super().__init__()
        self.attention = FusedMultiHeadAttention(
            24, 4, dropout_rate, dropout_rate, normalize_before=True, final_layer_norm=False
        )
        self.linear = paddle.nn.Linear(24, 8)

    def forward(self, x, keep):
        return self.linear(self.attention(x, attn_mask=keep.unsqueeze([1, 2])))


def make_network(training, dropout_rate=0.2):
    paddle.seed(4)
    network = Network(dropout_rate)
    network.train() if training else network.eval()
    return network


def make_arrays(batch, seq_len):
    rng = np.random.default_rng(batch * 100 + seq_len)
    return rng.standard_normal((batch, seq_len, 24)).astype("float32"), rng.random((batch, seq_len)) < 0.7


def specs():
    return [InputSpec([None, None, 24], "float32", "x"), InputSpec([None, None], "bool", "keep")]


def run(network, batch, seq_len):
    """The output for a fixed state of the generator, and in training the gradients of all parameters."""
    paddle.seed(9)
    out = network(*map(paddle.to_tensor, make_arrays(batch, seq_len)))
    if not network.training:
        return [out.numpy()]
    out.square().mean().backward()
    results = [out.numpy()] + [p.grad.numpy() for p in network.parameters()]
    network.clear_gradients()
    return results


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("full_graph", [True, False], ids=["full_graph", "sot"])
def test_to_static(full_graph, training):
    """Bit for bit, gradients and dropout included."""
    expected = [run(make_network(training), *size) for size in SIZES]
    static = paddle.jit.to_static(
        make_network(training), input_spec=specs() if full_graph else None, full_graph=full_graph
    )
    for size, wanted in zip(SIZES, expected):
        results = run(static, *size)
        assert len(results) == len(wanted)
        for result, array in zip(results, wanted):
            assert np.array_equal(result, array)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of a saved model, and its results in dygraph."""
    network = make_network(training=False)
    path = str(tmp_path_factory.mktemp("saved") / "network")
    paddle.jit.save(network, path, input_spec=specs())
    return path, [run(network, *size)[0] for size in SIZES]


def test_jit_load_gives_the_same_bits(saved):
    path, expected = saved
    loaded = paddle.jit.load(path)
    loaded.eval()
    for size, wanted in zip(SIZES, expected):
        assert np.array_equal(run(loaded, *size)[0], wanted)


@pytest.mark.skipif(IS_PADDLE_2, reason="parameters of a loaded model get no gradients on Paddle 2.6")
def test_training_of_a_loaded_model(tmp_path):
    """A model that was saved in training mode goes on training."""
    network = make_network(training=True, dropout_rate=0.0)
    paddle.jit.save(network, str(tmp_path / "network"), input_spec=specs())
    loaded = paddle.jit.load(str(tmp_path / "network"))
    loaded.train()
    expected = run(network, 2, 7)
    results = run(loaded, 2, 7)
    assert np.array_equal(results[0], expected[0])
    shapes = sorted(map(np.shape, expected[1:]))
    assert sorted(map(np.shape, results[1:])) == shapes
    total = [
        sum(float(np.square(g, dtype=np.float64).sum()) for g in gradients[1:]) for gradients in (results, expected)
    ]
    assert total[0] == pytest.approx(total[1], rel=1e-6) and total[0] > 0


def make_predictor(path, threads=1):
    from paddle import inference

    config = inference.Config(path + (".pdmodel" if IS_PADDLE_2 else ".json"), path + ".pdiparams")
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    return inference.create_predictor(config)


def predict(predictor, arrays):
    for name, array in zip(predictor.get_input_names(), arrays):
        handle = predictor.get_input_handle(name)
        handle.reshape(array.shape)
        handle.copy_from_cpu(array)
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


def test_predictor_agrees_with_dygraph(saved):
    path, expected = saved
    predictor = make_predictor(path)
    for size, wanted in zip(SIZES, expected):
        np.testing.assert_allclose(predict(predictor, make_arrays(*size)), wanted, rtol=1e-5, atol=2e-6)
    clone = predictor.clone()
    np.testing.assert_allclose(predict(clone, make_arrays(*SIZES[0])), expected[0], rtol=1e-5, atol=2e-6)


def load_callable(path, kind):
    """A saved model as a function of arrays."""
    if kind == "predictor":
        predictor = make_predictor(path, threads=2)
        return lambda arrays: predict(predictor, arrays)
    if PADDLE_VERSION == (3, 0):
        pytest.skip(
            "Paddle 3.0 compiles a loaded model in every call, and puts the whole process into static mode meanwhile"
        )
    loaded = paddle.jit.load(path)
    loaded.eval()
    return lambda arrays: loaded(*map(paddle.to_tensor, arrays)).numpy()


@pytest.mark.parametrize("kind", ["predictor", "jit.load"])
def test_two_models_in_two_threads(saved, kind):
    """Each gives the bits that it gives alone, whatever the other does at the same time. (Paddle's predictor holds
    Python's lock.)
    """
    models = [load_callable(saved[0], kind) for _ in range(2)]
    inputs = [make_arrays(4, 150), make_arrays(3, 201)]
    start = threading.Barrier(2)

    def serve(model, arrays):
        start.wait()
        with paddle.no_grad():
            return [model(arrays) for _ in range(20)]

    alone = [model(arrays) for model, arrays in zip(models, inputs)]
    with ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(serve, models, inputs)):
            assert len(results) == 20 and all(np.array_equal(result, expected) for result in results)


def test_static_inference_model(tmp_path):
    """paddle.static.save_inference_model and its counterpart."""
    path = str(tmp_path / "block")
    x = make_arrays(3, 11)[0]
    paddle.enable_static()
    try:
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            data = paddle.static.data("x", [-1, -1, 24])
            layer = FusedMultiHeadAttention(24, 4, causal=True)
            layer.eval()
            out = layer(data)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        (expected,) = executor.run(main, feed={"x": x}, fetch_list=[out])
        paddle.static.save_inference_model(path, [data], [out], executor, program=main)
        program, names, fetched = paddle.static.load_inference_model(path, executor)
        (result,) = executor.run(program, feed={names[0]: x}, fetch_list=fetched)
    finally:
        paddle.disable_static()
    assert np.array_equal(result, expected)


LOAD = """
import numpy as np
import paddle
import paddle_fused_attention
loaded = paddle.jit.load("network")
arrays = np.load("arrays.npz")
np.save("result.npy", loaded(paddle.to_tensor(arrays["x"]), paddle.to_tensor(arrays["keep"])).numpy())
"""


def test_a_process_of_its_own(saved, tmp_path):
    """It needs `import paddle_fused_attention` and nothing else."""
    path, expected = saved
    shutil.copytree(os.path.dirname(path), tmp_path / "saved")
    x, keep = make_arrays(*SIZES[0])
    np.savez(tmp_path / "saved" / "arrays.npz", x=x, keep=keep)
    result = run_python(LOAD, threads=1, directory=tmp_path / "saved")
    assert result.returncode == 0, result.stderr[-3000:]
    assert np.array_equal(np.load(tmp_path / "saved" / "result.npy"), expected[0])


IMPORT = "import paddle_fused_attention"
BY_JIT_LOAD = 'y = paddle.jit.load("block")(x)'


@pytest.fixture(scope="module")
def readme_example(tmp_path_factory):
    """The folder with the model that the example of the README saves, and the code that it loads it by."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    save, load, arrange = re.findall(
        "```python\n(.*?)```", readme.split("## Export and serving")[1].split("\n## ")[0], re.DOTALL
    )
    assert load.count(IMPORT) == load.count(BY_JIT_LOAD) == 1
    assert "arrange_weights(layer)" in arrange
    directory = tmp_path_factory.mktemp("readme")
    result = run_python(save + arrange, threads=1, directory=directory)
    assert result.returncode == 0, result.stderr[-3000:]
    return directory, load.replace("block.json", "block.pdmodel") if IS_PADDLE_2 else load


@pytest.mark.parametrize("model", ["block", "arranged"])
def test_readme(readme_example, model):
    directory, load = readme_example
    result = run_python(load.replace('"block', f'"{model}'), threads=1, directory=directory)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("kind", ["jit.load", "jit.load, not last", "predictor"])
def test_readme_without_the_import(readme_example, kind, tmp_path):
    """What the README says of it: an error of Paddle's, or the end of the process."""
    directory, load = readme_example
    load = load.replace(IMPORT, "")
    if kind == "predictor":
        load = load.replace(BY_JIT_LOAD, "")
    if kind == "jit.load, not last":
        directory = tmp_path
        network = paddle.nn.Sequential(FusedMultiHeadAttention(64, 4), paddle.nn.Linear(64, 8))
        network.eval()
        paddle.jit.save(network, str(directory / "block"), input_spec=[InputSpec([None, None, 64], "float32", "x")])
    no_core_file = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    result = run_python(no_core_file + load, threads=1, directory=directory)
    if kind == "jit.load" and PADDLE_VERSION >= (3, 1):
        assert result.returncode == -signal.SIGSEGV, result.stderr[-3000:]
    else:
        assert result.returncode == 1 and UNKNOWN_OPERATOR in result.stderr, result.stderr[-3000:]
