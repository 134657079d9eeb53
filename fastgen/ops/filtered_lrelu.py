"""StyleGAN3's alias-free leaky ReLU."""

from torch import Tensor

from .bias_act import bias_act
from .upfirdn2d import upfirdn2d


def filtered_lrelu(
    x: Tensor, fu=None, fd=None, b=None, up=1, down=1, padding=0, gain=2**0.5, slope=0.2, clamp=None, flip_filter=False
) -> Tensor:
    if b is not None:
        x = bias_act(x, b)
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)
