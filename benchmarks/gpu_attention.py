"""Attention by itself on one GPU, in the kinds that are not the block's: ours against PyTorch's.

    make gpu-bench
    PYTHONPATH=build/gpu python3 benchmarks/gpu_attention.py [--cases grouped ...]

All contenders of a case run in one process, taking turns; a time is the median over turns of the time per call. The
rate is that of the products that the visible scores need: twice the head dim for each of two products forward, of five
backward. Prints the rates in TFLOP/s, ours over the best of the others, and our milliseconds.

`deterministic` are backward passes that give the same bits each time, ours and PyTorch's.

Documents are packed sequences told apart by a flash mask instead; beside them stand ours as packed sequences and
PyTorch's flex_attention. Decoding is one query for each cache of keys and values: its rate is that at which these are
read, in GB/s, by replays of a CUDA graph of calls on different caches. Beside it stands a copy that moves as many
bytes.

Writes gpu_attention.json into --out (default: build).
"""

import inspect
import itertools
import json
from dataclasses import asdict, dataclass
from functools import partial

import pfa_core
import torch
import torch.nn.functional as F
from gpu_block import BACKENDS, address, current_stream, parse_options, take_turns
from torch.nn.attention import sdpa_kernel


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    queries: int
    keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = False
    window_left: int = -1
    lengths: tuple = ()  # of packed sequences, for which queries and keys are the longest of these
    documents: tuple = ()  # the lengths of what a flash mask tells apart in a sequence

    @property
    def queries_in_all(self):
        return sum(self.lengths) if self.lengths else self.batch * self.queries

    @property
    def keys_in_all(self):
        return sum(self.lengths) if self.lengths else self.batch * self.keys

    def visible(self):
        """How many pairs of a query and a key that it sees there are in a head of all sequences."""
        total = 0
        apart = self.lengths or self.documents
        for queries, keys in [(n, n) for n in apart] or [(self.queries, self.keys)] * self.batch:
            last = torch.arange(queries) + (keys - queries)
            end = (last + 1).clamp(0, keys) if self.causal else torch.full((queries,), keys)
            first = (last - self.window_left).clamp(0) if self.window_left >= 0 else torch.zeros_like(end)
            total += int((end - first).clamp(0).sum())
        return total


def draw_lengths(tokens, least, most):
    """Lengths of sequences, drawn evenly, that make up so many tokens."""
    torch.manual_seed(0)
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(min(int(torch.randint(least, most + 1, ())), tokens - sum(lengths)))
    return tuple(lengths)


def packed(name, lengths, *sizes, **options):
    return Case(name, len(lengths), max(lengths), max(lengths), *sizes, lengths=lengths, **options)


def documents(name, lengths, *sizes, **options):
    return Case(name, 1, sum(lengths), sum(lengths), *sizes, documents=lengths, **options)


def as_packed(case):
    return packed(case.name, case.documents, case.num_heads, case.num_kv_heads, case.head_dim, causal=case.causal)


@dataclass(frozen=True)
class Decoding:
    name: str
    batch: int
    keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def read(self):
        """Bytes of keys and values."""
        return 4 * self.batch * self.keys * self.num_kv_heads * self.head_dim


LENGTHS = draw_lengths(16384, 128, 2048)
CASES = [
    Case("grouped", 2, 4096, 4096, 32, 8, 128, causal=True),
    Case("separate", 8, 2048, 2048, 16, 16, 64),
    Case("short", 16, 512, 512, 16, 16, 64),
    Case("cross", 8, 1024, 4096, 16, 16, 64),
    Case("few_keys", 8, 4096, 77, 10, 10, 64),
    packed("packed", LENGTHS, 16, 16, 64),
    packed("packed_causal", LENGTHS, 16, 16, 64, causal=True),
    packed("packed_grouped", LENGTHS, 32, 8, 128, causal=True),
    Case("long", 1, 16384, 16384, 16, 16, 128, causal=True),
    Case("window", 1, 16384, 16384, 16, 16, 128, causal=True, window_left=1023),
    documents("documents", LENGTHS, 16, 16, 64),
    documents("documents_causal", LENGTHS, 16, 16, 64, causal=True),
    documents("documents_grouped", LENGTHS, 32, 8, 128, causal=True),
]
DECODING = [
    Decoding("decode", 8, 2048, 16, 16, 64),
    Decoding("decode_one", 1, 32768, 16, 16, 64),
    Decoding("decode_grouped", 8, 8192, 32, 8, 128),
    Decoding("decode_long", 1, 131072, 32, 8, 128),
]


class Tensors:
    """query [batch, queries, H, D], key and value [batch, keys, Hkv, D], packed [tokens, heads, D], and d_out."""

    def __init__(self, case):
        def draw(sequences, rows, heads):
            shape = (rows,) if case.lengths else (sequences, rows // sequences)
            return torch.randn(*shape, heads, case.head_dim, device="cuda").bfloat16()

        self.query = draw(case.batch, case.queries_in_all, case.num_heads)
        self.key = draw(case.batch, case.keys_in_all, case.num_kv_heads)
        self.value = torch.randn_like(self.key)
        self.d_out = torch.randn_like(self.query)
        starts = torch.tensor([0, *case.lengths]).cumsum(0)
        self.starts = starts.int().cuda() if case.lengths else None
        if case.documents:
            # Of each key the first query after its document and, unless causal hides those, the document's first.
            lengths = torch.tensor(case.documents)
            ends = lengths.cumsum(0)
            columns = torch.stack([ends] if case.causal else [ends, ends - lengths], -1)
            self.ranges = columns.repeat_interleave(lengths, 0).int().cuda()


def our_calls(case, tensors, deterministic=False):
    sizes = {n: v for n, v in asdict(case).items() if n not in ("name", "lengths", "documents")}
    if case.lengths:
        sizes.update(packed_queries=case.queries_in_all, packed_keys=case.keys_in_all)
    block = pfa_core.CudaBlock(dict(sizes, block="bare_attention", dtype="bfloat16", deterministic=deterministic))
    inputs = {name: getattr(tensors, name) for name in ("query", "key", "value")}
    kept = dict(inputs, out=torch.empty_like(tensors.query), d_out=tensors.d_out)
    kept.update({"d_" + name: torch.empty_like(tensor) for name, tensor in inputs.items()})
    if case.lengths:
        kept.update(cu_seqlens_q=tensors.starts, cu_seqlens_k=tensors.starts)
    arrays = {name: address(tensor) for name, tensor in kept.items()}
    if case.documents:
        arrays["startend_row_indices"] = (address(tensors.ranges), 1, tensors.ranges.shape[-1])

    def memory(size):
        kept[len(kept)] = torch.empty(size, dtype=torch.uint8, device="cuda")
        return address(kept[len(kept) - 1])

    saved = memory(block.saved_bytes(arrays))
    forward_workspace = memory(block.forward_workspace_bytes(arrays, True))
    backward_workspace = memory(block.backward_workspace_bytes(arrays))
    stream = current_stream()
    forward = partial(block.forward, arrays, saved, forward_workspace, stream, 0, 0)
    backward = partial(block.backward, arrays, saved, backward_workspace, stream)
    return forward, backward, kept


def our_packed_calls(case, tensors):
    """Those of documents as packed sequences."""
    alike = as_packed(case)
    of_packed = Tensors(alike)
    forward, backward, kept = our_calls(alike, of_packed)
    return partial(call_with, forward, kept, of_packed), partial(call_with, backward, kept, of_packed)


def call_with(call, *kept):
    """Calls it; what is kept lives as long as this."""
    return call()


def deterministically(call):
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    call()
    torch.use_deterministic_algorithms(False)


def flex_attention_of(case, tensors):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(case.documents, device="cuda")
    document = torch.arange(len(case.documents), device="cuda").repeat_interleave(lengths)

    def sees(b, h, query, key):
        same = document[query] == document[key]
        return same & (query >= key) if case.causal else same

    block_mask = create_block_mask(sees, None, None, case.queries, case.keys, device="cuda")
    heads = [t.transpose(1, 2) for t in tensors]
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, *heads, block_mask=block_mask, enable_gqa=case.num_heads != case.num_kv_heads)


def peers(case, tensors):
    """Name -> (forward, backward)."""
    q, k, v = (t.detach().requires_grad_() for t in (tensors.query, tensors.key, tensors.value))

    def with_gradients(forward, d_out):
        out = forward()
        return forward, lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    if case.documents:
        yield "packed", partial(our_packed_calls, case, tensors)
        yield "flex", partial(with_gradients, flex_attention_of(case, (q, k, v)), tensors.d_out.transpose(1, 2))
        return
    if case.lengths or case.window_left >= 0:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # of PyTorch before 2.10
            return
        starts = tensors.starts
        if starts is None:
            starts = torch.arange(case.batch + 1, device="cuda", dtype=torch.int32) * case.queries
        takes_windows = "window_size" in inspect.signature(varlen_attn).parameters
        if takes_windows:
            switches = dict(window_size=(case.window_left, 0 if case.causal else -1))
        else:
            switches = dict(is_causal=case.causal)
        if takes_windows or case.window_left < 0:
            rows = [t.flatten(0, -3) for t in (q, k, v)]
            longest = (case.queries, case.keys)
            d_out = tensors.d_out.flatten(0, -3)
            yield (
                "varlen",
                partial(with_gradients, partial(varlen_attn, *rows, starts, starts, *longest, **switches), d_out),
            )
        return
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    for backend in ("flash", "cudnn"):

        def attention(backend=backend):
            with sdpa_kernel(BACKENDS[backend]):
                return F.scaled_dot_product_attention(
                    *heads, is_causal=case.causal, enable_gqa=case.num_heads != case.num_kv_heads
                )

        yield backend, partial(with_gradients, attention, tensors.d_out.transpose(1, 2))


def run(case, turns):
    tensors = Tensors(case)
    forward, backward = {}, {}
    forward["ours"], backward["ours"], kept = our_calls(case, tensors)
    alike = our_calls(case, tensors, deterministic=True)
    alike[0]()
    backward["deterministic"] = alike[1]
    for name, make in peers(case, tensors):
        try:
            forward[name], backward[name] = make()
        except (RuntimeError, TypeError) as error:  # a way that does not exist for this case
            print(f"    {name}: {str(error).strip().splitlines()[0][:150]}")
            continue
        if name in ("flash", "varlen"):
            backward[name + "_deterministic"] = partial(deterministically, backward[name])
    with torch.no_grad():
        times = {"forward": take_turns(forward, turns)}
    times["backward"] = take_turns(backward, turns)
    del kept, alike
    operations = 4 * case.num_heads * case.head_dim * case.visible()
    rates = {
        direction: {name: factor * operations / ms / 1e9 for name, ms in times[direction].items()}
        for direction, factor in (("forward", 1.0), ("backward", 2.5))
    }
    return {"case": asdict(case), "ms": times, "tflops": rates}


def graph_of(calls):
    """The replay of a graph of calls, functions of a stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call(stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call(stream.cuda_stream)
    return graph.replay


def our_decoding(case, query, key, value):
    """A function of a stream. key and value [batch, Hkv, keys, D]."""
    config = dict(block="bare_attention", dtype="bfloat16", queries=1, causal=True, keys_by_head=True)
    config.update({n: v for n, v in asdict(case).items() if n != "name"})
    block = pfa_core.CudaBlock(config)
    out = torch.empty_like(query)
    arrays = {n: address(t) for n, t in dict(query=query, key=key, value=value, out=out).items()}
    size = block.forward_workspace_bytes(arrays, False)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def call(stream, kept=(out, workspace)):
        block.forward(arrays, None, address(workspace), stream, 0, 0)

    return call


def run_decoding(case, turns, cached=128 << 20):
    """On so many caches that what the L2 cache holds of one is gone when it is read again."""
    caches = max(2, -(-cached // case.read))
    query = torch.randn(case.batch, 1, case.num_heads, case.head_dim, device="cuda").bfloat16()
    shape = (case.batch, case.num_kv_heads, case.keys, case.head_dim)
    pairs = [[torch.randn(shape, device="cuda").bfloat16() for _ in "kv"] for _ in range(caches)]
    count = caches * max(1, 12 // caches)
    calls = {"ours": [our_decoding(case, query, *pair) for pair in pairs]}
    for backend in ("flash", "cudnn"):

        def attention(stream, pair, backend=backend):
            with sdpa_kernel(BACKENDS[backend]):
                F.scaled_dot_product_attention(
                    query.transpose(1, 2), *pair, enable_gqa=case.num_heads != case.num_kv_heads
                )

        calls[backend] = [partial(attention, pair=pair) for pair in pairs]
    calls["copy"] = [lambda stream, pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
    graphs = {}
    with torch.no_grad():
        for name, of_caches in calls.items():
            try:
                graphs[name] = graph_of(list(itertools.islice(itertools.cycle(of_caches), count)))
            except RuntimeError as error:  # a way that does not exist for this case
                print(f"    {name}: {str(error).strip().splitlines()[0][:150]}")
    ms = {name: time / count for name, time in take_turns(graphs, turns).items()}
    return {"case": asdict(case), "ms": ms, "gb_per_s": {name: case.read / time / 1e6 for name, time in ms.items()}}


def print_decoding(result):
    case = result["case"]
    sizes = f"B{case['batch']} 1 x {case['keys']} H{case['num_heads']}/{case['num_kv_heads']} D{case['head_dim']}"
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in result["gb_per_s"].items())
    print(f"{case['name']:16}{sizes:32}forward: {rates} GB/s; ours {result['ms']['ours'] * 1e3:.1f} us", flush=True)


def print_result(result):
    case = result["case"]
    sizes = f"B{case['batch']} {case['queries']} x {case['keys']} H{case['num_heads']}/{case['num_kv_heads']}"
    print(f"{case['name']:16}{sizes + ' D' + str(case['head_dim']):32}", end="")
    for direction in ("forward", "backward"):
        rates = result["tflops"][direction]
        line = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        others = [rate for name, rate in rates.items() if name != "ours" and "deterministic" not in name]
        if others and "ours" in rates:
            line += f", ratio {rates['ours'] / max(others):.2f}"
        print(f"{direction}: {line}".ljust(56), end="")
    print(" + ".join(f"{times['ours']:.3f}" for times in result["ms"].values() if "ours" in times), "ms", flush=True)


def main():
    options = parse_options(__doc__.splitlines()[0], CASES + DECODING, [])
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: bfloat16, TFLOP/s")
    results = []
    for case in CASES:
        if case.name in options.cases:
            results.append(run(case, options.turns))
            print_result(results[-1])
            torch.cuda.empty_cache()
    for case in DECODING:
        if case.name in options.cases:
            results.append(run_decoding(case, options.turns))
            print_decoding(results[-1])
            torch.cuda.empty_cache()
    (options.out / "gpu_attention.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
