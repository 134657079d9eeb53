"""upfirdn2d: short and two-dimensional filters tap by tap, long separable ones as products of matrices.

Of channels_last images those are two passes, tap by tap, along rows and along columns.

Along an axis, out[o] = sum_k c[k] x[i] over i up = o down - p0 + k. Tap by tap, only the k of o's phase are
met, every `up`-th, so no inserted zero ever is. As a product, a tile of results is L x R' with a tile x of
samples, the band L[o, i] = c[i up + p0 - o down], and R' like it for the other axis.

The zeros beside the bands would make NaN of a whole tile if one of its numbers were not finite. What lies in
tiles that have NaN is computed again with care: numbers that are not finite are counted apart.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, packed, precision, registers, serves, size_class, tuned

# Elements that a program makes tap by tap.
CONFIGS = [
    {"block": block, "num_warps": warps} for block, warps in ((2048, 4), (1024, 4), (2048, 8), (4096, 8))
]
if INTERPRETED:
    CONFIGS = [{"block": 2**15, "num_warps": 4}]
# Sides of tiles, and what they leave room for.
SIDES = (16, 32, 64, 128)
LONGEST, WIDEST_STEP = 32, 8
# Tiles that a program looks for NaN in.
GROUP = 128
INF = tl.constexpr(float("inf"))


@triton.jit
def taps_at(f_ptr, k, inside, stride, taps, FLIP: tl.constexpr):
    """c[k], the filter as correlation applies it; 0 where not inside."""
    if f_ptr is None:
        return tl.where(inside, 1.0, 0.0)
    else:
        return tl.load(f_ptr + (k if FLIP else taps - 1 - k) * stride, inside, 0.0).to(tl.float32)


@triton.jit
def padded_taps_kernel(
    out_ptr, fu_ptr, fd_ptr, taps_u, taps_d, scale_u, pad, size,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one filter or two, between zeros: the taps; 1 where one is; and their signs."""
    k = tl.arange(0, BLOCK) - pad
    if tl.program_id(0) == 0:
        inside = (k >= 0) & (k < taps_u)
        c = taps_at(fu_ptr, k, inside, 1, taps_u, FLIP) * scale_u
    else:
        inside = (k >= 0) & (k < taps_d)
        c = taps_at(fd_ptr, k, inside, 1, taps_d, FLIP)
    out_ptr += tl.program_id(0) * 3 * size + pad + k
    within = k + pad < size
    tl.store(out_ptr, rounded(c, PRECISION), within)
    tl.store(out_ptr + size, tl.where(inside, 1.0, 0.0), within)
    tl.store(out_ptr + 2 * size, sign(c), within)


@triton.jit
def upfirdn2d_kernel(
    out_ptr, x_ptr, f_ptr, channels, height, width, out_height, out_width,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_on, stride_oc, stride_oh, stride_ow,
    stride_fh, stride_fw, start_y, start_x, shift_y, shift_x, gain,
    FH: tl.constexpr, FW: tl.constexpr, UP_Y: tl.constexpr, UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, OUTER: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Rows of one phase, which share their taps: y = UP_Y q + phase. OUTER: f is [taps] of both axes.

    The first sample that o meets is ceil((o DOWN - p0) / UP), where -p0 = start UP + shift.
    """
    at = tl.program_id(0)
    x_blocks, y_blocks = tl.cdiv(out_width, BLOCK_X), tl.cdiv(tl.cdiv(out_height, UP_Y), BLOCK_Y)
    first_x, at = at % x_blocks * BLOCK_X, at // x_blocks
    phase, at = at % UP_Y, at // UP_Y
    first_q, at = at % y_blocks * BLOCK_Y, at // y_blocks
    c_blocks = tl.cdiv(channels, BLOCK_C)
    c = at % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    n = (at // c_blocks).to(tl.int64)
    q = first_q + tl.arange(0, BLOCK_Y)[:, None, None]
    ox = first_x + tl.arange(0, BLOCK_X)[None, :, None]

    met_y = tl.cdiv(phase * DOWN_Y + shift_y, UP_Y)
    tap_y = met_y * UP_Y - (phase * DOWN_Y + shift_y)
    met_x = tl.cdiv(ox * DOWN_X + shift_x, UP_X)
    tap_x = met_x * UP_X - (ox * DOWN_X + shift_x)
    top, left = q * DOWN_Y + met_y + start_y, met_x + start_x
    x_ptr += n * stride_xn + c.to(tl.int64) * stride_xc
    out = tl.zeros((BLOCK_Y, BLOCK_X, BLOCK_C), tl.float32)
    for j in range((FH + UP_Y - 1) // UP_Y):
        y, ky = top + j, tap_y + j * UP_Y
        rows = x_ptr + y.to(tl.int64) * stride_xh
        row_inside = (y >= 0) & (y < height) & (c < channels) & (ky < FH)
        for i in range((FW + UP_X - 1) // UP_X):
            x, kx = left + i, tap_x + i * UP_X
            column_inside = (x >= 0) & (x < width) & (kx < FW)
            if OUTER:
                tap = taps_at(f_ptr, kx, kx < FW, stride_fw, FW, FLIP)
                tap *= taps_at(f_ptr, ky, ky < FH, stride_fw, FH, FLIP)
            elif f_ptr is None:
                tap = 1.0
            else:
                row = f_ptr + (ky if FLIP else FH - 1 - ky) * stride_fh
                tap = taps_at(row, kx, (kx < FW) & (ky < FH), stride_fw, FW, FLIP)
            sample = tl.load(rows + x.to(tl.int64) * stride_xw, row_inside & column_inside, 0.0)
            out += tap * sample.to(tl.float32)
    oy = q * UP_Y + phase
    out_ptr += n * stride_on + c.to(tl.int64) * stride_oc
    out_ptr += oy.to(tl.int64) * stride_oh + ox.to(tl.int64) * stride_ow
    inside = (oy < out_height) & (ox < out_width) & (c < channels)
    tl.store(out_ptr, (out * gain).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def between(
    x, taps_ptr, size, first_y, first_x, ROWS: tl.constexpr, COLS: tl.constexpr,
    Y_OUT: tl.constexpr, Y_IN: tl.constexpr, X_OUT: tl.constexpr, X_IN: tl.constexpr,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of L x R', with L[o, i] = c[first_y + o Y_OUT + i Y_IN] and R like it, of padded taps.

    With care, what is not finite reaches only what its taps reach.
    """
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    left = taps_ptr + first_y + (row * Y_OUT + tl.arange(0, x.shape[0])[None, :] * Y_IN)
    right = taps_ptr + first_x + (tl.arange(0, x.shape[1])[:, None] * X_IN + col * X_OUT)
    if CAREFUL:
        finite = tl.abs(x) < INF
        y = tl.zeros((ROWS, COLS), tl.float32)
        # In turn: how many such numbers are met; how many more of one sign of infinity than of the other, and
        # so what comes of them; the sum of the finite ones. A loop, to hold little in registers.
        for turn in range(1, 4):
            part = tl.where(finite, tl.where(turn == 3, x, 0.0), tl.where(turn == 1, 1.0, sign(x)))
            z = _product(left + turn % 3 * size, part, right + turn % 3 * size, PRECISION)
            bad = tl.where(z == y, INF, tl.where(z == -y, -INF, float("nan")))
            bad = tl.where(y > 0, bad, 0.0)
            y = tl.where(turn == 1, z, tl.where(turn == 2, bad, tl.where(y == 0, z, y)))
        return y
    else:
        return _product(left, x, right, PRECISION)


@triton.jit
def _product(left, x, right, PRECISION: tl.constexpr):
    y = tl.dot(rounded(x, PRECISION), tl.load(right), input_precision=PRECISION)
    return tl.dot(tl.load(left), rounded(y, PRECISION), input_precision=PRECISION)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x to be multiplied. Matrix units cut off what TF32 does not hold: sums would all be a little small."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def tile_of(at, height, width, STEP_Y: tl.constexpr, STEP_X: tl.constexpr):
    """The plane, and the first row and column, of a tile of results."""
    tiles_y, tiles_x = tl.cdiv(height, STEP_Y), tl.cdiv(width, STEP_X)
    row, plane = at // tiles_x % tiles_y, tl.cast(at // tiles_x // tiles_y, tl.int64)
    return plane, row * STEP_Y, at % tiles_x * STEP_X


@triton.jit
def are_marked(
    nan_ptr, at, tiles, height, width, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr,
):  # fmt: skip
    """Is there NaN in what the first pass made of these tiles, in its own of FIRST_Y by FIRST_X results?"""
    tl.static_assert((STEP_Y <= FIRST_Y) & (STEP_X <= FIRST_X))
    plane, y, x = tile_of(at, height, width, STEP_Y, STEP_X)
    rows, cols = tl.cdiv(height, FIRST_Y), tl.cdiv(width, FIRST_X)
    nan_ptr += plane * rows * cols
    top, left = y // FIRST_Y * cols, x // FIRST_X
    bottom = tl.minimum((y + STEP_Y - 1) // FIRST_Y, rows - 1) * cols
    right = tl.minimum((x + STEP_X - 1) // FIRST_X, cols - 1)
    there = at < tiles
    marks = tl.load(nan_ptr + top + left, there, 0) | tl.load(nan_ptr + top + right, there, 0)
    return marks | tl.load(nan_ptr + bottom + left, there, 0) | tl.load(nan_ptr + bottom + right, there, 0)


@triton.jit
def count_of(
    nan_ptr, tiles, height, width, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """How many tiles are this program's: one, or GROUP, if one of them is marked, or none."""
    count = GROUP
    if GROUP > 1:
        at = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
        marks = are_marked(nan_ptr, at, tiles, height, width, STEP_Y, STEP_X, FIRST_Y, FIRST_X)
        count = tl.max(marks.to(tl.int32)) * GROUP
    return count


@triton.jit
def load_tile(
    x_ptr, plane, y, x, channels, height, width, stride_n, stride_c, stride_h, stride_w,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The numbers from row y and column x on in float32, 0 beside the image; and where they are inside."""
    y, x = y + tl.arange(0, ROWS)[:, None], x + tl.arange(0, COLS)[None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    x_ptr += plane // channels * stride_n + plane % channels * stride_c
    at = x_ptr + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return tl.load(at, inside, 0.0).to(tl.float32), inside


@triton.jit
def store_tile(
    out_ptr, out, plane, y, x, height, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
):  # fmt: skip
    """To contiguous images: the first STEP_Y rows and STEP_X columns, which are whole."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < tl.minimum(STEP_Y, height - y)) & (col < tl.minimum(STEP_X, width - x))
    out_ptr += (plane * height + y) * width + x
    tl.store(out_ptr + (row * width + col), out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def upfirdn2d_separable_kernel(
    out_ptr, nan_ptr, tiles, x_ptr, taps_ptr, pad, size, channels, height, width, out_height, out_width,
    stride_xn, stride_xc, stride_xh, stride_xw, start_y, start_x, shift_y, shift_x, gain,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr,
    IN_Y: tl.constexpr, IN_X: tl.constexpr, OUT_Y: tl.constexpr, OUT_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, FIRST_Y: tl.constexpr, FIRST_X: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start and shift as above; a tile, or, with care, those of a group that are marked."""
    CAREFUL: tl.constexpr = GROUP > 1
    count = count_of(nan_ptr, tiles, out_height, out_width, STEP_Y, STEP_X, FIRST_Y, FIRST_X, GROUP)
    for i in range(count):
        at = tl.program_id(0) * GROUP + i
        if not CAREFUL or are_marked(
            nan_ptr, at, tiles, out_height, out_width, STEP_Y, STEP_X, FIRST_Y, FIRST_X
        ):
            plane, oy, ox = tile_of(at, out_height, out_width, STEP_Y, STEP_X)
            from_y, from_x = oy * DOWN_Y + shift_y, ox * DOWN_X + shift_x
            y, x = tl.cdiv(from_y, UP_Y), tl.cdiv(from_x, UP_X)
            samples, _ = load_tile(
                x_ptr, plane, y + start_y, x + start_x, channels, height, width,
                stride_xn, stride_xc, stride_xh, stride_xw, IN_Y, IN_X,
            )  # fmt: skip
            out = gain * between(
                samples, taps_ptr + pad, size, y * UP_Y - from_y, x * UP_X - from_x, OUT_Y, OUT_X,
                -DOWN_Y, UP_Y, -DOWN_X, UP_X, CAREFUL, PRECISION,
            )  # fmt: skip
            if not CAREFUL:
                tl.store(nan_ptr + at, tl.max((out != out).to(tl.int32)))
            store_tile(out_ptr, out, plane, oy, ox, out_height, out_width, OUT_Y, OUT_X, STEP_Y, STEP_X)


def upfirdn2d(x, f, up, down, padding, flip_filter, gain):
    if not serves(x, f):
        return NotImplemented
    last = channels_last(x)
    if f is None or f.ndim == 2 or triton.cdiv(len(f), up[0]) * triton.cdiv(len(f), up[1]) <= 16:
        return _by_taps(x, f, up, down, padding, flip_filter, gain, last, x.dtype)
    if last or len(f) > LONGEST or max(*up, *down) > WIDEST_STEP:
        left, top = [*padding[:2], 0, 0], [0, 0, *padding[2:]]
        y = _by_taps(x, f[None], [up[0], 1], [down[0], 1], left, flip_filter, gain, last, torch.float32)
        return _by_taps(y, f[:, None], [1, up[1]], [1, down[1]], top, flip_filter, 1.0, last, x.dtype)
    return _by_bands(x, f, up, down, padding, flip_filter, gain)


def channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def result_size(size: int, up: int, down: int, padding: list[int], taps: int) -> int:
    return (size * up + sum(padding) - taps) // down + 1


def _by_taps(x, f, up, down, padding, flip_filter, gain, last, dtype):
    (n, c, h, w), (fh, fw) = x.shape, (1, 1) if f is None else (f.shape[0], f.shape[-1])
    ow, oh = result_size(w, up[0], down[0], padding[:2], fw), result_size(h, up[1], down[1], padding[2:], fh)
    # Of one pixel both layouts are the same, and it gets the strides of the other.
    layout = torch.channels_last if last and oh * ow > 1 else torch.contiguous_format
    out = torch.empty((n, c, oh, ow), dtype=dtype, device=x.device, memory_format=layout)
    rows = triton.cdiv(oh, up[1])
    (start_y, shift_y), (start_x, shift_x) = divmod(-padding[2], up[1]), divmod(-padding[0], up[0])
    steps = (0, 0) if f is None else f.stride() if f.ndim == 2 else (0, f.stride(0))

    def launch(config):
        # A power of two of each axis, the innermost first.
        block, left = {}, config["block"]
        axes = {"X": (ow, 64), "Y": (rows, 32), "C": (c, left)}
        axes = {"C": (c, 64), "Y": (rows, 2), "X": (ow, left)} if last else axes
        for axis, (size, most) in axes.items():
            block[axis] = min(triton.next_power_of_2(size), most, left)
            left //= block[axis]
        programs = triton.cdiv(c, block["C"]) * triton.cdiv(rows, block["Y"]) * triton.cdiv(ow, block["X"])
        upfirdn2d_kernel[(n * up[1] * programs,)](
            out, x, f, c, h, w, oh, ow, *x.stride(), *out.stride(), *steps,
            start_y, start_x, shift_y, shift_x, gain, FH=fh, FW=fw,
            UP_Y=up[1], UP_X=up[0], DOWN_Y=down[1], DOWN_X=down[0],
            OUTER=f is not None and f.ndim == 1, FLIP=flip_filter,
            BLOCK_C=block["C"], BLOCK_Y=block["Y"], BLOCK_X=block["X"],
            num_warps=config["num_warps"], maxnreg=registers(config["num_warps"]),
        )  # fmt: skip
        return out

    key = "upfirdn2d", x.dtype, last, *up, *down, fh, fw, size_class(n * c, oh, ow)
    return tuned(key, CONFIGS, launch)


def reach(size: int, up: int, down: int, taps: int) -> int:
    """How many results `size` samples suffice for, wherever they begin."""
    return (size * up - taps) // down + 1


@functools.cache
def _tile(up: int, down: int, taps: int, most: int) -> tuple[int, int, int]:
    """The sides of a square tile of samples and of its results, and how many of these are whole."""

    def cost(sides):
        # What it holds for each result: both tiles and two bands.
        samples, results = sides
        step = min(results, reach(samples, up, down, taps))
        return (samples + results) ** 2 / step**2 if step > 0 else math.inf

    samples, results = min(itertools.product(SIDES[:most], SIDES[:most]), key=cost)
    return samples, results, min(results, reach(samples, up, down, taps))


def _by_bands(x, f, up, down, padding, flip_filter, gain):
    n, c, h, w = x.shape
    oh = result_size(h, up[1], down[1], padding[2:], len(f))
    ow = result_size(w, up[0], down[0], padding[:2], len(f))
    out = x.new_empty((n, c, oh, ow))
    tiles = []
    for most in (3, 2):
        (in_y, out_y, step_y), (in_x, out_x, step_x) = (_tile(up[i], down[i], len(f), most) for i in (1, 0))
        sides = {"IN_Y": in_y, "OUT_Y": out_y, "STEP_Y": step_y}
        sides |= {"IN_X": in_x, "OUT_X": out_x, "STEP_X": step_x}
        tiles.append((sides, triton.cdiv(oh, step_y) * triton.cdiv(ow, step_x)))
    (start_y, shift_y), (start_x, shift_x) = divmod(-padding[2], up[1]), divmod(-padding[0], up[0])
    launch_twice(
        upfirdn2d_separable_kernel, tiles, n * c, out, x,
        *padded_taps([f], 1.0, flip_filter, max(*up, *down), x, precision(x)), c, h, w, oh, ow, *x.stride(),
        start_y, start_x, shift_y, shift_x, gain, UP_Y=up[1], UP_X=up[0], DOWN_Y=down[1], DOWN_X=down[0],
        FIRST_Y=tiles[0][0]["STEP_Y"], FIRST_X=tiles[0][0]["STEP_X"], PRECISION=precision(x),
    )  # fmt: skip
    return out


def padded_taps(
    filters: list[Tensor | None], scale: float, flip_filter: bool, step: int, x: Tensor, products: str
):
    """What bands of one filter or two, the first times `scale`, are read from; where c[0] is; a part's size.

    From one of a band's rows or columns to the next are `step` taps at most.
    """
    taps, pad = [1 if f is None else len(f) for f in filters], SIDES[-1] * step
    size = triton.cdiv(2 * pad + max(taps), 16) * 16
    out = torch.empty((len(filters), 3, size), dtype=torch.float32, device=x.device)
    padded_taps_kernel[(len(filters),)](
        out, packed(filters[0]), packed(filters[-1]), taps[0], taps[-1], scale, pad, size,
        FLIP=flip_filter, PRECISION=products, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return out, pad, size


def launch_twice(kernel, tiles, planes, out, *args, **constants):
    """The second time with care, where there is NaN; of both times, tiles' sides, and how many a plane is."""
    nan = torch.empty(planes * tiles[0][1], dtype=torch.int8, device=out.device)
    for (sides, count), group in zip(tiles, (1, GROUP), strict=True):
        count *= planes
        warps = sides.get("num_warps", 4)
        kernel[(triton.cdiv(count, group),)](
            out, nan, count, *args, GROUP=group, num_stages=1, maxnreg=registers(warps), **sides, **constants
        )


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    x, f = torch.empty(1, 128, 256, 256, dtype=dtype), torch.empty(4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        yield lambda y=y: upfirdn2d(y, f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
        yield lambda y=y: upfirdn2d(y, f, [1, 1], [2, 2], [1, 1, 1, 1], False, 1.0)
    yield lambda: upfirdn2d(x, f, [1, 1], [1, 1], [2, 1, 2, 1], False, 1.0)
    for up, down, taps in ((2, 1, 12), (4, 1, 24), (1, 2, 12), (1, 4, 24)):
        g = torch.empty(taps)
        yield lambda g=g, up=up, down=down: upfirdn2d(x, g, [up] * 2, [down] * 2, [6] * 4, False, 1.0)
    yield lambda: upfirdn2d(x, torch.empty(12, 12), [1, 1], [2, 2], [6] * 4, False, 1.0)
    yield lambda: upfirdn2d(y, torch.empty(12), [2, 2], [1, 1], [6] * 4, False, 4.0)
