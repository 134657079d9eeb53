"""The convolution within modulated_conv2d as a matrix product of what is never stored: pixels' windows.

A program makes a tile of pixels by output channels, of one image. Its loop is over input channels and taps:
each step reads the tile's pixels, shifted by the tap, multiplies them by the image's styles, and the product
with the weight goes to the matrix units. The gradient of x is the same product with another weight. The
transposed convolution is one with fewer taps for each parity of row and column: a program makes pixels of one
parity, and writes them between those of the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import activation, clamped
from .common import INTERPRETED, narrowed, packed, precision, registers, serves, size_class, tuned
from .filtered_bias_act import noise_strides, shifted

# By bytes of an element: BLOCK_M pixels, BLOCK_N channels out, BLOCK_K channels in, stages. The first that
# makes enough programs for a large GPU, and is half full, is taken, else the last. The largest has 8 warps.
TILES = {
    2: [(128, 128, 64, 3), (128, 64, 64, 4), (64, 64, 64, 4), (32, 32, 128, 4), (16, 16, 128, 5)],
    4: [(64, 64, 32, 3), (32, 32, 32, 4), (16, 16, 64, 4)],
}
ENOUGH = 128
# Of the sum over pixels that makes a weight's gradient, as many at once.
PIXELS = {2: 64, 4: 32}
if INTERPRETED:
    ENOUGH, PIXELS = 4, {2: 4096, 4: 4096}
    TILES = {size: [(1024, 128, 128, 1), *tiles] for size, tiles in TILES.items()}


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b; Triton's interpreter would multiply the bits of bfloat16 as whole numbers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def styled_conv2d_kernel(
    out_ptr, ds_ptr, x_ptr, w_ptr, s_ptr, d_ptr, noise_ptr, b_ptr, x0_ptr,
    channels, outputs, height, width, out_h, out_w, top, left, alpha, gain, clamp,
    stride_nn, stride_nc, stride_nh, stride_nw, stride_on, stride_oc, stride_oh, stride_ow,
    KH: tl.constexpr, KW: tl.constexpr, UP: tl.constexpr, STRIDE: tl.constexpr,
    EVEN: tl.constexpr,  # channels fill blocks
    FULL: tl.constexpr,  # noise of every channel
    ACT: tl.constexpr, CLAMPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = clamp(act(q d + noise + b) gain), q[o] = sum w[o] s x; and the tile's sums of q x0 to ds."""
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    blocks_m = tl.cdiv(tl.cdiv(out_h, UP) * tl.cdiv(out_w, UP), BLOCK_M)
    pid = tl.program_id(0)
    block_m, phase = pid // blocks_n % blocks_m, pid // (blocks_n * blocks_m) % (UP * UP)
    n = (pid // (blocks_n * blocks_m * UP * UP)).to(tl.int64)
    down, right = phase // UP, phase % UP
    rows, cols = (out_h - down + UP - 1) // UP, (out_w - right + UP - 1) // UP
    taps_w = (KW - right + UP - 1) // UP
    taps = (KH - down + UP - 1) // UP * taps_w

    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < rows * cols
    row, col = m // cols, m % cols
    o = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    known = o < outputs
    x_ptr += n * height * width * channels
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(taps * tl.cdiv(channels, BLOCK_K)):
        i, j = step % taps // taps_w, step % taps % taps_w
        k = step // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        # A transposed convolution meets taps in the order in which a convolution does not.
        y, x = (row * STRIDE + i - top, col * STRIDE + j - left) if UP == 1 else (row - i, col - j)
        seen = (there & (y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        given = known[None, :]
        if not EVEN:
            seen &= (k < channels)[None, :]
            given &= (k < channels)[:, None]
        at = (y * width + x).to(tl.int64) * channels
        a = tl.load(x_ptr + at[:, None] + k[None, :], seen, 0.0)
        tap = (i * UP + down) * KW + j * UP + right
        w = tl.load(w_ptr + (o * (KH * KW) + tap)[None, :] * channels + k[:, None], given, 0.0)
        if s_ptr is not None:
            s = tl.load(s_ptr + n * channels + k, k < channels, 0.0)
            a = narrowed(a.to(tl.float32) * s[None, :], a.dtype)
        acc = add_product(acc, a, w, PRECISION)

    inside = there[:, None] & known[None, :]
    y, x = (row * UP + down).to(tl.int64), (col * UP + right).to(tl.int64)
    at = n * stride_on + (y * stride_oh + x * stride_ow)[:, None] + (o.to(tl.int64) * stride_oc)[None, :]
    if ds_ptr is not None:
        x0 = tl.load(x0_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(ds_ptr + (n * blocks_m + block_m) * outputs + o, tl.sum(acc * x0, 0), known)
    v = shifted(
        acc, d_ptr, noise_ptr, b_ptr, n, y, x, o.to(tl.int64), there, known, outputs,
        stride_nn, stride_nc, stride_nh, stride_nw, FULL,
    )  # fmt: skip
    v = clamped(activation(v, alpha, ACT) * gain, clamp, CLAMPS)
    tl.store(out_ptr + at, narrowed(v, out_ptr.dtype.element_ty), inside)


@triton.jit
def styled_conv2d_dw_kernel(
    out_ptr, a_ptr, b_ptr, s_ptr, batch, a_channels, b_channels, a_h, a_w, b_h, b_w, top, left, splits,
    stride_split, stride_a, stride_b, stride_tap,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr,  # s belongs to a
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, a, b, tap] = sum over images, and a share of a's pixels: a times b at the tap, times s."""
    blocks_m, blocks_n = tl.cdiv(a_channels, BLOCK_M), tl.cdiv(b_channels, BLOCK_N)
    pid = tl.program_id(0)
    ca = pid // blocks_n % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cb = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_known, b_known = ca < a_channels, cb < b_channels
    tap = pid // (blocks_n * blocks_m) % (KH * KW)
    split = pid // (blocks_n * blocks_m * KH * KW)
    steps = tl.cdiv(tl.cdiv(a_h * a_w, BLOCK_K), splits)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in range(batch):
        a_image = a_ptr + tl.cast(n, tl.int64) * a_h * a_w * a_channels
        b_image = b_ptr + tl.cast(n, tl.int64) * b_h * b_w * b_channels
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(split * steps, (split + 1) * steps):
            p = step * BLOCK_K + tl.arange(0, BLOCK_K)
            there = p < a_h * a_w
            y, x = p // a_w * STRIDE + (tap // KW - top), p % a_w * STRIDE + (tap % KW - left)
            seen = there & (y >= 0) & (y < b_h) & (x >= 0) & (x < b_w)
            a_at, b_at = p.to(tl.int64) * a_channels, (y * b_w + x).to(tl.int64) * b_channels
            a = tl.load(a_image + a_at[:, None] + ca[None, :], there[:, None] & a_known[None, :], 0.0)
            b = tl.load(b_image + b_at[:, None] + cb[None, :], seen[:, None] & b_known[None, :], 0.0)
            acc = add_product(acc, tl.trans(a), b, PRECISION)
        if s_ptr is not None:
            if ROWS:
                acc *= tl.load(s_ptr + n * a_channels + ca, a_known, 0.0)[:, None]
            else:
                acc *= tl.load(s_ptr + n * b_channels + cb, b_known, 0.0)[None, :]
        out += acc
    at = tl.cast(split, tl.int64) * stride_split + tap * stride_tap
    at += (ca * stride_a)[:, None] + (cb * stride_b)[None, :]
    tl.store(out_ptr + at, out, a_known[:, None] & b_known[None, :])


def _images(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _is_served(x: Tensor, weight: Tensor | None, *others: Tensor | None) -> bool:
    alike = weight is None or (weight.dtype == x.dtype and weight.numel() < 2**31)
    return serves(x, *others) and alike


def _launch(
    out, x, weight, s=None, d=None, noise=None, b=None, x0=None, up=1, stride=1, top=0, left=0,
    act="linear", alpha=0.0, gain=1.0, clamp=-1.0,
):  # fmt: skip
    """Fills out; returns, if there is an x0, the sums [N, O] over pixels of q x0."""
    (n, channels, height, width), (outputs, _, kh, kw) = x.shape, weight.shape
    out_h, out_w = out.shape[2:]
    pixels = triton.cdiv(out_h, up) * triton.cdiv(out_w, up)
    tiles = TILES[x.element_size()]

    def sizes(tile):
        """Pixels and channels of a program, and programs in an image."""
        block_n = min(tile[1], max(16, triton.next_power_of_2(outputs)))
        return tile[0], block_n, up * up * triton.cdiv(pixels, tile[0]) * triton.cdiv(outputs, block_n)

    def launch(tile):
        block_m, block_n, programs = sizes(tile)
        block_k = min(tile[2], max(16, triton.next_power_of_2(channels)))
        warps = 8 if (block_m, block_n) == tiles[0][:2] else 4
        blocks_m = triton.cdiv(pixels, block_m)
        ds = None if x0 is None else out.new_empty(n, blocks_m, outputs, dtype=torch.float32)
        styled_conv2d_kernel[(n * programs,)](
            out, ds, _images(x), _images(weight), packed(s), packed(d),
            noise, packed(b), None if x0 is None else _images(x0), channels, outputs, height, width,
            out_h, out_w, top, left, alpha, gain, clamp, *noise_strides(noise), *out.stride(),
            KH=kh, KW=kw, UP=up, STRIDE=stride, EVEN=channels % block_k == 0,
            FULL=noise is not None and noise.shape[1] != 1, ACT=act, CLAMPS=clamp >= 0,
            PRECISION=precision(x), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=tile[3], maxnreg=registers(warps),
        )  # fmt: skip
        return None if ds is None else ds.sum(1)

    enough = (t for t in tiles if n * sizes(t)[2] >= ENOUGH and t[0] < 2 * pixels)
    first = next(enough, tiles[-1])
    key = "styled_conv2d", x.dtype, up, stride, kh, kw, channels, outputs, x0 is None, size_class(n * pixels)
    return tuned(key, [first, *(t for t in tiles if t != first)], launch)


def styled_conv2d(x, weight, s, padding, up):
    if not _is_served(x, weight, s):
        return NotImplemented
    (n, _, h, w), (outputs, _, kh, kw) = x.shape, weight.shape
    if up == 2:
        out = _empty(x, n, outputs, 2 * h + kh - 2, 2 * w + kw - 2)
        _launch(out, x, weight, s, up=2)
    else:
        out = _empty(x, n, outputs, h + sum(padding[2:]) - kh + 1, w + sum(padding[:2]) - kw + 1)
        _launch(out, x, weight, s, top=padding[2], left=padding[0])
    return out


def styled_conv2d_act(x, weight, s, d, noise, b, padding, act, alpha, gain, clamp, contiguous):
    if not _is_served(x, weight, s, d, noise, b):
        return NotImplemented
    (n, _, h, w), (outputs, _, kh, kw) = x.shape, weight.shape
    shape = n, outputs, h + sum(padding[2:]) - kh + 1, w + sum(padding[:2]) - kw + 1
    out = x.new_empty(shape) if contiguous else _empty(x, *shape)
    _launch(
        out, x, weight, s, d, noise, b, top=padding[2], left=padding[0],
        act=act, alpha=alpha, gain=gain, clamp=clamp,
    )  # fmt: skip
    return out


def styled_conv2d_bwd(dy, x, weight, s, padding, up):
    if not _is_served(x, weight, dy, s):
        return NotImplemented
    kh, kw = weight.shape[2:]
    dx, weight = _empty(x, *x.shape), weight.transpose(0, 1)
    where = {"stride": 2} if up == 2 else {"top": kh - 1 - padding[2], "left": kw - 1 - padding[0]}
    weight = weight if up == 2 else weight.flip([2, 3])
    ds = _launch(dx, dy, weight, d=s, x0=None if s is None else x, **where)
    return dx, dx.new_empty(0, x.shape[1], dtype=torch.float32) if ds is None else ds


def styled_conv2d_dw(dy, x, s, taps, padding, up):
    if not _is_served(x, None, dy, s) or dy.dtype != x.dtype:
        return NotImplemented
    outputs, channels, (kh, kw) = dy.shape[1], x.shape[1], taps
    # Of the two images the one that has a pixel for every one of the sum.
    a, b = (dy, x) if up == 1 else (x, dy)
    pixels = a.shape[2] * a.shape[3]
    block_k = min(PIXELS[x.element_size()], max(16, triton.next_power_of_2(pixels)))
    block_m, block_n = (min(64, max(16, triton.next_power_of_2(t.shape[1]))) for t in (a, b))
    programs = kh * kw * triton.cdiv(a.shape[1], block_m) * triton.cdiv(b.shape[1], block_n)
    splits = min(triton.cdiv(pixels, block_k), triton.cdiv(2 * ENOUGH, programs))
    sums = x.new_empty(splits, outputs, kh, kw, channels, dtype=torch.float32)
    by_output, by_channel = sums.stride(1), sums.stride(4)
    styled_conv2d_dw_kernel[(programs * splits,)](
        sums, _images(a), _images(b), packed(s), a.shape[0],
        a.shape[1], b.shape[1], *a.shape[2:], *b.shape[2:],
        *((padding[2], padding[0]) if up == 1 else (0, 0)), splits, sums.stride(0),
        *((by_output, by_channel) if up == 1 else (by_channel, by_output)), sums.stride(3),
        KH=kh, KW=kw, STRIDE=up, ROWS=up == 2, PRECISION=precision(x),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_stages=3,
    )  # fmt: skip
    return sums.sum(0).to(x.dtype).permute(0, 3, 1, 2)


def calls(dtype):
    """What shows every kernel and configuration, at the shapes of real generators: for cubins."""

    def images(*shape):
        return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    act = "lrelu", 0.2, 1.4, 256.0
    # Layers of one sample and of several, for every tile.
    channels = 128
    for side, outputs in (256, 128), (128, 64), (64, 256), (32, 512), (16, 512), (4, 512):
        x, weight, b = images(1, channels, side, side), images(outputs, channels, 3, 3), torch.empty(outputs)
        noise, s, d = torch.empty(1, 1, side, side), torch.empty(1, channels), torch.empty(1, outputs)
        for scales in ((None, None), (s, d)):
            yield lambda args=(x, weight, *scales, noise, b, [1] * 4, *act, False): styled_conv2d_act(*args)
            yield lambda args=(x, weight, scales[0], [0] * 4, 2): styled_conv2d(*args)
        dy, dy_up = images(1, outputs, side, side), images(1, outputs, 2 * side + 1, 2 * side + 1)
        for up, grad in ((1, dy), (2, dy_up)) if side >= 128 else ():
            yield lambda args=(grad, x, weight, s, [1] * 4, up): styled_conv2d_bwd(*args)
            yield lambda args=(grad, x, s, [3, 3], [1] * 4, up): styled_conv2d_dw(*args)
    # To the image, and to planes.
    x = images(1, 128, 128, 128)
    for outputs in (3, 96):
        weight, s, b = images(outputs, 128, 1, 1), torch.empty(1, 128), torch.empty(outputs)
        for contiguous in (False, True):
            args = x, weight, s, None, None, b, [0] * 4, "linear", 0.0, 1.0, 256.0, contiguous
            yield lambda args=args: styled_conv2d_act(*args)
