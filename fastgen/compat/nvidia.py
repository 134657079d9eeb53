"""`torch_utils.ops`, as StyleGAN2-ADA, StyleGAN3, EG3D and their descendants call it.

`impl` is accepted and changes nothing: the best kernel for the tensor's device always serves, and
FASTGEN_BACKEND=reference, or `with fastgen.backend("reference")`, turns all kernels off. `enabled` too may be
set: what it would turn on, derivatives of any order, is always there.
"""

from .. import ops
from ..ops.bias_act import DEFAULTS
from ._shared import GRADFIX, accepting, named, weight_of

PREFIXES = ("torch_utils.ops",)


class _Record(dict):
    """Read by item and by attribute."""

    __getattr__ = dict.__getitem__


activation_funcs = {
    name: _Record(
        func=lambda x, alpha=None, name=name, **_: ops.bias_act(x, act=name, alpha=alpha, gain=1),
        def_alpha=alpha,
        def_gain=gain,
    )
    for name, (alpha, gain) in DEFAULTS.items()
}


def _init() -> bool:
    """Everything is compiled already."""
    return True


upfirdn2d, filter2d, upsample2d, downsample2d, bias_act, filtered_lrelu = (
    accepting(op, "impl", ("cuda", "ref"), __name__)
    for op in (
        ops.upfirdn2d, ops.filter2d, ops.upsample2d, ops.downsample2d, ops.bias_act, ops.filtered_lrelu
    )
)  # fmt: skip


def grid_sample(input, grid):
    """fastgen.ops.grid_sample: bilinear, zeros outside, align_corners=False."""
    return ops.grid_sample(input, grid)


def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """fastgen.ops.conv2d_resample."""
    return ops.conv2d_resample(x, weight_of(w), f, up, down, padding, groups, flip_weight, flip_filter)


MODULES = {
    "upfirdn2d": named(ops.setup_filter, upfirdn2d, filter2d, upsample2d, downsample2d, _init),
    "bias_act": named(bias_act, _init) | {"activation_funcs": activation_funcs},
    "filtered_lrelu": named(filtered_lrelu, _init),
    "conv2d_resample": named(conv2d_resample),
    "conv2d_gradfix": GRADFIX | {"enabled": True},
    "grid_sample_gradfix": named(grid_sample) | {"enabled": True},
    "fma": named(ops.fma),
}
EXPORTS = {}
