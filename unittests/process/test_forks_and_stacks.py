"""Processes that are forked or spawned, data loaders' workers, and threads with small stacks."""

import pytest
from processes import run_python, run_script

CALLS = """
import sys
import numpy as np
import paddle
from paddle_fused_attention import fused_feedforward, fused_multi_head_attention
from paddle_fused_attention.functional import scaled_dot_product_attention


def tensor(*shape, dtype="float32"):
    numbers = np.random.default_rng(len(shape)).standard_normal(shape)
    result = paddle.to_tensor(numbers.astype("float32")).astype(dtype)
    result.stop_gradient = False
    return result


def call(dtype="float32"):
    x, qkv_weight, weight, up, down, q, mask = (
        tensor(*shape, dtype=dtype)
        for shape in (
            (2, 70, 128), (3, 2, 64, 128), (128, 128), (128, 512), (512, 128), (2, 70, 2, 64), (1, 2, 70, 70)
        )
    )
    block = fused_multi_head_attention(x, qkv_weight, weight, causal=True, attn_dropout_rate=0.1, seed=3)
    hidden = fused_feedforward(x, up, down, activation="gelu", dropout1_rate=0.1, seed=4)
    attention = scaled_dot_product_attention(q, q, q, mask, dropout_p=0.1, seed=5)
    results = [block, hidden, attention]
    results += paddle.grad(results, [x, qkv_weight, up, q, mask], results)
    return b"".join(result.numpy().tobytes() for result in results)
"""

FORKS = """
import os, time
expected = call()
for _ in range(3):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if call() == expected else 2
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert status == 0, status
assert call() == expected
print("well")
"""

SPAWNS = """
import multiprocessing

if __name__ == "__main__":
    expected = call()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(call, ["float32"] * 4) == [expected] * 4
        # Else the pool sends SIGTERM, which Paddle's handler may not survive (docs/paddle.md).
        pool.close()
        pool.join()
    print("well")
"""

WORKERS = """
from paddle.io import DataLoader, Dataset


class Computed(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.frombuffer(call(), np.uint8)


expected = np.frombuffer(call(), np.uint8)
for batch in DataLoader(Computed(), batch_size=2, num_workers=2, use_shared_memory=False):
    batch = batch[0] if isinstance(batch, (list, tuple)) else batch
    assert (batch.numpy() == expected).all()
print("well")
"""

STACKS = """
import threading

for dtype in ("float32", "float64", "float16", "bfloat16"):
    expected, found = call(dtype), []
    threading.stack_size(128 << 10)
    thread = threading.Thread(target=lambda: found.append(call(dtype)))
    thread.start()
    thread.join()
    assert found == [expected], dtype
print("well")
"""


# scikit-learn sets it to FALSE, which forked processes of ours inherit and hang by (docs/paddle.md).
SURVIVES_FORKS = {"KMP_INIT_AT_FORK": "TRUE"}


def check(end):
    assert (end.returncode, end.stdout.split()[-1:]) == (0, ["well"]), end.stderr[-2000:]


@pytest.mark.slow
def test_forks_after_use():
    check(run_python(CALLS + FORKS, threads=3, **SURVIVES_FORKS))


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(CALLS + SPAWNS)
    check(run_script(script))


@pytest.mark.slow
def test_workers_of_a_data_loader():
    check(run_python(CALLS + WORKERS, **SURVIVES_FORKS))


@pytest.mark.slow
def test_threads_with_small_stacks():
    """Of 128 KiB, and the operator's own of 64."""
    check(run_python(CALLS + STACKS, threads=3, OMP_STACKSIZE="64k", KMP_STACKSIZE="64k"))
