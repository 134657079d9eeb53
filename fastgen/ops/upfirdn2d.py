"""Upsample, pad, FIR-filter, downsample: the resampling of StyleGAN.

Along one axis, with s = up, d = down, p0 and p1 the padding, and c the filter as correlation applies it,

    out[o] = sum_k c[k] z[o d + k],   z[j] = x[(j - p0) / s] where that is a whole number inside x, else 0.

Its transpose has, for the gradient g of out, dx[i] = sum_o c[i s + p0 - o d] g[o]: zeros inserted into g
(up = d), the filter reversed, every s-th sample kept (down = s), and, as tap p0 links the first samples,
padding (taps - 1 - p0, (W - 1) s + 1 - len(out) d + p0), which gives exactly W samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import (
    define,
    memory_format,
    require,
    require_ints,
    require_number,
    require_same_device,
    require_tensor,
    wide,
)


def setup_filter(
    f,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """A filter for upfirdn2d and its like, such as setup_filter([1, 3, 3, 1]).

    f:           a number, taps, or rows of taps; None means [1]
    device:      where the filter is to be; None: torch's default
    normalize:   divide by the sum
    flip_filter: reverse all axes
    gain:        multiply by gain ** (ndim / 2)
    separable:   keep taps as they are, for both axes, instead of their outer product with themselves; None:
                 from eight taps on
    Returns:     float32, [taps] (separable) or [fh, fw].
    Raises:      ValueError on shapes and values, TypeError on what is not made of numbers.
    """
    op = "setup_filter"
    given = f
    try:
        f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: f must be a number, [taps] or [fh, fw], got {f!r}") from None
    f = f.reshape(1) if f.ndim == 0 else f
    text = "f must be a number, [taps] or [fh, fw], got shape {}"
    require(f.ndim <= 2 and f.numel() > 0, op, text, f.shape)
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    require(f.ndim == 1 or not separable, op, "f must be [taps] to be separable, got {}", f.shape)
    gain = require_number(op, "gain", gain)
    require(gain >= 0 or not separable, op, "gain must be at least 0 for a separable filter, got {}", gain)
    if f.ndim == 1 and not separable:
        f = f.outer(f)
    if normalize:
        total = f.sum()
        known = not (f.is_meta or torch.compiler.is_compiling())
        require(not known or bool(total != 0), op, "f must not sum to 0 to be normalised, got {}", given)
        f = f / total
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device=device)


def upfirdn2d_reference(
    x: Tensor,  # [N, C, H, W]
    f: Tensor | None,  # [taps] or [fh, fw]
    up: list[int],  # [x, y]
    down: list[int],  # [x, y]
    padding: list[int],  # [x0, x1, y0, y1]
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """upfirdn2d by PyTorch's convolutions; differentiable in x to any order."""
    if x.numel() == 0:
        return x.sum().expand(*x.shape[:2], *_out_size(x.shape[2:], f, up, down, padding)).clone()
    y = wide(x)
    taps = y.new_ones(1, 1) if f is None else f.detach().to(y.dtype)
    if not flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    if taps.ndim == 2:
        y = _filter(y, taps * gain, up, down, padding)
    else:
        y = _filter(y, taps[None] * gain, [up[0], 1], [down[0], 1], [*padding[:2], 0, 0])
        y = _filter(y, taps[:, None], [1, up[1]], [1, down[1]], [0, 0, *padding[2:]])
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def _filter(x: Tensor, taps: Tensor, up: list[int], down: list[int], padding: list[int]) -> Tensor:
    """Correlation with taps [th, tw] by depthwise convolutions, which never meet an inserted zero."""
    th, tw = taps.shape
    weight = taps.expand(x.shape[1], 1, th, tw)
    if up == [1, 1]:
        pad, rest = _symmetric(padding)
        return F.conv2d(window(x, rest), weight, padding=pad, stride=down[::-1], groups=x.shape[1])
    # The transposed convolution is the full one, but without the zeros after the last sample.
    x0, x1, y0, y1 = padding
    crop, rest = _symmetric([tw - 1 - x0, tw - up[0] - x1, th - 1 - y0, th - up[1] - y1])
    x = F.conv_transpose2d(x, weight.flip([2, 3]), padding=crop, stride=up[::-1], groups=x.shape[1])
    return window(x, [-p for p in rest])[:, :, :: down[1], :: down[0]]


def _symmetric(padding: list[int]) -> tuple[list[int], list[int]]:
    """What a convolution can do itself, as [y, x], and what is left."""
    x, y = max(0, min(padding[:2])), max(0, min(padding[2:]))
    return [y, x], [padding[0] - x, padding[1] - x, padding[2] - y, padding[3] - y]


def window(x: Tensor, padding: list[int]) -> Tensor:
    """Zero padding; negative values crop, what was just padded too."""
    x = F.pad(x, [max(0, p) for p in padding]) if max(padding) > 0 else x
    left, right, top, bottom = (max(0, -p) for p in padding)
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def _out_size(size, f: Tensor | None, up: list[int], down: list[int], padding: list[int]) -> tuple[int, int]:
    (h, w), (fh, fw) = size, _filter_size(f)
    x0, x1, y0, y1 = padding
    return (h * up[1] + y0 + y1 - fh) // down[1] + 1, (w * up[0] + x0 + x1 - fw) // down[0] + 1


def _filter_size(f: Tensor | None) -> tuple[int, int]:
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


def _fake(x, f, up, down, padding, flip_filter, gain):
    shape = (*x.shape[:2], *_out_size(x.shape[2:], f, up, down, padding))
    return x.new_empty(shape).contiguous(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, f, *ctx.args = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(*[f] * (f is not None))


def _backward(ctx, dy):
    f = next(iter(ctx.saved_tensors), None)
    return transposed(dy, f, ctx.size, *ctx.args), *[None] * 6


def transposed(dy, f, size, up, down, padding, flip_filter, gain) -> Tensor:
    """The gradient in x [..., *size] of the op with these arguments, for the gradient dy of its result."""
    (x0, _, y0, _), (h, w), (fh, fw), (oh, ow) = padding, size, _filter_size(f), dy.shape[2:]
    x1 = (w - 1) * up[0] + 1 - ow * down[0] + x0
    y1 = (h - 1) * up[1] + 1 - oh * down[1] + y0
    return _upfirdn2d(dy, f, down, up, [fw - 1 - x0, x1, fh - 1 - y0, y1], not flip_filter, gain)


def _vmap(info, in_dims, x, f, *args):
    if in_dims[1] is not None:
        xs = [x] * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
        return torch.stack(
            [_upfirdn2d(*both, *args) for both in zip(xs, f.unbind(in_dims[1]), strict=True)]
        ), 0
    x = x.movedim(in_dims[0], 0)
    return _upfirdn2d(x.flatten(0, 1), f, *args).unflatten(0, x.shape[:2]), 0


_upfirdn2d = define(
    "upfirdn2d(Tensor x, Tensor? f, int[] up, int[] down, int[] padding, bool flip_filter, float gain)"
    " -> Tensor",
    reference=upfirdn2d_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    vmap=_vmap,
    triton="upfirdn2d",
)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | list[int] = 1,
    down: int | list[int] = 1,
    padding: int | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Per channel: insert zeros, pad with zeros, convolve with f, keep every down-th sample.

    x:         [N, C, H, W]
    f:         [taps] (separable) or [fh, fw], as setup_filter makes them; None is the identity
    up:        an int or [x, y]; after each sample come up - 1 zeros, after the last one too
    down:      an int or [x, y]
    padding:   an int, [x, y] or [x0, x1, y0, y1], of the upsampled image; negative numbers crop
    flip_filter: correlate with f; otherwise it is reversed, a true convolution. The valid part is kept
    gain:      multiplies the result, once
    Returns:   [N, C, (H up + y0 + y1 - fh) // down + 1, (W up + x0 + x1 - fw) // down + 1], dtype of x.
    Raises:    ValueError on shapes, values, and an f larger than the padded image; TypeError on dtypes.
    Precision: accumulates in float32 (float64 for float64); differentiable in x to any order; not in f.
    """
    return _checked("upfirdn2d", x, f, up, down, padding, flip_filter, gain, _no_growth)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: int | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """upfirdn2d with as much padding as keeps the size.

    x, f, flip_filter, gain: as for upfirdn2d
    padding:   what the result grows by: an int, [x, y] or [x0, x1, y0, y1]
    Returns:   [N, C, H, W], dtype of x.
    """
    return _checked("filter2d", x, f, 1, 1, padding, flip_filter, gain, _same_growth)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | list[int] = 2,
    padding: int | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """upfirdn2d to up times the size; brightness is kept, so gain grows by the product of up.

    x, f, up, flip_filter, gain: as for upfirdn2d
    padding:   what the result grows by: an int, [x, y] or [x0, x1, y0, y1]
    Returns:   [N, C, H up, W up], dtype of x.
    """
    x_up, y_up = require_ints("upsample2d", "up", up, [2], at_least=1)
    gain = require_number("upsample2d", "gain", gain) * x_up * y_up
    return _checked("upsample2d", x, f, up, 1, padding, flip_filter, gain, _up_growth)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | list[int] = 2,
    padding: int | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """upfirdn2d to 1 / down times the size.

    x, f, down, flip_filter, gain: as for upfirdn2d
    padding:   what the input grows by: an int, [x, y] or [x0, x1, y0, y1]
    Returns:   [N, C, H // down, W // down] where sizes are multiples of down, dtype of x.
    """
    return _checked("downsample2d", x, f, 1, down, padding, flip_filter, gain, _down_growth)


def _no_growth(taps, up, down):
    return 0, 0


def _same_growth(taps, up, down):
    return taps // 2, (taps - 1) // 2


def _up_growth(taps, up, down):
    return (taps + up - 1) // 2, (taps - up) // 2


def _down_growth(taps, up, down):
    return (taps - down + 1) // 2, (taps - down) // 2


def _checked(op, x, f, up, down, padding, flip_filter, gain, growth):
    """Check, make canonical, grow the padding by growth(taps, up, down) -> (before, after), call."""
    require_tensor(op, "x", x, "N C H W")
    if f is not None:
        require_tensor(op, "f", f, ("taps", "fh fw"))
        require(f.numel() > 0, op, "f must have at least one tap, got {}", f.shape)
        require_same_device(op, x=x, f=f)
        f = f.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    up = require_ints(op, "up", up, [2], at_least=1)
    down = require_ints(op, "down", down, [2], at_least=1)
    x0, x1, y0, y1 = require_ints(op, "padding", padding, [2, 4])
    (h, w), (fh, fw) = x.shape[2:], _filter_size(f)
    grow_x, grow_y = growth(fw, up[0], down[0]), growth(fh, up[1], down[1])
    padding = [x0 + grow_x[0], x1 + grow_x[1], y0 + grow_y[0], y1 + grow_y[1]]
    require(h > 0 and w > 0, op, "x must have at least one row and one column, got {}", x.shape)
    size = (h * up[1] + padding[2] + padding[3], w * up[0] + padding[0] + padding[1])
    text = "x, upsampled and padded, must be at least as large as f ({} x {}), got {} x {}"
    require(size[0] >= fh and size[1] >= fw, op, text, fh, fw, *size)
    return _upfirdn2d(x, f, up, down, padding, bool(flip_filter), require_number(op, "gain", gain))
