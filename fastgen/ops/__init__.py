"""Every op: a plain, twice differentiable function of tensors, one file each."""

from .bias_act import bias_act
from .conv2d_resample import conv2d_resample
from .filtered_lrelu import filtered_lrelu
from .fma import fma
from .grid_sample import grid_sample
from .modulated_conv2d import modulated_conv2d
from .render_triplane import RenderOutput, render_triplane
from .sample_triplane import sample_triplane
from .upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "RenderOutput",
    "bias_act",
    "conv2d_resample",
    "downsample2d",
    "filter2d",
    "filtered_lrelu",
    "fma",
    "grid_sample",
    "modulated_conv2d",
    "render_triplane",
    "sample_triplane",
    "setup_filter",
    "upfirdn2d",
    "upsample2d",
]
