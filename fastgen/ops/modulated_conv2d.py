"""StyleGAN2's modulated convolution, with the modulation on the activations."""

from torch import Tensor

from .bias_act import bias_act
from .conv2d_resample import conv2d_resample


def modulated_conv2d(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None = None, up: int = 1, down: int = 1, padding=0,
    resample_filter: Tensor | None = None, demodulate: bool = True, flip_weight: bool = True,
    bias: Tensor | None = None, act: str = "linear", alpha=None, act_gain=None, clamp=None,
) -> Tensor:
    d = None
    if demodulate:
        energy = weight.float().square().sum([2, 3]) if weight.dtype.itemsize < 4 else weight.square().sum([2, 3])
        d = (styles.to(energy.dtype).square() @ energy.t() + 1e-8).rsqrt().to(x.dtype)[:, :, None, None]
    y = conv2d_resample(
        x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), resample_filter, up, down, padding,
        flip_weight=flip_weight,
    )
    if d is not None:
        y = y * d
    if noise is not None:
        y = y + noise.to(y.dtype)
    if bias is None and act == "linear" and act_gain is None and clamp is None:
        return y
    return bias_act(y, None if bias is None else bias.to(y.dtype), 1, act, alpha, act_gain, clamp)
