"""filtered_lrelu and its gradient: tiles of the image at its higher resolution, which never leave the chip.

With bands of the filters' taps as for upfirdn2d, v = U (x + b) U' and y = D a(v) D'; the gradient takes the
bands transposed. v is exact to float32 for 16 bits too: at the corner of a, its sign is a gradient's factor.
Two-dimensional filters are not served: the op's parts run then, one after the other.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from .bias_act import activation, clamped, slope
from .common import packed, precision, serves
from .upfirdn2d import (
    INF,
    SIDES,
    are_marked,
    between,
    channels_last,
    count_of,
    launch_twice,
    load_tile,
    padded_taps,
    reach,
    result_size,
    store_tile,
    tile_of,
)


@triton.jit
def filtered_lrelu_kernel(
    out_ptr, nan_ptr, tiles, x_ptr, taps_ptr, pad, size, b_ptr, channels, height, width,
    out_height, out_width, stride_xn, stride_xc, stride_xh, stride_xw,
    start_y, start_x, shift_y, shift_x, gain, alpha, clamp,
    CLAMPS: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, IN: tl.constexpr, MIDDLE: tl.constexpr,
    OUT: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start, shift, and tiles in groups, as for upfirdn2d."""
    CAREFUL: tl.constexpr = GROUP > 1
    fu_ptr, fd_ptr = taps_ptr + pad, taps_ptr + 3 * size + pad
    count = count_of(nan_ptr, tiles, out_height, out_width, STEP, STEP, FIRST, FIRST, GROUP)
    for i in range(count):
        at = tl.program_id(0) * GROUP + i
        if not CAREFUL or are_marked(
            nan_ptr, at, tiles, out_height, out_width, STEP, STEP, FIRST, FIRST
        ):  # fmt: skip
            plane, oy, ox = tile_of(at, out_height, out_width, STEP, STEP)
            from_y, from_x = oy * DOWN + shift_y, ox * DOWN + shift_x
            y, x = tl.cdiv(from_y, UP), tl.cdiv(from_x, UP)
            samples, inside = load_tile(
                x_ptr, plane, y + start_y, x + start_x, channels, height, width,
                stride_xn, stride_xc, stride_xh, stride_xw, IN, IN,
            )  # fmt: skip
            if b_ptr is not None:
                samples += tl.where(inside, tl.load(b_ptr + plane % channels).to(tl.float32), 0.0)
            v = between(
                samples, fu_ptr, size, y * UP - from_y, x * UP - from_x, MIDDLE, MIDDLE,
                -1, UP, -1, UP, CAREFUL, PRECISION,
            )  # fmt: skip
            v = clamped(activation(v, alpha, "lrelu") * gain, clamp, CLAMPS)
            out = between(v, fd_ptr, size, 0, 0, OUT, OUT, -DOWN, 1, -DOWN, 1, CAREFUL, PRECISION)
            if not CAREFUL:
                tl.store(nan_ptr + at, tl.max((out != out).to(tl.int32)))
            store_tile(out_ptr, out, plane, oy, ox, out_height, out_width, OUT, OUT, STEP, STEP)


@triton.jit
def filtered_lrelu_bwd_kernel(
    dx_ptr, nan_ptr, tiles, dy_ptr, x_ptr, taps_ptr, pad, size, b_ptr, channels, height, width, out_height,
    out_width, stride_gn, stride_gc, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    start_y, start_x, shift_y, shift_x, gain, alpha, clamp,
    CLAMPS: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, TAPS_U: tl.constexpr, TAPS_D: tl.constexpr,
    IN: tl.constexpr, MIDDLE: tl.constexpr, GRAD: tl.constexpr, OUT: tl.constexpr, STEP: tl.constexpr,
    FIRST: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sample i takes part in v from i UP + p0 - (TAPS_U - 1) on.

    In that, samples from i - (TAPS_U - 1) // UP on take part, and it in results from
    ceil((i UP + shift) / DOWN) + start on.
    """
    CAREFUL: tl.constexpr = GROUP > 1
    PHASE: tl.constexpr = (TAPS_U - 1) % UP
    LAST: tl.constexpr = TAPS_U - 1
    fu_ptr, fd_ptr = taps_ptr + pad, taps_ptr + 3 * size + pad
    count = count_of(nan_ptr, tiles, height, width, STEP, STEP, FIRST, FIRST, GROUP)
    for i in range(count):
        at = tl.program_id(0) * GROUP + i
        if not CAREFUL or are_marked(nan_ptr, at, tiles, height, width, STEP, STEP, FIRST, FIRST):
            plane, iy, ix = tile_of(at, height, width, STEP, STEP)
            samples, inside = load_tile(
                x_ptr, plane, iy - LAST // UP, ix - LAST // UP, channels, height, width,
                stride_xn, stride_xc, stride_xh, stride_xw, IN, IN,
            )  # fmt: skip
            if b_ptr is not None:
                samples += tl.where(inside, tl.load(b_ptr + plane % channels).to(tl.float32), 0.0)
            v = between(
                samples, fu_ptr, size, PHASE, PHASE, MIDDLE, MIDDLE, -1, UP, -1, UP, CAREFUL, PRECISION
            )

            from_y, from_x = iy * UP + shift_y, ix * UP + shift_x
            y, x = tl.cdiv(from_y, DOWN), tl.cdiv(from_x, DOWN)
            dy, _ = load_tile(
                dy_ptr, plane, y + start_y, x + start_x, channels, out_height, out_width,
                stride_gn, stride_gc, stride_gh, stride_gw, GRAD, GRAD,
            )  # fmt: skip
            first_y, first_x = TAPS_D - 1 - (y * DOWN - from_y), TAPS_D - 1 - (x * DOWN - from_x)
            dv = between(
                dy, fd_ptr, size, first_y, first_x, MIDDLE, MIDDLE, 1, -DOWN, 1, -DOWN, CAREFUL, PRECISION
            )
            dv *= gain * slope(v, alpha, "lrelu")
            if CLAMPS:
                dv = tl.where(tl.abs(activation(v, alpha, "lrelu") * gain) < clamp, dv, 0.0)
            dx = between(dv, fu_ptr, size, LAST, LAST, OUT, OUT, UP, -1, UP, -1, CAREFUL, PRECISION)
            if not CAREFUL:
                # Where v is not finite, slopes do not show it.
                nan = tl.max((dx != dx).to(tl.int32)) | tl.max((tl.abs(samples) < INF).to(tl.int32) ^ 1)
                tl.store(nan_ptr + at, nan)
            store_tile(dx_ptr, dx, plane, iy, ix, height, width, OUT, OUT, STEP, STEP)


def filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter):
    if not _served(x, fu, fd, b, up, down):
        return NotImplemented
    n, c, h, w = x.shape
    taps = _taps(fu, fd)
    ow, oh = (
        result_size(size, up, down, p, sum(taps) - 1) for size, p in ((w, padding[:2]), (h, padding[2:]))
    )
    out, source = x.new_empty((n, c, oh, ow)), _planes(x)
    products = precision(x, torch.float32)
    tiles = _tiles(oh, ow, up, down, *taps, False, products)
    (start_y, shift_y), (start_x, shift_x) = divmod(-padding[2], up), divmod(-padding[0], up)
    launch_twice(
        filtered_lrelu_kernel, tiles, n * c, out, source,
        *padded_taps([fu, fd], float(up), flip_filter, max(up, down), x, products), packed(b),
        c, h, w, oh, ow, *source.stride(), start_y, start_x, shift_y, shift_x, gain, slope, clamp,
        CLAMPS=clamp >= 0, UP=up, DOWN=down, FIRST=tiles[0][0]["STEP"], PRECISION=products,
    )  # fmt: skip
    return out.contiguous(memory_format=torch.channels_last) if channels_last(x) else out


def filtered_lrelu_bwd(dy, x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter):
    if not _served(x, fu, fd, b, up, down):
        return NotImplemented
    n, c, h, w = x.shape
    taps = _taps(fu, fd)
    dx, dy, source = x.new_empty(x.shape), _planes(dy), _planes(x)
    products = precision(x, torch.float32)
    tiles = _tiles(h, w, up, down, *taps, True, products)
    (start_y, shift_y), (start_x, shift_x) = (divmod(padding[i] - sum(taps) + 2, down) for i in (2, 0))
    launch_twice(
        filtered_lrelu_bwd_kernel, tiles, n * c, dx, dy, source,
        *padded_taps([fu, fd], float(up), flip_filter, max(up, down), x, products), packed(b), c, h, w,
        *dy.shape[2:], *dy.stride(), *source.stride(), start_y, start_x, shift_y, shift_x, gain, slope, clamp,
        CLAMPS=clamp >= 0, UP=up, DOWN=down, TAPS_U=taps[0], TAPS_D=taps[1],
        FIRST=tiles[0][0]["STEP"], PRECISION=products,
    )  # fmt: skip
    return dx.contiguous(memory_format=torch.channels_last) if channels_last(x) else dx


def _served(x, fu, fd, b, up, down) -> bool:
    short = all(f is None or f.ndim == 1 and len(f) <= 24 for f in (fu, fd))
    return serves(x, fu, fd, b) and short and max(up, down) <= 4


def _taps(*filters):
    return [1 if f is None else len(f) for f in filters]


def _planes(x):
    """x for kernels that take plane by plane, which would fetch all channels for each."""
    return x.contiguous() if channels_last(x) else x


def _tiles(height: int, width: int, *args) -> list[tuple[dict[str, int], int]]:
    """For launch_twice: tiles of results, and how many make an image, without care and with it."""
    sides = [_tile(*args, careful) for careful in (False, True)]
    return [(s, triton.cdiv(height, s["STEP"]) * triton.cdiv(width, s["STEP"])) for s in sides]


@functools.cache
def _tile(
    up: int, down: int, taps_u: int, taps_d: int, backward: bool, precision: str, careful: bool
) -> dict[str, int]:
    """The sides of square tiles of x, v, the result and dy, how many of the results are whole, and warps."""

    def step(x, v, out, grad):
        whole = min(v, reach(x, up, 1, taps_u))
        if backward:
            return min(out, reach(min(whole, reach(grad, down, 1, taps_d)), 1, up, taps_u))
        return min(out, reach(whole, 1, down, taps_d))

    def cost(sides):
        # What each product on both sides holds for each result: two tiles and two bands.
        x, v, out, grad = sides
        held = sum((side + v) ** 2 for side in (x, out, grad)[: 2 + backward])
        return held / step(*sides) ** 2 if step(*sides) > 0 else math.inf

    # What fits in registers, of which three terms of float32 take more, as does care; then what serves all.
    fits = (2, 2) if careful else (3, 4) if precision == "tf32" else (2, 3)
    for few, most in (SIDES[: fits[0]], SIDES[: fits[1]]), (SIDES[:3], SIDES[:3]):
        sides = min(itertools.product(few, most, few, few if backward else [0]), key=cost)
        if step(*sides) > 0:
            break
    named = dict(zip(("IN", "MIDDLE", "OUT", "GRAD"), sides, strict=True), STEP=step(*sides))
    if not backward:
        del named["GRAD"]
    return named | {"num_warps": 8 if careful or named["MIDDLE"] == 128 else 4}


def calls(dtype):
    """What shows both kernels, at the shapes of real generators: for cubins."""
    x, b = torch.empty(1, 128, 276, 276, dtype=dtype), torch.empty(128, dtype=dtype)
    for up, down, padding in ((2, 2, [9, 10]), (4, 2, [-7, -10]), (2, 4, [9, 10])):
        fu, fd = torch.empty(6 * up), torch.empty(6 * down)
        args = x, fu, fd, b, up, down, padding * 2, 1.4, 0.2, 256.0, False
        y = filtered_lrelu(*args)
        yield lambda args=args: filtered_lrelu(*args)
        yield lambda args=args, y=y: filtered_lrelu_bwd(y, *args)
