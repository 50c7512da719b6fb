"""Runs the CUDA core on PyTorch's tensors. All memory that a kernel may write lies between guards and starts as NaN."""

import os

import common
import numpy as np
import pfa_core
import torch
from core_config import config_of

GUARD = 256
# compute-sanitizer's initcheck must see memory that nobody wrote as such.
POISON = os.environ.get("PFA_TEST_POISON", "1") == "1"


class Memory:
    """Device buffers with a guard on either side; `check` says whether a guard was written to."""

    def __init__(self):
        self.buffers = []

    def bytes(self, count, offset=0):
        count += offset
        if not POISON:
            return torch.empty(count, dtype=torch.uint8, device="cuda")[offset:]
        whole = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
        self.buffers.append((whole, GUARD + offset, GUARD + count))
        return whole[GUARD + offset : GUARD + count]

    def empty(self, shape, dtype, offset=0):
        """A tensor `offset` bytes away from an aligned address."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self.bytes(count, offset).view(dtype).view(*shape)

    def check(self):
        for whole, begin, end in self.buffers:
            assert (whole[:begin] == 0xFF).all() and (whole[end:] == 0xFF).all(), "a kernel wrote outside its memory"


def torch_dtype(name):
    return getattr(torch, name)


def to_device(a, name):
    return torch.from_numpy(np.ascontiguousarray(a)).to("cuda").to(torch_dtype(name))


def to_numpy(tensor):
    return tensor.to(torch.float64).cpu().numpy()


def mask_argument(mask, shape):
    """The tuple that CudaBlock takes for a mask that broadcasts to `shape`."""
    strides = mask.expand(shape).stride()
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides))
    return (mask.data_ptr(), str(mask.dtype).split(".")[1], strides)


class Run:
    """A case of any block on device tensors: forward, backward, and the memory they use."""

    def __init__(self, case, inputs, saves=True, offset=0, **switches):
        self.case = case
        self.saves = saves
        self.memory = Memory()
        config, self.seed, self.random_offset = config_of(case)
        self.block = pfa_core.CudaBlock(dict(config, **switches), torch.cuda.current_device())
        self.tensors = {}
        for name, a in inputs.items():
            tensor = to_device(a, case.dtype_of(name))
            if offset and name != "attn_mask":
                moved = self.memory.empty(tensor.shape, tensor.dtype, offset)
                moved.copy_(tensor)
                tensor = moved
            self.tensors[name] = tensor
        self.arrays = {n: t.data_ptr() for n, t in self.tensors.items() if n not in ("attn_mask", "d_out")}
        if "attn_mask" in self.tensors:
            shape = (case.batch, case.num_heads, case.seq_len, case.seq_len)
            self.arrays["mask"] = mask_argument(self.tensors["attn_mask"], shape)
        d_out = self.tensors["d_out"]
        self.out = self.memory.empty(d_out.shape, d_out.dtype, offset)
        self.arrays["out"] = self.out.data_ptr()
        self.saved = self.memory.bytes(self.block.saved_bytes(self.arrays)) if saves else None
        self.offset = offset

    def stream(self):
        return torch.cuda.current_stream().cuda_stream

    def forward(self):
        if not hasattr(self, "workspace"):
            self.workspace = self.memory.bytes(self.block.forward_workspace_bytes(self.arrays, self.saves))
        saved = self.saved.data_ptr() if self.saves else None
        workspace = self.workspace.data_ptr()
        self.block.forward(self.arrays, saved, workspace, self.stream(), self.seed, self.random_offset)
        return self.out

    def backward(self, wanted):
        if not hasattr(self, "gradients"):
            self.gradients = {
                n: self.memory.empty(self.tensors[n].shape, self.tensors[n].dtype, self.offset) for n in wanted
            }
            self.backward_arrays = {n: a for n, a in self.arrays.items() if n != "out"}
            self.backward_arrays["d_out"] = self.tensors["d_out"].data_ptr()
            self.backward_arrays.update({"d_" + n: g.data_ptr() for n, g in self.gradients.items()})
            self.backward_workspace = self.memory.bytes(self.block.backward_workspace_bytes(self.backward_arrays))
        self.block.backward(
            self.backward_arrays, self.saved.data_ptr(), self.backward_workspace.data_ptr(), self.stream()
        )
        return self.gradients


def run_attention(qkv, d_out, mask=None, seed=0, offset=0, **switches):
    """The attention stages alone on qkv [B, S, 3, H, D] and d_out [B, S, H, D]: the result, and the gradients of qkv
    and its bias.
    """
    batch, seq_len, _, num_heads, head_dim = qkv.shape
    config = dict(batch=batch, seq_len=seq_len, embed_dim=num_heads * head_dim, num_heads=num_heads, head_dim=head_dim)
    block = pfa_core.CudaBlock(dict(config, dtype=str(qkv.dtype).split(".")[1], **switches))
    memory = Memory()
    out, d_qkv, d_qkv_bias = (memory.empty(shape, qkv.dtype) for shape in (d_out.shape, qkv.shape, qkv.shape[2:]))
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    log_sum_exp, score_shift = (memory.empty((batch, num_heads, seq_len), statistics) for _ in range(2))
    random_state = memory.empty((2,), torch.int64)
    tensors = dict(qkv=qkv, attn_out=out, log_sum_exp=log_sum_exp, score_shift=score_shift, random_state=random_state)
    tensors.update(x=d_out, out=out, d_attn_out=d_out, d_qkv=d_qkv, d_qkv_bias=d_qkv_bias)
    arrays = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    if mask is not None:
        arrays["mask"] = mask_argument(mask, (batch, num_heads, seq_len, seq_len))
    size = max(block.stage_workspace_bytes(dict(arrays, d_x=arrays["x"]), backward) for backward in (False, True))
    arrays["stage_workspace"] = memory.bytes(size).data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    block.run_stage("attention_forward", arrays, stream, seed % 2**64, offset)
    block.run_stage("attention_backward", arrays, stream)
    torch.cuda.synchronize()
    memory.check()
    return out, d_qkv, d_qkv_bias


def run_weights(case, inputs, wanted):
    """The weights [batch, queries, heads, keys], by the statistics of whatever kernels serve the attention, and the
    `wanted` gradients, of the case's dtypes; and the memory that they lie in.
    """
    config, seed, offset = config_of(case)
    memory, stream = Memory(), torch.cuda.current_stream().cuda_stream
    floats = {name: inputs[name] for name in ("query", "key", "attn_mask") if name in inputs}
    tensors = {name: to_device(a, case.dtype_of(name)) for name, a in floats.items()}
    d_weights = to_device(inputs["d_out"].swapaxes(1, 2), case.dtype)
    arrays = {name: tensors[name].data_ptr() for name in ("query", "key")}
    if "attn_mask" in tensors:
        arrays["mask"] = mask_argument(tensors["attn_mask"], (case.batch, case.heads, case.queries, case.keys))
    if "startend_row_indices" in inputs:
        ranges = torch.from_numpy(inputs["startend_row_indices"]).cuda()
        arrays["startend_row_indices"] = (ranges.data_ptr(), *ranges.shape[1::2])
    value = torch.zeros_like(tensors["key"])
    attention = pfa_core.CudaBlock(config)
    out = memory.empty(tensors["query"].shape, tensors["query"].dtype)
    of_attention = dict(arrays, value=value.data_ptr(), out=out.data_ptr())
    saved = memory.bytes(attention.saved_bytes(of_attention))
    workspace = memory.bytes(attention.forward_workspace_bytes(of_attention, True))
    attention.forward(of_attention, saved.data_ptr(), workspace.data_ptr(), stream, seed, offset)

    block = pfa_core.CudaBlock(dict(config, block="attention_weights"))
    weights = memory.empty(d_weights.shape, d_weights.dtype)
    arrays.update(statistics=saved.data_ptr(), out=weights.data_ptr())
    block.forward(arrays, None, memory.bytes(block.forward_workspace_bytes(arrays, False)).data_ptr(), stream, 0, 0)
    gradients = {name: memory.empty(tensors[name].shape, tensors[name].dtype) for name in wanted}
    arrays.update({"d_" + name: tensor.data_ptr() for name, tensor in gradients.items()}, d_out=d_weights.data_ptr())
    workspace = memory.bytes(block.backward_workspace_bytes(arrays))
    block.backward(arrays, None, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    return weights.transpose(1, 2), gradients, memory


def run_case(case, inputs, wanted=None, **options):
    """Result and gradients (all, or the wanted), as float64 NumPy arrays."""
    if wanted is None:
        wanted = common.differentiable(inputs)
    run = Run(case, inputs, **options)
    run.forward()
    if wanted:
        run.backward(wanted)
    torch.cuda.synchronize()
    run.memory.check()
    return to_numpy(run.out), {n: to_numpy(g) for n, g in run.gradients.items()} if wanted else {}
