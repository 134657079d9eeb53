"""What follows a modulated convolution, in one pass: filter, scale, noise, bias, activation.

    out = clamp(act(t scale + noise + b) gain) next,   t = upfirdn2d(x, f, padding, gain=fir_gain)

next are the styles of the layer that follows, where its input is to be multiplied here. For a gradient dy let
g be bias_act's for dy next, that of t scale + noise + b. Then

    dt = g scale,  dscale = sum_hw g t,  dnoise = g,  db = sum_nhw g,  dx = upfirdn2d(dt) with f reversed,

and dnext = sum_hw dy out / next, of an out that is made again.

An image may come as four phases, which nothing has to interleave then: x[2 i + j] are the pixels in rows
2 m + i and columns 2 m + j. The op is internal: modulated_conv2d runs on it where a kernel is compiled, in
memory [N, H, W, C].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, differentiate, wide, wide_dtype
from .bias_act import bias_act, bias_act_bwd
from .upfirdn2d import transposed, upfirdn2d


def _interleaved(x: list[Tensor]) -> Tensor:
    if len(x) == 1:
        return x[0]
    (h, w), height, width = x[0].shape[2:], x[0].shape[2] + x[2].shape[2], x[0].shape[3] + x[1].shape[3]
    phases = torch.stack([F.pad(p, (0, w - p.shape[3], 0, h - p.shape[2])) for p in x], -1)
    image = phases.unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    return image[:, :, :height, :width]


def _filters(f, padding, fir_gain) -> bool:
    return f is not None or any(padding) or fir_gain != 1


def _filtered(x: list[Tensor], f, padding, flip_filter, fir_gain) -> Tensor:
    x = _interleaved(x)
    filters = _filters(f, padding, fir_gain)
    return upfirdn2d(x, f, 1, 1, padding, flip_filter, fir_gain) if filters else x


def _shifted(t: Tensor, scale: Tensor | None, noise: Tensor | None) -> Tensor:
    t = wide(t)
    t = t if scale is None else t * scale[:, :, None, None]
    return t if noise is None else t + noise


def filtered_bias_act_reference(
    x: list[Tensor],  # [N, C, H, W], or its four phases
    f: Tensor | None,  # [taps] or [fh, fw]; None is the identity
    padding: list[int],  # [x0, x1, y0, y1]
    flip_filter: bool,
    fir_gain: float,
    scale: Tensor | None,  # [N, C], float32 (float64 for float64)
    noise: Tensor | None,  # four dimensions that broadcast to the result's, float32 (float64 for float64)
    b: Tensor | None,  # [C]
    act: str,
    alpha: float,
    gain: float,
    clamp: float,  # negative: none
    next: Tensor | None,  # [N, C], float32 (float64 for float64)
    contiguous: bool,  # the result is that, not channels_last
) -> Tensor:
    """filtered_bias_act of differentiable ops."""
    v = _shifted(_filtered(x, f, padding, flip_filter, fir_gain), scale, noise)
    b = None if b is None else b.to(v.dtype)
    out = bias_act(v, b, 1, act, alpha, gain, None if clamp < 0 else clamp)
    out = out if next is None else out * next[:, :, None, None]
    layout = torch.contiguous_format if contiguous else torch.channels_last
    return out.to(x[0].dtype).contiguous(memory_format=layout)


def filtered_bias_act_bwd_reference(
    dy, x, f, padding, flip_filter, fir_gain, scale, noise, b, act, alpha, gain, clamp
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the filtered image, of scale, of noise (summed over channels if it has one) and of b."""
    t = wide(_filtered(x, f, padding, flip_filter, fir_gain))
    v = _shifted(t, scale, noise)
    b = None if b is None else b.to(v.dtype)
    g = bias_act_bwd(dy.to(v.dtype), v, b, 1, act, alpha, gain, clamp)
    dt = g if scale is None else g * scale[:, :, None, None]
    if noise is None:
        d_noise = g.new_zeros(0, 1, *g.shape[2:])
    else:
        d_noise = g if noise.shape[1] != 1 else g.sum(1, keepdim=True)
    dt, d_noise = (d.contiguous(memory_format=torch.channels_last) for d in (dt.to(x[0].dtype), d_noise))
    return dt, (g * t).sum([2, 3]), d_noise, g.sum([0, 2, 3])


def _out_size(x: list[Tensor], f: Tensor | None, padding: list[int]) -> tuple[int, int]:
    # The last phase has the last row and column.
    h, w = (x[0].shape[i] + (x[-1].shape[i] if len(x) == 4 else 0) for i in (2, 3))
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    return h + sum(padding[2:]) - fh + 1, w + sum(padding[:2]) - fw + 1


def _empty(like: Tensor, *shape, dtype=None) -> Tensor:
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _fake(x, f, padding, *others):
    shape = *x[0].shape[:2], *_out_size(x, f, padding)
    return x[0].new_empty(shape) if others[-1] else _empty(x[0], *shape)


def _fake_bwd(dy, x, f, padding, flip_filter, fir_gain, scale, noise, *_):
    (n, c), dtype = dy.shape[:2], wide_dtype(x[0])
    shape = (0, 1) if noise is None else (n, noise.shape[1])
    d_noise = _empty(dy, *shape, *dy.shape[2:], dtype=dtype)
    return _empty(dy, *dy.shape), dy.new_empty(n, c, dtype=dtype), d_noise, dy.new_empty(c, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, f, *ctx.filter_args, scale, noise, b, ctx.act, ctx.alpha, ctx.gain, ctx.clamp, next, _ = inputs
    ctx.save_for_backward(*x, f, scale, noise, b, next)


def _backward(ctx, dy):
    *x, f, scale, noise, b, next = ctx.saved_tensors
    act = ctx.act, ctx.alpha, ctx.gain, ctx.clamp
    d_next = None
    if next is not None:
        y = filtered_bias_act(x, f, *ctx.filter_args, scale, noise, b, *act, None, False)
        d_next = (wide(dy) * wide(y)).sum([2, 3])
        dy = (wide(dy) * next[:, :, None, None]).to(dy.dtype)
    dx, d_scale, d_noise, d_b = _filtered_bias_act_bwd(dy, x, f, *ctx.filter_args, scale, noise, b, *act)
    padding, _, fir_gain = ctx.filter_args
    if _filters(f, padding, fir_gain):
        dx = transposed(dx, f, _out_size(x, None, [0] * 4), [1, 1], [1, 1], *ctx.filter_args)
    dxs = [dx] if len(x) == 1 else [dx[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    d_scale = None if scale is None else d_scale
    d_noise = None if noise is None else d_noise.sum_to_size(noise.shape)
    d_b = None if b is None else d_b.to(b.dtype)
    return dxs, *[None] * 4, d_scale, d_noise, d_b, *[None] * 4, d_next, None


def _setup_context_bwd(ctx, inputs, output):
    dy, x, f, *ctx.filter_args, scale, noise, b, ctx.act, ctx.alpha, ctx.gain, ctx.clamp = inputs
    ctx.save_for_backward(dy, *x, f, scale, noise, b)


def _backward_bwd(ctx, *second):
    """The gradient of the gradient, by the differentiable ops."""
    saved = list(ctx.saved_tensors)
    f = saved.pop(-4)

    def first(dy, *tensors):
        *x, scale, noise, b = tensors
        act = ctx.act, ctx.alpha, ctx.gain, ctx.clamp
        return filtered_bias_act_bwd_reference(dy, x, f, *ctx.filter_args, scale, noise, b, *act)

    d_dy, *dx, d_scale, d_noise, d_b = differentiate(first, saved, second)
    return d_dy, dx, *[None] * 4, d_scale, d_noise, d_b, *[None] * 4


_ARGUMENTS = (
    "Tensor[] x, Tensor? f, int[] padding, bool flip_filter, float fir_gain, Tensor? scale, Tensor? noise,"
    " Tensor? b, str act, float alpha, float gain, float clamp"
)
filtered_bias_act = define(
    f"filtered_bias_act({_ARGUMENTS}, Tensor? next, bool contiguous) -> Tensor",
    reference=filtered_bias_act_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    triton="filtered_bias_act",
)
_filtered_bias_act_bwd = define(
    f"filtered_bias_act_bwd(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=filtered_bias_act_bwd_reference,
    fake=_fake_bwd,
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
    triton="filtered_bias_act",
)
