"""`basicsr.ops`, and copies of it such as GPEN's `face_model.op`.

As rosinality's, but that the slope comes second in FusedLeakyReLU, where there always is a bias. What some
copies take besides, a device, is not needed.
"""

import torch
from torch import nn

from . import rosinality
from ._shared import accepting, named
from .rosinality import fused, upfirdn2d_op

PREFIXES = ("basicsr.ops", "face_model.op")
NESTED = True


class FusedLeakyReLU(nn.Module):
    """leaky_relu(x + bias) * scale, with a bias for each of `channel` channels."""

    def __init__(self, channel, negative_slope=0.2, scale=2**0.5, device=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel))
        self.negative_slope, self.scale = negative_slope, scale

    def forward(self, input):
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)


fused_leaky_relu, upfirdn2d = (
    accepting(function, "device", None, __name__)
    for function in (rosinality.fused_leaky_relu, rosinality.upfirdn2d)
)
MODULES = {
    "fused_act": named(FusedLeakyReLU, fused_leaky_relu) | {"fused_act_ext": fused, "fused": fused},
    "upfirdn2d": named(upfirdn2d) | {"upfirdn2d_ext": upfirdn2d_op, "upfirdn2d_op": upfirdn2d_op},
}
EXPORTS = named(FusedLeakyReLU, fused_leaky_relu, upfirdn2d)


def exports(package: str) -> dict:
    """basicsr.ops has its ops in packages of their own only."""
    return {} if package.rpartition(".")[2] == "ops" else EXPORTS
