"""Training features of Paddle with the layer: recompute, accumulation, clipping, paddle.Model."""

import numpy as np
import paddle
import pytest
from blocks import IS_PADDLE_2, gradients, make_layer, make_x
from paddle.distributed.fleet.utils import recompute


def run_twice(network, call):
    """Output and all gradients for a fixed state of the generator, which goes on as it was."""
    paddle.seed(5)
    x = paddle.to_tensor(make_x(), stop_gradient=False)
    out = call(network, x)
    out.square().mean().backward()
    results = [out.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in network.parameters())]
    network.clear_gradients()
    return results + [paddle.rand([3]).numpy()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute(use_reentrant):
    if IS_PADDLE_2 and not use_reentrant:
        pytest.skip("Paddle 2.6 has recompute with use_reentrant=False on GPUs alone")
    network = paddle.nn.Sequential(make_layer(0.3), make_layer(0.2, seed=2, causal=True))
    expected = run_twice(network, lambda net, x: net(x))
    results = run_twice(network, lambda net, x: recompute(net[1], recompute(net[0], x, use_reentrant=use_reentrant)))
    for result, wanted in zip(results, expected):
        assert np.array_equal(result, wanted)


def test_gradient_accumulation():
    """Two halves of a batch give the gradients of the whole."""
    layer, x = make_layer(), make_x()
    layer(paddle.to_tensor(x)).square().mean().backward()
    expected = gradients(layer)
    layer.clear_gradients()
    for half in (x[:2], x[2:]):
        (layer(paddle.to_tensor(half)).square().mean() / 2).backward()
    for name, gradient in gradients(layer).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * np.abs(expected[name]).max() + 1e-8)


@pytest.mark.parametrize("clip", ["ClipGradByGlobalNorm", "ClipGradByNorm", "ClipGradByValue"])
def test_gradient_clipping(clip):
    layer = make_layer()
    limit = 0.01
    layer(paddle.to_tensor(make_x())).square().sum().backward()
    before = {name: p.numpy() for name, p in layer.named_parameters()}
    found = {name: g.astype(np.float64) for name, g in gradients(layer).items()}
    total = np.sqrt(sum((g**2).sum() for g in found.values()))
    assert total > limit
    optimizer = paddle.optimizer.SGD(1.0, parameters=layer.parameters(), grad_clip=getattr(paddle.nn, clip)(limit))
    optimizer.step()
    for name, p in layer.named_parameters():
        norm = np.sqrt((found[name] ** 2).sum())
        wanted = {
            "ClipGradByGlobalNorm": found[name] * limit / total,
            "ClipGradByNorm": found[name] * min(1.0, limit / norm),
            "ClipGradByValue": np.clip(found[name], -limit, limit),
        }[clip]
        np.testing.assert_allclose(before[name] - p.numpy(), wanted, rtol=1e-3, atol=1e-6, err_msg=name)


class Labelled(paddle.io.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return make_x(seed=i)[0], np.array([i % 3])


class Classifier(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.attention = make_layer(0.1)
        self.linear = paddle.nn.Linear(24, 3)

    def forward(self, x):
        return self.linear(self.attention(x).mean(axis=1))


def test_model_fit(tmp_path):
    """paddle.Model trains as a loop by hand, with accumulation and clipping, and its checkpoint goes on."""

    def make():
        paddle.seed(0)
        network = Classifier()
        clip = paddle.nn.ClipGradByGlobalNorm(1.0)
        return network, paddle.optimizer.AdamW(1e-2, parameters=network.parameters(), grad_clip=clip)

    network, optimizer = make()
    model = paddle.Model(network)
    model.prepare(optimizer, paddle.nn.CrossEntropyLoss(), paddle.metric.Accuracy())
    paddle.seed(7)
    model.fit(Labelled(), epochs=2, batch_size=4, shuffle=False, verbose=0, accumulate_grad_batches=2)
    twin, optimizer = make()
    paddle.seed(7)
    for _ in range(2):
        for step, (x, label) in enumerate(paddle.io.DataLoader(Labelled(), batch_size=4)):
            paddle.nn.CrossEntropyLoss()(twin(x), label).backward()
            if step % 2:
                optimizer.step()
                optimizer.clear_grad()
    for (name, p), q in zip(network.named_parameters(), twin.parameters()):
        np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    model.save(str(tmp_path / "model"))
    other = paddle.Model(Classifier())
    other.prepare(None, paddle.nn.CrossEntropyLoss(), paddle.metric.Accuracy())
    other.load(str(tmp_path / "model"))
    assert other.evaluate(Labelled(), verbose=0) == model.evaluate(Labelled(), verbose=0)
    assert len(model.predict(Labelled(), batch_size=4, verbose=0)[0]) == 4
