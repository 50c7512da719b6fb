"""Runs a random case by the CUDA core on tensors of PyTorch, which lie between guards."""

import attention_cases
import torch
from core_config import config_of
from device import Memory, Run, mask_argument, run_weights, to_device, to_numpy
from pfa_core import CudaBlock

MOST_HEAD_DIM = 256


def ways():
    return [torch.cuda.get_device_name()]


def why_not(drawn):
    head_dim = getattr(drawn.case, "head_dim", 0)
    return f"head_dim {head_dim}" if head_dim > MOST_HEAD_DIM else None


def run(drawn, inputs, way):
    """Result and gradients as float64 arrays, and what is wrong with them already."""
    if isinstance(drawn.case, attention_cases.WeightsCase):
        out, gradients, memory = run_weights(drawn.case, inputs, drawn.wanted)
    elif isinstance(drawn.case, attention_cases.Case):
        out, gradients, memory = _run_attention(drawn.case, inputs, drawn.wanted)
    else:
        block = Run(drawn.case, inputs, **getattr(drawn.case, "switches", dict)())
        out, gradients, memory = block.forward(), block.backward(drawn.wanted), block.memory
    torch.cuda.synchronize()
    broken = []
    try:
        memory.check()
    except AssertionError as error:
        broken.append(str(error))
    return to_numpy(out), {name: to_numpy(gradient) for name, gradient in gradients.items()}, broken


def _run_attention(case, inputs, wanted):
    config, seed, offset = config_of(case)
    block, memory = CudaBlock(config, torch.cuda.current_device()), Memory()
    of_floats = {name: a for name, a in inputs.items() if name in ("query", "key", "value", "attn_mask", "d_out")}
    tensors = {name: to_device(a, case.dtype_of(name)) for name, a in of_floats.items()}
    described = {name: torch.from_numpy(a).cuda() for name, a in inputs.items() if name not in tensors}
    arrays = {name: tensors[name].data_ptr() for name in ("query", "key", "value")}
    for name, tensor in described.items():
        has_shape = name == "startend_row_indices"
        arrays[name] = (tensor.data_ptr(), *tensor.shape[1::2]) if has_shape else tensor.data_ptr()
    if "attn_mask" in tensors:
        arrays["mask"] = mask_argument(tensors["attn_mask"], (case.batch, case.heads, case.queries, case.keys))
    out = memory.empty(tensors["d_out"].shape, tensors["d_out"].dtype)
    arrays["out"] = out.data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    saved = memory.bytes(block.saved_bytes(arrays)).data_ptr()
    workspace = memory.bytes(block.forward_workspace_bytes(arrays, True))
    block.forward(arrays, saved, workspace.data_ptr(), stream, seed, offset)
    gradients = {name: memory.empty(tensors[name].shape, tensors[name].dtype) for name in wanted}
    arrays.update({"d_" + name: gradient.data_ptr() for name, gradient in gradients.items()})
    arrays["d_out"] = tensors["d_out"].data_ptr()
    workspace = memory.bytes(block.backward_workspace_bytes(arrays))
    block.backward(arrays, saved, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    return out, gradients, memory
