"""sample_triplane and its first two derivatives: bilinear samples of three planes.

A program takes BLOCK_M points, of any images, and BLOCK_C channels at a time. With a, b the fractions of a
position, a sample is the sum of a cell's corners times their shares, such as (1 - a) b; a slope along (u, v)
is the sum of corners times the shares' derivatives. What comes back to the planes is added up by atomics, in
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, narrowed, registers, serves, size_class, tuned, widened

# The interpreter takes its time for each step, whatever the size of a tile: there tiles are larger.
SCALE = 8 if INTERPRETED else 1
# Elements of a program's tile.
CONFIGS = [
    {"block": block * SCALE, "num_warps": warps}
    for block, warps in ((2048, 8), (2048, 4), (1024, 4), (4096, 8))
]


@triton.jit
def element(matrix, plane, K: tl.constexpr):
    """The K-th of a plane's six numbers: three take points to columns, three to rows."""
    return tl.where(plane == 0, matrix[K], tl.where(plane == 1, matrix[6 + K], matrix[12 + K]))


@triton.jit
def projected(point, matrix, plane, ROW: tl.constexpr):
    """Points' columns or rows on a plane; zeros select: they make no NaN of what they leave out."""
    x, y, z = point
    a = element(matrix, plane, 3 * ROW)
    b = element(matrix, plane, 3 * ROW + 1)
    c = element(matrix, plane, 3 * ROW + 2)
    return tl.where(a == 0, 0.0, x * a) + tl.where(b == 0, 0.0, y * b) + tl.where(c == 0, 0.0, z * c)


@triton.jit
def cell(u, size):
    """The pixel before a position in pixels, and the fraction; -2 and size stand for all that is outside."""
    whole = tl.floor(u)
    # NaN is outside; its fraction, and so its shares, stay NaN.
    pixel = tl.where(whole >= -2, whole, -2.0)
    return tl.where(pixel > size, size, pixel).to(tl.int32), u - whole


@triton.jit
def corner(ptr, strides, image, i, j, c, height, width, plane, K: tl.constexpr):
    """Pointers [M, C] to channels c of corner K of cells, and whether it is in the plane [M, 1].

    K counts the corners 00, 01, 10, 11. image: where the cells' images begin, in int64.
    """
    i, j = i + K % 2, j + K // 2
    inside = (i >= 0) & (i < width) & (j >= 0) & (j < height)
    at = image + (plane * strides[1] + j * strides[3] + i * strides[4])
    return ptr + at[:, None] + c * strides[2], inside[:, None]


@triton.jit
def shares(a, b, K: tl.constexpr):
    """The two factors of corner K's share, of the column and of the row."""
    return a if K % 2 == 1 else 1 - a, b if K // 2 == 1 else 1 - b


@triton.jit
def point_at(ptr, point, inside):
    """x, y and z of points [M, 3]."""
    return (
        widened(tl.load(ptr + 3 * point, inside, 0.0)),
        widened(tl.load(ptr + 3 * point + 1, inside, 0.0)),
        widened(tl.load(ptr + 3 * point + 2, inside, 0.0)),
    )


@triton.jit
def _located(point, matrix, height, width, plane):
    """Cells' columns and rows, and fractions."""
    i, a = cell(((projected(point, matrix, plane, 0) + 1) * width - 1) * 0.5, width)
    j, b = cell(((projected(point, matrix, plane, 1) + 1) * height - 1) * 0.5, height)
    return i, j, a, b


@triton.jit
def sample_triplane_kernel(
    out_ptr, p_ptr, x_ptr, points_ptr, q_ptr, matrix, p_strides, x_strides, count, m, channels, height, width,
    MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = samples of p + slopes of x along q; p, or x and q, may be None."""
    blocks = tl.cdiv(channels, BLOCK_C)
    point = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    given, n = point < count, point // m
    wanted = given[:, None] & (c < channels)
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    position = point_at(points_ptr, point, given)
    if x_ptr is not None:
        q = point_at(q_ptr, point, given)
    for plane in range(3):
        i, j, a, b = _located(position, matrix, height, width, plane)
        if x_ptr is not None:
            qu = projected(q, matrix, plane, 0) * (width * 0.5)
            qv = projected(q, matrix, plane, 1) * (height * 0.5)
        for k in tl.static_range(4):
            wa, wb = shares(a, b, k)
            if p_ptr is not None:
                at, inside = corner(p_ptr, p_strides, n * p_strides[0], i, j, c, height, width, plane, k)
                out += (wa * wb)[:, None] * widened(tl.load(at, wanted & inside, 0.0))
            if x_ptr is not None:
                at, inside = corner(x_ptr, x_strides, n * x_strides[0], i, j, c, height, width, plane, k)
                slope = (2 * (k % 2) - 1) * wb * qu + (2 * (k // 2) - 1) * wa * qv
                out += slope[:, None] * widened(tl.load(at, wanted & inside, 0.0))
        if not MEAN:
            at = ((n * 2 + plane) * m + point)[:, None] * channels + c
            tl.store(out_ptr + at, narrowed(out, out_ptr.dtype.element_ty), wanted)
            out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if MEAN:
        out = narrowed(out * (1 / 3), out_ptr.dtype.element_ty)
        tl.store(out_ptr + point[:, None] * channels + c, out, wanted)


@triton.jit
def sample_triplane_bwd_kernel(
    d_ptr, dpoints_ptr, dy_ptr, p_ptr, x_ptr, points_ptr, q_ptr, matrix, d_strides, p_strides, x_strides,
    count, m, channels, height, width, MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What dy sends back through samples of p and slopes of x along q.

    d, float32, is added to: the gradient of p, or, if q is given, of x. dpoints is that of the positions;
    there p or x may be None.
    """
    point = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    given, n = point < count, point // m
    gx, gy, gz = (tl.zeros([BLOCK_M], tl.float32),) * 3
    position = point_at(points_ptr, point, given)
    if q_ptr is not None:
        q = point_at(q_ptr, point, given)
    for plane in range(3):
        i, j, a, b = _located(position, matrix, height, width, plane)
        if q_ptr is not None:
            qu = projected(q, matrix, plane, 0) * (width * 0.5)
            qv = projected(q, matrix, plane, 1) * (height * 0.5)
        row = point if MEAN else (n * 2 + plane) * m + point
        du, dv = (tl.zeros([BLOCK_M], tl.float32),) * 2
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)[None, :]
            wanted = given[:, None] & (c < channels)
            g = widened(tl.load(dy_ptr + row[:, None] * channels + c, wanted, 0.0))
            g = g * (1 / 3) if MEAN else g
            along_u, along_v, mixed = (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),) * 3
            for k in tl.static_range(4):
                wa, wb = shares(a, b, k)
                if d_ptr is not None:
                    at, inside = corner(d_ptr, d_strides, n * d_strides[0], i, j, c, height, width, plane, k)
                    share = wa * wb
                    if q_ptr is not None:
                        share = (2 * (k % 2) - 1) * wb * qu + (2 * (k // 2) - 1) * wa * qv
                    tl.atomic_add(at, share[:, None] * g, wanted & inside, sem="relaxed")
                if p_ptr is not None:
                    at, inside = corner(p_ptr, p_strides, n * p_strides[0], i, j, c, height, width, plane, k)
                    pixel = widened(tl.load(at, wanted & inside, 0.0))
                    along_u += ((2 * (k % 2) - 1) * wb)[:, None] * pixel
                    along_v += ((2 * (k // 2) - 1) * wa)[:, None] * pixel
                if x_ptr is not None:
                    at, inside = corner(x_ptr, x_strides, n * x_strides[0], i, j, c, height, width, plane, k)
                    pixel = widened(tl.load(at, wanted & inside, 0.0))
                    mixed += ((2 * (k % 2) - 1) * (2 * (k // 2) - 1)) * pixel
            if p_ptr is not None:
                du += tl.sum(g * along_u, 1)
                dv += tl.sum(g * along_v, 1)
            if x_ptr is not None:
                twist = tl.sum(g * mixed, 1)
                du += twist * qv
                dv += twist * qu
        du, dv = du * (width * 0.5), dv * (height * 0.5)
        gx += _unprojected(du, dv, matrix, plane, 0)
        gy += _unprojected(du, dv, matrix, plane, 1)
        gz += _unprojected(du, dv, matrix, plane, 2)
    if dpoints_ptr is not None:
        at = dpoints_ptr + 3 * point
        tl.store(at, narrowed(gx, dpoints_ptr.dtype.element_ty), given)
        tl.store(at + 1, narrowed(gy, dpoints_ptr.dtype.element_ty), given)
        tl.store(at + 2, narrowed(gz, dpoints_ptr.dtype.element_ty), given)


@triton.jit
def _unprojected(du, dv, matrix, plane, AXIS: tl.constexpr):
    """What the gradients of columns and rows give to x, y or z."""
    u, v = element(matrix, plane, AXIS), element(matrix, plane, 3 + AXIS)
    return tl.where(u == 0, 0.0, u * du) + tl.where(v == 0, 0.0, v * dv)


def addressable(x: Tensor) -> bool:
    """Can offsets within an image be of 32 bits, here and in a copy?"""
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return max(span, x[:1].numel()) < 2**31


def channels_last(planes: Tensor) -> Tensor:
    """Zeros like planes, in float32, with channels side by side: for atomics."""
    if planes.stride(2) == 1:
        return torch.zeros_like(planes, dtype=torch.float32)
    n, _, c, h, w = planes.shape
    return planes.new_zeros(n, 3, h, w, c, dtype=torch.float32).permute(0, 1, 4, 2, 3)


def like(d: Tensor, x: Tensor) -> Tensor:
    """d in x's dtype and layout."""
    out = torch.empty_like(x)
    return d if d.dtype == out.dtype and d.stride() == out.stride() else out.copy_(d)


def sample_triplane(planes: Tensor, coordinates: Tensor, projection: list[float], mean: bool):
    if not _served(planes, coordinates):
        return NotImplemented
    (n, _, c, _, _), m = planes.shape, coordinates.shape[1]
    out = planes.new_empty((n, m, c) if mean else (n, 3, m, c))
    return _sample(out, planes, None, planes, coordinates, projection, mean)


def sample_triplane_bwd(dy, planes, coordinates, projection, mean, need_planes, need_coordinates):
    if not _served(planes, coordinates, dy):
        return NotImplemented
    p = planes if need_coordinates else None
    return _scatter(dy, p, None, planes, coordinates, projection, mean, need_planes, need_coordinates)


def sample_triplane_bwd2(
    ddplanes, ddcoordinates, dy, planes, coordinates, projection, mean, need_dy, need_planes, need_coordinates
):
    if not _served(planes, coordinates, dy, ddplanes, ddcoordinates):
        return NotImplemented
    args = ddcoordinates, planes, coordinates, projection, mean
    ddy = _sample(dy.new_empty(dy.shape), ddplanes, *args) if need_dy else dy.new_empty(0)
    p, directed = ddplanes if need_coordinates else None, ddcoordinates is not None
    dplanes, dpoints = _scatter(dy, p, *args, need_planes and directed, need_coordinates)
    return ddy, dplanes if directed or not need_planes else torch.zeros_like(planes), dpoints


def _served(planes, coordinates, dy=None, p=None, q=None) -> bool:
    given = serves(coordinates, planes, dy, p, q) and planes.numel() > 0
    return given and addressable(planes) and (p is None or addressable(p))


def _sample(out, p, q, planes, coordinates, projection, mean):
    """Samples of p + slopes of planes along q."""
    (_, _, c, h, w), (n, m, _) = planes.shape, coordinates.shape
    x, q = (None, None) if q is None else (planes, q.contiguous())

    def launch(config):
        block = min(64, triton.next_power_of_2(c))
        block_m = config["block"] // block
        sample_triplane_kernel[(triton.cdiv(n * m, block_m) * triton.cdiv(c, block),)](
            out, p, x, coordinates.contiguous(), q, tuple(projection), _strides(p), _strides(x), n * m, m,
            c, h, w, MEAN=mean, BLOCK_M=block_m, BLOCK_C=block,
            num_warps=config["num_warps"], maxnreg=registers(config["num_warps"]),
        )  # fmt: skip
        return out

    key = "sample_triplane", out.dtype, mean, q is None, c, size_class(n * m, h * w)
    return tuned(key, CONFIGS, launch)


def _scatter(dy, p, q, planes, coordinates, projection, mean, need_planes, need_coordinates):
    """The gradients, for dy, of samples of p + slopes of planes along q; of planes' as p where q is None."""
    (_, _, c, h, w), (n, m, _) = planes.shape, coordinates.shape
    x, q = (None, None) if q is None else (planes if need_coordinates else None, q.contiguous())
    d = channels_last(planes) if need_planes else None
    dpoints = coordinates.new_empty(coordinates.shape if need_coordinates else 0)
    block = min(64, triton.next_power_of_2(c))
    block_m = CONFIGS[0]["block"] // block
    sample_triplane_bwd_kernel[(triton.cdiv(n * m, block_m),)](
        d, dpoints if need_coordinates else None, dy.contiguous(), p, x, coordinates.contiguous(), q,
        tuple(projection), _strides(d), _strides(p), _strides(x), n * m, m, c, h, w, MEAN=mean,
        BLOCK_M=block_m, BLOCK_C=block, num_warps=8,
    )  # fmt: skip
    return planes.new_empty(0) if d is None else like(d, planes), dpoints


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    image = torch.empty(1, 96, 256, 256, dtype=dtype)
    planes = image.contiguous(memory_format=torch.channels_last).view(1, 3, 32, 256, 256)
    dy, points, projection = planes.new_empty(1, 4096, 32), torch.empty(1, 4096, 3), [1.0] * 18
    yield lambda: sample_triplane(planes, points, projection, True)
    yield lambda: sample_triplane(image.view(planes.shape), points, projection, False)
    yield lambda: sample_triplane_bwd(dy, planes, points, projection, True, True, True)
    yield lambda: sample_triplane_bwd2(planes, points, dy, planes, points, projection, True, True, True, True)
