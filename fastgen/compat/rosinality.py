"""`op`, as rosinality's StyleGAN2 and the repositories that took it over call it, with its raw extensions.

Filters here are used as they are given: 2-D, as a true convolution, without a gain of their own.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import ops
from ._shared import GRADFIX, named

PREFIXES = ("op",)


class FusedLeakyReLU(nn.Module):
    """leaky_relu(x + bias) * scale, with a bias for each of `channel` channels; none where bias is False."""

    def __init__(self, channel, bias=True, negative_slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, input):
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)


def fused_leaky_relu(
    input: Tensor,  # [N, C, ...]
    bias: Tensor | None = None,  # [C]
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
) -> Tensor:
    """leaky_relu(input + bias) * scale."""
    return ops.bias_act(input, bias, act="lrelu", alpha=negative_slope, gain=scale)


def pair(value) -> list[int]:
    """[x, y] of a number or two."""
    return [value, value] if isinstance(value, int) else list(value)


def upfirdn2d(
    input: Tensor,  # [N, C, H, W]
    kernel: Tensor,  # [kh, kw]
    up=1,  # or (x, y)
    down=1,  # or (x, y)
    pad=(0, 0),  # (before, after) on both axes, or (x0, x1, y0, y1)
) -> Tensor:
    """Upsample, pad, convolve with the kernel, downsample."""
    padding = list(pad) * 2 if len(pad) == 2 else list(pad)
    return ops.upfirdn2d(input, kernel, pair(up), pair(down), padding)


def fused_bias_act(
    input: Tensor,  # [N, C, ...]
    bias: Tensor,  # [C], or no elements for none
    refer: Tensor,  # like input, where grad is 1
    act: int,  # 1 linear, 3 leaky ReLU
    grad: int,  # 0 the value, 1 its gradient by the sign of refer, 2 the second derivative
    alpha: float,
    scale: float,
) -> Tensor:
    """The raw extension: the activation of input + bias, or `input + bias` times its derivative at refer."""
    if act not in (1, 3) or grad not in (0, 1, 2):
        raise ValueError(f"fused_bias_act: act must be 1 or 3 and grad 0, 1 or 2, got {act!r} and {grad!r}")
    b = bias if bias.numel() else None
    if grad == 2:
        return torch.zeros_like(input)
    if act == 1 or grad == 0:
        return ops.bias_act(input, b, act="lrelu" if act == 3 else "linear", alpha=alpha, gain=scale)
    x = ops.bias_act(input, b, gain=scale)
    return torch.where(refer > 0, x, x * alpha)


def upfirdn2d_raw(
    input: Tensor,  # [M, H, W, minor]
    kernel: Tensor,  # [kh, kw]
    up_x: int, up_y: int, down_x: int, down_y: int, pad_x0: int, pad_x1: int, pad_y0: int, pad_y1: int,
) -> Tensor:  # fmt: skip
    """The raw extension: upfirdn2d of [M, H, W, minor]."""
    padding = [pad_x0, pad_x1, pad_y0, pad_y1]
    out = ops.upfirdn2d(input.permute(0, 3, 1, 2), kernel, [up_x, up_y], [down_x, down_y], padding)
    return out.permute(0, 2, 3, 1).contiguous()


fused = SimpleNamespace(fused_bias_act=fused_bias_act)
upfirdn2d_op = SimpleNamespace(upfirdn2d=upfirdn2d_raw)
MODULES = {
    "fused_act": named(FusedLeakyReLU, fused_leaky_relu) | {"fused": fused},
    "upfirdn2d": named(upfirdn2d) | {"upfirdn2d_op": upfirdn2d_op},
    "conv2d_gradfix": GRADFIX | {"enabled": True},
}
EXPORTS = named(FusedLeakyReLU, fused_leaky_relu, upfirdn2d)
