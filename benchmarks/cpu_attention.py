"""Attention by itself on the CPU: paddle_fused_attention.functional against PyTorch's scaled_dot_product_attention.

    python benchmarks/cpu_attention.py [--cases NAME ...] [--dtypes float32 bfloat16] [--threads 2 1]
        [--passes forward forward+backward] [--turns 7] [--json FILE]

Backward gives the gradients of query, key and value, and of the mask where it is a float one.
There is no dropout. The libraries:

    ours         scaled_dot_product_attention, flash_attention or flash_attn_unpadded, in Paddle's layout
    torch        one call on [batch, heads, tokens, head_dim], its own layout; grouped heads by enable_gqa, packed
                 sequences padded to the longest with a mask, a window as a mask
    torch_parts  several calls: one for each packed sequence; for a window one for blocks of queries with their keys

Each library runs in a process of its own, pinned to as many cores as it has threads, and all take turns; the medians
are compared. Before that each library's output and gradient of the query are compared with PyTorch's in float64.

A step of decoding, one query for a cache of keys, reads memory and computes little: for it there are also the bytes of
keys and values by the time, beside those that as many threads read of a large array.
"""

import os
from contextlib import ExitStack
from typing import NamedTuple, Tuple

import numpy as np
import peers


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    window: int = 0  # that key and so many before it
    mask: bool = False  # [1, heads, queries, keys], float, with a gradient
    lengths: Tuple[int, ...] = ()  # of packed sequences


LENGTHS = (1024, 64, 512, 300, 768, 129, 1000, 96, 640, 450, 900, 200, 333, 777, 250, 749)  # 8192 tokens
CASES = {
    "bert": Case(8, 512, 512, 12, 12, 64),
    "causal": Case(1, 2048, 2048, 16, 16, 64, causal=True),
    "grouped": Case(1, 1024, 1024, 32, 8, 128, causal=True),
    "mask": Case(2, 512, 512, 12, 12, 64, mask=True),
    "packed": Case(len(LENGTHS), 1024, 1024, 12, 12, 64, lengths=LENGTHS),
    "window": Case(1, 8192, 8192, 8, 8, 64, window=256),
    "cross": Case(8, 64, 1024, 12, 12, 64),
    "decode": Case(8, 1, 2048, 16, 16, 64),
    # To try the benchmark itself.
    "tiny": Case(2, 9, 9, 4, 2, 8, causal=True),
    "tiny_mask": Case(2, 9, 12, 2, 2, 8, mask=True),
    "tiny_packed": Case(3, 7, 7, 2, 2, 8, lengths=(7, 1, 4)),
    "tiny_window": Case(1, 12, 12, 2, 2, 8, window=3),
    "tiny_decode": Case(2, 1, 12, 2, 2, 8),
}
LIBRARIES = ("ours", "torch", "torch_parts")
MEASURED_BYTES = 1 << 29  # of the array by which the memory's bandwidth is measured


def draw(case):
    """query, key, value and d_out as ours takes them, and the mask or None, float32."""
    generator = np.random.default_rng(0)
    leading = [(sum(case.lengths),)] * 2 if case.lengths else [(case.batch, case.queries), (case.batch, case.keys)]
    of_query, of_key = ((*leading[i], n, case.head_dim) for i, n in enumerate((case.heads, case.kv_heads)))
    arrays = [generator.standard_normal(shape, np.float32) for shape in (of_query, of_key, of_key, of_query)]
    mask = generator.standard_normal((1, case.heads, case.queries, case.keys), np.float32) if case.mask else None
    return arrays, mask


class Ours(peers.Model):
    def __init__(self, case, dtype):
        import paddle
        from paddle_fused_attention import functional

        self._paddle = paddle
        arrays, mask = draw(case)
        self._inputs = [paddle.to_tensor(a).astype(dtype) for a in arrays[:3]]
        self._d_out = paddle.to_tensor(arrays[3]).astype(dtype)
        if mask is not None:
            self._inputs.append(paddle.to_tensor(mask).astype(dtype))
        for tensor in self._inputs:
            tensor.stop_gradient = False
        if case.lengths:
            starts = paddle.to_tensor(np.cumsum((0, *case.lengths)), dtype="int32")
            longest, scale = max(case.lengths), case.head_dim**-0.5
            self._call = lambda q, k, v: functional.flash_attn_unpadded(
                q, k, v, starts, starts, longest, longest, scale, causal=case.causal
            )[0]
        elif case.window:
            self._call = lambda q, k, v: functional.flash_attention(
                q, k, v, causal=True, window_size=(case.window - 1, 0)
            )[0]
        else:
            self._call = lambda *inputs: functional.scaled_dot_product_attention(*inputs, is_causal=case.causal)

    def forward(self):
        with self._paddle.no_grad():
            return self._call(*self._inputs)

    def train(self):
        self._call(*self._inputs).backward(self._d_out)
        gradient = self._inputs[0].grad
        for tensor in self._inputs:
            tensor.clear_gradient(set_to_zero=False)
        return gradient

    def output(self):
        return self.forward().astype("float64").numpy()

    def gradient(self):
        self._call(*self._inputs).backward(self._d_out)
        return self._inputs[0].grad.astype("float64").numpy()


class Torch(peers.Model):
    """One call, or `parts`."""

    def __init__(self, case, dtype, parts=False):
        import torch

        self._torch, self._case, self._parts = torch, case, parts
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._dtype = getattr(torch, dtype)
        arrays, mask = draw(case)
        to_tensor = self._padded if case.lengths and not parts else self._plain
        q, k, v, d_out = (to_tensor(a) for a in arrays)
        self._inputs, self._d_out, self._mask = [q, k, v], d_out, None
        if case.lengths and parts:
            self._inputs = [part for tensor in (q, k, v) for part in self._split(tensor)]
            self._d_out = self._split(d_out)
        elif case.lengths:
            keep = torch.arange(case.keys) < torch.tensor(case.lengths)[:, None]
            self._mask = keep[:, None, None, :]
        elif case.window and not parts:
            place = torch.arange(case.queries)
            behind = place[:, None] - place
            self._mask = (behind >= 0) & (behind < case.window)
        elif case.mask:
            self._mask = torch.from_numpy(mask).to(self._dtype)
            self._inputs.append(self._mask)
        for tensor in self._inputs:
            tensor.requires_grad_()
        if case.window and parts:
            behind = torch.arange(case.window)[:, None] + case.window - torch.arange(2 * case.window)
            whole = (behind >= 0) & (behind < case.window)
            self._mask = whole.expand(case.queries // case.window, 1, *whole.shape).clone()
            self._mask[0, :, :, : case.window] = False  # before the first block there are no keys

    def _plain(self, a):
        """[..., tokens, heads, head_dim] to [batch, heads, tokens, head_dim]."""
        tensor = self._torch.from_numpy(a)
        tensor = tensor if tensor.dim() == 4 else tensor[None]
        return tensor.transpose(1, 2).contiguous().to(self._dtype)

    def _padded(self, a):
        case = self._case
        padded = np.zeros((case.batch, case.queries, *a.shape[1:]), a.dtype)
        for row, (first, length) in zip(padded, zip(np.cumsum((0, *case.lengths)), case.lengths)):
            row[:length] = a[first : first + length]
        return self._plain(padded)

    def _split(self, tensor):
        return [part.contiguous() for part in tensor.split(self._case.lengths, dim=2)]

    def _attention(self, q, k, v, mask=None, causal=False):
        grouped = self._case.heads != self._case.kv_heads
        return self._torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )

    def _call(self):
        case, torch = self._case, self._torch
        if not self._parts:
            return self._attention(*self._inputs[:3], self._mask, case.causal)
        if case.lengths:
            count = len(case.lengths)
            return [self._attention(*self._inputs[i::count]) for i in range(count)]
        # Blocks of as many queries as the window has keys; each sees keys of its own block and of the one before.
        q, k, v = self._inputs
        k, v = (torch.nn.functional.pad(a, (0, 0, case.window, 0)) for a in (k, v))
        k, v = (a.unfold(2, 2 * case.window, case.window).transpose(-1, -2) for a in (k, v))
        q = q.unflatten(2, (-1, case.window))
        out = self._attention(*(a[0].transpose(0, 1) for a in (q, k, v)), self._mask)
        return out.transpose(0, 1).flatten(1, 2)[None]

    def forward(self):
        with self._torch.no_grad():
            return self._call()

    def train(self):
        out = self._call()
        if isinstance(out, list):
            self._torch.autograd.backward(out, self._d_out)
        else:
            out.backward(self._d_out)
        gradients = [tensor.grad for tensor in self._inputs]
        for tensor in self._inputs:
            tensor.grad = None
        return gradients

    def _back(self, tensor):
        """The result's layout, or the query's, as ours."""
        case = self._case
        if isinstance(tensor, list):
            tensor = self._torch.cat(tensor, dim=2)
        array = tensor.detach().double().transpose(1, 2).numpy()
        if not case.lengths:
            return array
        return array[0] if self._parts else np.concatenate([a[:n] for a, n in zip(array, case.lengths)])

    def output(self):
        return self._back(self.forward())

    def gradient(self):
        gradients = self.train()
        return self._back(gradients[: len(self._case.lengths)] if self._parts and self._case.lengths else gradients[0])


def has_parts(case):
    return bool(case.lengths or case.window)


def make_attention(library, case, dtype):
    return Ours(case, dtype) if library == "ours" else Torch(case, dtype, parts=library == "torch_parts")


def serve(library):
    """Answers also with the "bandwidth"."""
    answer_others = peers.answers(lambda case, dtype: make_attention(library, CASES[case], dtype))
    peers.serve(lambda do, **request: bandwidth() if do == "bandwidth" else answer_others(do=do, **request))


def bandwidth():
    """The bytes a second that PyTorch's threads read of a large array, at best."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    array = torch.ones(MEASURED_BYTES // 4)
    return MEASURED_BYTES / min(peers.time_step(array.sum, 0.0) for _ in range(10))


def measure(threads, arguments):
    """Prints the table; the seconds by "case dtype", pass and library."""
    results = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(__file__, name, threads)) for name in LIBRARIES}
        limit = workers["torch"].ask(do="bandwidth")
        print(f"{threads} threads, median of {arguments.turns} turns; milliseconds, and (the time / ours)")
        print(f"a large array is read at {limit / 1e9:.1f} GB/s")
        peers.print_header(LIBRARIES)
        for dtype in arguments.dtypes:
            for name in arguments.cases:
                case = CASES[name]
                taking = {n: w for n, w in workers.items() if n != "torch_parts" or has_parts(case)}
                row = results[f"{name} {dtype}"] = {}
                for which in arguments.passes:
                    if which == "forward+backward" and "decode" in name:
                        continue
                    do = "output" if which == "forward" else "gradient"
                    expected = peers.saved(workers["torch"], name, "float64", do)
                    for worker in taking.values():
                        peers.check(worker, name, dtype, do, expected)
                    row[which] = peers.take_turns(taking, arguments.turns, case=name, dtype=dtype, do=which)
                    peers.print_row(name, dtype, which, row[which], LIBRARIES)
                    if "decode" in name:
                        numbers = 2 * case.batch * case.keys * case.kv_heads * case.head_dim
                        size = numbers * (2 if dtype == "bfloat16" else 4)
                        speeds = {library: size / seconds for library, seconds in row[which].items()}
                        row["of_bandwidth"] = {library: speed / limit for library, speed in speeds.items()}
                        shown = (f"{n} {s / 1e9:.1f} GB/s ({s / limit:.0%})" for n, s in speeds.items())
                        print("  keys and values are read at", ", ".join(shown), flush=True)
    print(flush=True)
    return {"bandwidth": limit, "seconds": results}


def main():
    parser = peers.parser_of(__doc__, CASES, LIBRARIES)
    parser.add_argument("--json", help="where to write all numbers")
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments.worker)
    report = {threads: measure(threads, arguments) for threads in arguments.threads}
    if arguments.json:
        peers.write(report, arguments.json)


if __name__ == "__main__":
    main()
