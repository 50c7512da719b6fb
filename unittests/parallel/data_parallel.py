"""Run by test_data_parallel.py: two processes train on half of each batch, and the first saves its parameters:
``python data_parallel.py OUT.npz``.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from paddle_fused_attention import FusedMultiHeadAttention  # noqa: E402

PROCESSES = 2


def make_network():
    paddle.seed(1)
    return paddle.nn.Sequential(
        FusedMultiHeadAttention(24, 4, 0.0, 0.0, normalize_before=True), paddle.nn.Linear(24, 3)
    )


def make_batches():
    return [np.random.default_rng(i).standard_normal((2 * PROCESSES, 7, 24)).astype("float32") for i in range(5)]


def train(network, batches):
    """SGD steps; Adam would blow up the rounding errors of a key bias, whose gradient is zero."""
    optimizer = paddle.optimizer.SGD(0.5, parameters=network.parameters())
    for batch in batches:
        (network(paddle.to_tensor(batch)) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def worker(path):
    paddle.distributed.init_parallel_env()
    rank = paddle.distributed.get_rank()
    network = make_network()
    share = slice(2 * rank, 2 * rank + 2)
    train(paddle.DataParallel(network), [batch[share] for batch in make_batches()])
    if rank == 0:
        np.savez(path, **{name: p.numpy() for name, p in network.named_parameters()})


if __name__ == "__main__":
    paddle.distributed.spawn(worker, args=(sys.argv[1],), nprocs=PROCESSES, backend="gloo")
