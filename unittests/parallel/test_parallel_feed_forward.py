"""The feed-forward block over two and four processes of the CPU against one, and on one against ordinary ops."""

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
import parallel_feed_forward_worker as worker
import pytest
from paddle_fused_attention import (
    ParallelClipGradByGlobalNorm,
    ParallelFusedFeedForward,
    fused_feedforward,
    load_full_state_dict,
)
from processes import run_script

DEGREES = (2, 4)
SPLIT = ("linear1_weight", "linear1_bias", "linear2_weight")
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel_feed_forward")


@pytest.fixture(scope="module")
def runs(directory):
    """What each process of each degree found."""
    found = {}
    for degree in DEGREES:
        result = run_script(worker.__file__, degree, directory, threads=1, directory=directory)
        assert result.returncode == 0, result.stderr[-3000:]
        found[degree] = [dict(np.load(directory / f"degree{degree}_rank{rank}.npz")) for rank in range(degree)]
    return found


def joined(name, shares, gated):
    """A whole parameter of all processes' shares."""
    if name == "linear2_weight":
        return np.concatenate(shares)
    halves = [np.split(share, 2 if gated else 1, -1) for share in shares]
    return np.concatenate([half[part] for part in range(len(halves[0])) for half in halves], -1)


@pytest.mark.slow
def test_loss_curve_is_that_of_one_process(runs):
    expected = worker.train(worker.make_network(), worker.STEPS)
    assert expected[-1] < expected[0]
    for degree in DEGREES:
        for found in runs[degree]:
            np.testing.assert_allclose(found["losses"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_clipped_by_global_norm(runs):
    expected = worker.train(worker.make_network(), range(5), paddle.nn.ClipGradByGlobalNorm(0.1))
    alone = worker.train(worker.make_network(), range(5), ParallelClipGradByGlobalNorm(0.1))
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-6)
    for degree in DEGREES:
        for found in runs[degree]:
            np.testing.assert_allclose(found["clipped"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropout_rate", [0.0, 0.2])
@pytest.mark.parametrize("kind", worker.LAYERS)
def test_results_and_gradients_are_those_of_one_process(runs, kind, dropout_rate):
    """With dropout the same elements are dropped."""
    expected = worker.computed(kind, dropout_rate)
    for degree in DEGREES:
        for name, whole in expected.items():
            shares = [found[f"{kind}/{dropout_rate}/{name}"] for found in runs[degree]]
            if name in SPLIT:
                assert shares[0].size == whole.size // degree
                shares = [joined(name, shares, worker.LAYERS[kind].get("gated", False))]
            for share in shares:
                np.testing.assert_array_equal(share, shares[0], err_msg=name)
            np.testing.assert_allclose(
                shares[0], whole, rtol=0, atol=2e-5 * np.abs(whole).max() + 1e-7, err_msg=f"{degree} {name}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", worker.LAYERS)
def test_initial_values_are_those_of_one_process(runs, kind):
    paddle.seed(3)
    state = ParallelFusedFeedForward(worker.WIDTH, worker.HIDDEN, **worker.LAYERS[kind]).state_dict()
    for found in (*runs[2], *runs[4]):
        names = [name.split("/")[-1] for name in found if name.startswith(f"{kind}/initial/")]
        assert names == list(state)
        for name, parameter in state.items():
            np.testing.assert_array_equal(found[f"{kind}/initial/{name}"], parameter.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", worker.LAYERS)
def test_evaluation(runs, kind, dtype):
    expected = worker.evaluated(kind, "float32")
    for found in (*runs[2], *runs[4], {f"{kind}/evaluated/{dtype}": worker.evaluated(kind, dtype)}):
        np.testing.assert_allclose(
            found[f"{kind}/evaluated/{dtype}"], expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max()
        )


@pytest.mark.slow
def test_checkpoints_load_at_one_process(runs, directory):
    for degree in DEGREES:
        alone = worker.make_network()
        worker.train(alone, worker.STEPS)
        network = worker.make_network()
        state = paddle.load(str(directory / f"degree{degree}.pdparams"))
        assert list(state) == list(alone.state_dict())
        assert load_full_state_dict(network, state) == ([], [])
        network.eval(), alone.eval()
        x = paddle.to_tensor(next(worker.make_batch(0)))
        np.testing.assert_allclose(network(x).numpy(), alone(x).numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_shares_are_marked(runs):
    expected = [f"0.{name}" for name in ("linear_weight", "qkv_bias", "qkv_weight")]
    expected += [f"{i}.{name}" for i in (1, 2) for name in sorted(SPLIT)]
    for found in (*runs[2], *runs[4]):
        assert found["distributed"].tolist() == expected


@pytest.mark.slow
def test_sums_over_the_group(runs):
    """One forward and one backward, and in backward those of the trained parameters of a first layer norm."""
    for found in (*runs[2], *runs[4]):
        assert found["sums/post-norm"].tolist() == found["sums/frozen norm"].tolist() == [1, 1]
        assert found["sums/pre-norm"].tolist() == [1, 3]


@pytest.mark.slow
def test_copies(runs):
    for found in runs[2]:
        for name in ("group of one", "copy", "again"):
            assert found[f"difference/{name}"] < 1e-5, name


@pytest.mark.slow
def test_errors(runs):
    for rank, found in enumerate(runs[2]):
        errors = {name.split("/")[1]: str(text) for name, text in found.items() if name.startswith("error/")}
        assert "linear1_weight" in errors["x"] and errors.pop("x").startswith("ValueError: ")
        assert errors == {
            "hidden": "ValueError: dim_feedforward: expected a multiple of the group's 2 processes, got 41",
            "type": "TypeError: group: expected a group of paddle.distributed.new_group or None, got list",
            "member": "ValueError: group: expected a group that this process belongs to, got one of ranks "
            f"[{1 - rank}] on rank {rank}",
            "seed": "ValueError: paddle.seed: expected the same seed on every process of the group, got [1, 2]",
            "x type": "TypeError: x: expected a Tensor, got int",
            "state": "ValueError: linear1_weight: expected shape [24, 80], that of the whole layer, got [24, 40]",
            "static": "NotImplementedError: tensor parallelism: expected dygraph, since the sum over the group is "
            "taken between operators, got a static graph",
        }


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate=True),
    "silu": F.silu,
}


def composed(layer, x):
    """The layer by ordinary ops, without dropout."""
    h = x
    if layer.normalize_before:
        h = F.layer_norm(x, worker.WIDTH, layer.ln1_scale, layer.ln1_bias, layer.epsilon)
    u = F.linear(h, layer.linear1_weight, layer.linear1_bias)
    if layer.gated:
        a, b = paddle.split(u, 2, axis=-1)
        u = ACTIVATIONS[layer.activation](a) * b
    else:
        u = ACTIVATIONS[layer.activation](u)
    z = F.linear(u, layer.linear2_weight, layer.linear2_bias)
    if layer.add_residual:
        z = x + z
    if layer.final_layer_norm:
        return F.layer_norm(z, worker.WIDTH, layer.ln2_scale, layer.ln2_bias, layer.epsilon)
    return z


@pytest.mark.parametrize("kind", [kind for kind in worker.LAYERS if "epsilon" not in worker.LAYERS[kind]])
def test_one_process_is_the_composition(kind):
    """Paddle's layer norm takes no epsilon above 0.001."""
    layer = worker.make_layer(kind, 0.0, act_dropout_rate=0.0)
    found, expected = ([], [])
    for results, compute in ((found, layer), (expected, lambda x: composed(layer, x))):
        layer.clear_gradients()
        x, y = map(paddle.to_tensor, worker.make_batch(0, worker.WIDTH))
        x.stop_gradient = False
        out = compute(x)
        ((out - y) ** 2).mean().backward()
        results.extend(tensor.numpy() for tensor in (out, x.grad, *(p.grad for p in layer.parameters())))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("kind", worker.LAYERS)
def test_one_process_is_the_function(kind):
    """Its numbers and its switches, but for the dropout masks."""
    layer = worker.make_layer(kind)
    layer.eval()
    x = paddle.to_tensor(next(worker.make_batch(1)))
    expected = fused_feedforward(
        x, **{name: getattr(layer, name) for name in ("linear1_weight", "linear2_weight", "linear1_bias",
        "linear2_bias", "ln1_scale", "ln1_bias", "ln2_scale", "ln2_bias", "activation", "add_residual", "gated",
        "final_layer_norm")}, ln1_epsilon=layer.epsilon, ln2_epsilon=layer.epsilon,
        pre_layer_norm=layer.normalize_before, training=False,
    )  # fmt: skip
    np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), rtol=0, atol=1e-5)
    assert layer.degree == 1 and layer.group is None and "degree=1" in repr(layer)


@pytest.mark.parametrize("rates", [(0.0, 0.5), (0.5, 0.0)])
def test_each_dropout_drops(rates):
    """The first rate is that of the hidden numbers."""
    hidden_rate, rate = rates
    layer = ParallelFusedFeedForward(
        worker.WIDTH, worker.HIDDEN, rate, act_dropout_rate=hidden_rate, add_residual=False, final_layer_norm=False
    )
    x = paddle.to_tensor(next(worker.make_batch(0)))
    dropped = float((layer(x) == 0).astype("float32").mean())
    assert abs(dropped - rate) < 0.1
    assert not np.allclose(layer(x).numpy(), layer(x).numpy())
    assert layer.dropout_rate == rate and layer.act_dropout_rate == hidden_rate
    assert ParallelFusedFeedForward(4, 8, 0.3).act_dropout_rate == 0.3


@pytest.mark.parametrize("full_graph", [True, False])
def test_one_process_to_static(full_graph):
    layer = worker.make_layer("gated")
    layer.eval()
    x = paddle.to_tensor(next(worker.make_batch(1)))
    expected = layer(x).numpy()
    found = paddle.jit.to_static(layer, full_graph=full_graph)(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_one_process_static():
    paddle.enable_static()
    try:
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            x = paddle.static.data("x", [-1, -1, worker.WIDTH])
            loss = ParallelFusedFeedForward(worker.WIDTH, worker.HIDDEN, gated=True)(x).square().mean()
            paddle.optimizer.SGD(0.1).minimize(loss)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        (found,) = executor.run(program, feed={"x": next(worker.make_batch(1))}, fetch_list=[loss])
    finally:
        paddle.disable_static()
    assert abs(float(found) - 1) < 1e-3  # layer-normalised


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_stay_wide(dtype):
    """And state dicts of any float dtype load."""
    layer = worker.make_layer("two norms")
    state = copy.deepcopy(layer.state_dict())
    layer.to(dtype=dtype)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == (paddle.float32 if name.startswith("ln") else getattr(paddle, dtype)), name
    assert layer.set_state_dict(state) == ([], [])
    for name, parameter in layer.named_parameters():
        expected = state[name].astype(parameter.dtype).astype("float32").numpy()
        np.testing.assert_array_equal(parameter.astype("float32").numpy(), expected)


def test_attributes_of_the_parameters():
    zeros = paddle.ParamAttr(name="w", initializer=paddle.nn.initializer.Constant(0.0))
    layer = ParallelFusedFeedForward(4, 8, weight_attr=zeros, bias_attr=False, normalize_before=True, name="ffn")
    names = {name: p.name for name, p in layer.named_parameters()}
    assert names.pop("ln1_scale").startswith("ffn")
    assert names == {"linear1_weight": "w.linear1_weight", "linear2_weight": "w.linear2_weight"}
    assert float(layer.linear1_weight.abs().sum()) == 0 and float(layer.ln1_scale.min()) == 1
    paddle.seed(5)
    layer = ParallelFusedFeedForward(4, 8, gated=True)
    paddle.seed(5)
    linear = paddle.nn.Linear(4, 16)
    np.testing.assert_array_equal(layer.linear1_weight.numpy(), linear.weight.numpy())


@pytest.mark.parametrize("argument, value, error", [
    ("d_model", 0, "ValueError: d_model: expected at least 1, got 0"),
    ("d_model", 4.0, "TypeError: d_model: expected an int, got 4.0"),
    ("dim_feedforward", -8, "ValueError: dim_feedforward: expected at least 1, got -8"),
    ("dropout_rate", 2, "ValueError: dropout_rate: expected a number in [0, 1], got 2"),
    ("act_dropout_rate", "0", "TypeError: act_dropout_rate: expected a number in [0, 1], got '0'"),
    ("epsilon", -1, "ValueError: epsilon: expected a number of at least 0, got -1"),
    ("activation", "tanh", "ValueError: activation: expected one of 'relu', 'gelu', 'gelu_tanh', 'silu', got 'tanh'"),
    ("normalize_before", 2, "TypeError: normalize_before: expected a bool, got 2"),
    ("final_layer_norm", "no", "TypeError: final_layer_norm: expected a bool, got 'no'"),
    ("add_residual", None, "TypeError: add_residual: expected a bool, got None"),
    ("gated", [], "TypeError: gated: expected a bool, got []"),
    ("weight_attr", False, "ValueError: weight_attr: expected a ParamAttr, what makes one, or None, got False: "
     "the weights are needed"),
    ("weight_attr", paddle.nn.initializer.Assign(np.zeros((4, 4))),
     "ValueError: weight_attr: expected an array of shape [4, 8] to assign to linear1_weight, got [4, 4]"),
    ("group", 3, "TypeError: group: expected a group of paddle.distributed.new_group or None, got int"),
])  # fmt: skip
def test_arguments(argument, value, error):
    arguments = {"d_model": 4, "dim_feedforward": 8, argument: value}
    assert worker.error_of(lambda: ParallelFusedFeedForward(**arguments)) == error
