"""Run by test_split_feed_forward.py: ``python feed_forward_worker.py PROCESSES DIRECTORY`` starts so many processes,
and each saves what it found. The blocks are those of the tests too.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402
from paddle_fused_attention import fused_bias_dropout_residual_layer_norm, fused_feedforward, incubate  # noqa: E402

ROWS, WIDTH, HIDDEN = 10, 12, 24
WEIGHTS = ("linear1_weight", "linear1_bias", "linear2_weight")
BLOCKS = {
    "plain": dict(seed=5, activation="gelu"),
    "before": dict(seed=5, pre_layer_norm=True),
    "gated": dict(seed=6, activation="silu", gated=True, pre_layer_norm=True, final_layer_norm=True),
    "bare": dict(seed=7, add_residual=False, final_layer_norm=False, mode="downscale_in_infer"),
    "evaluated": dict(training=False, mode="downscale_in_infer"),
}


def arrays_of(block, dtype="float64"):
    rng = np.random.default_rng(3)
    first = HIDDEN * (2 if BLOCKS[block].get("gated") else 1)
    shapes = {
        "x": (ROWS, WIDTH),
        "linear1_weight": (WIDTH, first),
        "linear2_weight": (HIDDEN, WIDTH),
        "linear1_bias": (first,),
        **{n: (WIDTH,) for n in ("linear2_bias", "ln1_scale", "ln1_bias", "ln2_scale", "ln2_bias")},
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def results_of(tensors, block, **arguments):
    """The result and all gradients, of a fixed gradient of the result. NumPy arrays."""
    for tensor in tensors.values():
        tensor.stop_gradient = False
    out = fused_feedforward(**tensors, dropout1_rate=0.2, dropout2_rate=0.3, **BLOCKS[block], **arguments)
    (out * (paddle.arange(WIDTH).astype(out.dtype) - 3.0)).sum().backward()
    found = {name: t.grad for name, t in tensors.items() if t.grad is not None}
    return {"out": out, **found}


def share_of(name, array, part, parts):
    """The part of a whole parameter, with gated blocks of each half, or of its gradient."""
    if name not in WEIGHTS:
        return array
    if name == "linear2_weight":
        return np.split(array, parts)[part]
    halves = np.split(array, array.shape[-1] // HIDDEN, axis=-1)
    return np.concatenate([np.split(half, parts, axis=-1)[part] for half in halves], axis=-1)


def run_group(group):
    results = {}
    for block in BLOCKS:
        tensors = {
            name: paddle.to_tensor(share_of(name, array, group.rank, group.nranks))
            for name, array in arrays_of(block).items()
        }
        found = results_of(tensors, block, ring_id=group.id)
        results.update({f"group/{block}/{name}": t.numpy() for name, t in found.items()})
    return results


def run_layer(group):
    """Paddle's layer with nranks and ring_id, trained for one step by the generator's masks."""
    paddle.seed(31)
    whole = incubate.FusedFeedForward(WIDTH, HIDDEN, 0.3, activation="gelu", act_dropout_rate=0.2)
    layer = incubate.FusedFeedForward(
        WIDTH, HIDDEN, 0.3, activation="gelu", act_dropout_rate=0.2, nranks=group.nranks, ring_id=group.id
    )
    layer.set_state_dict(
        {
            name: share_of(name[1:], value.numpy(), group.rank, group.nranks)
            for name, value in whole.state_dict().items()
        }
    )
    x = paddle.to_tensor(arrays_of("plain", "float32")["x"])
    paddle.seed(32)
    first, second = layer(x).numpy(), layer(x).numpy()
    layer.eval()
    whole.eval()
    return {
        "layer/drops": float(np.abs(first - second).max()),
        "layer/first": first,
        "layer/evaluated": layer(x).numpy(),
        "layer/whole": whole(x).numpy(),
        "layer/distributed": [p.is_distributed for p in layer.parameters()],
    }


def run_mesh():
    """The auto-parallel engine: rows of x, or hidden numbers, spread over two processes."""
    mesh = dist.ProcessMesh([0, 1], dim_names=["part"])
    if paddle.__version__.startswith("2."):
        tensors = {name: paddle.to_tensor(array) for name, array in arrays_of("plain").items()}
        tensors["x"] = dist.shard_tensor(tensors["x"], mesh, [dist.Replicate()])
        try:
            fused_feedforward(**tensors)
        except NotImplementedError as error:
            return {"mesh/error": str(error)}
        return {"mesh/error": "none"}
    results = {}
    for block in ("before", "gated", "bare", "evaluated"):
        for kind in ("rows", "hidden"):
            if kind == "rows" and BLOCKS[block].get("training", True):
                continue  # every process counts the elements of its own rows
            axes = {"x": 0} if kind == "rows" else {"linear1_weight": 1, "linear1_bias": 0, "linear2_weight": 0}
            tensors = {
                name: dist.shard_tensor(
                    paddle.to_tensor(array), mesh, [dist.Shard(axes[name]) if name in axes else dist.Replicate()]
                )
                for name, array in arrays_of(block).items()
            }
            found = results_of(tensors, block)
            for name, t in found.items():
                whole = dist.reshard(t, mesh, [dist.Replicate()])
                results[f"mesh/{kind}/{block}/{name}"] = whole.numpy()
            if kind == "hidden" and block != "gated":
                results[f"mesh/{kind}/{block}/local"] = tensors["linear1_weight"].grad._local_shape
    x = dist.shard_tensor(paddle.to_tensor(arrays_of("bare")["x"]), mesh, [dist.Shard(0)])
    tail = fused_bias_dropout_residual_layer_norm(x, x, dropout_rate=0.0)
    results["mesh/tail"] = dist.reshard(tail, mesh, [dist.Replicate()]).numpy()
    return results


def worker(directory):
    paddle.set_device("cpu")
    dist.init_parallel_env()
    group = dist.get_group(0)
    results = {**run_group(group), **run_layer(group)}
    if group.nranks == 2:
        results.update(run_mesh())
    np.savez(os.path.join(directory, f"degree{group.nranks}_rank{group.rank}.npz"), **results)


if __name__ == "__main__":
    dist.spawn(worker, args=(sys.argv[2],), nprocs=int(sys.argv[1]), backend="gloo")
