"""What modulated_conv2d does to a weight and to images before it convolves, in one pass each."""

import torch
import triton
import triton.language as tl

from . import filtered_bias_act
from .common import FLOATS, narrowed, serves


@triton.jit
def modulated_weight_kernel(
    out_ptr, d_ptr, w_ptr, s_ptr, samples, outputs, channels, stride_oi, stride_ot,
    TAPS: tl.constexpr, FLIP: tl.constexpr, DEMODULATE: tl.constexpr,
    FOLD: tl.constexpr,  # a single sample's s and d into the weight
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One output's weights, and its d for a block of samples."""
    o, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, t = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_T)
    w_ptr += o.to(tl.int64) * channels * TAPS
    out_ptr += o.to(tl.int64) * channels * TAPS
    squares = tl.zeros([BLOCK_N], tl.float32)
    if DEMODULATE:
        for first in range(0, channels, BLOCK_I):
            known = first + i < channels
            inside = known[:, None] & (t < TAPS)[None, :]
            w = tl.load(w_ptr + ((first + i) * TAPS)[:, None] + t[None, :], inside, 0.0)
            at = (n * channels)[:, None] + (first + i)[None, :]
            s = tl.load(s_ptr + at, (n < samples)[:, None] & known[None, :], 0.0).to(tl.float32)
            squares += tl.sum(s * s * tl.sum(w * w, 1)[None, :], 1)
    d = tl.rsqrt(squares + 1e-8)
    if DEMODULATE and not FOLD:
        tl.store(d_ptr + n * outputs + o, d, n < samples)
    if tl.program_id(1) == 0:
        for first in range(0, channels, BLOCK_I):
            known = first + i < channels
            inside = known[:, None] & (t < TAPS)[None, :]
            w = tl.load(w_ptr + ((first + i) * TAPS)[:, None] + t[None, :], inside, 0.0)
            if FOLD:
                w *= tl.load(s_ptr + first + i, known, 0.0).to(tl.float32)[:, None]
            if FOLD and DEMODULATE:
                w *= tl.sum(tl.where(n == 0, d, 0.0))
            to = TAPS - 1 - t if FLIP else t
            at = ((first + i) * stride_oi)[:, None] + (to * stride_ot)[None, :]
            tl.store(out_ptr + at, narrowed(w, out_ptr.dtype.element_ty), inside)


def modulated_weight(weight, styles, demodulate, flip, phases, channels_last, dtype):
    if weight.dtype != torch.float32 or dtype not in FLOATS or phases or not serves(weight, styles):
        return NotImplemented
    (outputs, channels, kh, kw), samples = weight.shape, styles.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=layout)
    fold = samples == 1
    d = weight.new_empty(samples if demodulate and not fold else 0, outputs)
    block_n = 1 if fold else 16
    modulated_weight_kernel[(outputs, max(1, triton.cdiv(samples, block_n) if demodulate else 1))](
        out, d, weight.contiguous(), styles.contiguous(), samples, outputs, channels,
        *((1, channels) if channels_last else (kh * kw, 1)),
        TAPS=kh * kw, FLIP=flip, DEMODULATE=demodulate, FOLD=fold,
        BLOCK_N=block_n, BLOCK_I=min(128, triton.next_power_of_2(channels)),
        BLOCK_T=triton.next_power_of_2(kh * kw),
    )  # fmt: skip
    return [out, d]


def channels_last(x, scale):
    nothing = "linear", 0.0, 1.0, -1.0
    return filtered_bias_act.filtered_bias_act(
        [x], None, [0] * 4, False, 1.0, scale, None, None, *nothing, None, False
    )


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    for samples in (1, 4):
        weight, styles = torch.empty(64, 512, 3, 3), torch.empty(samples, 512)
        yield lambda args=(weight, styles, True, True, False, True, dtype): modulated_weight(*args)
    x = torch.empty(1, 128, 64, 64, dtype=dtype)
    yield lambda: channels_last(x, torch.empty(1, 128))
