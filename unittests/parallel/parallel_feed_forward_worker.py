"""Run by test_parallel_feed_forward.py: ``python parallel_feed_forward_worker.py PROCESSES DIRECTORY`` starts so many
processes, and each saves what it found. The models and the training are those of the tests too.
"""

import copy
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402
from paddle_fused_attention import (  # noqa: E402
    ParallelClipGradByGlobalNorm,
    ParallelFusedFeedForward,
    ParallelFusedMultiHeadAttention,
    full_state_dict,
    load_full_state_dict,
)

WIDTH, HIDDEN, SEQ_LEN, BATCH = 24, 40, 7, 4
STEPS = range(20)

LAYERS = {
    "post-norm": dict(activation="gelu"),
    "pre-norm": dict(activation="relu", normalize_before=True),
    "gated": dict(activation="silu", normalize_before=True, gated=True, act_dropout_rate=0.4),
    "two norms": dict(activation="gelu_tanh", normalize_before=True, final_layer_norm=True, epsilon=0.01),
    "no norm, no residual": dict(final_layer_norm=False, add_residual=False, gated=True),
    "no biases": dict(bias_attr=False),
}


def perturbed(network):
    """Biases and scales away from their initial zeros and ones, the same for every degree."""
    rng = np.random.default_rng(5)
    state = full_state_dict(network)
    changed = {name: (p.numpy() + 0.1 * rng.standard_normal(p.shape)).astype("float32") for name, p in state.items()}
    load_full_state_dict(network, changed)
    return network


def make_layer(kind, dropout_rate=0.2, **arguments):
    paddle.seed(7)
    return perturbed(ParallelFusedFeedForward(WIDTH, HIDDEN, dropout_rate, **{**LAYERS[kind], **arguments}))


def make_network(dropout_rate=0.2):
    """Both halves of a transformer layer, the feed-forward half of another, and a head."""
    paddle.seed(11)
    return perturbed(
        paddle.nn.Sequential(
            ParallelFusedMultiHeadAttention(
                WIDTH, 4, dropout_rate, dropout_rate, normalize_before=True, final_layer_norm=False
            ),
            ParallelFusedFeedForward(WIDTH, HIDDEN, dropout_rate, **LAYERS["gated"]),
            ParallelFusedFeedForward(WIDTH, HIDDEN, dropout_rate, **LAYERS["post-norm"]),
            paddle.nn.Linear(WIDTH, 3),
        )
    )


def make_batch(step, width=3):
    rng = np.random.default_rng(100 + step)
    return (rng.standard_normal((BATCH, SEQ_LEN, n)).astype("float32") for n in (WIDTH, width))


def train(network, steps, clip=None):
    """Losses of SGD with momentum; Adam would blow up the rounding errors of a key bias, whose gradient is zero."""
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, parameters=network.parameters(), grad_clip=clip)
    losses = []
    for step in steps:
        x, y = map(paddle.to_tensor, make_batch(step))
        loss = ((network(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    return losses


def computed(kind, dropout_rate):
    """A layer's result and its gradients, of the input and every parameter; a share where the layer has a share."""
    layer = make_layer(kind, dropout_rate)
    x, y = map(paddle.to_tensor, make_batch(0, WIDTH))
    x.stop_gradient = False
    paddle.seed(13)
    out = layer(x)
    ((out - y) ** 2).mean().backward()
    return {"out": out.numpy(), "x": x.grad.numpy(), **{name: p.grad.numpy() for name, p in layer.named_parameters()}}


def evaluated(kind, dtype):
    layer = make_layer(kind)
    layer.eval()
    layer.to(dtype=dtype)
    return layer(paddle.to_tensor(next(make_batch(0))).astype(dtype)).astype("float32").numpy()


def counted_sums(kind, **frozen):
    """How many sums over the group a call takes, and its backward."""
    layer = make_layer(kind)
    for name in frozen:
        getattr(layer, name).stop_gradient = True
    x = paddle.to_tensor(next(make_batch(0)))
    x.stop_gradient = False
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **named: calls.append(1) or all_reduce(*arguments, **named)
    try:
        out = layer(x)
        forward = len(calls)
        out.sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return [forward, len(calls) - forward]


def error_of(function):
    try:
        function()
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_errors():
    rank = dist.get_rank()
    paddle.seed(1)
    layer = ParallelFusedFeedForward(WIDTH, HIDDEN, gated=True)
    # Paddle's gloo can make no second group of several processes.
    alone, other = dist.new_group([0]), dist.new_group([1])

    def with_seed(seed):
        paddle.seed(seed)
        return ParallelFusedFeedForward(WIDTH, HIDDEN)

    def in_static_graph():
        paddle.enable_static()
        try:
            with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
                layer(paddle.static.data("x", [2, 3, WIDTH]))
        finally:
            paddle.disable_static()

    results = {
        "error/hidden": error_of(lambda: ParallelFusedFeedForward(WIDTH, 41)),
        "error/type": error_of(lambda: ParallelFusedFeedForward(WIDTH, HIDDEN, group=[0, 1])),
        "error/member": error_of(lambda: ParallelFusedFeedForward(WIDTH, HIDDEN, group=other if rank == 0 else alone)),
        "error/seed": error_of(lambda: with_seed(1 + rank)),
        "error/x type": error_of(lambda: layer(1)),
        "error/x": error_of(lambda: layer(paddle.ones([2, WIDTH + 1]))),
        "error/state": error_of(lambda: layer.load_full_state_dict(layer.state_dict())),
        "error/static": error_of(in_static_graph),
    }
    paddle.seed(1)
    x = paddle.to_tensor(next(make_batch(0)))
    whole = layer.full_state_dict()
    layer.eval()
    expected = layer(x).numpy()
    own = ParallelFusedFeedForward(WIDTH, HIDDEN, gated=True, group=alone if rank == 0 else other)
    own.set_state_dict(whole)
    own.eval()
    results["difference/group of one"] = np.abs(own(x).numpy() - expected).max()
    again = ParallelFusedFeedForward(WIDTH, HIDDEN, gated=True)
    assert again.set_state_dict(layer.state_dict()) == ([], [])
    again.eval()
    for name, found in (("copy", copy.deepcopy(layer)), ("again", again)):
        results[f"difference/{name}"] = np.abs(found(x).numpy() - expected).max()
    return results


def worker(directory):
    paddle.set_device("cpu")
    dist.init_parallel_env()
    rank, degree = dist.get_rank(), dist.get_world_size()
    network = make_network()
    results = {
        "distributed": sorted(name for name, p in network.named_parameters() if getattr(p, "is_distributed", False)),
        "losses": train(network, STEPS),
        "clipped": train(make_network(), range(5), ParallelClipGradByGlobalNorm(0.1)),
    }
    state = full_state_dict(network)
    if rank == 0:
        paddle.save(state, os.path.join(directory, f"degree{degree}.pdparams"))
    for kind in LAYERS:
        paddle.seed(3)
        for name, p in ParallelFusedFeedForward(WIDTH, HIDDEN, **LAYERS[kind]).full_state_dict().items():
            results[f"{kind}/initial/{name}"] = p.numpy()
        for rate in (0.0, 0.2):
            for name, array in computed(kind, rate).items():
                results[f"{kind}/{rate}/{name}"] = array
        for dtype in ("float32", "float16", "bfloat16"):
            results[f"{kind}/evaluated/{dtype}"] = evaluated(kind, dtype)
    results["sums/post-norm"] = counted_sums("post-norm")
    results["sums/frozen norm"] = counted_sums("pre-norm", ln1_scale=True, ln1_bias=True)
    results["sums/pre-norm"] = counted_sums("pre-norm")
    if degree == 2:
        results.update(run_errors())
    np.savez(os.path.join(directory, f"degree{degree}_rank{rank}.npz"), **results)


if __name__ == "__main__":
    dist.spawn(worker, args=(sys.argv[2],), nprocs=int(sys.argv[1]), backend="gloo")
