"""`mmcv.ops`: with `mmcv-lite`, whose package has no compiled ops, and no import of them succeeds, too.

Both signatures of upfirdn2d are taken: mmcv 2's (filter, padding), and 1's (kernel, pad) by those names.
"""

import importlib

import torch
from torch import Tensor, nn

from .. import ops
from . import rosinality
from ._shared import GRADFIX, accepting, named, speaking

PREFIXES = ("mmcv.ops",)

filter2d, upsample2d, downsample2d = (
    accepting(op, "use_custom_op", (True, False), __name__)
    for op in (ops.filter2d, ops.upsample2d, ops.downsample2d)
)


def is_sound(name: str) -> bool:
    """Without its compiled extension mmcv.ops cannot be imported."""
    if name != "mmcv.ops":
        return True
    try:
        importlib.import_module("mmcv._ext")
    except ImportError:  # none, or of another torch
        return False
    return True


@speaking(x="input", f="filter")
def upfirdn2d(
    input: Tensor,  # [N, C, H, W]
    filter: Tensor | None = None,  # [taps] or [fh, fw]
    up=1,  # or [x, y]
    down=1,  # or [x, y]
    padding=0,  # or [x, y] or [x0, x1, y0, y1]
    flip_filter: bool = False,
    gain: float = 1,
    use_custom_op: bool = True,
    *,
    kernel: Tensor | None = None,
    pad=None,
) -> Tensor:
    """fastgen.ops.upfirdn2d; `kernel` and `pad`, (before, after) or four numbers, are mmcv 1's words."""
    if pad is not None:
        return rosinality.upfirdn2d(input, filter if kernel is None else kernel, up, down, pad)
    return ops.upfirdn2d(input, filter if kernel is None else kernel, up, down, padding, flip_filter, gain)


@speaking(x="input", b="bias")
def bias_act(input, bias=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, use_custom_op=True):
    """fastgen.ops.bias_act."""
    return ops.bias_act(input, bias, dim, act, alpha, gain, clamp)


@speaking(x="input", fu="filter_up", fd="filter_down", b="bias")
def filtered_lrelu(
    input, filter_up=None, filter_down=None, bias=None, up=1, down=1, padding=0, gain=2**0.5, slope=0.2,
    clamp=None, flip_filter=False, use_custom_op=True,
):  # fmt: skip
    """fastgen.ops.filtered_lrelu."""
    return ops.filtered_lrelu(
        input, filter_up, filter_down, bias, up, down, padding, gain, slope, clamp, flip_filter
    )


class FusedBiasLeakyReLU(nn.Module):
    """leaky_relu(x + bias) * scale, with a bias for each of num_channels channels."""

    def __init__(self, num_channels, negative_slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, input):
        return fused_bias_leakyrelu(input, self.bias, self.negative_slope, self.scale)


@speaking(x="input", b="bias")
def fused_bias_leakyrelu(input, bias, negative_slope=0.2, scale=2**0.5):
    """leaky_relu(input + bias) * scale, over [N, C, ...]."""
    return ops.bias_act(input, bias, act="lrelu", alpha=negative_slope, gain=scale)


MODULES = {
    "upfirdn2d": named(upfirdn2d, filter2d, upsample2d, downsample2d),
    "bias_act": named(bias_act),
    "filtered_lrelu": named(filtered_lrelu),
    "fused_bias_leakyrelu": named(FusedBiasLeakyReLU, fused_bias_leakyrelu),
    "conv2d_gradfix": GRADFIX,
}
EXPORTS = {name: value for names in MODULES.values() for name, value in names.items()}
