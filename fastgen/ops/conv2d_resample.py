"""Convolution with optional resampling, without ever convolving zeros.

On the infinite, zero-extended, upsampled grid the FIR filter and the convolution are both
shift-invariant, so they commute. With padding >= 0 nothing is cropped before the last step, hence

    up:    conv_w(fir(zeros(x)))       = fir(conv_transpose(x, w, stride=up)),
    down:  decimate(fir(conv_w(x)))    = conv_w(fir(x), stride=down),

exactly. Only the window differs. `conv_transpose2d` returns the full convolution: relative to
padding the upsampled image by (p0, p1) it holds kw - 1 - p0 columns too many on the left, and
kw - 1 - p1 on the right less the up - 1 trailing zeros that it leaves out; hence the padding
(p0 - (kw - 1), p1 - (kw - 1) + up - 1) of the filter that follows.
A 1x1 convolution commutes with everything, cropping included.
"""

import torch.nn.functional as F
from torch import Tensor

from .upfirdn2d import upfirdn2d


def _four(padding) -> list[int]:
    p = [padding] * 2 if isinstance(padding, int) else list(padding)
    return [p[0], p[0], p[1], p[1]] if len(p) == 2 else p


def _convolve(x: Tensor, w: Tensor, padding: list[int], stride: int, groups: int, flip_weight: bool) -> Tensor:
    if not flip_weight and w.shape[2:] != (1, 1):
        w = w.flip([2, 3])
    x0, x1, y0, y1 = padding
    if x0 == x1 and y0 == y1 and x0 >= 0 and y0 >= 0:
        return F.conv2d(x, w, stride=stride, padding=(y0, x0), groups=groups)
    return F.conv2d(F.pad(x, padding), w, stride=stride, groups=groups)


def _convolve_up(x: Tensor, w: Tensor, up: int, groups: int, flip_weight: bool) -> Tensor:
    if flip_weight:
        w = w.flip([2, 3])
    if groups == 1:
        w = w.transpose(0, 1)
    else:
        o, i, kh, kw = w.shape
        w = w.reshape(groups, o // groups, i, kh, kw).transpose(1, 2).reshape(groups * i, o // groups, kh, kw)
    return F.conv_transpose2d(x, w, stride=up, groups=groups)


def conv2d_resample(
    x: Tensor, w: Tensor, f: Tensor | None = None, up: int = 1, down: int = 1, padding=0, groups: int = 1,
    flip_weight: bool = True, flip_filter: bool = False,
) -> Tensor:
    kh, kw = w.shape[2:]
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    p = _four(padding)
    if up > 1:
        grow = ((fw + up - 1) // 2, (fw - up) // 2, (fh + up - 1) // 2, (fh - up) // 2)
        p = [a + b for a, b in zip(p, grow)]
    if down > 1:
        grow = ((fw - down + 1) // 2, (fw - down) // 2, (fh - down + 1) // 2, (fh - down) // 2)
        p = [a + b for a, b in zip(p, grow)]
    pointwise = kh == kw == 1

    if up == 1 and down == 1:
        return _convolve(x, w, p, 1, groups, flip_weight)
    if down == 1 and pointwise:
        x = _convolve(x, w, [0] * 4, 1, groups, flip_weight)
        return upfirdn2d(x, f, up=up, padding=p, gain=up**2, flip_filter=flip_filter)
    if down == 1 and min(p) >= 0:
        x = _convolve_up(x, w, up, groups, flip_weight)
        p = [p[0] - kw + 1, p[1] - kw + up, p[2] - kh + 1, p[3] - kh + up]
        return upfirdn2d(x, f, padding=p, gain=up**2, flip_filter=flip_filter)
    if up == 1 and pointwise:
        x = upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter)
        return _convolve(x, w, [0] * 4, 1, groups, flip_weight)
    if up == 1 and min(p) >= 0:
        x = upfirdn2d(x, f, padding=p, flip_filter=flip_filter)
        return _convolve(x, w, [0] * 4, down, groups, flip_weight)
    x = upfirdn2d(x, f if up > 1 else None, up=up, padding=p, gain=up**2, flip_filter=flip_filter)
    x = _convolve(x, w, [0] * 4, 1, groups, flip_weight)
    return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
