"""Who gets a gradient: stop_gradient and no_grad mean for the operator what they mean for Paddle's own, in every graph
mode, also where they change after a graph was made.
"""

import numpy as np
import paddle
import paddle.nn.functional as F
import paddle_fused_attention
import pytest
from paddle import nn
from paddle.static import InputSpec
from paddle_fused_attention import FusedMultiHeadAttention, _op
from runners import static_mode

IS_PADDLE_2 = paddle.__version__.startswith("2.")
E, H = 24, 4
BATCH, SEQ_LEN = 2, 5


class Composed(FusedMultiHeadAttention):
    """The block out of Paddle's own operators."""

    def forward(self, query, attn_mask=None):
        qkv = paddle.matmul(query, self.qkv_weight.reshape([3 * E, E]), transpose_y=True) + self.qkv_bias.reshape(
            [3 * E]
        )
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


def forget_gradients(network):
    """None, not zeros."""
    for parameter in network.parameters():
        parameter.clear_gradient(False)


def compare(found, expected, true=None):
    """Each gradient is that of Paddle's operators. Where those give none, so must the block; or, if what every gradient
    would be is given, be right: a graph of Paddle's operators that was traced frozen stays so.
    """
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
    """Gradients of one step, which are cleared. Where nothing is trained Paddle 3's backward does nothing and 2.6's
    raises.
    """
    loss = loss_of(network)
    if not (IS_PADDLE_2 and loss.stop_gradient):
        loss.backward()
    found = gradients_of(network)
    forget_gradients(network)
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
    """Steps after the graph was traced with the block frozen move its weights as they move in dygraph, or not at all,
    as those of Paddle's operators.
    """

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
    assert any(
        np.allclose(found, run(Composed, graph), rtol=1e-3, atol=1e-4)
        for graph in (full_graph, lambda network: network)
    )


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
    """jit.save with frozen parameters, jit.load, and training of all: gradients, or their absence, are those of
    Paddle's operators.
    """

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
                (name,) = [
                    n for n, p in network.named_parameters() if p.shape == parameter.shape and (p == parameter).all()
                ]
                found[name] = None if parameter.grad is None else parameter.grad.numpy()
            results.append(found)
            forget_gradients(loaded)
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


def block_of(module):
    return module.FusedMultiHeadAttention(E, H, 0.0, 0.0)


MAKERS = [
    lambda: block_of(paddle_fused_attention),
    lambda: block_of(paddle_fused_attention.incubate),
    lambda: paddle_fused_attention.ParallelFusedMultiHeadAttention(E, H, 0.0, 0.0),
    lambda: paddle_fused_attention.convert(nn.TransformerEncoderLayer(E, H, 32, 0.0)),
]
BLOCKS = pytest.mark.parametrize("make", MAKERS, ids=["block", "incubate", "parallel", "converted"])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("x_stops", [True, False], ids=["x_stops", "x_wants"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("make", MAKERS[:-1], ids=["block", "incubate", "parallel"])  # models are converted in dygraph
def test_stop_gradient_of_the_result(make, grad, x_stops, frozen):
    """In a static program it is that of Linear's result."""
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        x = paddle.static.data("x", [BATCH, SEQ_LEN, E])
        x.stop_gradient = x_stops
        results = []
        for layer in (nn.Linear(E, E), make()):
            for parameter in layer.parameters():
                parameter.stop_gradient = frozen
            with paddle.set_grad_enabled(grad) if not IS_PADDLE_2 or grad else paddle.no_grad():
                results.append(layer(x).stop_gradient)
    assert results[0] == results[1]


class Distillation(nn.Layer):
    """A teacher that is called under no_grad, in one of its forms."""

    def __init__(self, teacher, form):
        super().__init__()
        paddle.seed(3)
        self.student = nn.Linear(E, E)
        self.teacher = teacher
        self.form = form

    @paddle.no_grad()
    def teach(self, x):
        return self.teacher(x)

    def forward(self, x):
        hidden = self.student(x)
        if self.form == "context":
            with paddle.no_grad():
                target = self.teacher(hidden)
        else:
            target = self.teach(hidden)
        return hidden * hidden + target


@pytest.mark.skipif(
    IS_PADDLE_2, reason="Paddle 2.6 has no no_grad in static graphs: its own layers get gradients there"
)
@pytest.mark.parametrize("form", ["context", "decorator"])
@BLOCKS
def test_teacher_under_no_grad(make, form):
    """In a full graph it gets no gradient, and the student that of dygraph."""
    network = Distillation(make(), form)
    loss_of(network).backward()
    expected = gradients_of(network)
    assert (
        expected["student.weight"] is not None
        and expected["teacher." + next(iter(network.teacher.state_dict()))] is None
    )
    forget_gradients(network)
    loss_of(full_graph(network)).backward()
    compare(gradients_of(network), expected)


@BLOCKS
def test_full_graph_called_under_no_grad(make):
    """Nothing flows through it. What its result shows is up to Paddle, and the same for Linear."""
    shown = []
    for layer in (nn.Linear(E, E), make()):
        network = full_graph(layer)
        x = paddle.to_tensor(arrays()[0])
        network(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        forget_gradients(network)
        with paddle.no_grad():
            out = network(x)
        shown.append(out.stop_gradient)
        if not out.stop_gradient:
            out.sum().backward()
        assert all(parameter.grad is None for parameter in network.parameters())
    assert shown[0] == shown[1]


class WithMask(nn.Layer):
    """A layer called with a mask by position, for to_static."""

    def __init__(self, kind):
        super().__init__()
        paddle.seed(3)
        self.layer = {
            "block": lambda: paddle_fused_attention.FusedMultiHeadAttention(16, 2, 0.0, 0.0),
            "incubate": lambda: paddle_fused_attention.incubate.FusedMultiHeadAttention(16, 2, 0.0, 0.0),
            "converted": lambda: paddle_fused_attention.convert(nn.TransformerEncoderLayer(16, 2, 32, 0.0)),
        }[kind]()
        self.converted = kind == "converted"
        self.to(dtype="float64")

    def forward(self, x, mask):
        return self.layer(x, mask) if self.converted else self.layer(x, attn_mask=mask)


@pytest.mark.parametrize("mode", ["dygraph", "full_graph"])
@pytest.mark.parametrize("kind", ["block", "incubate", "converted"])
def test_layers_give_a_mask_its_gradient(kind, mode):
    """Against the difference of two results, of every layer that takes a mask."""
    rng = np.random.default_rng(4)
    x, d_out = (paddle.to_tensor(rng.standard_normal((2, 5, 16))) for _ in range(2))
    mask, direction = rng.standard_normal((2, 1, 5, 5)), rng.standard_normal((2, 1, 5, 5))
    layer = WithMask(kind)
    other = WithMask(kind)
    call = other if mode == "dygraph" else paddle.jit.to_static(other, full_graph=True)

    def result(array):
        with paddle.no_grad():
            return float((layer(x, paddle.to_tensor(array)) * d_out).sum())

    step = 1e-5
    expected = (result(mask + step * direction) - result(mask - step * direction)) / (2 * step)
    trained = paddle.to_tensor(mask, stop_gradient=False)
    call(x, trained).backward(d_out)
    assert trained.grad.shape == list(mask.shape)
    np.testing.assert_allclose((trained.grad.numpy() * direction).sum(), expected, rtol=1e-6)


def test_backward_twice():
    """Paddle's words, which name retain_graph; and with it the gradients double."""
    network = Network(FusedMultiHeadAttention)
    x, d_out = map(paddle.to_tensor, arrays())
    block = network.block
    for training in (True, False):
        block.training = training
        out = block(x)
        out.backward(d_out)
        with pytest.raises(Exception, match="retain_graph=True"):
            out.backward(d_out)
        forget_gradients(block)
        out = block(x)
        out.backward(d_out, retain_graph=True)
        once = block.qkv_weight.grad.numpy()
        out.backward(d_out)
        np.testing.assert_allclose(block.qkv_weight.grad.numpy(), 2 * once)
        forget_gradients(block)


@pytest.mark.parametrize("holds", [False, True], ids=["program", "dygraph"])
def test_bits_of_a_saved_program(holds):
    """Programs of earlier versions say which inputs were frozen when they were made; only dygraph's own word is taken
    for it.
    """
    block = Network(FusedMultiHeadAttention).block
    x, d_out = map(paddle.to_tensor, arrays())
    out = block(x)
    out.backward(d_out)
    expected = gradients_of(block)
    forget_gradients(block)
    tensors = (
        x,
        block.qkv_weight,
        block.linear_weight,
        None,
        None,
        block.ln_scale,
        block.ln_bias,
        block.qkv_bias,
        block.linear_bias,
        None,
    )
    present = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
    switches = _op.FINAL_LAYER_NORM | _op.ADD_RESIDUAL | _op.UPSCALE_IN_TRAIN | _op.SAVE_FOR_BACKWARD
    only_ln_bias = 1 << _op.TENSORS.index("ln_bias")
    numbers = _op._float_bits((1e-5, 1e-5, 0.0, 0.0))
    out = _op._run_custom_op(
        _op.ATTENTION.type,
        *(_op._absent_eager() if tensor is None else tensor for tensor in tensors),
        False,
        switches | (_op.NEEDS_GRAD_HOLDS if holds else 0),
        present,
        only_ln_bias,
        *numbers,
        0,
        0,
        0,
    )[0]
    out.backward(d_out)
    found = gradients_of(block)
    if holds:
        for name in found.keys() - {"ln_bias"}:
            assert found[name].shape == (1,) and found[name] == 0  # nobody's gradient, but zeros
            expected[name] = found[name]
    compare(found, expected)
