"""Who gets a gradient: stop_gradient and no_grad mean for the operator what they mean for Paddle's own, in every graph mode, also where
they change after a graph was made."""

import contextlib

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.static import InputSpec
from paddle_fused_attention import FusedMultiHeadAttention
from runners import static_mode

IS_PADDLE_2 = paddle.__version__.startswith("2.")
E, H = 24, 4
BATCH, SEQ_LEN = 2, 5


class Composed(FusedMultiHeadAttention):
    """The block out of Paddle's own operators."""

    def forward(self, query, attn_mask=None):
        qkv = paddle.matmul(query, self.qkv_weight.reshape([3 * E, E]), transpose_y=True) + self.qkv_bias.reshape([3 * E])
        q, k, v = paddle.unbind(qkv.reshape([BATCH, SEQ_LEN, 3, H, E // H]).transpose([2, 0, 3, 1, 4]))
        scores = paddle.matmul(q * (E // H) ** -0.5, k, transpose_y=True)
        o = paddle.matmul(F.softmax(scores), v).transpose([0, 2, 1, 3]).reshape([BATCH, SEQ_LEN, E])
        z = query + paddle.matmul(o, self.linear_weight) + self.linear_bias
        centred = z - z.mean(-1, keepdim=True)
        return centred * paddle.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * self.ln_scale + self.ln_bias


class Network(nn.Layer):
    def __init__(self, block):
        super().__init__()
        paddle.seed(3)
        self.linear = nn.Linear(E, E)
        self.block = block(E, H, 0.0, 0.0)

    def forward(self, x):
        return self.block(self.linear(x))


BIASES = {"block.linear_bias", "block.qkv_bias", "block.ln_scale"}
BLOCK = {"block." + name for name in ("qkv_weight", "qkv_bias", "linear_weight", "linear_bias", "ln_scale", "ln_bias")}
LINEAR = {"linear.weight", "linear.bias"}
FREEZABLE = [BIASES, BLOCK - BIASES, BLOCK, LINEAR, BLOCK | LINEAR]


def freeze(network, names, frozen=True):
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.stop_gradient = frozen


def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, BATCH, SEQ_LEN, E)).astype("float32")


def loss_of(network):
    x, weight = map(paddle.to_tensor, arrays())
    return (network(x) * weight).sum()


def gradients_of(network):
    return {name: None if p.grad is None else p.grad.numpy() for name, p in network.named_parameters()}


def compare(found, expected, true=None):
    """Each gradient is that of Paddle's operators. Where those give none, so must the block; or, if what every gradient would be is
    given, be right: a graph of Paddle's operators that was traced frozen stays so."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if true is not None and gradient is None and found[name] is not None:
            gradient = true[name]
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert found[name].shape == gradient.shape, name
            # The largest gradient is of the order of 10; the bias of keys has none but for rounding.
            np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=2e-4, err_msg=name)


def true_gradients():
    return step(Network(Composed))


def full_graph(network):
    return paddle.jit.to_static(network, full_graph=True)


GRAPHS = pytest.mark.parametrize("graph", [lambda network: network, full_graph], ids=["dygraph", "full_graph"])


def step(network):
    """Gradients of one step, which are cleared. Where nothing is trained Paddle 3's backward does nothing and 2.6's raises."""
    loss = loss_of(network)
    if not (IS_PADDLE_2 and loss.stop_gradient):
        loss.backward()
    found = gradients_of(network)
    network.clear_gradients(set_to_zero=False)
    return found


@GRAPHS
@pytest.mark.parametrize("names", FREEZABLE, ids=lambda names: "+".join(sorted(names)))
def test_frozen_then_trained(names, graph):
    """Gradual unfreezing: one graph runs frozen, then trained, then frozen."""

    def run(block):
        network = graph(Network(block))
        results = []
        for frozen in (True, False, True):
            freeze(network, names, frozen)
            results.append(step(network))
        return results

    results = run(FusedMultiHeadAttention), run(Composed)
    for found, expected, thawed in zip(*results, (False, True, False)):
        compare(found, expected, true_gradients() if thawed else None)


@GRAPHS
@pytest.mark.parametrize("frozen", [True, False], ids=["thaw", "freeze"])
@pytest.mark.parametrize("names", FREEZABLE[:-1], ids=lambda names: "+".join(sorted(names)))
def test_changed_between_forward_and_backward(names, frozen, graph):
    def run(block):
        network = graph(Network(block))
        freeze(network, names, frozen)
        loss = loss_of(network)
        freeze(network, names, not frozen)
        loss.backward()
        return gradients_of(network)

    compare(run(FusedMultiHeadAttention), run(Composed))


def test_an_optimizer_of_what_was_frozen():
    """Steps after the graph was traced with the block frozen move its weights as they move in dygraph, or not at all, as those of Paddle's
    operators."""

    def run(block, graph):
        network = graph(Network(block))
        freeze(network, BLOCK)
        optimizer = paddle.optimizer.SGD(0.01, parameters=network.parameters())
        for frozen in (True, True, False, False):
            freeze(network, BLOCK, frozen)
            loss_of(network).backward()
            optimizer.step()
            optimizer.clear_grad()
        return [float(loss_of(network))] + [float(parameter.square().sum()) for parameter in network.parameters()]

    found = run(FusedMultiHeadAttention, full_graph)
    assert any(np.allclose(found, run(Composed, graph), rtol=1e-3, atol=1e-4) for graph in (full_graph, lambda network: network))


def distinct_network(block):
    """With no two parameters of the same values."""
    network = Network(block)
    with paddle.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.set_value(parameter + i / 1000)
    return network


@pytest.mark.skipif(IS_PADDLE_2, reason="parameters of a loaded model get no gradients on Paddle 2.6")
@pytest.mark.parametrize("names", FREEZABLE, ids=lambda names: "+".join(sorted(names)))
def test_saved_frozen_and_tuned(names, tmp_path):
    """jit.save with frozen parameters, jit.load, and training of all: gradients, or their absence, are those of Paddle's operators."""

    def run(block):
        network = distinct_network(block)
        freeze(network, names)
        path = str(tmp_path / block.__name__)
        paddle.jit.save(network, path, input_spec=[InputSpec([BATCH, SEQ_LEN, E], "float32", "x", stop_gradient=True)])
        loaded = paddle.jit.load(path)
        loaded.train()
        results = []
        for thaw in (False, True):
            for parameter in loaded.parameters():
                parameter.stop_gradient = parameter.stop_gradient and not thaw
            loss = loss_of(loaded)
            loss.backward()
            # By their values, which are all different: loaded parameters have other names.
            found = {}
            for parameter in loaded.parameters():
                (name,) = [n for n, p in network.named_parameters() if p.shape == parameter.shape and (p == parameter).all()]
                found[name] = None if parameter.grad is None else parameter.grad.numpy()
            results.append(found)
            loaded.clear_gradients(set_to_zero=False)
        return results

    results = run(FusedMultiHeadAttention), run(Composed)
    compare(results[0][0], results[1][0])
    compare(results[0][1], results[1][1], step(distinct_network(Composed)))


def run_program(block, names, build):
    """A static program that `build` makes of a network; returns what it fetches by name, None for what is not there."""
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            x = paddle.static.data("x", [BATCH, SEQ_LEN, E])
            weight = paddle.static.data("weight", [BATCH, SEQ_LEN, E])
            network = Network(block)
            freeze(network, names)
            variables = build(network, x, weight)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        dygraph = initial_state()
        for name, parameter in network.named_parameters():
            paddle.static.global_scope().find_var(parameter.name).get_tensor().set(dygraph[name], paddle.CPUPlace())
        present = {name: variable for name, variable in variables.items() if variable is not None}
        results = executor.run(main, feed=dict(zip(("x", "weight"), arrays())), fetch_list=list(present.values()))
    return dict(dict.fromkeys(variables), **dict(zip(present, results)))


def initial_state():
    paddle.disable_static()
    state = {name: tensor.numpy() for name, tensor in Network(FusedMultiHeadAttention).state_dict().items()}
    paddle.enable_static()
    return state


@pytest.mark.parametrize("names", [set(), *FREEZABLE[:-1]], ids=lambda names: "+".join(sorted(names)))
def test_gradients_of_a_program(names):
    """Asked for the gradients of all parameters, frozen ones too."""

    def build(network, x, weight):
        parameters = dict(network.named_parameters())
        loss = (network(x) * weight).sum()
        return dict(zip(parameters, paddle.static.gradients([loss], list(parameters.values()))))

    found = run_program(FusedMultiHeadAttention, names, build)
    expected = run_program(Composed, names, build)
    assert all(found[name] is None for name in names & LINEAR)
    compare(found, expected, true_gradients())


def test_stopped_in_the_middle():
    """Nothing flows through a result whose stop_gradient was set."""

    def build(network, x, weight):
        hidden = network.linear(x)
        hidden.stop_gradient = True
        parameters = dict(network.named_parameters())
        loss = (network.block(hidden) * weight).sum()
        return dict(zip(parameters, paddle.static.gradients([loss], list(parameters.values()))))

    found = run_program(FusedMultiHeadAttention, set(), build)
    assert found["linear.weight"] is None and found["linear.bias"] is None
    compare(found, run_program(Composed, set(), build))
