"""filtered_bias_act and its gradient: tiles of pixels by channels, each output read and written once.

A tile of pixels is as square as it can be where a filter is, so that most of what neighbouring outputs share
is in the cache of one processor. Four phases are never interleaved in memory: pixel (r, q) of the image is
pixel (r / 2, q / 2) of the phase that its parities name.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import activation, clamped, slope
from .common import INTERPRETED, narrowed, packed, registers, serves, size_class, tuned

# Bytes of a tile, and of a pixel's channels in it.
PIXEL = 128
CONFIGS = [{"tile": tile, "num_warps": warps} for tile, warps in ((4096, 4), (2048, 4), (4096, 8), (8192, 8))]
# The loop over taps is unrolled.
MOST_TAPS = 16
if INTERPRETED:
    CONFIGS = [{"tile": 32768, "num_warps": 4}]


@triton.jit
def filtered(
    x_ptr, f_ptr, n, y, x, c, inside, channels, height, width, top, left, gain,
    stride_xn, stride_xc, stride_xh, stride_xw, to_01, to_10, to_11,
    UP: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """t [pixels, channels] at rows y and columns x."""
    acc = inside * 0.0
    for k in tl.static_range(FH * FW):
        i, j = k // FW, k % FW
        r, q = y + (i - top), x + (j - left)
        within = inside & ((r >= 0) & (r < height) & (q >= 0) & (q < width))[:, None]
        if UP == 1:
            at = (n * stride_xn + r * stride_xh + q * stride_xw)[:, None] + c[None, :] * stride_xc
        else:
            # Sums of products, not a choice of pointers, of which the compiler would not see the alignment.
            odd_r, odd_q = r & 1, q & 1
            rows, cols = (height + 1 - odd_r) // 2, (width + 1 - odd_q) // 2
            image = odd_r * (1 - odd_q) * to_10 + odd_q * (1 - odd_r) * to_01 + odd_r * odd_q * to_11
            at = (image + ((n * rows + (r >> 1)) * cols + (q >> 1)) * channels)[:, None] + c[None, :]
        value = tl.load(x_ptr + at, within, 0.0).to(tl.float32)
        if f_ptr is not None:
            # A convolution turns the filter; what is named flipped does not.
            fi, fj = (i, j) if FLIP else (FH - 1 - i, FW - 1 - j)
            if SEPARABLE:
                value *= tl.load(f_ptr + fi).to(tl.float32) * tl.load(f_ptr + fj).to(tl.float32)
            else:
                value *= tl.load(f_ptr + fi * FW + fj).to(tl.float32)
        acc += value
    return acc * gain


@triton.jit
def tile_of_pixels(tile, height, width, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows and columns of a tile's pixels, and which of them there are."""
    p, tiles = tl.arange(0, BLOCK_P), tl.cdiv(width, BLOCK_W)
    y = (tile // tiles).to(tl.int64) * (BLOCK_P // BLOCK_W) + p // BLOCK_W
    x = (tile % tiles).to(tl.int64) * BLOCK_W + p % BLOCK_W
    return y, x, (y < height) & (x < width)


@triton.jit
def shifted(
    t, scale_ptr, noise_ptr, b_ptr, n, y, x, c, there, known, channels,
    stride_nn, stride_nc, stride_nh, stride_nw, FULL: tl.constexpr,
):  # fmt: skip
    """t scale + noise + b, for pixels that are there and channels that are known."""
    if scale_ptr is not None:
        t *= tl.load(scale_ptr + n * channels + c, known, 0.0).to(tl.float32)[None, :]
    if noise_ptr is not None:
        noise_ptr += n * stride_nn + y * stride_nh + x * stride_nw
        if FULL:
            inside = there[:, None] & known[None, :]
            noise = tl.load(noise_ptr[:, None] + (c * stride_nc)[None, :], inside, 0.0)
        else:
            noise = tl.load(noise_ptr, there, 0.0)[:, None]
        t += noise.to(tl.float32)
    if b_ptr is not None:
        t += tl.load(b_ptr + c, known, 0.0).to(tl.float32)[None, :]
    return t


@triton.jit
def filtered_bias_act_kernel(
    out_ptr, x_ptr, f_ptr, scale_ptr, noise_ptr, b_ptr, next_ptr,
    channels, height, width, out_h, out_w, top, left, fir_gain, alpha, gain, clamp,
    stride_xn, stride_xc, stride_xh, stride_xw, to_01, to_10, to_11,  # elements from image to phases
    stride_nn, stride_nc, stride_nh, stride_nw,
    stride_on, stride_oc, stride_oh, stride_ow,
    UP: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    FULL: tl.constexpr,  # noise of every channel
    ACT: tl.constexpr, CLAMPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(out_h, BLOCK_P // BLOCK_W) * tl.cdiv(out_w, BLOCK_W)
    n = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    y, x, there = tile_of_pixels(tl.program_id(0) // blocks % tiles, out_h, out_w, BLOCK_P, BLOCK_W)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inside = there[:, None] & known[None, :]
    t = filtered(
        x_ptr, f_ptr, n, y, x, c, inside, channels, height, width, top, left, fir_gain,
        stride_xn, stride_xc, stride_xh, stride_xw, to_01, to_10, to_11, UP, FH, FW, SEPARABLE, FLIP,
    )  # fmt: skip
    v = shifted(
        t, scale_ptr, noise_ptr, b_ptr, n, y, x, c, there, known, channels,
        stride_nn, stride_nc, stride_nh, stride_nw, FULL,
    )  # fmt: skip
    v = clamped(activation(v, alpha, ACT) * gain, clamp, CLAMPS)
    if next_ptr is not None:
        v *= tl.load(next_ptr + n * channels + c, known, 0.0).to(tl.float32)[None, :]
    at = (n * stride_on + y * stride_oh + x * stride_ow)[:, None] + c[None, :] * stride_oc
    tl.store(out_ptr + at, narrowed(v, out_ptr.dtype.element_ty), inside)


@triton.jit
def sum_of_pixels(v, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """By rows, for short sums round less."""
    return tl.sum(tl.sum(tl.reshape(v, [BLOCK_P // BLOCK_W, BLOCK_W, BLOCK_C]), 1), 0)


@triton.jit
def filtered_bias_act_bwd_kernel(
    dt_ptr, sums_ptr, d_noise_ptr, dy_ptr, x_ptr, f_ptr, scale_ptr, noise_ptr, b_ptr,
    channels, height, width, out_h, out_w, top, left, fir_gain, alpha, gain, clamp, plane,
    stride_dn, stride_dc, stride_dh, stride_dw,
    stride_xn, stride_xc, stride_xh, stride_xw, to_01, to_10, to_11,  # elements from image to phases
    stride_nn, stride_nc, stride_nh, stride_nw,
    UP: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    FULL: tl.constexpr, ACT: tl.constexpr, CLAMPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All channels of a tile of pixels. Into sums go, for every tile and channel, those of g t and of g."""
    tiles = tl.cdiv(out_h, BLOCK_P // BLOCK_W) * tl.cdiv(out_w, BLOCK_W)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    y, x, there = tile_of_pixels(tl.program_id(0) % tiles, out_h, out_w, BLOCK_P, BLOCK_W)
    pixel = (n * out_h + y) * out_w + x
    d_noise = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = tl.arange(0, BLOCK_C).to(tl.int64) + first
        known = c < channels
        inside = there[:, None] & known[None, :]
        t = filtered(
            x_ptr, f_ptr, n, y, x, c, inside, channels, height, width, top, left, fir_gain,
            stride_xn, stride_xc, stride_xh, stride_xw, to_01, to_10, to_11, UP, FH, FW, SEPARABLE, FLIP,
        )  # fmt: skip
        v = shifted(
            t, scale_ptr, noise_ptr, b_ptr, n, y, x, c, there, known, channels,
            stride_nn, stride_nc, stride_nh, stride_nw, FULL,
        )  # fmt: skip
        at = (n * stride_dn + y * stride_dh + x * stride_dw)[:, None] + c[None, :] * stride_dc
        g = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32) * gain
        if ACT != "linear":
            g *= slope(v, alpha, ACT)
        if CLAMPS:
            g = tl.where(tl.abs(activation(v, alpha, ACT) * gain) < clamp, g, 0.0)
        g = tl.where(inside, g, 0.0)
        own = sums_ptr + tl.program_id(0).to(tl.int64) * channels + c
        tl.store(own, sum_of_pixels(tl.where(inside, g * t, 0.0), BLOCK_P, BLOCK_W, BLOCK_C), known)
        tl.store(own + plane, sum_of_pixels(g, BLOCK_P, BLOCK_W, BLOCK_C), known)
        at = pixel[:, None] * channels + c[None, :]
        if FULL:
            tl.store(d_noise_ptr + at, g, inside)
        elif noise_ptr is not None:
            d_noise += tl.sum(g, 1)
        if scale_ptr is not None:
            g *= tl.load(scale_ptr + n * channels + c, known, 0.0).to(tl.float32)[None, :]
        tl.store(dt_ptr + at, narrowed(g, dt_ptr.dtype.element_ty), inside)
    if noise_ptr is not None and not FULL:
        tl.store(d_noise_ptr + pixel, d_noise, there)


def _like_images(*shape, x: Tensor, dtype=None) -> Tensor:
    dtype = dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _arguments(x: list[Tensor], f, padding, flip_filter, scale, noise, act, clamp, tile=CONFIGS[0]["tile"]):
    """What both kernels take: images, where they are, scale, sizes, and what is constant."""
    up = 1 if len(x) == 1 else 2
    height, width = (x[0].shape[i] + (x[-1].shape[i] if up == 2 else 0) for i in (2, 3))
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    out_h, out_w = height + sum(padding[2:]) - fh + 1, width + sum(padding[:2]) - fw + 1
    bytes_each = x[0].element_size()
    # Phases are of several sizes; in channels_last the kernels know their strides.
    x = x if up == 1 else [p.contiguous(memory_format=torch.channels_last) for p in x]
    to = [(p.data_ptr() - x[0].data_ptr()) // bytes_each for p in x[1:]] or [0] * 3
    block_c = min(PIXEL // bytes_each, triton.next_power_of_2(x[0].shape[1]))
    block_p = tile // bytes_each // block_c
    side = 1 << block_p.bit_length() // 2
    constants = {
        "UP": up, "FH": fh, "FW": fw, "SEPARABLE": f is not None and f.ndim == 1, "FLIP": flip_filter,
        "FULL": noise is not None and noise.shape[1] != 1, "ACT": act, "CLAMPS": clamp >= 0,
        "BLOCK_P": block_p, "BLOCK_C": block_c,
        "BLOCK_W": min(triton.next_power_of_2(out_w), block_p if fh == fw == 1 else side),
    }  # fmt: skip
    sizes = [height, width, out_h, out_w, padding[2], padding[0]]
    return x, [*x[0].stride(), *to], packed(scale), sizes, constants


def noise_strides(noise: Tensor | None) -> list[int]:
    if noise is None:
        return [0] * 4
    return [0 if size == 1 else stride for size, stride in zip(noise.shape, noise.stride(), strict=True)]


def _is_served(x: list[Tensor], f: Tensor | None, *others: Tensor | None) -> bool:
    return serves(*x, *others) and (f is None or f.shape[0] * f.shape[-1] <= MOST_TAPS)


def filtered_bias_act(
    x, f, padding, flip_filter, fir_gain, scale, noise, b, act, alpha, gain, clamp, next, contiguous
):
    if not _is_served(x, f, scale, noise, b, next):
        return NotImplemented
    (n, c, *phase), like = x[0].shape, x[0]

    def launch(config):
        images, place, scales, sizes, constants = _arguments(
            x, f, padding, flip_filter, scale, noise, act, clamp, config["tile"]
        )
        out_h, out_w = sizes[2:4]
        out = like.new_empty(n, c, out_h, out_w) if contiguous else _like_images(n, c, out_h, out_w, x=like)
        if contiguous:
            # Its neighbours in memory are along a row.
            constants["BLOCK_W"] = min(triton.next_power_of_2(out_w), constants["BLOCK_P"])
        tiles = triton.cdiv(out_h, constants["BLOCK_P"] // constants["BLOCK_W"])
        tiles *= triton.cdiv(out_w, constants["BLOCK_W"]) * triton.cdiv(c, constants["BLOCK_C"])
        filtered_bias_act_kernel[(n * tiles,)](
            out, images[0], packed(f), scales, noise, packed(b), packed(next), c, *sizes, fir_gain, alpha,
            gain, clamp, *place, *noise_strides(noise), *out.stride(), **constants,
            num_warps=config["num_warps"], maxnreg=registers(config["num_warps"]),
        )  # fmt: skip
        return out

    taps = 0 if f is None else f.numel()
    key = "filtered_bias_act", like.dtype, len(x), taps, act, contiguous, size_class(n, c, *phase)
    return tuned(key, CONFIGS, launch)


def filtered_bias_act_bwd(dy, x, f, padding, flip_filter, fir_gain, scale, noise, b, act, alpha, gain, clamp):
    if not _is_served(x, f, dy, scale, noise, b):
        return NotImplemented
    n, c, out_h, out_w = dy.shape
    images, place, scale, sizes, constants = _arguments(x, f, padding, flip_filter, scale, noise, act, clamp)
    tiles = triton.cdiv(out_h, constants["BLOCK_P"] // constants["BLOCK_W"])
    tiles *= triton.cdiv(out_w, constants["BLOCK_W"])
    shape = (0, 1) if noise is None else (n, noise.shape[1])
    dt, d_noise = _like_images(*dy.shape, x=dy), _like_images(*shape, out_h, out_w, x=dy, dtype=torch.float32)
    sums = dy.new_empty(2, n, tiles, c, dtype=torch.float32)
    filtered_bias_act_bwd_kernel[(n * tiles,)](
        dt, sums, d_noise, dy, images[0], packed(f), scale, noise, packed(b), c, *sizes,
        fir_gain, alpha, gain, clamp,
        sums[0].numel(), *dy.stride(), *place, *noise_strides(noise), **constants, num_warps=8,
    )  # fmt: skip
    d_scale, d_b = sums.sum(2)
    return dt, d_scale, d_noise, d_b.sum(0)


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    scale, b, f = torch.empty(1, 128), torch.empty(128), torch.empty(4, 4)
    noise = torch.empty(1, 1, 128, 128)
    up = [torch.empty(1, 128, 65 - i, 65 - j, dtype=dtype) for i in (0, 1) for j in (0, 1)]
    up = [p.contiguous(memory_format=torch.channels_last) for p in up]
    whole = torch.empty(1, 128, 129, 129, dtype=dtype).contiguous(memory_format=torch.channels_last)
    plain = whole[:, :, :128, :128].contiguous(memory_format=torch.channels_last)
    act = "lrelu", 0.2, 1.4, 256.0
    filter_args = f, [1] * 4, False, 4.0, scale, noise, b, *act
    plain_args = None, [0] * 4, False, 1.0, scale, noise, b, *act
    for x, args in ((up, filter_args), ([whole], filter_args), ([plain], plain_args)):
        for contiguous in (False, True):
            yield lambda x=x, args=(*args, None, contiguous): filtered_bias_act(x, *args)
        yield lambda x=x, args=args: filtered_bias_act_bwd(plain, x, *args)
