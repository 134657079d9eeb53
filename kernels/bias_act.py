"""bias_act and its first two derivatives: elementwise, in one pass.

A dense tensor is rows of what lies side by side in memory. Behind the bias's dimension a row has one channel,
its number modulo their count; where channels lie innermost, a row is the channels of one pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import expm1, laid_out, packed, serves, sigmoid, size_class, softplus, tanh, tuned

# Elements of a program: two to four 16-byte loads a thread.
CONFIGS = [
    {"block": block, "num_warps": warps} for block, warps in ((1024, 4), (512, 4), (2048, 8), (4096, 8))
]
SELU_SCALE = tl.constexpr(1.0507009873554804934)
SELU_ALPHA = tl.constexpr(1.6732632423543772848)


@triton.jit
def activation(v, alpha, ACT: tl.constexpr):
    """f(v)."""
    if ACT == "relu":
        return tl.where(v <= 0, 0.0, v)
    elif ACT == "lrelu":
        return tl.where(v > 0, v, v * alpha)
    elif ACT == "tanh":
        return tanh(v)
    elif ACT == "sigmoid":
        return sigmoid(v)
    elif ACT == "elu":
        return tl.where(v > 0, v, expm1(v))
    elif ACT == "selu":
        return SELU_SCALE * tl.where(v > 0, v, SELU_ALPHA * expm1(v))
    elif ACT == "softplus":
        return tl.where(v > 20, v, softplus(v))
    elif ACT == "swish":
        return v * sigmoid(v)
    else:
        tl.static_assert(ACT == "linear")
        return v


@triton.jit
def slope(v, alpha, ACT: tl.constexpr):
    """f'(v), with PyTorch's choice where f has a corner, and at NaN."""
    if ACT == "relu":
        return tl.where(v <= 0, 0.0, 1.0)
    elif ACT == "lrelu":
        return tl.where(v > 0, 1.0, alpha)
    elif ACT == "tanh":
        t = tanh(v)
        return 1 - t * t
    elif ACT == "sigmoid":
        s = sigmoid(v)
        return s * (1 - s)
    elif ACT == "elu":
        return tl.where(v <= 0, tl.exp(v), 1.0)
    elif ACT == "selu":
        return SELU_SCALE * tl.where(v <= 0, SELU_ALPHA * tl.exp(v), 1.0)
    elif ACT == "softplus":
        return tl.where(v > 20, 1.0, sigmoid(v))
    elif ACT == "swish":
        s = sigmoid(v)
        return s * (1 + v * (1 - s))
    else:
        tl.static_assert(ACT == "linear")
        return v * 0 + 1


@triton.jit
def curvature(v, ACT: tl.constexpr):
    """f''(v)."""
    if ACT == "tanh":
        t = tanh(v)
        return -2 * t * (1 - t * t)
    elif ACT == "elu":
        return tl.where(v >= 0, 0.0, tl.exp(v))
    elif ACT == "selu":
        return SELU_SCALE * tl.where(v >= 0, 0.0, SELU_ALPHA * tl.exp(v))
    elif ACT == "sigmoid":
        s = sigmoid(v)
        return s * (1 - s) * (1 - 2 * s)
    elif ACT == "softplus":
        s = sigmoid(v)
        return tl.where(v > 20, 0.0, s * (1 - s))
    elif ACT == "swish":
        s = sigmoid(v)
        return s * (1 - s) * (2 + v * (1 - 2 * s))
    else:
        tl.static_assert(ACT == "linear" or ACT == "relu" or ACT == "lrelu")
        return v * 0


@triton.jit
def clamped(y, clamp, CLAMPS: tl.constexpr):
    """y within -clamp and clamp; NaN stays."""
    if CLAMPS:
        y = tl.where(y > clamp, clamp, y)
        y = tl.where(y < -clamp, -clamp, y)
    return y


@triton.jit
def bias_act_kernel(
    out_ptr, g_ptr, dy_ptr, x_ptr, b_ptr, rows, cols, channels, alpha, gain, clamp,
    ORDER: tl.constexpr,  # of the derivative
    ACT: tl.constexpr, CLAMPS: tl.constexpr, BIAS: tl.constexpr,  # none, row, column
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ORDER 0: out = f(x + b); 1: out = dy f'; 2: out = g dy f''; each times gain, and clamped."""
    blocks = tl.cdiv(cols, BLOCK_C)
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first_col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    at = first_row * cols + first_col + (r * cols + c)
    inside = (r < rows - first_row) & (c < cols - first_col)
    v = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if BIAS == "row":
        v += tl.load(b_ptr + (first_row + r) % channels).to(tl.float32)
    elif BIAS == "column":
        v += tl.load(b_ptr + first_col + c, c < cols - first_col, 0.0).to(tl.float32)
    y = activation(v, alpha, ACT) * gain
    if ORDER == 0:
        out = clamped(y, clamp, CLAMPS)
    else:
        out = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32) * gain
        if ORDER == 1:
            out *= slope(v, alpha, ACT)
        else:
            out *= tl.load(g_ptr + at, inside, 0.0).to(tl.float32) * curvature(v, ACT)
        if CLAMPS:
            out = tl.where(tl.abs(y) < clamp, out, 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


def bias_act(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float):
    return _launch(0, None, None, x, b, dim, act, alpha, gain, clamp)


def bias_act_bwd(dy, x, b, dim, act, alpha, gain, clamp):
    return _launch(1, None, dy, x, b, dim, act, alpha, gain, clamp)


def bias_act_bwd2(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    return _launch(2, ddx, dy, x, b, dim, act, alpha, gain, clamp)


def _launch(order, g, dy, x, b, dim, act, alpha, gain, clamp):
    if not serves(x, b, dy, g):
        return NotImplemented
    out = torch.empty_like(x)
    x, dy, g = (None if t is None else laid_out(t, out) for t in (x, dy, g))
    kind, rows, cols = "none", 1, x.numel()
    if b is not None:
        channels = x.shape[dim]
        # In a dense tensor an element's channel is its offset / stride modulo their count.
        cols = x.stride(dim) if channels > 1 else x.numel()
        kind, cols = ("row", cols) if cols > 1 or channels == 1 else ("column", channels)
        rows = x.numel() // cols

    def launch(config):
        block_c = min(config["block"], triton.next_power_of_2(cols))
        block_r = config["block"] // block_c
        bias_act_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c),)](
            out, g, dy, x, packed(b), rows, cols, 1 if b is None else len(b), alpha, gain, clamp, ORDER=order,
            ACT=act, CLAMPS=clamp >= 0, BIAS=kind, BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=config["num_warps"],
        )  # fmt: skip
        return out

    key = "bias_act", order, act, x.dtype, kind, size_class(rows, cols)
    return tuned(key, CONFIGS, launch)


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    x, b = torch.empty(1, 128, 256, 256, dtype=dtype), torch.empty(128, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        yield lambda y=y: bias_act(y, b, 1, "lrelu", 0.2, 1.4, 256.0)
        yield lambda y=y: bias_act_bwd(y, y, b, 1, "lrelu", 0.2, 1.4, 256.0)
    yield lambda: bias_act(x, b, 1, "swish", 0.0, 1.4, -1.0)
    yield lambda: bias_act_bwd2(x, x, x, b, 1, "swish", 0.0, 1.4, -1.0)
