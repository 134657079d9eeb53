"""render_triplane and its gradient.

The forward is one kernel, a program of which takes whole rays. Colours stay where they were decoded: sorting
moves depths and densities, and weights back.

The backward knows the sorted depths and evaluates everything else again, in two kernels. The first takes
whole rays, and leaves each sample's weight and gradient of density. The second takes blocks of samples, keeps
sums of the decoder's gradients over many of them, and adds planes' gradients up by atomics.
"""

import torch
import triton
import triton.language as tl

from .common import narrowed, precision, registers, serves, sigmoid, size_class, tuned, widened
from .rays import (
    UNITS,
    concatenated,
    ends,
    following,
    gates,
    hidden,
    importance_depths,
    in_order,
    line_of,
    located,
    march,
    merged,
    sampled,
    shaded,
    take,
)
from .sample_triplane import SCALE, addressable, channels_last, corner, point_at, shares

# How many samples a ray may have, how wide the decoder's layers may be, and how much both together: shared
# memory holds tiles of so many numbers.
LONGEST, WIDEST, LARGEST = 256, 128, 8192
# Samples that are decoded together: by a program with whole rays, at the least those of one; by others.
ROWS, BLOCK_M = 128, 64
# Rays of a program of the forward, in those that make ROWS.
CONFIGS = [{"rays": rays, "num_warps": warps} for rays, warps in ((1, 8), (0.5, 8))]
# Programs of the backward's second kernel.
PROGRAMS = 512
# Whether those of GROUP consecutive samples that are in one cell are added up before planes' gradients are
# added to: the backward waits for its atomics most.
REDUCE, GROUP = True, tl.constexpr(16)


@triton.jit
def render_triplane_kernel(
    features_ptr, depth_ptr, weight_ptr, kept_ptr, planes_ptr, strides, matrix, height, width, decoder,
    origins_ptr, directions_ptr, depths_ptr, u_ptr, rays, per_image,
    WHITE: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Features, mean depth, weight and sorted depths of rays; S samples, and K more where those say."""
    T: tl.constexpr = S + K
    planes = planes_ptr, strides, matrix, height, width
    ray = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    given, image = ray < rays, ray // per_image
    origin, direction = point_at(origins_ptr, ray, given), point_at(directions_ptr, ray, given)
    i = tl.arange(0, BLOCK_S)[None, :]
    valid = given & (i < S)
    t = tl.load(depths_ptr + ray * S + i, valid, 0.0)
    sigma, gate = shaded(
        planes, decoder, image, origin, direction, t, valid, FINE, COARSE, F, D, C, BLOCK_F, BLOCK_D, BLOCK_C
    )
    alpha, light, _ = march(sigma, t, S)
    w = alpha * light
    if K == 0:
        a, v = i, ends(w)
        out = tl.sum(gate * v[:, :, None], 1)
    else:
        k = tl.arange(0, BLOCK_K)[None, :]
        valid = given & (k < K)
        fine = in_order(importance_depths(w, t, tl.load(u_ptr + ray * K + k, valid, 0.0), S), valid)
        sigma_fine, gate_fine = shaded(
            planes, decoder, image, origin, direction, fine, valid, FINE, COARSE,
            F, D, C, BLOCK_F, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        START: tl.constexpr = BLOCK_T - BLOCK_K
        a = tl.arange(0, BLOCK_T)[None, :]
        rank, order = merged(t, fine, S, K, BLOCK_T)
        t, sigma = concatenated(t, fine, S, BLOCK_T), concatenated(sigma, sigma_fine, S, BLOCK_T)
        t, sigma = take(t, order), take(sigma, order)
        alpha, light, _ = march(sigma, t, T)
        w = alpha * light
        v = ends(w)
        # Rather than the colours, their weights go back.
        back = take(v, rank)
        out = tl.sum(gate * tl.where(i < S, take(back, i), 0.0)[:, :, None], 1)
        out += tl.sum(gate_fine * tl.where(k < K, take(back, k + START), 0.0)[:, :, None], 1)

    weight = tl.sum(w, 1)[:, None]
    depth = tl.sum(tl.where(a < T, v * t, 0.0), 1)[:, None] / tl.where(weight == 0, 1.0, weight)
    depth = tl.where((weight == 0) | (depth != depth), float("inf"), depth)
    # 2 (sum v (1.002 gate - 0.001) + [white_back] (1 - W)) - 1
    out = 2.004 * out + (1 - 2.002 * weight if WHITE else -1 - 0.002 * weight)
    c = tl.arange(0, BLOCK_C)[None, :]
    tl.store(features_ptr + ray * C + c, narrowed(out, features_ptr.dtype.element_ty), given & (c < C))
    tl.store(depth_ptr + ray, depth, given)
    tl.store(weight_ptr + ray, weight, given)
    tl.store(kept_ptr + ray * T + a, t, given & (a < T))


@triton.jit
def render_triplane_bwd_rays_kernel(
    v_ptr, d_sigma_ptr, lines_ptr, df_ptr, dd_ptr, dw_ptr, planes_ptr, strides, matrix, height, width,
    decoder, origins_ptr, directions_ptr, depths_ptr, rays, per_image,
    WHITE: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of S sorted samples of rays, weights v and gradients of density; and lines, the rays on planes."""
    planes = planes_ptr, strides, matrix, height, width
    ray = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    given, image = ray < rays, ray // per_image
    origin, direction = point_at(origins_ptr, ray, given), point_at(directions_ptr, ray, given)
    for plane in range(3):
        u, v, du, dv = line_of(planes, origin, direction, plane)
        at = lines_ptr + (ray * 3 + plane) * 4
        tl.store(at, u, given)
        tl.store(at + 1, v, given)
        tl.store(at + 2, du, given)
        tl.store(at + 3, dv, given)
    i, c = tl.arange(0, BLOCK_S)[None, :], tl.arange(0, BLOCK_C)[None, :]
    valid = given & (i < S)
    t = tl.load(depths_ptr + ray * S + i, valid, 0.0)
    sigma, gate = shaded(
        planes, decoder, image, origin, direction, t, valid, FINE, COARSE, F, D, C, BLOCK_F, BLOCK_D, BLOCK_C
    )
    alpha, light, keep = march(sigma, t, S)
    w = alpha * light
    v = ends(w)
    tl.store(v_ptr + ray * S + i, v, valid)

    g = 2 * widened(tl.load(df_ptr + ray * C + c, given & (c < C), 0.0))
    q = tl.sum(gate * g[:, None, :], 2) * 1.002
    d_weights = (following(q) + q) * 0.5 + tl.load(dw_ptr + ray, given, 0.0)
    d_weights -= (1.001 if WHITE else 0.001) * tl.sum(g, 1)[:, None]
    weight = tl.sum(w, 1)[:, None]
    depth = tl.sum(v * t, 1)[:, None] / weight
    # The mean of a ray's depths stays within them; where it is NaN, nothing depends on the weights.
    d_depth = tl.where(depth != depth, 0.0, tl.load(dd_ptr + ray, given, 0.0) / weight)
    d_weights += d_depth * ((following(t) + t) * 0.5 - tl.where(depth != depth, 0.0, depth))
    inside = i < S - 1
    dw_w = tl.where(inside, d_weights * w, 0.0)
    d_alpha = d_weights * light - (tl.cumsum(dw_w, 1, reverse=True) - dw_w) / keep
    slope = sigmoid((sigma + following(sigma)) * 0.5 - 1)
    d_sigma = d_alpha * (following(t) - t) * (1 - alpha) * slope
    tl.store(d_sigma_ptr + ray * S + i, ends(tl.where(inside, d_sigma, 0.0)), valid)


@triton.jit
def loaded_line(lines_ptr, ray, valid, plane):
    at = lines_ptr + (ray * 3 + plane) * 4
    u, v = tl.load(at, valid, 0.0), tl.load(at + 1, valid, 0.0)
    return u, v, tl.load(at + 2, valid, 0.0), tl.load(at + 3, valid, 0.0)


@triton.jit
def scatter(
    d_ptr, strides, planes, image, line, t, valid, d_x, f, plane,
    F: tl.constexpr, PRECISION: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Adds d_x [M, F] times the corners' shares to a plane."""
    M: tl.constexpr = d_x.shape[0]
    BLOCK_F: tl.constexpr = d_x.shape[1]
    _, _, _, height, width = planes
    i, j, a, b = located(planes, line, t)
    last = tl.ravel(valid)
    if REDUCE:
        # Only the last of a group's samples in one cell adds what all of them have.
        place = tl.reshape(j * (width + 3) + i, [M // GROUP, GROUP])
        # Those that are not there are in no image.
        number = tl.reshape(tl.where(valid, image, -1), [M // GROUP, GROUP])
        same = (place[:, :, None] == place[:, None, :]) & (number[:, :, None] == number[:, None, :])
        n = tl.arange(0, GROUP)
        # What is not finite is added alone, for it would reach others as 0 NaN.
        finite = tl.sum((tl.abs(d_x) < float("inf")).to(tl.int32), 1)
        alone = tl.reshape(finite < BLOCK_F, [M // GROUP, GROUP])
        same &= (n[:, None] == n[None, :])[None, :, :] | ~(alone[:, :, None] | alone[:, None, :])
        later = same & (n[:, None] < n[None, :])[None, :, :]
        last &= tl.ravel(tl.sum(later.to(tl.int32), 2)) == 0
    image = tl.ravel(image * strides[0])
    for k in tl.static_range(4):
        wa, wb = shares(a, b, k)
        if REDUCE:
            share = tl.where(same, tl.reshape(wa * wb, [M // GROUP, GROUP])[:, None, :], 0.0)
            own = tl.ravel(alone)[:, None]
            value = tl.reshape(tl.where(own, 0.0, d_x), [M // GROUP, GROUP, BLOCK_F])
            value = tl.reshape(tl.dot(share, value, input_precision=PRECISION), [M, BLOCK_F])
            value = tl.where(own, (wa * wb)[:, None] * d_x, value)
        else:
            value = (wa * wb)[:, None] * d_x
        at, inside = corner(d_ptr, strides, image, i, j, f, height, width, plane, k)
        tl.atomic_add(at, value, last[:, None] & inside & (f < F), sem="relaxed")


@triton.jit
def render_triplane_bwd_samples_kernel(
    d_planes_ptr, d_strides, sums_ptr, v_ptr, d_sigma_ptr, lines_ptr, df_ptr,
    planes_ptr, strides, matrix, height, width, decoder, depths_ptr, samples, per_image,
    PRECISION: tl.constexpr, REDUCE: tl.constexpr,
    S: tl.constexpr, F: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds to planes' gradients, and to a program's sums of those of w1, b1, w2, b2."""
    planes = planes_ptr, strides, matrix, height, width
    BLOCK: tl.constexpr = min(UNITS, BLOCK_D)
    f, c = tl.arange(0, BLOCK_F)[None, :], tl.arange(0, BLOCK_C)[None, :]
    block, unit = tl.arange(0, BLOCK_D // BLOCK), tl.arange(0, BLOCK)
    d_w1 = tl.zeros([BLOCK_D // BLOCK, BLOCK, BLOCK_F], tl.float32)
    d_w2 = tl.zeros([BLOCK_D // BLOCK, BLOCK, BLOCK_C], tl.float32)
    d_b1, d_row = (tl.zeros([BLOCK_D // BLOCK, BLOCK], tl.float32),) * 2
    d_b2, d_density = tl.zeros([BLOCK_C], tl.float32), 0.0
    sums_ptr += tl.program_id(0) * (D * (F + 1) + (C + 1) * (D + 1))
    d_b1_ptr, d_w2_ptr, d_b2_ptr = sums_ptr + D * F, sums_ptr + D * (F + 1), sums_ptr + D * (F + C + 2)
    for step in range(tl.program_id(0), tl.cdiv(samples, BLOCK_M), tl.num_programs(0)):
        sample = step * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        valid, ray = sample < samples, sample // S
        image = ray // per_image
        t = tl.load(depths_ptr + sample, valid, 0.0)
        x = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for plane in range(3):
            line = loaded_line(lines_ptr, ray, valid, plane)
            x += sampled(planes, image, line, t, valid & (f < F), f, plane)
        x *= 1 / 3
        colour = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for first in range(0, D, BLOCK):
            h, _, _, w2 = hidden(decoder, x, first + unit, PRECISION, F, D, C, BLOCK_F, BLOCK_C)
            colour = tl.dot(h, tl.trans(w2), colour, input_precision=PRECISION)
        gate = gates(decoder, colour, C)
        df = widened(tl.load(df_ptr + ray * C + c, valid & (c < C), 0.0))
        d_gate = (gate - gate * gate) * (2.004 * tl.load(v_ptr + sample, valid, 0.0) * df)
        d_sigma = tl.load(d_sigma_ptr + sample, valid, 0.0)
        d_density += tl.sum(d_sigma)
        d_b2 += tl.sum(d_gate, 0)
        d_x = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for first in range(0, D, BLOCK):
            d = first + unit
            h, w1, row, w2 = hidden(decoder, x, d, PRECISION, F, D, C, BLOCK_F, BLOCK_C)
            here = (block == first // BLOCK)[:, None]
            d_w2 += tl.where(
                here[:, :, None], tl.dot(tl.trans(h), d_gate, input_precision=PRECISION)[None], 0.0
            )
            d_row += tl.where(here, tl.sum(h * d_sigma, 0)[None, :], 0.0)
            # The derivative of softplus is 1 - exp(-softplus).
            d_h = (tl.dot(d_gate, w2, input_precision=PRECISION) + d_sigma * row) * (1 - tl.exp(-h))
            d_w1 += tl.where(here[:, :, None], tl.dot(tl.trans(d_h), x, input_precision=PRECISION)[None], 0.0)
            d_b1 += tl.where(here, tl.sum(d_h, 0)[None, :], 0.0)
            d_x = tl.dot(d_h, w1, d_x, input_precision=PRECISION)
        d_x *= 1 / 3
        for plane in range(3):
            line = loaded_line(lines_ptr, ray, valid, plane)
            scatter(
                d_planes_ptr, d_strides, planes, image, line, t, valid, d_x, f, plane, F, PRECISION, REDUCE
            )

    d = block[:, None] * BLOCK + unit[None, :]
    tl.store(d_b1_ptr + d, d_b1, d < D)
    tl.store(d_w2_ptr + d, d_row, d < D)
    tl.store(d_b2_ptr, d_density)
    tl.store(d_b2_ptr + 1 + c, d_b2[None, :], c < C)
    d, f, c = d[:, :, None], f[:, None, :], c[:, None, :]
    tl.store(sums_ptr + d * F + f, d_w1, (d < D) & (f < F))
    tl.store(d_w2_ptr + (c + 1) * D + d, d_w2, (c < C) & (d < D))


def render_triplane(
    planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, projection, white_back
):
    (n, r, s), k = depths.shape, 0 if u_fine is None else u_fine.shape[2]
    # A gather's index may not be longer than what it is of, so that S is padded to K.
    block_k = _padded(k)
    block_s, block_t = max(_padded(s), block_k), _padded(s + block_k if k else s)
    scene, rays = (planes, w1, b1, w2, b2), (ray_origins, ray_directions, depths)
    block_r = _rays_of(scene, [*rays, u_fine] if k else rays, block_s)
    if not block_r or block_t > LONGEST or (k and s < 4):
        return NotImplemented
    features = planes.new_empty(n, r, w2.shape[0] - 1)
    depth, weight = depths.new_empty(n, r, 1), depths.new_empty(n, r, 1)
    kept = depths.new_empty(n, r, s + k)
    sizes, arrays = _sizes(w1, w2), (*_scene(*scene, projection), *(x.contiguous() for x in rays))
    u_fine = u_fine.contiguous() if k else None

    def launch(config):
        block = max(1, int(block_r * config["rays"]))
        render_triplane_kernel[(triton.cdiv(n * r, block),)](
            features, depth, weight, kept, *arrays, u_fine, n * r, r,
            WHITE=white_back, FINE=precision(depths), COARSE=precision(planes), S=s, K=k,
            BLOCK_R=block, BLOCK_S=block_s, BLOCK_K=block_k, BLOCK_T=block_t, **sizes,
            num_warps=config["num_warps"], maxnreg=registers(config["num_warps"]),
        )  # fmt: skip

    key = "render_triplane", planes.dtype, s, k, *sizes.values(), size_class(n * r)
    tuned(key, CONFIGS, launch)
    # Rays that meet nothing are farthest away.
    return features, depth.clamp_(*kept.aminmax()), weight, kept


def render_triplane_bwd(
    df, dd, dw, planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, projection, white_back
):
    (n, r, s), block_s = depths.shape, _padded(depths.shape[2])
    scene, rays = (planes, w1, b1, w2, b2), (ray_origins, ray_directions, depths)
    block_r = _rays_of(scene, rays, block_s)
    if not block_r:
        return NotImplemented
    sizes = _sizes(w1, w2)
    f, d, c = sizes["F"], sizes["D"], sizes["C"]
    # Where one of the gradients is of float32, so are the products.
    products = precision(next((x for x in scene if x.dtype == torch.float32), planes))
    arrays = _scene(*scene, projection)
    origins, directions, depths, df = (x.contiguous() for x in (*rays, df))
    v, d_sigma, lines = torch.empty_like(depths), torch.empty_like(depths), depths.new_empty(n, r, 3, 4)
    render_triplane_bwd_rays_kernel[(triton.cdiv(n * r, block_r),)](
        v, d_sigma, lines, df, dd.float().contiguous(), dw.float().contiguous(), *arrays,
        origins, directions, depths, n * r, r, WHITE=white_back, FINE=precision(depths), COARSE=products,
        S=s, BLOCK_R=block_r, BLOCK_S=block_s, **sizes, num_warps=8,
    )  # fmt: skip
    d_planes = channels_last(planes)
    block_m = min(BLOCK_M, LARGEST // 2 // max(sizes["BLOCK_F"], sizes["BLOCK_C"])) * SCALE
    programs = min(PROGRAMS, triton.cdiv(n * r * s, block_m))
    sums = depths.new_empty(programs, d * (f + 1) + (c + 1) * (d + 1))
    render_triplane_bwd_samples_kernel[(programs,)](
        d_planes, d_planes.stride(), sums, v, d_sigma, lines, df, *arrays, depths, n * r * s, r,
        PRECISION=products, REDUCE=REDUCE, S=s, BLOCK_M=block_m, **sizes, num_warps=8, num_stages=1,
    )  # fmt: skip
    sums = sums.sum(0).split([d * f, d, (c + 1) * d, c + 1])
    # An op's outputs may not share memory.
    weights = (y.view(x.shape).to(x.dtype, copy=True) for x, y in zip(scene[1:], sums, strict=True))
    return planes.new_empty(planes.shape).copy_(d_planes), *weights


def _rays_of(scene, rays, block_s: int) -> int:
    """How many rays a program takes; 0 where the kernels do not serve."""
    planes, w1, _, w2, _ = scene
    width = max(_padded(w1.shape[1]), _padded(w2.shape[0] - 1))
    served = (
        serves(*scene)
        and all(x.dtype == torch.float32 and x.numel() > 0 for x in rays)
        and max(width, w1.shape[0]) <= WIDEST
        and block_s <= LONGEST
        and block_s * width <= LARGEST
        and addressable(planes)
    )
    return max(1, min(ROWS, LARGEST // width) // block_s) * SCALE if served else 0


def _scene(planes, w1, b1, w2, b2, projection) -> tuple:
    """What kernels take as planes, copied if their channels are not side by side, and as decoder."""
    if planes.stride(2) != 1:
        planes = planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    decoder = tuple(x.contiguous() for x in (w1, b1, w2, b2))
    return planes, planes.stride(), tuple(projection), *planes.shape[3:], decoder


def _sizes(w1, w2) -> dict[str, int]:
    sizes = {"F": w1.shape[1], "D": w1.shape[0], "C": w2.shape[0] - 1}
    return sizes | {f"BLOCK_{name}": _padded(size) for name, size in sizes.items()}


def _padded(size: int) -> int:
    """To a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(size))


def calls(dtype):
    """What shows every kernel, at the shapes of real generators: for cubins."""
    image = torch.empty(1, 96, 256, 256, dtype=dtype).contiguous(memory_format=torch.channels_last)
    decoder = (torch.empty(shape, dtype=dtype) for shape in ((64, 32), (64,), (33, 64), (33,)))
    scene = image.view(1, 3, 32, 256, 256), *decoder
    rays, t = (torch.empty(1, 256, 3), torch.empty(1, 256, 3)), torch.empty(1, 256, 48)
    both, df, one, projection = t.repeat(1, 1, 2), t[..., :32].to(dtype), t[..., :1], [1.0] * 18
    yield lambda: render_triplane(*scene, *rays, t, t, projection, False)
    yield lambda: render_triplane(*scene, *rays, both, None, projection, True)
    yield lambda: render_triplane_bwd(df, one, one, *scene, *rays, both, projection, False)
