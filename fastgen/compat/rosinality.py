"""`op`, as rosinality's StyleGAN2 and the repositories that took it over call it, with its raw extensions.

Filters here are used as they are given: 2-D, as a true convolution, without a gain of their own.
"""

import operator
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._define import require_tensor
from ._shared import GRADFIX, named, speaking

PREFIXES = ("op",)


class FusedLeakyReLU(nn.Module):
    """leaky_relu(x + bias) * scale, with a bias for each of `channel` channels; none where bias is False."""

    def __init__(self, channel, bias=True, negative_slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, input):
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)


@speaking(x="input", b="bias")
def fused_leaky_relu(
    input: Tensor,  # [N, C, ...]
    bias: Tensor | None = None,  # [C]
    negative_slope: float = 0.2,
    scale: float = 2**0.5,
) -> Tensor:
    """leaky_relu(input + bias) * scale."""
    return ops.bias_act(input, bias, act="lrelu", alpha=negative_slope, gain=scale)


def whole(name: str, value, counts: tuple[int, ...]) -> list[int]:
    """Integers, of any kind: one, or as many as one of the counts."""
    given = value if isinstance(value, Iterable) and getattr(value, "ndim", 1) else [value]
    try:
        found = [operator.index(v) for v in given]
    except TypeError:
        found = []
    if len(found) not in counts:
        wanted = " or ".join({1: "an int", 2: "two", 4: "four"}[n] for n in counts)
        raise ValueError(f"upfirdn2d: {name} must be {wanted}, got {value!r}")
    return found


@speaking(x="input", f="kernel")
def upfirdn2d(
    input: Tensor,  # [N, C, H, W]
    kernel: Tensor,  # [kh, kw]
    up=1,  # or (x, y)
    down=1,  # or (x, y)
    pad=(0, 0),  # (before, after) on both axes, or (x0, x1, y0, y1)
) -> Tensor:
    """Upsample, pad, convolve with the kernel, downsample."""
    require_tensor("upfirdn2d", "kernel", kernel, "kh kw")
    up, down, pad = whole("up", up, (1, 2)), whole("down", down, (1, 2)), whole("pad", pad, (2, 4))
    return ops.upfirdn2d(input, kernel, up * (3 - len(up)), down * (3 - len(down)), (pad * 2)[:4])


def fused_bias_act(
    input: Tensor,  # [N, C, ...]
    bias: Tensor | None,  # [C], or no elements for none
    refer: Tensor,  # like input, where grad is 1
    act: int,  # 1 linear, 3 leaky ReLU
    grad: int,  # 0 the value, 1 its gradient by the sign of refer, 2 the second derivative
    alpha: float,
    scale: float,
) -> Tensor:
    """The raw extension: the activation of input + bias, or `input + bias` times its derivative at refer."""
    if act not in (1, 3) or grad not in (0, 1, 2):
        raise ValueError(f"fused_bias_act: act must be 1 or 3 and grad 0, 1 or 2, got {act!r} and {grad!r}")
    b = bias if bias is not None and bias.numel() else None
    if grad == 2:
        return torch.zeros_like(input)
    if act == 1 or grad == 0:
        return _raw_bias_act(input, b, "lrelu" if act == 3 else "linear", alpha, scale)
    require_tensor("fused_bias_act", "refer", refer)
    if refer.shape != input.shape:
        shapes = list(input.shape), list(refer.shape)
        raise ValueError("fused_bias_act: refer must have input's shape {}, got {}".format(*shapes))
    x = _raw_bias_act(input, b, "linear", alpha, scale)
    return torch.where(refer > 0, x, x * alpha)


@speaking(x="input", b="bias")
def _raw_bias_act(input, bias, act, alpha, scale):
    return ops.bias_act(input, bias, act=act, alpha=alpha, gain=scale)


def upfirdn2d_raw(
    input: Tensor,  # [M, H, W, minor]
    kernel: Tensor,  # [kh, kw]
    up_x: int, up_y: int, down_x: int, down_y: int, pad_x0: int, pad_x1: int, pad_y0: int, pad_y1: int,
) -> Tensor:  # fmt: skip
    """The raw extension: upfirdn2d of [M, H, W, minor]."""
    require_tensor("upfirdn2d", "input", input, "M H W minor")
    pad = pad_x0, pad_x1, pad_y0, pad_y1
    out = upfirdn2d(input.permute(0, 3, 1, 2), kernel, (up_x, up_y), (down_x, down_y), pad)
    return out.permute(0, 2, 3, 1).contiguous()


fused = SimpleNamespace(fused_bias_act=fused_bias_act)
upfirdn2d_op = SimpleNamespace(upfirdn2d=upfirdn2d_raw)
MODULES = {
    "fused_act": named(FusedLeakyReLU, fused_leaky_relu) | {"fused": fused},
    "upfirdn2d": named(upfirdn2d) | {"upfirdn2d_op": upfirdn2d_op},
    "conv2d_gradfix": GRADFIX | {"enabled": True},
}
EXPORTS = named(FusedLeakyReLU, fused_leaky_relu, upfirdn2d)
