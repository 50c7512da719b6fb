"""The attention block on the CPU: ours against the same block composed of Paddle's layers and of PyTorch's.

    python benchmarks/cpu_block.py [--threads 2] [--rounds 7] [--json FILE] [--chart FILE] [--case NAME ...]

Each library runs in a process of its own; one after another they take a turn at a case, for several rounds, and the medians are
compared: forward in eval mode without gradients, and forward and backward in training with dropout 0.1. The growth of each
process's peak memory over a training step is read in a fresh process that runs nothing else. PyTorch and matplotlib are needed
(benchmarks/requirements.txt); without PyTorch its column stays empty.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = {  # batch, seq_len, embed_dim, num_heads
    "b8_s128_e768": (8, 128, 768, 12),
    "b2_s1024_e768": (2, 1024, 768, 12),
    "b1_s2048_e1024": (1, 2048, 1024, 16),
    "b1_s8192_e512": (1, 8192, 512, 8),
    "minilm_b32_s128": (32, 128, 384, 12),  # one layer of the encoder in examples/semantic_search
}
LIBRARIES = ("ours", "paddle", "torch")
PASSES = ("forward", "forward+backward")
DROPOUT = 0.1


def paddle_steps(case, fused):
    import paddle
    import paddle.nn.functional as F

    batch, seq_len, embed_dim, num_heads = CASES[case]
    head_dim = embed_dim // num_heads

    class Composed(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.qkv = paddle.nn.Linear(embed_dim, 3 * embed_dim)
            self.out = paddle.nn.Linear(embed_dim, embed_dim)
            self.norm = paddle.nn.LayerNorm(embed_dim)

        def forward(self, x):
            qkv = self.qkv(x).reshape([batch, seq_len, 3, num_heads, head_dim]).transpose([2, 0, 3, 1, 4])
            scores = paddle.matmul(qkv[0] * head_dim**-0.5, qkv[1], transpose_y=True)
            probabilities = F.dropout(F.softmax(scores), DROPOUT, training=self.training)
            attended = paddle.matmul(probabilities, qkv[2]).transpose([0, 2, 1, 3]).reshape([batch, seq_len, embed_dim])
            return self.norm(x + F.dropout(self.out(attended), DROPOUT, training=self.training))

    if fused:
        from paddle_fused_attention import FusedMultiHeadAttention

        layer = FusedMultiHeadAttention(embed_dim, num_heads, DROPOUT, DROPOUT)
    else:
        layer = Composed()
    x = paddle.randn([batch, seq_len, embed_dim])
    x.stop_gradient = False
    d_out = paddle.randn(x.shape)

    def forward():
        layer.eval()
        with paddle.no_grad():
            layer(x)

    def train():
        layer.train()
        layer(x).backward(d_out)
        layer.clear_gradients()
        x.clear_gradient()

    return forward, train


def torch_steps(case):
    import torch
    import torch.nn.functional as F

    batch, seq_len, embed_dim, num_heads = CASES[case]
    head_dim = embed_dim // num_heads

    class Composed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(embed_dim, 3 * embed_dim)
            self.out = torch.nn.Linear(embed_dim, embed_dim)
            self.norm = torch.nn.LayerNorm(embed_dim)

        def forward(self, x):
            q, k, v = self.qkv(x).view(batch, seq_len, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if self.training else 0.0)
            attended = attended.transpose(1, 2).reshape(batch, seq_len, embed_dim)
            return self.norm(x + F.dropout(self.out(attended), DROPOUT, self.training))

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    layer = Composed()
    x = torch.randn(batch, seq_len, embed_dim, requires_grad=True)
    d_out = torch.randn(batch, seq_len, embed_dim)

    def forward():
        layer.eval()
        with torch.no_grad():
            layer(x)

    def train():
        layer.train()
        layer(x).backward(d_out)
        layer.zero_grad()
        x.grad = None

    return forward, train


def steps(library, case):
    return torch_steps(case) if library == "torch" else paddle_steps(case, fused=library == "ours")


def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def serve(library):
    """Answers lines "case pass" on standard input with seconds, until the input ends."""
    prepared = {}
    for line in sys.stdin:
        case, which = line.split()
        if case not in prepared:
            prepared.clear()
            prepared[case] = steps(library, case)
            for step in prepared[case]:
                step()
        step = prepared[case][PASSES.index(which)]
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure_memory(library, case):
    """Prints by how many bytes one training step raises the peak of this fresh process."""
    _, train = steps(library, case)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak begins anew
    before = peak_bytes()
    train()
    print(peak_bytes() - before)


def start(library, *arguments, **options):
    command = [sys.executable, os.path.abspath(__file__), "--worker", library, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, **options)


def run_case(workers, case, rounds):
    seconds = {which: {library: [] for library in workers} for which in PASSES}
    for _ in range(rounds):
        for which in PASSES:
            for library, worker in workers.items():
                print(case, which, file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    raise SystemExit(f"{library} failed at {case} {which}")
                seconds[which][library].append(float(answer))
    return {which: {name: statistics.median(times) for name, times in row.items()} for which, row in seconds.items()}


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, which in zip(axes, PASSES):
        for i, peer in enumerate(("paddle", "torch")):
            found = [(j, row[which][peer] / row[which]["ours"]) for j, row in enumerate(results.values()) if peer in row[which]]
            bars = axis.bar([j + 0.4 * i for j, _ in found], [ratio for _, ratio in found], 0.4, label=f"{peer} / ours")
            axis.bar_label(bars, fmt="%.1f")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([j + 0.2 for j in range(len(results))], list(results), rotation=20)
        axis.set_title(which)
        axis.legend()
    axes[0].set_ylabel("time relative to ours")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--json", default="cpu_block.json")
    parser.add_argument("--chart", default="cpu_block.png")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        library, *case = arguments.worker
        return measure_memory(library, *case) if case else serve(library)

    # Before any of the libraries is imported; the OPENBLAS variables would hold back peers.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    libraries = [name for name in LIBRARIES if name != "torch" or subprocess.call([sys.executable, "-c", "import torch"]) == 0]
    workers = {library: start(library, stdin=subprocess.PIPE) for library in libraries}
    print(f"{arguments.threads} threads, median of {arguments.rounds} rounds; milliseconds, and peers' time / ours")
    print(f"{'case':<18}{'pass':<18}" + "".join(f"{name:>10}" for name in libraries) + f"{'paddle/ours':>14}{'torch/ours':>14}")
    results = {}
    for case in arguments.case:
        results[case] = run_case(workers, case, arguments.rounds)
        for which, row in results[case].items():
            ratios = "".join(
                f"{row[peer] / row['ours']:>14.2f}" if peer in row else f"{'-':>14}" for peer in ("paddle", "torch")
            )
            print(f"{case:<18}{which:<18}" + "".join(f"{1e3 * row[name]:>10.1f}" for name in libraries) + ratios, flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    print("\ngrowth of the peak memory in a training step, MiB, and relative to Paddle's layers")
    for case in arguments.case:
        growth = {library: int(start(library, case).communicate()[0]) for library in libraries}
        results[case]["peak growth"] = growth
        print(f"{case:<18}" + "".join(f"{name}: {size / 2**20:.0f}   " for name, size in growth.items())
              + f"ours / paddle: {growth['ours'] / growth['paddle']:.2f}", flush=True)  # fmt: skip
    with open(arguments.json, "w") as file:
        json.dump({"threads": arguments.threads, "rounds": arguments.rounds, "seconds": results}, file, indent=1)
    try:
        draw(results, arguments.chart)
    except ImportError:
        print("no chart: matplotlib is not installed")


if __name__ == "__main__":
    main()
