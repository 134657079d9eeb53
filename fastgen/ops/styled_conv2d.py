"""The convolution within modulated_conv2d, for GPUs: styles multiply what is read, not what is stored.

    y[n,o] = sum_i,k weight[o,i,k] s[n,i] x[n,i]

shifted by the tap k, or, for up = 2, the full transposed convolution of stride 2. With q[n,i] the transposed
sum of weight dy,

    dx = q s,  ds = sum_hw q x,  dweight[o,i,k] = sum_n s[n,i] sum_hw dy[n,o] x[n,i] (shifted by k),

so dx and ds are one pass over another such convolution, and dweight needs s once for a sample. Where nothing
has to be recorded for autograd, styled_conv2d_act does all that follows as well, before anything is stored.
The ops are internal, and everything they make is in channels_last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, differentiate, wide
from .conv2d_resample import convolve
from .filtered_bias_act import filtered_bias_act_reference
from .upfirdn2d import window


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(y: Tensor) -> Tensor:
    # One channel's strides may be those of either format.
    strides = torch.empty_like(y, memory_format=torch.channels_last).stride()
    return y if y.stride() == strides else y.clone(memory_format=torch.channels_last)


def _scaled(x: Tensor, s: Tensor | None) -> Tensor:
    return x if s is None else (wide(x) * s[:, :, None, None]).to(x.dtype)


def styled_conv2d_reference(
    x: Tensor,  # [N, I, H, W]
    weight: Tensor,  # [O, I, kh, kw], in x's dtype
    s: Tensor | None,  # [N, I], float32 (float64 for float64); None: 1
    padding: list[int],  # [x0, x1, y0, y1]; not looked at where up is 2
    up: int,  # 1 or 2
) -> Tensor:
    """styled_conv2d by PyTorch's convolutions."""
    x = _scaled(x, s)
    y = convolve(x, weight, padding) if up == 1 else F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return _channels_last(y)


def styled_conv2d_act_reference(
    x, weight, s, d, noise, b, padding, act, alpha, gain, clamp, contiguous
) -> Tensor:
    """clamp(act(styled_conv2d(x) d + noise + b) gain), the tail as filtered_bias_act has it."""
    y = styled_conv2d_reference(x, weight, s, padding, 1)
    return filtered_bias_act_reference(
        [y], None, [0] * 4, False, 1.0, d, noise, b, act, alpha, gain, clamp, None, contiguous
    )


def styled_conv2d_bwd_reference(dy, x, weight, s, padding, up) -> tuple[Tensor, Tensor]:
    """dx and ds; without s ds has no rows."""
    if up == 1:
        kh, kw = weight.shape[2:]
        rest = [k - 1 - p for k, p in zip((kw, kw, kh, kh), padding, strict=True)]
        q = convolve(dy, weight.flip([2, 3]).transpose(0, 1), rest)
    else:
        q = F.conv2d(dy, weight.transpose(0, 1), stride=2)
    ds = (wide(q) * wide(x)).sum([2, 3]) if s is not None else wide(q).new_zeros(0, x.shape[1])
    return _channels_last(_scaled(q, s)), ds


def styled_conv2d_dw_reference(dy, x, s, taps, padding, up) -> Tensor:
    """dweight, for taps [kh, kw]."""
    x = _scaled(x, s)
    rest = [1, 1], False, [0, 0], 1, [False, True, False]
    if up == 1:
        weight, x = x.new_empty(1).expand(dy.shape[1], x.shape[1], *taps), window(x, padding)
        dw = torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [0, 0], *rest)[1]
    else:
        weight, rest = x.new_empty(1).expand(x.shape[1], dy.shape[1], *taps), ([1, 1], True, *rest[2:])
        dw = torch.ops.aten.convolution_backward(dy, x, weight, None, [2, 2], [0, 0], *rest)[1]
        dw = dw.transpose(0, 1)
    return _channels_last(dw)


def _out_size(x: Tensor, weight: Tensor, padding: list[int], up: int) -> tuple[int, int]:
    (h, w), (kh, kw) = x.shape[2:], weight.shape[2:]
    if up == 2:
        return 2 * h + kh - 2, 2 * w + kw - 2
    return h + sum(padding[2:]) - kh + 1, w + sum(padding[:2]) - kw + 1


def _fake(x, weight, s, padding, up):
    return _empty(x, x.shape[0], weight.shape[0], *_out_size(x, weight, padding, up))


def _fake_act(x, weight, s, d, noise, b, padding, *others):
    shape = x.shape[0], weight.shape[0], *_out_size(x, weight, padding, 1)
    return x.new_empty(shape) if others[-1] else _empty(x, *shape)


def _fake_bwd(dy, x, weight, s, padding, up):
    return _empty(x, *x.shape), wide(x.new_empty(0)).new_empty(0 if s is None else x.shape[0], x.shape[1])


def _setup_context(ctx, inputs, output):
    x, weight, s, *ctx.args = inputs
    ctx.save_for_backward(x, weight, s)


def _backward(ctx, dy):
    x, weight, s = ctx.saved_tensors
    dx = dw = ds = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        dx, ds = _styled_conv2d_bwd(dy, x, weight, s, *ctx.args)
    if ctx.needs_input_grad[1]:
        dw = _styled_conv2d_dw(dy, x, s, list(weight.shape[2:]), *ctx.args)
    return dx, dw, None if s is None else ds, None, None


def _setup_context_bwd(ctx, inputs, output):
    dy, x, weight, s, *ctx.args = inputs
    ctx.save_for_backward(dy, x, weight, s)


def _backward_bwd(ctx, *second):
    def first(*tensors):
        return styled_conv2d_bwd_reference(*tensors, *ctx.args)

    return *differentiate(first, ctx.saved_tensors, second), None, None


def _setup_context_dw(ctx, inputs, output):
    dy, x, s, *ctx.args = inputs
    ctx.save_for_backward(dy, x, s)


def _backward_dw(ctx, ddw):
    """sum(ddw dw) is sum(dy styled_conv2d(x, ddw, s)), so its gradients are that convolution's."""
    dy, x, s = ctx.saved_tensors
    _, *args = ctx.args
    dx, ds = _styled_conv2d_bwd(dy, x, ddw, s, *args)
    return styled_conv2d(x, ddw, s, *args), dx, None if s is None else ds, None, None, None


styled_conv2d = define(
    "styled_conv2d(Tensor x, Tensor weight, Tensor? s, int[] padding, int up) -> Tensor",
    reference=styled_conv2d_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    triton="styled_conv2d",
)
styled_conv2d_act = define(
    "styled_conv2d_act(Tensor x, Tensor weight, Tensor? s, Tensor? d, Tensor? noise, Tensor? b,"
    " int[] padding, str act, float alpha, float gain, float clamp, bool contiguous) -> Tensor",
    reference=styled_conv2d_act_reference,
    fake=_fake_act,
    triton="styled_conv2d",
)
_styled_conv2d_bwd = define(
    "styled_conv2d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? s, int[] padding, int up)"
    " -> (Tensor, Tensor)",
    reference=styled_conv2d_bwd_reference,
    fake=_fake_bwd,
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
    triton="styled_conv2d",
)
_styled_conv2d_dw = define(
    "styled_conv2d_dw(Tensor dy, Tensor x, Tensor? s, int[] taps, int[] padding, int up) -> Tensor",
    reference=styled_conv2d_dw_reference,
    fake=lambda dy, x, s, taps, *_: _empty(x, dy.shape[1], x.shape[1], *taps),
    backward=_backward_dw,
    setup_context=_setup_context_dw,
    triton="styled_conv2d",
)
