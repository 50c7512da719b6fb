"""The memory-bound stages alone, on rows of every length, aligned or not, against float64 on the device."""

import pfa_core
import pytest
import reference
import torch
from device import Memory, torch_dtype

# By vectors with few and many numbers per thread, at the limits of each, by single numbers, and rows too long for
# registers.
COLS = (8, 96, 768, 1000, 1023, 1024, 2560, 4096, 4104, 8192, 12288, 16384, 20000, 40000)
LIMIT = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


class Rows:
    """x, y, z, d_out of [rows, cols] and layer-norm parameters, with what the stages write; `narrow`: the dtype of the
    products' operands, where it is not that of x.
    """

    def __init__(self, dtype, norm_dtype, rows, cols, rate=0.0, offset=0, narrow=None, **switches):
        self.memory = Memory()
        self.dtype, self.norm_dtype, self.narrow = (
            torch_dtype(dtype),
            torch_dtype(norm_dtype),
            torch_dtype(narrow or dtype),
        )
        self.rows, self.cols, self.rate, self.offset = rows, cols, rate, offset
        dtypes = dict(dtype=narrow or dtype, residual_dtype=dtype, norm_dtype=norm_dtype)
        config = dict(batch=1, seq_len=rows, embed_dim=cols, num_heads=1, head_dim=1, dropout_rate=rate)
        self.block = pfa_core.CudaBlock(dict(config, **dtypes, **switches))
        self.accumulator = torch.float64 if dtype == "float64" else torch.float32
        torch.manual_seed(cols)
        self.stream = torch.cuda.current_stream().cuda_stream
        self.random_state = torch.tensor([5, 9], device="cuda")

    def draw(self, *shape, dtype=None):
        tensor = self.memory.empty(shape, dtype or self.dtype, self.offset)
        return tensor.copy_(torch.randn(shape, dtype=torch.float64, device="cuda"))

    def empty(self, *shape, dtype=None):
        return self.memory.empty(shape, dtype or self.dtype, self.offset)

    def factor(self):
        if self.rate == 0:
            return 1.0
        random = torch.from_numpy(reference.output_random(5, 9, self.rows, self.cols).astype("int32")).cuda()
        return (random >= int(self.rate * 65536 + 0.5)).double() / (1 - self.rate)

    def run(self, stage, tensors):
        arrays = {n: t.data_ptr() for n, t in tensors.items() if t is not None}
        backward = "backward" in stage
        # Only the row stages' own part of the workspace is used, which does not depend on the attention's shape.
        size = 6 * 132 * 2 * max(self.cols, 64) * 8 if backward else 64
        workspace = self.memory.bytes(size)
        self.block.run_stage(
            stage,
            dict(arrays, random_state=self.random_state.data_ptr(), stage_workspace=workspace.data_ptr()),
            self.stream,
        )
        torch.cuda.synchronize()
        self.memory.check()


def close(name, actual, expected, dtype):
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert error <= LIMIT[dtype], f"{name}: relative error {error:.3g}"


def normalise(z, epsilon=1e-5):
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()


# Of x, of layer-norm parameters, and of the products' operands.
TYPES = [(dtype, dtype, dtype) for dtype in LIMIT]
TYPES += [(dtype, "float32", dtype) for dtype in ("float16", "bfloat16")]
TYPES += [("float32", "float32", narrow) for narrow in ("float16", "bfloat16")]


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_residual(dtype, norm_dtype, narrow, cols, rate):
    check_residual(dtype, norm_dtype, 37, cols, rate, narrow=narrow)


@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
@pytest.mark.parametrize("rate", (0.0, 0.1))
def test_residual_many_rows(dtype, norm_dtype, narrow, rate):
    check_residual(dtype, norm_dtype, 5000, 768, rate, narrow=narrow)


@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
@pytest.mark.parametrize("rate", (0.0, 0.1))
def test_residual_unaligned(dtype, norm_dtype, narrow, rate):
    check_residual(dtype, norm_dtype, 37, 768, rate, offset=8 if dtype == "float64" else 4, narrow=narrow)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_residual_far_from_zero(dtype):
    check_residual(dtype, dtype, 37, 768, 0.3, x_mean=200.0)


def check_residual(dtype, norm_dtype, rows, cols, rate, offset=0, x_mean=0.0, narrow=None):
    narrow = narrow or dtype
    r = Rows(dtype, norm_dtype, rows, cols, rate, offset, narrow)
    y, x, d_out = r.draw(rows, cols), r.draw(rows, cols).add_(x_mean), r.draw(rows, cols)
    scale, bias = r.draw(cols, dtype=r.norm_dtype), r.draw(cols, dtype=r.norm_dtype)
    residual, out = r.empty(rows, cols).copy_(y), r.empty(rows, cols)
    mean = None if rate else r.empty(rows, dtype=r.accumulator)
    rstd = r.empty(rows, dtype=r.accumulator)
    r.run(
        "residual_forward",
        dict(x=x, y=residual, residual=residual, out=out, ln_scale=scale, ln_bias=bias, ln_mean=mean, ln_rstd=rstd),
    )
    factor = r.factor()
    z = y.double() * factor + x.double() if rate else y.double()
    n = normalise(z)
    close("residual", residual, n if rate else z, dtype)
    close("out", out, n * scale.double() + bias.double(), dtype)
    statistic = "float64" if dtype == "float64" else "float32"
    if mean is not None:
        close("mean", mean, z.mean(-1), statistic)
    expected_rstd = (z.var(-1, unbiased=False) + 1e-5).rsqrt()
    # Rows that no registers hold wait in memory, where z is rounded. Without dropout it has been before.
    held = cols % 8 == 0 and cols <= 16384 and not offset
    close("rstd", rstd, expected_rstd, statistic if held or not rate else dtype)

    names = ("ln_scale", "ln_bias", "linear_bias")
    sums = {"d_" + name: r.empty(cols, dtype=r.narrow if name == "linear_bias" else r.norm_dtype) for name in names}
    d_residual = r.empty(rows, cols)
    d_linear = r.empty(rows, cols, dtype=r.narrow) if rate or narrow != dtype else d_residual
    tensors = dict(d_out=d_out, residual=residual, ln_mean=mean, ln_rstd=rstd, ln_scale=scale, d_residual=d_residual)
    r.run("residual_backward", dict(tensors, d_linear=d_linear, **sums))
    if rate:
        n = residual.double()  # as rounded
    d_z, d_scale, d_bias = reference.layer_norm_gradient(
        d_out.double()[None], n[None], expected_rstd[None, :, None], scale.double()
    )
    d_z = d_z[0]
    close("d_residual", d_residual, d_z, dtype)
    close("d_linear", d_linear, d_z * factor, narrow)
    close("d_ln_scale", sums["d_ln_scale"], d_scale, norm_dtype)
    close("d_ln_bias", sums["d_ln_bias"], d_bias, norm_dtype)
    close("d_linear_bias", sums["d_linear_bias"], (d_z * factor).sum(0), narrow)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
@pytest.mark.parametrize("adds", (False, True))
def test_layer_norm(dtype, norm_dtype, narrow, cols, adds):
    check_layer_norm(dtype, norm_dtype, narrow, 37, cols, adds)


@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
def test_layer_norm_of_many_rows(dtype, norm_dtype, narrow):
    check_layer_norm(dtype, norm_dtype, narrow, 5000, 768, True)


@pytest.mark.parametrize("dtype,norm_dtype,narrow", TYPES)
def test_layer_norm_unaligned(dtype, norm_dtype, narrow):
    check_layer_norm(dtype, norm_dtype, narrow, 37, 768, True, offset=8 if dtype == "float64" else 4)


def check_layer_norm(dtype, norm_dtype, narrow, rows, cols, adds, offset=0):
    r = Rows(dtype, norm_dtype, rows, cols, 0.0, offset, narrow, pre_layer_norm=True, add_residual=adds)
    x, d_hidden, d_residual = r.draw(rows, cols), r.draw(rows, cols, dtype=r.narrow), r.draw(rows, cols)
    scale, bias = r.draw(cols, dtype=r.norm_dtype), r.draw(cols, dtype=r.norm_dtype)
    hidden = r.empty(rows, cols, dtype=r.narrow)
    mean, rstd = r.empty(rows, dtype=r.accumulator), r.empty(rows, dtype=r.accumulator)
    norm = dict(x=x, pre_ln_scale=scale, pre_ln_mean=mean, pre_ln_rstd=rstd)
    r.run("layer_norm_forward", dict(norm, pre_ln_bias=bias, hidden=hidden))
    n = normalise(x.double())
    close("hidden", hidden, n * scale.double() + bias.double(), narrow)

    d_x, d_scale, d_bias = r.empty(rows, cols), r.empty(cols, dtype=r.norm_dtype), r.empty(cols, dtype=r.norm_dtype)
    sums = dict(d_pre_ln_scale=d_scale, d_pre_ln_bias=d_bias)
    r.run("layer_norm_backward", dict(norm, d_hidden=d_hidden, d_residual=d_residual, d_x=d_x, **sums))
    z = x.double().requires_grad_()
    (normalise(z) * scale.double()).backward(d_hidden.double())
    close("d_x", d_x, z.grad + d_residual.double() if adds else z.grad, dtype)
    close("d_pre_ln_scale", d_scale, (d_hidden.double() * n).sum(0), norm_dtype)
    close("d_pre_ln_bias", d_bias, d_hidden.double().sum(0), norm_dtype)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", LIMIT)
def test_dropout_without_norm(dtype, cols):
    rows = 37
    r = Rows(dtype, dtype, rows, cols, 0.3, final_layer_norm=False)
    y, x, d_out = r.draw(rows, cols), r.draw(rows, cols), r.draw(rows, cols)
    residual = r.empty(rows, cols).copy_(y)
    r.run("residual_forward", dict(x=x, y=residual, residual=residual, out=residual))
    close("out", residual, y.double() * r.factor() + x.double(), dtype)
    d_linear, d_bias = r.empty(rows, cols), r.empty(cols)
    r.run("residual_backward", dict(d_out=d_out, d_residual=d_out, d_linear=d_linear, d_linear_bias=d_bias))
    close("d_linear", d_linear, d_out.double() * r.factor(), dtype)
    close("d_linear_bias", d_bias, (d_out.double() * r.factor()).sum(0), dtype)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("narrow", ("float16", "bfloat16"))
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_rounding_without_norm(rate, narrow, cols):
    """d_linear is of another type than d_out: without a layer norm and without dropout too."""
    rows = 37
    r = Rows("float32", "float32", rows, cols, rate, narrow=narrow, final_layer_norm=False)
    d_out, d_linear, d_bias = r.draw(rows, cols), r.empty(rows, cols, dtype=r.narrow), r.empty(cols, dtype=r.narrow)
    r.run("residual_backward", dict(d_out=d_out, d_residual=d_out, d_linear=d_linear, d_linear_bias=d_bias))
    close("d_linear", d_linear, d_out.double() * r.factor(), narrow)
    close("d_linear_bias", d_bias, (d_out.double() * r.factor()).sum(0), narrow)


@pytest.mark.parametrize("cols", (1, 96, 1023))
@pytest.mark.parametrize("offset", (0, 4))
@pytest.mark.parametrize("narrow", ("float16", "bfloat16"))
def test_narrow_x(narrow, offset, cols):
    r = Rows("float32", "float32", 37, cols, offset=offset, narrow=narrow)
    x, hidden = r.draw(37, cols), r.empty(37, cols, dtype=r.narrow)
    r.run("narrow_x", dict(x=x, hidden=hidden))
    assert torch.equal(hidden, x.to(r.narrow))
