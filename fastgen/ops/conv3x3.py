"""A float32 3x3 convolution with padding 1, for the CPU: what the ops and models that need one call inside.

    y[n,o] = sum_i,k x[n,i] (shifted by k) weight[o,i,k]

The compiled kernels are Winograd's F(2x2, 3x3), which takes 4/9 of the products. They read and write memory
[N, H, W, C]; any other layout is copied first. Their rounding errors are below those of a direct sum, whose
chains of additions are longer. The gradient of x is the same convolution with the weight turned by 180
degrees and its channels exchanged; that of the weight is a second op; the derivatives of both are these two
again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, require, require_same_device, require_tensor


def conv3x3_reference(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)
    # One channel's strides may be those of either format.
    return y if y.stride() == _fake(x, weight).stride() else y.clone(memory_format=torch.channels_last)


def conv3x3_dw_reference(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of conv3x3's weight, by PyTorch."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    weight = x.new_empty(1).expand(dy.shape[1], x.shape[1], 3, 3)
    arguments = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *arguments)[1].contiguous()


def _fake(x, weight):
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _conv3x3(dy, weight.flip([2, 3]).transpose(0, 1))
    if ctx.needs_input_grad[1]:
        dw = _conv3x3_dw(dy, x)
    return dx, dw


def _backward_dw(ctx, ddw):
    dy, x = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = _conv3x3(x, ddw)
    if ctx.needs_input_grad[1]:
        dx = _conv3x3(dy, ddw.flip([2, 3]).transpose(0, 1))
    return ddy, dx


_conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight) -> Tensor",
    reference=conv3x3_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_conv3x3_dw = define(
    "conv3x3_dw(Tensor dy, Tensor x) -> Tensor",
    reference=conv3x3_dw_reference,
    fake=lambda dy, x: x.new_empty(dy.shape[1], x.shape[1], 3, 3),
    backward=_backward_dw,
    setup_context=_setup_context,
)


def pays(x: Tensor, weight: Tensor, padding: list[int]) -> bool:
    """Is this convolution, with padding [x0, x1, y0, y1], one that the kernel is the fastest at?"""
    fits = x.dtype == torch.float32 and list(weight.shape[2:]) == [3, 3] and padding == [1] * 4
    return fits and min(weight.shape[:2]) >= 32 and x.shape[2] * x.shape[3] >= 64


def conv3x3(
    x: Tensor,  # [N, I, H, W]
    weight: Tensor,  # [O, I, 3, 3]
) -> Tensor:
    """Correlate with 3x3 taps, as F.conv2d(x, weight, padding=1).

    weight in another dtype is converted to x's. Only float32 on the CPU has a kernel; all else is PyTorch's.
    Returns:   [N, O, H, W] in channels_last.
    Raises:    ValueError on shapes and devices, TypeError on dtypes.
    Precision: sums in float32; differentiable to any order in x and weight.
    Source:    Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", sec. 4.1.
    """
    require_tensor("conv3x3", "x", x, "N I H W")
    require_tensor("conv3x3", "weight", weight, "O I kh kw")
    channels, *taps = weight.shape[1:]
    require(taps == [3, 3], "conv3x3", "weight must be 3x3, got {}x{}", *taps)
    text = "weight must have {} input channels, as x has, got {}"
    require(channels == x.shape[1], "conv3x3", text, x.shape[1], channels)
    require_same_device("conv3x3", x=x, weight=weight)
    op = _conv3x3 if x.dtype == torch.float32 else conv3x3_reference
    return op(x, weight.to(x.dtype))
