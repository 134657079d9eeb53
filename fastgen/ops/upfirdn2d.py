"""Upsample, FIR-filter, downsample."""

import torch
import torch.nn.functional as F
from torch import Tensor


def setup_filter(f, device=None, normalize=True, flip_filter=False, gain=1, separable=None) -> Tensor:
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim == 0:
        f = f[None]
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = f.outer(f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device=device)


def _pair(v):
    return [v, v] if isinstance(v, int) else list(v)


def _four(padding):
    p = _pair(padding)
    return [p[0], p[0], p[1], p[1]] if len(p) == 2 else p


def _size(f):
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def upfirdn2d(x: Tensor, f: Tensor | None, up=1, down=1, padding=0, flip_filter=False, gain=1) -> Tensor:
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = _pair(up), _pair(down), _four(padding)
    n, c, h, w = x.shape
    if ux > 1 or uy > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, ux - 1, 0, 0, 0, uy - 1]).reshape(n, c, h * uy, w * ux)
    x = F.pad(x, [x0, x1, y0, y1])
    if f is not None:
        f = f.to(x.dtype) if flip_filter else f.to(x.dtype).flip(list(range(f.ndim)))
        if f.ndim == 2:
            x = F.conv2d(x, (f * gain).expand(c, 1, -1, -1), stride=(dy, dx), groups=c)
        else:
            x = F.conv2d(x, (f * gain)[None, None, None].expand(c, 1, 1, -1), stride=(1, dx), groups=c)
            x = F.conv2d(x, f[None, None, :, None].expand(c, 1, -1, 1), stride=(dy, 1), groups=c)
        return x
    return x[:, :, ::dy, ::dx] * gain


def filter2d(x: Tensor, f: Tensor | None, padding=0, flip_filter=False, gain=1) -> Tensor:
    (fw, fh), p = _size(f), _four(padding)
    p = [p[0] + fw // 2, p[1] + (fw - 1) // 2, p[2] + fh // 2, p[3] + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=p, flip_filter=flip_filter, gain=gain)


def upsample2d(x: Tensor, f: Tensor | None, up=2, padding=0, flip_filter=False, gain=1) -> Tensor:
    (fw, fh), (ux, uy), p = _size(f), _pair(up), _four(padding)
    p = [p[0] + (fw + ux - 1) // 2, p[1] + (fw - ux) // 2, p[2] + (fh + uy - 1) // 2, p[3] + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(x: Tensor, f: Tensor | None, down=2, padding=0, flip_filter=False, gain=1) -> Tensor:
    (fw, fh), (dx, dy), p = _size(f), _pair(down), _four(padding)
    p = [p[0] + (fw - dx + 1) // 2, p[1] + (fw - dx) // 2, p[2] + (fh - dy + 1) // 2, p[3] + (fh - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter, gain=gain)
