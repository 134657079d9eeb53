"""Convolution with up- or downsampling, without ever convolving an inserted or a dropped sample.

On the infinite grid, zeros outside, the FIR filter and the convolution are both shift-invariant: they
commute. With padding >= 0 nothing is cropped before the last step, hence exactly

    up:    conv_w(fir(zeros inserted(x))) = fir(conv_transpose_w(x)),
    down:  every d-th(fir(conv_w(x)))     = conv_w(fir(x)) with stride d,

but for the window. conv_transpose2d returns the full convolution: next to padding the upsampled image by
(p0, p1) it has kw - 1 - p0 columns too many on the left, and on the right kw - 1 - p1 less the up - 1 zeros
after the last sample. So the filter that follows pads by (p0 - (kw - 1), p1 - (kw - 1) + up - 1).
A 1x1 convolution commutes with everything, cropping included. What is left takes the long way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, require, require_ints, require_same_device, require_tensor
from .upfirdn2d import upfirdn2d, window


def conv2d_resample_reference(
    x: Tensor,  # [N, C, H, W]
    w: Tensor,  # [O, C / groups, kh, kw]
    f: Tensor | None,  # [taps] or [fh, fw]
    up: int,
    down: int,
    padding: list[int],  # [x0, x1, y0, y1], the filter's share included
    groups: int,
    flip_weight: bool,
    flip_filter: bool,
) -> Tensor:
    """conv2d_resample of PyTorch's convolutions and upfirdn2d; differentiable to any order."""
    w = w.to(x.dtype)
    kh, kw = w.shape[2:]
    pointwise, crops = kh == kw == 1, min(padding) < 0
    if up == down == 1:
        return convolve(x, w, padding, 1, groups, flip_weight)
    if down == 1 and pointwise:
        x = convolve(x, w, [0] * 4, 1, groups, flip_weight)
        return upfirdn2d(x, f, up, 1, padding, flip_filter, up**2)
    if down == 1 and not crops:
        x = _convolve_up(x, w, up, groups, flip_weight)
        padding = padding_after_transposed(padding, kh, kw, up)
        return upfirdn2d(x, f, 1, 1, padding, flip_filter, up**2)
    if up == 1 and pointwise:
        x = upfirdn2d(x, f, 1, down, padding, flip_filter)
        return convolve(x, w, [0] * 4, 1, groups, flip_weight)
    if up == 1 and not crops:
        x = upfirdn2d(x, f, 1, 1, padding, flip_filter)
        return convolve(x, w, [0] * 4, down, groups, flip_weight)
    x = upfirdn2d(x, f if up > 1 else None, up, 1, padding, flip_filter, up**2)
    x = convolve(x, w, [0] * 4, 1, groups, flip_weight)
    return upfirdn2d(x, f, 1, down, 0, flip_filter) if down > 1 else x


def convolve(
    x: Tensor, w: Tensor, padding: list[int], stride: int = 1, groups: int = 1, flip_weight: bool = True
) -> Tensor:
    """torch's convolution with padding [x0, x1, y0, y1]; flip_weight as for conv2d_resample."""
    if not flip_weight and w.shape[2:] != (1, 1):
        w = w.flip([2, 3])
    x0, x1, y0, y1 = padding
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return F.conv2d(x, w, stride=stride, padding=(y0, x0), groups=groups)
    return F.conv2d(window(x, padding), w, stride=stride, groups=groups)


def _convolve_up(x: Tensor, w: Tensor, up: int, groups: int, flip_weight: bool) -> Tensor:
    if flip_weight:
        w = w.flip([2, 3])
    # [O, I / groups, ...] to [I, O / groups, ...]
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return F.conv_transpose2d(x, w, stride=up, groups=groups)


def padding_after_transposed(padding: list[int], kh: int, kw: int, up: int) -> list[int]:
    """What the filter pads the full transposed convolution by, to the same end as padding before it."""
    x0, x1, y0, y1 = padding
    return [x0 - kw + 1, x1 - kw + up, y0 - kh + 1, y1 - kh + up]


def phases_of_weight(w: Tensor) -> list[Tensor]:
    """The weights of a transposed convolution by 2 as four convolutions.

    out[2 m + p] = sum_j x[m - j] w[2 j + p]: every phase p, of rows and of columns, has its own taps.
    """
    return [w[:, :, i::2, j::2].flip([2, 3]) for i in (0, 1) for j in (0, 1)]


def convolve_transposed(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The full transposed convolution by 2 with one weight [O, I, kh, kw], or its four phases with theirs."""
    if len(weights) == 1:
        return [F.conv_transpose2d(x, weights[0].transpose(0, 1), stride=2)]
    return [F.conv2d(x, w, padding=(w.shape[2] - 1, w.shape[3] - 1)) for w in weights]


_conv2d_resample = define(
    "conv2d_resample(Tensor x, Tensor w, Tensor? f, int up, int down, int[] padding, int groups,"
    " bool flip_weight, bool flip_filter) -> Tensor",
    reference=conv2d_resample_reference,
)


def call_autocast(op: Callable, x: Tensor, *args) -> Tensor:
    """op(x, ...) as autocast would have it: with x, which sets the dtype, in autocast's."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return op(x, *args)
    if x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return op(x, *args)


def check_resample(op: str, x, w, f, up, down, padding, groups: int = 1, names=("w", "f")) -> list[int]:
    """Check what a resampling convolution takes; returns padding [x0, x1, y0, y1], the filter's included."""
    require_tensor(op, "x", x, "N C H W")
    require_tensor(op, names[0], w, "O I kh kw")
    require_same_device(op, x=x, **{names[0]: w})
    for name, value in (("up", up), ("down", down), ("groups", groups)):
        require(
            isinstance(value, int) and value >= 1,
            op,
            "{} must be an int of at least 1, got {!r}",
            name,
            value,
        )
    o, i = w.shape[:2]
    for name, images in (("x", x), (names[0], w)):
        text = "{} must have at least one row and one column, got {}"
        require(images.shape[2] > 0 and images.shape[3] > 0, op, text, name, images.shape)
    text = "{} must have at least one output and one input channel, got {}"
    require(o > 0 and i > 0, op, text, names[0], w.shape)
    product = "" if groups == 1 else "groups * I = {1} * "
    text = "x must have " + product + "{2} channels, got {0}"
    require(x.shape[1] == groups * i, op, text, x.shape[1], groups, i)
    require(o % groups == 0, op, "{} must have a multiple of groups={} outputs, got {}", names[0], groups, o)
    padding = require_ints(op, "padding", padding, [2, 4])
    fh = fw = 1
    if f is not None:
        require_tensor(op, names[1], f, ("taps", "fh fw"))
        require(f.numel() > 0, op, "{} must have at least one tap, got {}", names[1], f.shape)
        require_same_device(op, x=x, **{names[1]: f})
        fh, fw = f.shape[0], f.shape[-1]
    for axis, taps in ((0, fw), (1, fh)):
        before = (taps + up - 1) // 2 * (up > 1) + (taps - down + 1) // 2 * (down > 1)
        after = (taps - up) // 2 * (up > 1) + (taps - down) // 2 * (down > 1)
        padding[2 * axis] += before
        padding[2 * axis + 1] += after
    # Where both resample, the filter is applied twice.
    twice = (up > 1) + (down > 1)
    need = [w.shape[2] + twice * (fh - 1), w.shape[3] + twice * (fw - 1)]
    size = [x.shape[2] * up + sum(padding[2:]), x.shape[3] * up + sum(padding[:2])]
    require(
        size[0] >= need[0] and size[1] >= need[1],
        op,
        "x, upsampled and padded, must have at least the size {} of filter and kernel, got {}",
        need,
        size,
    )
    return padding


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | list[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Upsample with f, convolve with w, downsample with f.

    upfirdn2d(x, f, up, padding, gain=up^2) if up > 1 -> convolution -> upfirdn2d(f, down) if down > 1, with
    padding grown so that padding = k // 2 keeps the size times up / down.
    x:         [N, C, H, W]
    w:         [O, C / groups, kh, kw], taken in x's dtype, and both in autocast's
    f:         [taps] (separable) or [fh, fw]; None is the identity
    up, down:  ints
    padding:   an int, [x, y] or [x0, x1, y0, y1], of the upsampled image
    groups:    of channels, as torch's conv2d has it
    flip_weight: True correlates, as torch's conv2d does; False convolves
    flip_filter: of f, as for upfirdn2d
    Returns:   [N, O, (H up + y0 + y1 - kh + 1) / down, ...] in x's dtype; sizes round down after resampling.
    Raises:    ValueError on shapes and values, TypeError on dtypes.
    Precision: that of torch's convolution; differentiable in x and w to any order; not in f.
    """
    padding = check_resample("conv2d_resample", x, w, f, up, down, padding, groups)
    return call_autocast(
        _conv2d_resample, x, w, f, up, down, padding, groups, bool(flip_weight), bool(flip_filter)
    )
