"""Attention by itself in all its kinds: what the CPU's core computes in float64, for every family of kernels. In 16
bits errors are measured by those of the same attention composed of PyTorch's ops in that dtype."""

import common
import numpy as np
import pfa_core
import pytest
import reference
import torch
from attention_cases import FORMS, in_form, out_of_form
from cases import DTYPES, SIXTEEN_BIT
from device import Memory, mask_argument, to_device, to_numpy

# Of the largest number, or of one where all are smaller: some gradients are 0 but for rounding. In 16 bits only for
# these.
LIMIT = {"float64": 1e-9, "float32": 2e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
GRADIENTS = ("query", "key", "value")
SEED, OFFSET = 77, 5


def ranges_of_documents(shape, lengths, queries, causal):
    """startend_row_indices [batch, heads, keys, columns] of documents that follow each other, in another order for each
    head. Of two columns beside `causal` the second shows a key again to those after the next document."""
    batch, heads, _, columns = shape
    result = np.empty(shape, np.int64)
    for b in range(batch):
        for h in range(heads):
            rolled = np.roll(lengths, b * heads + h)
            ends = np.cumsum(rolled)
            after = np.append(ends[1:], queries)
            start, end, after = (np.repeat(a, rolled) for a in (ends - rolled, ends, after))
            none = np.zeros_like(end)
            of_columns = {1: [end], 2: [end, after if causal else start], 4: [end, none + queries, none, start]}
            result[b, h] = np.stack(of_columns[columns], -1)
    return result


class Problem:
    """Inputs of float64 that `dtype` holds exactly.

    `sizes`: batch, queries, keys, num_heads, num_kv_heads and head_dim. `lengths`, of packed sequences: those of
    queries and those of keys. `mask`: the axes of [batch, heads, queries, keys] that it has, and its dtype. `ranges`:
    the number of columns, and that of heads; and the lengths of documents that they tell apart, unless they are random.
    `form`: how query, key and value share tensors on the GPU.
    """

    def __init__(self, sizes, dtype, lengths=None, mask=None, ranges=None, seed=0, form=None, **switches):
        rng = np.random.default_rng(seed)
        batch, queries, keys, num_heads, num_kv_heads, head_dim = sizes
        if lengths:
            batch, queries, keys = len(lengths[0]), max(lengths[0]), max(lengths[1])
        self.dtype, self.form = dtype, form
        self.config = dict(
            block="bare_attention",
            batch=batch,
            queries=queries,
            keys=keys,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            **switches,
        )
        shapes = [(batch, queries, num_heads, head_dim), (batch, keys, num_kv_heads, head_dim)]
        self.described = {}
        if lengths:
            starts = [np.cumsum([0, *numbers]).astype(np.int32) for numbers in lengths]
            self.described.update(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
            shapes = [(int(s[-1]), *shape[2:]) for s, shape in zip(starts, shapes)]
            self.config.update(packed_queries=shapes[0][0], packed_keys=shapes[1][0])
        draw = lambda shape: reference.round_to(rng.standard_normal(shape), dtype).astype(np.float64)  # noqa: E731
        self.inputs = dict(zip(GRADIENTS, map(draw, (shapes[0], shapes[1], shapes[1]))))
        self.d_out = draw(shapes[0])
        self.mask = self.mask_dtype = None
        if mask:
            axes, self.mask_dtype = mask
            shape = [n if axis in axes else 1 for n, axis in zip((batch, num_heads, queries, keys), "BHQK")]
            self.mask = rng.standard_normal(shape)
            if self.mask_dtype == "bool":
                self.mask = self.mask > -1
            else:
                self.mask[rng.random(shape) < 0.05] = -np.inf
                self.mask = reference.round_to(self.mask, self.mask_dtype).astype(np.float64)
        if ranges:
            columns, heads, *documents = ranges
            shape = (batch, heads, keys, columns)
            if documents:
                hidden = ranges_of_documents(shape, documents[0], queries, switches.get("causal"))
            else:
                hidden = np.sort(rng.integers(0, queries + 1, shape), -1)
                if columns == 2 and not switches.get("causal"):
                    hidden = hidden[..., ::-1]
            self.described["startend_row_indices"] = np.ascontiguousarray(hidden, np.int32)

    def expected(self):
        config = {n: v for n, v in self.config.items() if n not in ("allow_tf32", "deterministic")}
        config["dtype"] = "float64"
        inputs = {**self.inputs, **self.described}
        needs = [*GRADIENTS]
        if self.mask is not None:
            inputs["attn_mask"] = self.mask
            needs += ["attn_mask"] * (self.mask_dtype != "bool")
        out, saved = pfa_core.forward(inputs, config, SEED, OFFSET)
        gradients = pfa_core.backward(inputs, config, self.d_out, saved, needs, out=out)
        return {"out": out, **{"d_" + name: a for name, a in gradients.items()}}

    def seen(self, queries, keys, sequences):
        """[batch, heads, queries, keys], which broadcasts: whether a query of some of the sequences sees a key."""
        i, j = torch.arange(queries, device="cuda")[:, None], torch.arange(keys, device="cuda")
        last = i + keys - queries
        left, right = (self.config.get("window_" + side, -1) for side in ("left", "right"))
        right = 0 if self.config.get("causal") else right
        seen = (j >= last - left if left >= 0 else i >= 0) & (j <= last + right if right >= 0 else j >= 0)
        seen = seen[None, None]
        if "startend_row_indices" in self.described:
            ranges = torch.from_numpy(self.described["startend_row_indices"]).cuda()[sequences, :, :keys]
            c = ranges.repeat_interleave(self.config["num_heads"] // ranges.shape[1], 1).unbind(-1)
            c = [column[:, :, None] for column in c]
            between = len(c) == 4 or len(c) == 2 and self.config.get("causal")
            hidden = i >= c[0]
            if between:
                hidden = hidden & (i < c[1])
            elif len(c) == 2:
                hidden = hidden | (i < c[1])
            if len(c) == 4:
                hidden = hidden | (i >= c[2]) & (i < c[3])
            seen = seen & ~hidden
        return seen

    def composed_of(self, query, key, value, mask, sequences):
        """The result of some of the sequences, a slice, which have one length: [batch, queries, H, D]."""
        config, dtype = self.config, query.dtype
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        key, value = (t.repeat_interleave(config["num_heads"] // config["num_kv_heads"], 1) for t in (key, value))
        seen = self.seen(query.shape[2], key.shape[2], sequences)
        scores = (query * config.get("scale", config["head_dim"] ** -0.5)) @ key.transpose(2, 3)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            seen = seen & (mask != -np.inf)
            scores = scores + mask.masked_fill(mask == -np.inf, 0.0).to(dtype)
        p = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1).masked_fill(~seen, 0.0)
        rate = config.get("dropout_rate", 0.0)
        if rate:
            p = p * (torch.rand(p.shape, device="cuda") >= rate) / (1 - rate)
        return (p @ value).transpose(1, 2)

    def composed(self, dtype):
        """The result and all gradients by PyTorch's ops. What dropout keeps is drawn alike for every dtype, but not as
        ours is."""
        torch.manual_seed(0)
        leaves = {name: to_device(a, dtype).requires_grad_() for name, a in self.inputs.items()}
        query, key, value = leaves.values()
        mask = None
        if self.mask is not None:
            mask = to_device(self.mask, "bool" if self.mask_dtype == "bool" else dtype)
            mask = mask.requires_grad_() if self.mask_dtype != "bool" else mask
        if "cu_seqlens_q" in self.described:
            starts = [self.described["cu_seqlens_" + side].tolist() for side in "qk"]
            spans = [[slice(*pair) for pair in zip(s, s[1:])] for s in starts]
            outs = [
                self.composed_of(query[None, q], key[None, k], value[None, k], None, slice(b, b + 1))[0]
                for b, (q, k) in enumerate(zip(*spans))
            ]
            out = torch.cat(outs)
        else:
            out = self.composed_of(query, key, value, mask, slice(None))
        if mask is not None and mask.requires_grad:
            leaves["attn_mask"] = mask
        gradients = torch.autograd.grad(out, list(leaves.values()), to_device(self.d_out, dtype))
        return {"out": to_numpy(out.detach()), **{"d_" + n: to_numpy(g) for n, g in zip(leaves, gradients)}}

    def peers(self, expected):
        """What is as far from what is expected as the composed ops in this dtype are from those in float64."""
        composed, exact = self.composed(self.dtype), self.composed("float64")
        if not self.config.get("dropout_rate"):
            for name in exact:  # they are the same attention
                least = max(1.0, abs(expected[name]).max(initial=0.0))
                assert abs(exact[name] - expected[name]).max(initial=0.0) <= 1e-9 * least, name
        return {name: expected[name] + composed[name] - exact[name] for name in exact}

    def actual(self, wanted):
        """The result, and the gradients of the wanted inputs, on the GPU. Nothing outside them is written to."""
        config, inputs = dict(self.config, dtype=self.dtype), self.inputs
        if self.form:
            inputs = in_form(self.form, inputs)
            config.update(
                key_behind_query="key" not in inputs,
                value_behind_key="value" not in inputs,
                keys_by_head=FORMS[self.form],
            )
            wanted = [name for name in wanted if name in inputs]
        block = pfa_core.CudaBlock(config)
        memory = Memory()
        tensors = {name: to_device(a, self.dtype) for name, a in inputs.items()}
        described = {name: torch.from_numpy(a).cuda() for name, a in self.described.items()}
        arrays = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        for name, tensor in described.items():
            ranges = name == "startend_row_indices"
            arrays[name] = (tensor.data_ptr(), *tensor.shape[1::2]) if ranges else tensor.data_ptr()
        if self.mask is not None:
            tensors["attn_mask"] = to_device(self.mask, self.mask_dtype)
            scores = [self.config[name] for name in ("batch", "num_heads", "queries", "keys")]
            arrays["mask"] = mask_argument(tensors["attn_mask"], scores)
        d_out = to_device(self.d_out, self.dtype)
        out = memory.empty(d_out.shape, d_out.dtype)
        arrays["out"] = out.data_ptr()
        saved = memory.bytes(block.saved_bytes(arrays)).data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        workspace = memory.bytes(block.forward_workspace_bytes(arrays, True)).data_ptr()
        block.forward(arrays, saved, workspace, stream, SEED, OFFSET)
        gradients = {name: memory.empty(tensors[name].shape, tensors[name].dtype) for name in wanted}
        arrays.update({"d_" + name: tensor.data_ptr() for name, tensor in gradients.items()}, d_out=d_out.data_ptr())
        workspace = memory.bytes(block.backward_workspace_bytes(arrays)).data_ptr()
        block.backward(arrays, saved, workspace, stream)
        torch.cuda.synchronize()
        memory.check()
        found = {name: to_numpy(tensor) for name, tensor in gradients.items()}
        if self.form:
            found = out_of_form(self.form, found, self.config["num_heads"], self.config["num_kv_heads"])
        return {"out": to_numpy(out), **{"d_" + name: a for name, a in found.items()}}

    def wanted(self):
        is_float = self.mask is not None and self.mask_dtype != "bool"
        return (*GRADIENTS, "attn_mask") if is_float else GRADIENTS

    def least(self, name, expected):
        """The number that errors are compared with at least. The gradients of a row's scores sum to 0, so those of a
        mask that is the same for all keys, and of queries that see one key and of that key, are what rounding leaves of
        differences of sums of head_dim products, in each of the rows that are added up."""
        if name == "out" or not expected.size or abs(expected).max() > 1e-9:
            return 1.0
        batch, queries, num_heads = (self.config[name] for name in ("batch", "queries", "num_heads"))
        rows = {"d_key": queries * num_heads / self.config["num_kv_heads"]}
        if self.mask is not None:
            rows["d_attn_mask"] = batch * num_heads * queries / self.mask.size
        return np.sqrt(self.config["head_dim"] * max(1.0, rows.get(name, 1.0)))

    def check(self, wanted=None):
        expected = self.expected()
        is_tf32 = self.dtype == "float32" and self.config.get("allow_tf32")
        found = self.actual(self.wanted() if wanted is None else wanted)
        peers = self.peers(expected) if self.dtype in SIXTEEN_BIT else {}
        for name, actual in found.items():
            if name in peers and (name == "out" or abs(expected[name]).max(initial=0.0) > 1e-9):
                stored = self.mask_dtype if name == "d_attn_mask" else None
                common.check_tensor(name, actual, expected[name], self.dtype, peers[name], stored)
                continue
            limit = LIMIT["tf32" if is_tf32 else self.dtype]
            if name == "d_attn_mask":
                limit = max(limit, LIMIT.get(self.mask_dtype, 0))
            assert not np.isnan(actual).any(), f"{name}: NaN"
            if actual.size:
                error = abs(actual - expected[name]).max() / max(
                    self.least(name, expected[name]), abs(expected[name]).max()
                )
                assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


# Head dims for every size of tile.
HEAD_DIMS = (8, 64, 100, 128, 200)
KINDS = {
    "more keys": dict(sizes=(2, 70, 201, 2, 2)),
    "fewer keys": dict(sizes=(2, 201, 70, 2, 2), causal=True),
    "one query": dict(sizes=(2, 1, 300, 4, 2), causal=True),
    "one query of many heads": dict(sizes=(1, 1, 2000, 24, 2), mask=("BHK", "float32")),
    "one query with a window": dict(sizes=(3, 1, 700, 2, 2), window_left=300, mask=("K", "bool")),
    "one query of many sequences": dict(sizes=(70, 1, 130, 16, 16)),
    "no keys": dict(sizes=(2, 65, 0, 2, 2)),
    "no queries": dict(sizes=(2, 0, 65, 4, 2), mask=("BK", "float32")),
    "grouped": dict(sizes=(2, 130, 130, 6, 2), causal=True),
    "one head of keys": dict(sizes=(1, 150, 90, 4, 1), dropout_rate=0.2),
    "window": dict(sizes=(1, 300, 300, 2, 2), window_left=40, window_right=7),
    "causal window": dict(sizes=(1, 300, 260, 4, 2), window_left=70, causal=True),
    "diagonal": dict(sizes=(1, 200, 200, 2, 1), window_left=0, window_right=0),
    "packed": dict(sizes=(0, 0, 0, 2, 2), lengths=((5, 130, 0, 64, 1), (5, 130, 0, 64, 1)), causal=True),
    "packed with other keys": dict(sizes=(0, 0, 0, 4, 2), lengths=((70, 0, 129, 3), (9, 66, 200, 0)), dropout_rate=0.1),
    "packed with windows": dict(
        sizes=(0, 0, 0, 2, 1), lengths=((150, 270), (150, 270)), window_left=30, window_right=0
    ),
    "ranges of 1 column": dict(sizes=(2, 200, 200, 2, 2), ranges=(1, 1), causal=True),
    "ranges of 2 columns": dict(sizes=(2, 200, 200, 4, 2), ranges=(2, 2)),
    "ranges of 2 columns, causal": dict(sizes=(2, 200, 200, 4, 2), ranges=(2, 1), causal=True, dropout_rate=0.1),
    "ranges of 4 columns": dict(sizes=(2, 150, 200, 4, 2), ranges=(4, 2)),
    "ranges of 4 columns, mask": dict(sizes=(2, 150, 200, 4, 2), ranges=(4, 2), mask=("BK", "bool")),
    "ranges with a window": dict(sizes=(2, 300, 260, 4, 2), ranges=(2, 1), window_left=70, causal=True),
    "ranges of documents": dict(sizes=(2, 300, 300, 4, 2), ranges=(1, 2, (5, 130, 64, 101)), causal=True),
    "negative scale": dict(sizes=(1, 130, 130, 2, 2), scale=-0.3, causal=True),
    "scale of 0": dict(sizes=(1, 130, 130, 2, 2), scale=0.0, causal=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, head_dim, dtype):
    options = dict(KINDS[kind])
    sizes = (*options.pop("sizes"), head_dim)
    Problem(sizes, dtype, **options).check()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("head_dim", (40, 80))
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_in_part_of_a_tile(kind, head_dim, dtype):
    options = dict(KINDS[kind])
    sizes = (*options.pop("sizes"), head_dim)
    Problem(sizes, dtype, **options).check()


SHARED = {
    "equal": dict(sizes=(2, 130, 130, 4, 4), causal=True, dropout_rate=0.1),
    "grouped": dict(sizes=(2, 130, 130, 6, 2), mask=("BQK", "float32")),
    "packed": dict(sizes=(0, 0, 0, 4, 2), lengths=((5, 130, 0, 64),) * 2, causal=True),
    "other keys": dict(sizes=(2, 70, 201, 4, 2)),
    "one query": dict(sizes=(3, 1, 300, 4, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (24, 64, 128))
@pytest.mark.parametrize(
    "form, kind",
    [
        (form, kind)
        for form, by_head in FORMS.items()
        for kind, options in SHARED.items()
        if not (by_head and "lengths" in options)
        and (not form.startswith("qk") or options["sizes"][1] == options["sizes"][2])
    ],
)
def test_shared_tensors(form, kind, head_dim, dtype):
    """Query, key and value in one tensor or two, keys and values by head."""
    options = dict(SHARED[kind])
    sizes = (*options.pop("sizes"), head_dim)
    Problem(sizes, dtype, form=form, **options).check()


def draw_lengths(count, most, seed):
    return tuple(np.random.default_rng(seed).integers(0, most + 1, count).tolist())


# More tiles than there are multiprocessors, so that a thread block has several, and memory is used again.
LARGE_KINDS = {
    "more keys": dict(sizes=(3, 300, 1100, 40, 40)),
    "fewer keys": dict(sizes=(3, 1100, 300, 40, 40), causal=True, dropout_rate=0.1),
    "one tile of keys": dict(sizes=(6, 900, 77, 40, 40)),
    "grouped": dict(sizes=(5, 600, 600, 32, 8), causal=True),
    "grouped, other keys, window": dict(sizes=(4, 500, 700, 36, 12), window_left=200, window_right=30),
    "window": dict(sizes=(2, 1500, 1500, 16, 16), window_left=129, causal=True, dropout_rate=0.1),
    "far keys": dict(sizes=(2, 700, 300, 40, 40), window_left=40, causal=True),
    "mask of keys and heads": dict(sizes=(3, 400, 520, 36, 12), mask=("BHK", "bool"), causal=True),
    "mask of everything": dict(sizes=(2, 400, 520, 32, 8), mask=("BHQK", "float16")),
    "mask with window": dict(sizes=(2, 700, 700, 32, 8), mask=("BK", "float16"), window_left=150, window_right=150),
    "packed": dict(sizes=(0, 0, 0, 16, 16), lengths=(draw_lengths(50, 400, 1),) * 2, causal=True),
    "packed and grouped": dict(
        sizes=(0, 0, 0, 24, 8), lengths=(draw_lengths(40, 500, 2),) * 2, dropout_rate=0.1, window_left=90
    ),
    "packed, other keys": dict(
        sizes=(0, 0, 0, 16, 4), lengths=(draw_lengths(30, 500, 3), draw_lengths(30, 700, 4)), causal=True
    ),
    "packed, one long": dict(sizes=(0, 0, 0, 4, 4), lengths=((3, 2000, 1, 5, 0, 64),) * 2),
    "packed, one long and many short": dict(
        sizes=(0, 0, 0, 16, 8), lengths=((17,) * 20 + (1900,) + (0, 90) * 20,) * 2, causal=True
    ),
    "packed, equal": dict(sizes=(0, 0, 0, 12, 12), lengths=((256,) * 24,) * 2, dropout_rate=0.1),
    "packed, many tiles": dict(
        sizes=(0, 0, 0, 30, 30), lengths=(draw_lengths(130, 25, 6) + (300, 129, 257, 1),) * 2, causal=True
    ),
    "packed, more than a segment": dict(sizes=(0, 0, 0, 4, 2), lengths=(draw_lengths(700, 12, 5),) * 2, causal=True),
    "ranges of long documents": dict(sizes=(2, 1500, 1500, 16, 16), ranges=(2, 1, (3, 700, 1, 129, 400, 267))),
    "ranges of documents, causal": dict(
        sizes=(3, 1100, 1100, 24, 8), ranges=(1, 8, (300, 77, 500, 223)), causal=True, dropout_rate=0.1
    ),
    "ranges of documents, seen again": dict(sizes=(2, 1300, 1300, 16, 8), ranges=(2, 8, (400, 300, 600)), causal=True),
    "ranges of documents, 4 columns": dict(
        sizes=(2, 900, 900, 24, 8), ranges=(4, 1, (128, 256, 3, 513)), dropout_rate=0.1
    ),
    "ranges of 4 columns, many heads": dict(sizes=(3, 600, 1100, 16, 8), ranges=(4, 8)),
    "ranges, long": dict(sizes=(1, 200, 5000, 8, 8), ranges=(2, 1), window_left=900),
    "ranges, more keys than a segment": dict(sizes=(1, 140, 66000, 2, 1), ranges=(2, 1)),
    "ranges, more queries than a segment": dict(sizes=(1, 66000, 140, 2, 1), ranges=(4, 1)),
    "ranges, many tiles": dict(sizes=(17, 130, 130, 64, 64), ranges=(2, 1, (40, 64, 26))),
    "ranges of equal documents": dict(sizes=(2, 1536, 1536, 10, 10), ranges=(2, 1, (256,) * 6)),
    "ranges of documents, one long and many short": dict(
        sizes=(1, 1600, 1600, 24, 12), ranges=(1, 12, (0, 20, 31) * 6 + (1294,)), causal=True
    ),
    "ranges of documents that begin anywhere": dict(
        sizes=(2, 1500, 1500, 16, 4), ranges=(2, 4, (0, 190, 33, 64, 0, 400, 97, 129, 587))
    ),
}


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("head_dim", (40, 64, 80, 128))
@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_large_kinds(kind, head_dim, dtype):
    options = dict(LARGE_KINDS[kind])
    sizes = (*options.pop("sizes"), head_dim)
    Problem(sizes, dtype, **options).check()


def kernels_of(problem, wanted=GRADIENTS):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        problem.actual(wanted)
    return [event.key for event in profiler.key_averages() if "pfa::cuda" in event.key]


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="these kernels are for Hopper")
@pytest.mark.parametrize("head_dim, deterministic", ((40, False), (128, False), (64, True)))
@pytest.mark.parametrize("kind", [*KINDS, *LARGE_KINDS])
def test_hopper_serves(kind, head_dim, deterministic):
    options = dict(KINDS[kind] if kind in KINDS else LARGE_KINDS[kind])
    sizes = (*options.pop("sizes"), head_dim)
    problem = Problem(sizes, "bfloat16", deterministic=deterministic, **options)
    names = kernels_of(problem)
    refuses = "ranges of 4 columns, mask" in kind or "scale" in kind or kind in ("no keys", "no queries")
    refuses_backward = refuses or deterministic and "ranges" in kind
    one_query = "one query" in kind
    assert any("hopper" in name and "forward_kernel" in name for name in names) != (refuses or one_query), names
    assert any("hopper" in name and "backward_kernel" in name for name in names) != refuses_backward, names
    assert any("attention_one_query" in name for name in names) == one_query, names
    assert any("_mma" in name for name in names) == refuses_backward, names


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="this kernel is for Hopper")
@pytest.mark.parametrize("axes", ("QK", "BQK", "HQK", "BHQK"))
@pytest.mark.parametrize("mask_dtype", ("bool", "float16", "float32"))
def test_masks_that_the_copy_engine_cannot_read(mask_dtype, axes):
    problem = Problem((3, 150, 131, 4, 2, 128), "bfloat16", mask=(axes, mask_dtype), causal=True)
    problem.check()
    names = kernels_of(problem)
    assert any("copy_mask_kernel" in name for name in names) != (axes == "BHQK" and mask_dtype != "bool"), names


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="this kernel is for Hopper")
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("kind", ("packed, equal", "packed, many tiles"))
def test_few_tiles_of_a_thread_block_are_sorted(kind, head_dim):
    options = dict(LARGE_KINDS[kind])
    names = kernels_of(Problem((*options.pop("sizes"), head_dim), "bfloat16", **options))
    sorts = {of_keys: any(f"sort_packed_kernel<{of_keys}>" in name for name in names) for of_keys in ("false", "true")}
    assert sorts == dict.fromkeys(sorts, "many tiles" not in kind), names


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_sequences_keep_to_themselves(dtype, head_dim):
    """What one packed sequence holds does not come into those beside it."""
    lengths = (70, 130, 200)
    problem = Problem((0, 0, 0, 4, 2, head_dim), dtype, lengths=(lengths, lengths))
    before = problem.actual(GRADIENTS)
    middle = slice(lengths[0], lengths[0] + lengths[1])
    for array in (*problem.inputs.values(), problem.d_out):
        array[middle] = np.nan
    after = problem.actual(GRADIENTS)
    for name in before:
        others = [np.delete(numbers[name], middle, 0) for numbers in (before, after)]
        assert not np.isnan(others[1]).any(), name
        np.testing.assert_allclose(others[1], others[0], rtol=0, atol=LIMIT[dtype] * abs(others[0]).max())


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_in_tf32(kind, head_dim):
    options = dict(KINDS[kind], allow_tf32=True)
    sizes = (*options.pop("sizes"), head_dim)
    Problem(sizes, "float32", **options).check()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("wanted", ((), ("query",), ("key",), ("value",), ("attn_mask",), ("query", "value")))
def test_subsets_of_gradients(wanted, dtype):
    Problem((2, 100, 130, 4, 2, 64), dtype, mask=("HQK", "float32")).check(wanted)


@pytest.mark.parametrize("head_dim", (64, 200))
def test_one_gradient_of_wide_heads(head_dim):
    for wanted in ("key", "value"):
        Problem((1, 100, 130, 2, 2, head_dim), "float16").check((wanted,))


# Few and many thread blocks, and every axis that can broadcast.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", ("", "K", "Q", "H", "B", "QK", "BK", "HQK", "BQK", "BHK", "BHQ", "BHQK"))
def test_gradient_of_mask(axes, dtype):
    Problem((3, 150, 130, 4, 2, 64), dtype, mask=(axes, "float32"), causal=True, dropout_rate=0.1).check()


@pytest.mark.parametrize("mask_dtype", ("float64", "float16", "bfloat16"))
def test_dtypes_of_mask(mask_dtype):
    Problem((2, 70, 70, 2, 2, 64), "bfloat16", mask=("HQK", mask_dtype)).check()


def test_gradient_of_mask_is_the_same_each_time():
    problem = Problem((8, 300, 300, 4, 2, 64), "bfloat16", mask=("HK", "float32"), dropout_rate=0.1)
    first, second = (problem.actual(("attn_mask",))["d_attn_mask"] for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("dtype, head_dim", (("float32", 64), ("float16", 64), ("bfloat16", 40), ("bfloat16", 128)))
@pytest.mark.parametrize("kind", [*KINDS, *LARGE_KINDS])
def test_gradients_are_the_same_each_time(kind, head_dim, dtype):
    options = dict(KINDS[kind] if kind in KINDS else LARGE_KINDS[kind])
    problem = Problem((*options.pop("sizes"), head_dim), dtype, **options)
    as_they_come = problem.actual(GRADIENTS)
    problem.config["deterministic"] = True
    first, *others = (problem.actual(GRADIENTS) for _ in range(3))
    for name in first:
        assert all((first[name] == other[name]).all() for other in others), name
        least = max(1.0, abs(as_they_come[name]).max(initial=0.0))
        assert abs(first[name] - as_they_come[name]).max(initial=0.0) <= LIMIT[dtype] * least, name


def draw_problem(seed):
    """A mixture of everything."""
    rng = np.random.default_rng(seed)
    choose = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    options = dict(causal=bool(choose(0, 1)))
    num_kv_heads = choose(1, 2, 3)
    queries = choose(1, 17, 64, 130, 300)
    sizes = [
        choose(1, 2, 3),
        queries,
        choose(queries, queries, 1, 50, 257),
        num_kv_heads * choose(1, 2, 4),
        num_kv_heads,
    ]
    sizes.append(choose(1, 8, 30, 64, 72, 96, 128, 160, 256))
    if choose(0, 0, 1):
        options["lengths"] = [rng.integers(0, sizes[1] + 1, sizes[0]).tolist() for _ in range(2)]
        if choose(0, 1):
            options["lengths"][1] = options["lengths"][0]
        for numbers in options["lengths"]:
            numbers[0] = max(numbers[0], 1)
    if choose(0, 1):
        options.update(window_left=choose(-1, 0, 30, 100), window_right=choose(-1, 0, 20))
    if choose(0, 0, 1):
        columns = choose(1, 2) if options["causal"] else choose(2, 4)
        options["ranges"] = (columns, choose(1, num_kv_heads))
    if choose(0, 1):
        options["dropout_rate"] = 0.2
    if choose(0, 1) and "lengths" not in options:
        axes = "".join(axis for axis in "BHQK" if choose(0, 1))
        options["mask"] = (axes, choose("bool", "float32", "float16"))
    if choose(0, 0, 0, 1):
        options["scale"] = choose(0.5, -0.2)
    dtype = choose(*DTYPES)
    return Problem(tuple(sizes), dtype, seed=seed, allow_tf32=bool(choose(0, 1)), **options)


@pytest.mark.parametrize("seed", range(200))
def test_mixtures(seed):
    draw_problem(seed).check()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_lengths_that_are_wrong_stay_inside(dtype):
    """Longer sequences than were promised: what comes is undefined, but nothing else is written to."""
    problem = Problem((0, 0, 0, 2, 2, 64), dtype, lengths=((200, 100), (200, 100)))
    problem.config.update(queries=70, keys=70)
    problem.actual(GRADIENTS)
