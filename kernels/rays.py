"""What happens along rays: positions on the planes, decoding, marching, importance sampling, sorting.

The formulas are those of fastgen.ops._march. Samples of R rays are [R, S], S padded to a power of two; for
the decoder they are rows [M]. `planes` is a pointer, five strides, the projection's 18 numbers, height and
width; `decoder` is pointers to w1, b1, w2 and b2.
"""

import triton
import triton.language as tl

from .common import expm1, sigmoid, softplus, widened
from .sample_triplane import cell, corner, projected, shares

# Hidden units that are evaluated together.
UNITS = tl.constexpr(32)


@triton.jit
def quick_softplus(x):
    """log(1 + e^x) to a few 1e-7, rather than to a few parts of it in 1e7."""
    return tl.maximum(x, 0.0, tl.PropagateNan.ALL) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def take(x, index):
    """x[r, index[r, k]]; an index [1, K] is that of every row. Triton compiles none longer than a row."""
    return tl.gather(x, tl.broadcast_to(index, [x.shape[0], index.shape[1]]), 1)


@triton.jit
def following(x):
    """x[r, i + 1]; the last one repeats."""
    return take(x, tl.minimum(tl.arange(0, x.shape[1]) + 1, x.shape[1] - 1)[None, :])


@triton.jit
def line_of(planes, origin, direction, plane):
    """Rays on a plane, in pixels: columns and rows at depth 0, and how fast they grow with depth."""
    _, _, matrix, height, width = planes
    u = projected(origin, matrix, plane, 0) * (width * 0.5) + (width * 0.5 - 0.5)
    v = projected(origin, matrix, plane, 1) * (height * 0.5) + (height * 0.5 - 0.5)
    du = projected(direction, matrix, plane, 0) * (width * 0.5)
    return u, v, du, projected(direction, matrix, plane, 1) * (height * 0.5)


@triton.jit
def located(planes, line, t):
    """Columns and rows of the cells of samples at depths t [R, S], and fractions, all [M]."""
    _, _, _, height, width = planes
    u, v, du, dv = line
    i, a = cell(tl.ravel(u + t * du), width)
    j, b = cell(tl.ravel(v + t * dv), height)
    return i, j, a, b


@triton.jit
def sampled(planes, image, line, t, wanted, f, plane):
    """Features f of samples at depths t on a plane [M, f]."""
    ptr, strides, _, height, width = planes
    i, j, a, b = located(planes, line, t)
    image = tl.ravel(tl.broadcast_to(image * strides[0], t.shape))
    x = tl.zeros([image.shape[0], f.shape[1]], tl.float32)
    for k in tl.static_range(4):
        wa, wb = shares(a, b, k)
        at, inside = corner(ptr, strides, image, i, j, f, height, width, plane, k)
        x += (wa * wb)[:, None] * widened(tl.load(at, wanted & inside, 0.0))
    return x


@triton.jit
def hidden(
    decoder, x, d, PRECISION: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Units d of the hidden layer [M, d]; of w1 [d, F], of w2 density's row [1, d] and colours' [C, d]."""
    w1_ptr, b1_ptr, w2_ptr, _ = decoder
    f, c = tl.arange(0, BLOCK_F)[None, :], tl.arange(0, BLOCK_C)[:, None]
    w1 = widened(tl.load(w1_ptr + d[:, None] * F + f, (d[:, None] < D) & (f < F), 0.0))
    b1 = widened(tl.load(b1_ptr + d, d < D, 0.0))
    row = widened(tl.load(w2_ptr + d, d < D, 0.0))
    w2 = widened(tl.load(w2_ptr + (c + 1) * D + d[None, :], (c < C) & (d[None, :] < D), 0.0))
    h = quick_softplus(tl.dot(x, tl.trans(w1), input_precision=PRECISION) + b1[None, :])
    return h, w1, row[None, :], w2


@triton.jit
def gates(decoder, colour, C: tl.constexpr):
    """Colours' sigmoids, before which their biases are added."""
    _, _, _, b2_ptr = decoder
    c = tl.arange(0, colour.shape[1])
    return sigmoid(colour + widened(tl.load(b2_ptr + 1 + c, c < C, 0.0))[None, :])


@triton.jit
def shaded(
    planes, decoder, image, origin, direction, t, valid, FINE: tl.constexpr, COARSE: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Densities [R, S], and colours' sigmoids [R, S, C], of samples at depths t."""
    f = tl.arange(0, BLOCK_F)[None, :]
    wanted = tl.ravel(valid)[:, None] & (f < F)
    x = tl.zeros([wanted.shape[0], BLOCK_F], tl.float32)
    for plane in range(3):
        x += sampled(planes, image, line_of(planes, origin, direction, plane), t, wanted, f, plane)
    x *= 1 / 3
    BLOCK: tl.constexpr = min(UNITS, BLOCK_D)
    sigma = tl.zeros([x.shape[0]], tl.float32)
    colour = tl.zeros([x.shape[0], BLOCK_C], tl.float32)
    # Some units at a time, for registers.
    for first in range(0, D, BLOCK):
        h, _, row, w2 = hidden(decoder, x, first + tl.arange(0, BLOCK), FINE, F, D, C, BLOCK_F, BLOCK_C)
        sigma += tl.sum(h * row, 1)
        colour = tl.dot(h, tl.trans(w2), colour, input_precision=COARSE)
    sigma = tl.reshape(sigma, t.shape) + widened(tl.load(decoder[3]))
    return sigma, tl.reshape(gates(decoder, colour, C), [t.shape[0], t.shape[1], BLOCK_C])


@triton.jit
def march(sigma, t, T: tl.constexpr):
    """alpha, light, and keep + 1e-10 of the intervals between T sorted samples; alpha is 0 behind them."""
    inside = tl.arange(0, t.shape[1])[None, :] < T - 1
    density = softplus((sigma + following(sigma)) * 0.5 - 1)
    # 1 - e^x would keep few digits where an interval stops little, and a GPU's fast e^x still fewer. But what
    # is 0 by that, is 0: rays that meet nothing are to be known by their weight.
    x = density * (t - following(t))
    alpha = tl.where(inside & ((x > 0) | (x <= -(2**-25)) | (x != x)), -expm1(x), 0.0)
    keep = tl.where(inside, 1 - alpha + 1e-10, 1.0)
    return alpha, tl.cumprod(keep, 1) / keep, keep


@triton.jit
def ends(w):
    """Half of what intervals have, at each of their two ends."""
    i = tl.arange(0, w.shape[1])[None, :]
    return (w + tl.where(i == 0, 0.0, take(w, tl.maximum(i - 1, 0)))) * 0.5


@triton.jit
def larger(a, b):
    """The larger one, or NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def importance_depths(w, t, u, S: tl.constexpr):
    """Depths where weights w of the S - 1 intervals between t are large, by u [R, K]."""
    BINS: tl.constexpr = S - 3
    i = tl.arange(0, t.shape[1])[None, :]
    peaks = larger(following(w), w)
    pdf = tl.where(i < BINS, (following(peaks) + peaks) * 0.5 + (0.01 + 1e-5), 0.0)
    # At the upper edges of the bins; below the first one there is nothing.
    cdf = tl.cumsum(pdf / tl.sum(pdf, 1)[:, None], 1)
    edges = (t + following(t)) * 0.5
    # The bin is how many edges are not above u: also all that are NaN, as searchsorted has it.
    above = (cdf[:, :, None] > u[:, None, :]) | (i[:, :, None] >= BINS)
    at = tl.sum(1 - above.to(tl.int32), 1)
    c = tl.where(at == 0, 0.0, take(cdf, tl.maximum(at - 1, 0)))
    width = take(cdf, tl.minimum(at, BINS - 1)) - c
    e = take(edges, at)
    return e + (u - c) / tl.where(width < 1e-5, 1.0, width) * (take(edges, tl.minimum(at + 1, BINS)) - e)


@triton.jit
def concatenated(x, y, S: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first S of x, and y at the end of BLOCK_T."""
    R: tl.constexpr = x.shape[0]
    BLOCK_S: tl.constexpr = x.shape[1]
    BLOCK_K: tl.constexpr = y.shape[1]
    x = tl.reshape(tl.broadcast_to(x[:, None, :], [R, BLOCK_T // BLOCK_S, BLOCK_S]), [R, BLOCK_T])
    y = tl.reshape(tl.broadcast_to(y[:, None, :], [R, BLOCK_T // BLOCK_K, BLOCK_K]), [R, BLOCK_T])
    return tl.where(tl.arange(0, BLOCK_T)[None, :] < S, x, y)


@triton.jit
def keys_of(t, valid):
    """Integers ordered like depths, -0 like 0; those of NaN, then of invalid ones, are last."""
    bits = (t + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(valid, tl.where(t != t, 0x7FFFFFFD, key), 0x7FFFFFFE)


@triton.jit
def in_order(t, valid):
    """Valid depths first, from small to large, then NaN; 0 behind them."""
    key = tl.sort(keys_of(t, valid), 1)
    t = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return tl.where(key == 0x7FFFFFFE, 0.0, t)


@triton.jit
def merged(t, fine, S: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where each of two sorted rows of depths, concatenated, is when sorted together; and which is where."""
    START: tl.constexpr = BLOCK_T - fine.shape[1]
    FEW: tl.constexpr = min(32, fine.shape[1])
    i, k = tl.arange(0, t.shape[1])[None, :], tl.arange(0, fine.shape[1])[None, :]
    key, key_fine = keys_of(t, i < S), keys_of(fine, k < K)
    rank = i + tl.zeros(t.shape, tl.int32)
    rank_fine = k + tl.zeros(fine.shape, tl.int32)
    # Some at a time, for registers; sums along the middle axis stay within threads. Coarse ones come first.
    for first in range(0, t.shape[1], FEW):
        j = first + tl.arange(0, FEW)[None, :]
        rank_fine += tl.sum((take(key, j)[:, :, None] <= key_fine[:, None, :]).to(tl.int32), 1)
    for first in range(0, fine.shape[1], FEW):
        j = first + tl.arange(0, FEW)[None, :]
        rank += tl.sum((take(key_fine, j)[:, :, None] < key[:, None, :]).to(tl.int32), 1)
    # Those of what is padded are nowhere, but are looked up too.
    rank = tl.minimum(concatenated(rank, rank_fine, S, BLOCK_T), BLOCK_T - 1)
    # Of fine ones, how many are before each place: those behind them, and the coarse ones, are not.
    a = tl.arange(0, BLOCK_T)[None, :]
    before = tl.zeros(rank.shape, tl.int32)
    rank_fine = tl.where(k < K, rank_fine, BLOCK_T)
    for first in range(0, fine.shape[1], FEW):
        j = first + tl.arange(0, FEW)[None, :]
        before += tl.sum((take(rank_fine, j)[:, :, None] < a[:, None, :]).to(tl.int32), 1)
    here = tl.minimum(before + START, BLOCK_T - 1)
    order = tl.where(take(rank, here) == a, here, tl.maximum(a - before, 0))
    return rank, order
