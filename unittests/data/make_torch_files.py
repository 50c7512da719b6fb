"""Writes torch_zip.bin and torch_legacy.bin with PyTorch; test_checkpoint_files.py has what they hold. Made with
PyTorch 2.13.
"""

from collections import OrderedDict
from pathlib import Path

import torch

base = torch.arange(12, dtype=torch.float32)
tied = torch.nn.Parameter(torch.arange(4, dtype=torch.float32).reshape(2, 2))
state = OrderedDict(
    parameter=torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]])),
    tied_a=tied,
    tied_b=tied.data,
    view=base[2:8].view(2, 3),
    transposed=base.view(3, 4).t(),
    strided=base[1::3],
    expanded=torch.tensor([7.0]).expand(2, 3),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    uint16=torch.tensor([1, 65535], dtype=torch.uint16),
    float8=torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(torch.float8_e4m3fn).t(),
    epoch=3,
)
for dtype in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"):
    state[dtype] = torch.arange(4).to(getattr(torch, dtype))
state._metadata = OrderedDict([("", {"version": 1})])
folder = Path(__file__).parent
torch.save(state, folder / "torch_zip.bin")
torch.save(state, folder / "torch_legacy.bin", _use_new_zipfile_serialization=False)
