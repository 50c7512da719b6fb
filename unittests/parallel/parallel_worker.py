"""Run by test_parallel.py: ``python parallel_worker.py PROCESSES DIRECTORY`` starts so many processes, and each saves
what it found. The models and the training are those of the tests too.
"""

import copy
import functools
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402
from paddle_fused_attention import FusedMultiHeadAttention, incubate  # noqa: E402
from paddle_fused_attention.parallel import (  # noqa: E402
    ParallelClipGradByGlobalNorm,
    ParallelFusedMultiHeadAttention,
    full_state_dict,
    load_full_state_dict,
)

EMBED_DIM, NUM_HEADS, SEQ_LEN, BATCH = 24, 4, 7, 4


class Network(paddle.nn.Layer):
    """Two blocks, of either norm order, and a head."""

    def __init__(self, layer_class, dropout_rate, **arguments):
        super().__init__()
        sizes = (EMBED_DIM, NUM_HEADS, dropout_rate, dropout_rate)
        self.first = layer_class(*sizes, normalize_before=True, final_layer_norm=False, causal=True, **arguments)
        self.second = layer_class(*sizes, normalize_before=True, **arguments)
        self.head = paddle.nn.Linear(EMBED_DIM, 3)

    def forward(self, x, mask=None):
        return self.head(self.second(self.first(x), attn_mask=mask))


def perturbed(network):
    """Biases and scales away from their initial zeros and ones, the same for every degree."""
    rng = np.random.default_rng(5)
    state = full_state_dict(network)
    changed = {name: (p.numpy() + 0.1 * rng.standard_normal(p.shape)).astype("float32") for name, p in state.items()}
    load_full_state_dict(network, changed)
    return network


def make_network(dropout_rate=0.2, layer_class=ParallelFusedMultiHeadAttention, **arguments):
    paddle.seed(11)
    return perturbed(Network(layer_class, dropout_rate, **arguments))


def make_batch(step):
    rng = np.random.default_rng(100 + step)
    x = rng.standard_normal((BATCH, SEQ_LEN, EMBED_DIM)).astype("float32")
    y = rng.standard_normal((BATCH, SEQ_LEN, 3)).astype("float32")
    return x, y


def make_mask():
    """A mask with heads, which have to be shared out too."""
    return np.random.default_rng(9).random((BATCH, NUM_HEADS, SEQ_LEN, SEQ_LEN)) > 0.3


def loss_of(network, step):
    x, y = (paddle.to_tensor(array) for array in make_batch(step))
    return ((network(x) - y) ** 2).mean()


def train(network, steps, clip=None):
    """Losses of SGD with momentum; Adam would blow up the rounding errors of a key bias, whose gradient is zero."""
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, parameters=network.parameters(), grad_clip=clip)
    losses = []
    for step in steps:
        loss = loss_of(network, step)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    return losses


def gradients():
    """Of the loss for the input and every parameter, a share where the layer has a share; and for masks that want one,
    of every head and the same for all."""
    network = make_network()
    x, y = (paddle.to_tensor(array) for array in make_batch(0))
    x.stop_gradient = False
    ((network(x, paddle.to_tensor(make_mask())) - y) ** 2).mean().backward()
    found = {"x": x.grad.numpy(), **{name: p.grad.numpy() for name, p in network.named_parameters()}}
    for name, heads in (("mask", NUM_HEADS), ("mask_of_all_heads", 1)):
        mask = paddle.to_tensor(np.where(make_mask()[:, :heads], 0.0, -3.0).astype("float32"), stop_gradient=False)
        ((make_network()(x, mask) - y) ** 2).mean().backward()
        found[name] = mask.grad.numpy()
    return found


def gradients_with_keys(key_len):
    """Of a layer whose keys and values are other tensors; where they are as long as the query they are its copies."""
    layer = make_network().second
    query = make_batch(0)[0]
    rng = np.random.default_rng(7)
    arrays = [
        query,
        *(query if key_len == SEQ_LEN else rng.standard_normal((BATCH, key_len, EMBED_DIM)) for _ in range(2)),
    ]
    tensors = [paddle.to_tensor(a.astype("float32"), stop_gradient=False) for a in arrays]
    mask = paddle.to_tensor(np.random.default_rng(9).random((BATCH, NUM_HEADS, SEQ_LEN, key_len)) > 0.3)
    paddle.seed(12)
    out = layer(*tensors, mask)
    (out * paddle.arange(EMBED_DIM, dtype="float32")).square().mean().backward()
    found = {"out": out.numpy(), **{name: t.grad.numpy() for name, t in zip(("query", "key", "value"), tensors)}}
    return {**found, **{name: p.grad.numpy() for name, p in layer.named_parameters()}}


def evaluate(dtype):
    """The second block's result in evaluation mode."""
    layer = make_network().second
    layer.eval()
    layer.to(dtype=dtype)
    return (
        layer(paddle.to_tensor(make_batch(0)[0]).astype(dtype), attn_mask=paddle.to_tensor(make_mask()))
        .astype("float32")
        .numpy()
    )


def resume(network, steps):
    """The steps after a checkpoint, of which the random state is not a part."""
    paddle.seed(steps[0])
    return train(network, steps)


MESH_STEPS = 8
FIRST, SECOND, THIRD = range(20), range(20, 25), range(25, 30)


def run_both(directory):
    """What two processes and four do."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    network = make_network()
    results = {"losses": train(network, FIRST)}
    if degree == 2:
        state = full_state_dict(network)
    else:
        network = make_network(weight_attr=paddle.nn.initializer.Constant(0.0))
        load_full_state_dict(network, paddle.load(os.path.join(directory, "degree2.pdparams")))
        results["continued"] = resume(network, SECOND)
        state = full_state_dict(network)
    if rank == 0:
        paddle.save(state, os.path.join(directory, f"degree{degree}.pdparams"))
    results["clipped"] = train(make_network(), range(5), ParallelClipGradByGlobalNorm(0.1))
    for name, gradient in gradients().items():
        results[f"gradient/{name}"] = gradient
    for key_len in (SEQ_LEN, 10):
        for name, array in gradients_with_keys(key_len).items():
            results[f"keys {key_len}/{name}"] = array
    for dtype in ("float32", "float16", "bfloat16"):
        results[f"evaluated/{dtype}"] = evaluate(dtype)
    return results


def error_of(function):
    try:
        function()
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_two():
    """Errors, copies, and the way to and from the whole layer."""
    rank = dist.get_rank()
    paddle.seed(1)
    layer = ParallelFusedMultiHeadAttention(EMBED_DIM, NUM_HEADS, 0.0, 0.0)
    # Paddle's gloo can make no second group of several processes.
    alone, other = dist.new_group([0]), dist.new_group([1])
    x = paddle.to_tensor(make_batch(0)[0])

    def with_seed(seed):
        paddle.seed(seed)
        return ParallelFusedMultiHeadAttention(EMBED_DIM, NUM_HEADS)

    def in_static_graph():
        paddle.enable_static()
        try:
            with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
                layer(paddle.static.data("x", [2, 3, EMBED_DIM]))
        finally:
            paddle.disable_static()

    results = {
        "error/heads": error_of(lambda: ParallelFusedMultiHeadAttention(EMBED_DIM, 3)),
        "error/type": error_of(lambda: ParallelFusedMultiHeadAttention(EMBED_DIM, NUM_HEADS, group=[0, 1])),
        "error/member": error_of(
            lambda: ParallelFusedMultiHeadAttention(EMBED_DIM, NUM_HEADS, group=other if rank == 0 else alone)
        ),
        "error/seed": error_of(lambda: with_seed(1 + rank)),
        "error/mask type": error_of(lambda: layer(x, attn_mask=1)),
        "error/mask": error_of(lambda: layer(x, attn_mask=paddle.ones([BATCH, 2, SEQ_LEN, SEQ_LEN]))),
        "error/state": error_of(lambda: layer.load_full_state_dict(layer.state_dict())),
        "error/full": error_of(lambda: ParallelFusedMultiHeadAttention.from_full(layer)),
        "error/static": error_of(in_static_graph),
    }
    paddle.seed(2)
    whole = FusedMultiHeadAttention(EMBED_DIM, NUM_HEADS, 0.0, 0.0, normalize_before=True, bias_attr=False)
    whole.linear_weight.stop_gradient = True
    whole.eval()
    split = ParallelFusedMultiHeadAttention.from_full(whole)
    again = split.to_full()
    expected = whole(x).numpy()
    for name, found in (("split", split), ("copy", copy.deepcopy(split)), ("again", again)):
        results[f"difference/{name}"] = np.abs(found(x).numpy() - expected).max()
    own = ParallelFusedMultiHeadAttention.from_full(whole, group=alone if rank == 0 else other)
    results["difference/group of one"] = np.abs(own(x).numpy() - expected).max()
    results["frozen"] = [split.linear_weight.stop_gradient, again.linear_weight.stop_gradient, split.training]
    attention = paddle.nn.MultiHeadAttention(EMBED_DIM, NUM_HEADS)
    split = ParallelFusedMultiHeadAttention.from_multi_head_attention(
        attention, paddle.nn.LayerNorm(EMBED_DIM), dropout_rate=0.0
    )
    results["difference/attention"] = np.abs((split(x) - split.to_full()(x)).numpy()).max()
    attention_again, _ = split.to_multi_head_attention()
    results["difference/attention again"] = np.abs((attention_again(x) - attention(x)).numpy()).max()
    return results


def share_of(name, array, transposed):
    """This process's part of a parameter of Paddle's layer."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    if name == "linear_weight":
        return np.split(array, degree, 0)[rank]
    if not name.startswith("qkv"):
        return array
    if not transposed:
        return np.split(array, degree, 1)[rank]
    columns = array.reshape([*array.shape[:-1], 3, NUM_HEADS, -1])
    return np.split(columns, degree, -2)[rank].reshape([*array.shape[:-1], -1])


def run_ring():
    """Paddle's own arguments for tensor parallelism, with shares of the parameters of a layer that is whole."""
    degree = dist.get_world_size()
    x, mask = paddle.to_tensor(make_batch(0)[0]), paddle.to_tensor(make_mask())
    results = {}
    for transposed in (False, True):
        for pre in (False, True):
            arguments = dict(normalize_before=pre, transpose_qkv_wb=transposed)
            paddle.seed(4)
            whole = incubate.FusedMultiHeadAttention(EMBED_DIM, NUM_HEADS, 0.0, 0.3, **arguments)
            part = incubate.FusedMultiHeadAttention(
                EMBED_DIM, NUM_HEADS, 0.0, 0.3, nranks=degree, ring_id=0, **arguments
            )
            rng = np.random.default_rng(6)
            for parameter in whole.parameters():
                parameter.set_value(rng.standard_normal(parameter.shape).astype("float32") * 0.3)

            for name, parameter in whole.named_parameters():
                getattr(part, name).set_value(np.ascontiguousarray(share_of(name, parameter.numpy(), transposed)))
            gradients = []
            for layer, copies in ((whole, False), (part, False), (part, True)):
                paddle.seed(8)
                layer.clear_gradients()
                inputs = x.clone().detach()
                inputs.stop_gradient = False
                out = layer(inputs, inputs * 1.0, inputs * 1.0, mask) if copies else layer(inputs, attn_mask=mask)
                (out**2).mean().backward()
                gradients.append({"out": out.numpy(), "x": inputs.grad.numpy()})
                gradients[-1].update({name: p.grad.numpy() for name, p in layer.named_parameters()})
            for name, value in gradients[0].items():
                scale = np.abs(value).max() + 1e-3
                expected = share_of(name, value, transposed) if name in dict(whole.named_parameters()) else value
                for kind, found in zip(("itself", "copies"), gradients[1:]):
                    results[f"ring/{transposed}/{pre}/{kind}/{name}"] = np.abs(found[name] - expected).max() / scale
    part_of = functools.partial(incubate.FusedMultiHeadAttention, EMBED_DIM, NUM_HEADS, ring_id=0)
    cache = paddle.zeros([2, BATCH, NUM_HEADS // degree, 1, EMBED_DIM // NUM_HEADS])
    results["error/ring size"] = error_of(lambda: part_of(nranks=4))
    results["error/ring cache"] = error_of(lambda: part_of(nranks=2)(x, cache=cache))
    return results


def shard(network, mesh, by_heads):
    """Puts every parameter on the mesh, whole or with the heads spread over it."""

    def place(name, layer, mesh):
        for key, parameter in list(layer.named_parameters(include_sublayers=False)):
            axis = {"qkv_weight": 1, "qkv_bias": 1, "linear_weight": 0}.get(key) if by_heads else None
            placement = dist.Replicate() if axis is None else dist.Shard(axis)
            setattr(layer, key, dist.shard_tensor(parameter, mesh, [placement]))

    return dist.shard_layer(network, mesh, place)


def run_mesh():
    """The auto-parallel engine: ordinary layers whose tensors are sharded over the batch, or over heads."""
    mesh = dist.ProcessMesh([0, 1], dim_names=["part"])
    if paddle.__version__.startswith("2."):
        x = dist.shard_tensor(paddle.to_tensor(make_batch(0)[0]), mesh, [dist.Replicate()])
        layer = FusedMultiHeadAttention(EMBED_DIM, NUM_HEADS)
        return {"error/mesh": error_of(lambda: layer(x))}
    results = {}
    for kind, dropout_rate in (("batch", 0.0), ("heads", 0.2)):
        network = shard(make_network(dropout_rate, FusedMultiHeadAttention), mesh, kind == "heads")
        # Dropout after the sum is Paddle's own: the single layer has other masks.
        for layer in (network.first, network.second):
            layer.dropout_rate = 0.0
        placement = dist.Shard(0) if kind == "batch" else dist.Replicate()
        optimizer = paddle.optimizer.Momentum(0.1, 0.9, parameters=network.parameters())
        mask = dist.shard_tensor(paddle.to_tensor(make_mask()), mesh, [placement])
        losses = []
        for step in range(MESH_STEPS):
            x, y = (dist.shard_tensor(paddle.to_tensor(array), mesh, [placement]) for array in make_batch(step))
            hidden = network.first(x)
            if step == 0:
                results[f"mesh/{kind}/placed"] = str(hidden.placements)
            loss = ((network.head(network.second(hidden, attn_mask=mask)) - y) ** 2).mean()
            loss.backward()
            if step == 0:
                results[f"mesh/{kind}/gradient"] = network.first.qkv_weight.grad._local_shape
            optimizer.step()
            optimizer.clear_grad()
            losses.append(float(loss))
        network.eval()
        recorded = network.first(x)
        with paddle.no_grad():
            unrecorded = network.first(x)
        assert unrecorded.stop_gradient and unrecorded.placements == recorded.placements
        results[f"mesh/{kind}/recorded"] = recorded._local_value().numpy()
        results[f"mesh/{kind}/unrecorded"] = unrecorded._local_value().numpy()
        results[f"mesh/{kind}/losses"] = losses
        results[f"mesh/{kind}/local"] = network.first.qkv_weight._local_shape
    return results


def worker(directory):
    paddle.set_device("cpu")
    dist.init_parallel_env()
    degree = dist.get_world_size()
    results = run_both(directory)
    if degree == 2:
        results.update(run_two())
        results.update(run_ring())
        results.update(run_mesh())
    np.savez(os.path.join(directory, f"degree{degree}_rank{dist.get_rank()}.npz"), **results)


if __name__ == "__main__":
    dist.spawn(worker, args=(sys.argv[2],), nprocs=int(sys.argv[1]), backend="gloo")
