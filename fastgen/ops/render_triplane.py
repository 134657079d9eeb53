"""EG3D's volume renderer: sample, decode, march, importance-sample, merge, march.

Notation, per ray: samples k = 1..T at ascending depths t_k with density s_k and colour c_k; intervals
i between neighbours, with d_i = t_{i+1} - t_i and the mean s, c, t of their two ends.

    alpha_i = 1 - exp(-softplus(s_i - 1) d_i),   w_i = alpha_i prod_{j<i} (1 - alpha_j + 1e-10)
    W = sum w_i,  F = 2 (sum w_i c_i + [white_back] (1 - W)) - 1,  D = sum w_i t_i / W

Weighting the mean of two ends is weighting each end by half: with v_k = (w_{k-1} + w_k) / 2,
sum_i w_i c_i = sum_k v_k c_k, and no array of mean colours is needed.

Backward, given dF, dD, dW, at fixed depths (g = 2 dF, q_k = g . c_k):

    dw_i     = (q_i + q_{i+1}) / 2 - [white_back] sum(g) + dW + dD (t_i - D) / W
    dalpha_i = dw_i prod_{j<i} (1 - alpha_j + 1e-10) - sum_{j>i} dw_j w_j / (1 - alpha_i + 1e-10)
    ds_i     = dalpha_i d_i (1 - alpha_i) sigmoid(s_i - 1),    dc_k = v_k g

The fused op works on blocks of rays small enough to stay in cache, keeps only depths [N, R, T] between
forward and backward, and evaluates everything else again. It gathers from a channels-last copy of the
planes with a border of zeros, so that a sample is one weighted sum of 3 x 4 rows (an embedding bag).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sample_triplane import projection, sample_triplane

# Samples decoded at a time.
_BLOCK = {"cpu": 1 << 13, "cuda": 1 << 19}


class RenderOutput(NamedTuple):
    features: Tensor
    depth: Tensor
    weight: Tensor


def ray_limits(origins: Tensor, directions: Tensor, box_warp: float) -> tuple[Tensor, Tensor]:
    """Depths [N, R, 1] at which rays enter and leave the cube of side box_warp around the origin."""
    a = (-box_warp / 2 - origins) / directions
    b = (box_warp / 2 - origins) / directions
    entry = torch.minimum(a, b).amax(-1, keepdim=True)
    leave = torch.maximum(a, b).amin(-1, keepdim=True)
    hit = leave > entry
    # Parity with EG3D: a ray that misses ends at the largest start. Where all miss, any finite range will do.
    some = hit.any()
    first = torch.where(some, torch.where(hit, entry, torch.inf).amin(), 0.0)
    last = torch.where(some, torch.where(hit, entry, -torch.inf).amax(), box_warp)
    return torch.where(hit, entry, first), torch.where(hit, leave, last)


def coarse_depths(start, end, u: Tensor, disparity: bool) -> Tensor:
    samples = u.shape[-1]
    t = (torch.arange(samples, device=u.device, dtype=u.dtype) + u) / (samples - 1)
    return 1 / ((1 - t) / start + t / end) if disparity else start + t * (end - start)


def importance_depths(weights: Tensor, depths: Tensor, u: Tensor) -> Tensor:
    """Depths drawn where weights [..., S-1] between depths [..., S] are large, by u [..., K] in [0, 1)."""
    peaks = torch.maximum(weights[..., 1:], weights[..., :-1])
    pdf = (peaks[..., 1:] + peaks[..., :-1]) / 2 + (0.01 + 1e-5)
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    edges = (depths[..., 1:-1] + depths[..., :-2]) / 2
    above = torch.searchsorted(cdf, u, right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=edges.shape[-1] - 1)
    c0, c1 = cdf.gather(-1, below), cdf.gather(-1, above)
    e0, e1 = edges.gather(-1, below), edges.gather(-1, above)
    width = torch.where(c1 - c0 < 1e-5, 1.0, c1 - c0)
    return e0 + (u - c0) / width * (e1 - e0)


def _softplus(x: Tensor) -> Tensor:
    # log(1 + e^x) to one rounding of 1, in half of log1p's time; above 40 it is x in every dtype.
    return torch.maximum(x, x.clamp(max=40).exp_().add_(1).log_())


def _alpha(sigma: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, light before each interval, and the light that each lets through, from sorted samples."""
    density = F.softplus((sigma[..., 1:] + sigma[..., :-1]) / 2 - 1)
    keep = torch.exp(-density * depths.diff(dim=-1))
    alpha = 1 - keep
    keep = keep + 1e-10
    return alpha, F.pad(keep[..., :-1].cumprod(-1), (1, 0), value=1.0), keep


def _weights(sigma: Tensor, depths: Tensor) -> Tensor:
    alpha, light, _ = _alpha(sigma, depths)
    return alpha * light


def _ends(w: Tensor) -> Tensor:
    return (F.pad(w, (1, 0)) + F.pad(w, (0, 1))) / 2


def _depth(total: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    depth = total / weight
    return torch.where(depth.isnan(), torch.inf, depth).clamp(low, high)


def render_triplane_reference(planes, decoder, ray_origins, ray_directions, depths, u_fine, extra, box_warp, plane_axes, white_back):
    n, r, _ = ray_origins.shape
    w1, b1, w2, b2 = decoder

    def decode(t):
        points = ray_origins[:, :, None] + t[..., None] * ray_directions[:, :, None]
        x = sample_triplane(planes, points.flatten(1, 2), box_warp, plane_axes, reduce="mean")
        x = F.linear(F.softplus(F.linear(x, w1, b1)), w2, b2).view(n, r, t.shape[-1], -1)
        return x[..., 0], x[..., 1:].sigmoid() * 1.002 - 0.001

    sigma, colour = decode(depths)
    if extra:
        with torch.no_grad():
            fine = importance_depths(_weights(sigma, depths), depths, u_fine)
        fine_sigma, fine_colour = decode(fine)
        depths, order = torch.cat([depths, fine], -1).sort(-1)
        sigma = torch.cat([sigma, fine_sigma], -1).gather(-1, order)
        colour = torch.cat([colour, fine_colour], -2)
        colour = colour.gather(-2, order[..., None].expand_as(colour))
    w = _weights(sigma, depths)
    weight = w.sum(-1, keepdim=True)
    v = _ends(w)
    features = (v[..., None, :] @ colour)[..., 0, :]
    if white_back:
        features = features + 1 - weight
    depth = _depth((v * depths).sum(-1, keepdim=True), weight, depths.amin(), depths.amax())
    return features * 2 - 1, depth, weight


class _Scene:
    """Planes as a table of rows with a border of zeros, rays in plane pixels, and the decoder."""

    def __init__(self, planes, decoder, ray_origins, ray_directions, matrix):
        n, p, c, self.h, self.w = planes.shape
        dtype = ray_origins.dtype
        table = planes.new_zeros(n, p, self.h + 3, self.w + 3, c, dtype=dtype)
        table[:, :, 1:-2, 1:-2] = planes.permute(0, 1, 3, 4, 2)
        self.shape, self.table = table.shape, table.view(-1, c)
        self.w1, self.b1, self.w2, self.b2 = (t.to(dtype) for t in decoder)
        m = torch.tensor(matrix, dtype=dtype).view(6, 3).to(planes.device)
        size = torch.tensor([self.w / 2, self.h / 2] * 3, dtype=dtype).to(planes.device)
        # Column -1, the first of the border, gets index 0.
        self.origin = ((ray_origins.reshape(-1, 1, 3) * m).sum(-1) + 1) * size + 0.5
        self.direction = (ray_directions.reshape(-1, 1, 3) * m).sum(-1) * size
        rays = ray_origins.shape[1]
        plane = (self.h + 3) * (self.w + 3)
        self.base = torch.arange(n, device=planes.device).repeat_interleave(rays).mul_(3 * plane)
        self.step = torch.arange(3, device=planes.device).mul_(plane)

    def corners(self, rays: slice, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows [M, 12] and their weights for samples at depths [r, T]."""
        xy = torch.addcmul(self.origin[rays, None], self.direction[rays, None], depths[..., None]).view(*depths.shape, 3, 2)
        index, fraction = [], []
        for axis, size in ((0, self.w), (1, self.h)):
            x = xy[..., axis].clamp(0, size + 1)
            # NaN turns into any integer: clamped again, it stays in the weights only.
            i = x.long().clamp_(0, size + 1)
            index.append(i)
            fraction.append(x - i)
        (i, j), (fx, fy) = index, fraction
        first = j.mul_(self.w + 3).add_(i).add_(self.step).add_(self.base[rays, None, None])
        rows = torch.stack([first, first + 1, first + self.w + 3, first + self.w + 4], -1)
        fy = fy / 3
        gy = 1 / 3 - fy
        right, low = gy * fx, fy * fx
        weights = torch.stack([gy - right, right, fy - low, low], -1)
        return rows.view(-1, 12), weights.view(-1, 12)

    def decode(self, rows: Tensor, weights: Tensor, shape) -> tuple[Tensor, ...]:
        x = F.embedding_bag(rows, self.table, mode="sum", per_sample_weights=weights)
        h = _softplus(torch.addmm(self.b1, x, self.w1.t()))
        sigma = (h @ self.w2[0] + self.b2[0]).view(shape)
        gate = torch.addmm(self.b2[1:], h, self.w2[1:].t()).sigmoid_().view(*shape, -1)
        return x, h, sigma, gate


def _blocks(rays: int, samples: int, device):
    step = max(1, _BLOCK.get(device.type, 1 << 16) // samples)
    return [slice(i, min(i + step, rays)) for i in range(0, rays, step)]


def _forward(planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, extra, matrix, white_back):
    n, r, _ = ray_origins.shape
    s = depths.shape[-1]
    scene = _Scene(planes, (w1, b1, w2, b2), ray_origins, ray_directions, matrix)
    coarse = depths.reshape(n * r, s)
    features = planes.new_empty(n * r, w2.shape[0] - 1, dtype=coarse.dtype)
    weight, total = coarse.new_empty(2, n * r, 1)
    kept = coarse.new_empty(n * r, s + extra)
    if extra:
        u_fine = u_fine.reshape(n * r, extra)
    for rays in _blocks(n * r, s + extra, planes.device):
        t = coarse[rays]
        *_, sigma, gate = scene.decode(*scene.corners(rays, t), t.shape)
        if extra:
            fine = importance_depths(_weights(sigma, t), t, u_fine[rays].contiguous())
            *_, fine_sigma, fine_gate = scene.decode(*scene.corners(rays, fine), fine.shape)
            t, order = torch.cat([t, fine], -1).sort(-1)
            w = _weights(torch.cat([sigma, fine_sigma], -1).gather(-1, order), t)
            # Rather than the colours, sort their weights back.
            v = _ends(w)
            total[rays] = (v * t).sum(-1, keepdim=True)
            v = torch.empty_like(v).scatter_(-1, order, v)
            out = (v[:, None, :s] @ gate).baddbmm_(v[:, None, s:], fine_gate)[:, 0]
        else:
            w = _weights(sigma, t)
            v = _ends(w)
            total[rays] = (v * t).sum(-1, keepdim=True)
            out = (v[:, None] @ gate)[:, 0]
        ws = w.sum(-1, keepdim=True)
        weight[rays], kept[rays] = ws, t
        # 2 (1.002 sum v gate - 0.001 W + [white] (1 - W)) - 1
        constant, slope = (1.0, -2.002) if white_back else (-1.0, -0.002)
        features[rays] = out.mul_(2.004).add_(slope * ws + constant)
    depth = _depth(total, weight, kept.amin(), kept.amax()) if kept.numel() else total
    return features.view(n, r, -1), depth.view(n, r, 1), weight.view(n, r, 1), kept.view(n, r, -1)


def _backward(df, dd, dw, planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, matrix, white_back):
    n, r, _ = ray_origins.shape
    scene = _Scene(planes, (w1, b1, w2, b2), ray_origins, ray_directions, matrix)
    samples = depths.shape[-1]
    depths = depths.reshape(n * r, samples)
    df, dd, dw = (g.reshape(n * r, -1).to(depths.dtype) for g in (df, dd, dw))
    low, high = depths.amin(), depths.amax()
    d_table = torch.zeros_like(scene.table)
    d_w1, d_b1, d_w2, d_b2 = (torch.zeros_like(t) for t in (scene.w1, scene.b1, scene.w2, scene.b2))
    for rays in _blocks(n * r, samples, planes.device):
        t, g = depths[rays], 2 * df[rays]
        rows, corner = scene.corners(rays, t)
        x, h, sigma, gate = scene.decode(rows, corner, t.shape)
        alpha, light, keep = _alpha(sigma, t)
        w = alpha * light
        v = _ends(w)
        weight = w.sum(-1, keepdim=True)
        g_sum = g.sum(-1, keepdim=True)
        q = (gate @ g[..., None])[..., 0] * 1.002
        d_weights = (q[:, 1:] + q[:, :-1]) / 2 + dw[rays] - (1.001 if white_back else 0.001) * g_sum
        depth = (v * t).sum(-1, keepdim=True) / weight
        # Outside the clamp, and where nothing was hit, depth is constant.
        d_depth = torch.where((depth >= low) & (depth <= high), dd[rays] / weight, 0.0)
        middle = (t[:, 1:] + t[:, :-1]) / 2
        d_weights = d_weights + torch.where(d_depth == 0, 0.0, d_depth * (middle - depth))
        after = (d_weights * w).flip(-1).cumsum(-1).flip(-1)[:, 1:]
        d_alpha = d_weights * light - F.pad(after, (0, 1)) / keep
        mean = (sigma[:, 1:] + sigma[:, :-1]) / 2 - 1
        d_sigma = _ends(d_alpha * t.diff(dim=-1) * (1 - alpha) * mean.sigmoid()).view(-1, 1)

        d_gate = (gate - gate.square()).mul_((v[..., None] * 1.002) * g[:, None]).flatten(0, 1)
        d_h = (d_gate @ scene.w2[1:]).addmm_(d_sigma, scene.w2[:1])
        d_w2[0] += (d_sigma.t() @ h)[0]
        d_w2[1:].addmm_(d_gate.t(), h)
        d_b2[0] += d_sigma.sum()
        d_b2[1:] += d_gate.sum(0)
        # softplus' = 1 - exp(-softplus)
        d_h.addcmul_(d_h, h.neg_().exp_(), value=-1)
        d_w1.addmm_(d_h.t(), x)
        d_b1 += d_h.sum(0)
        d_x = d_h @ scene.w1
        for k in range(12):
            d_table.index_add_(0, rows[:, k], d_x * corner[:, k, None])
    d_planes = d_table.view(scene.shape)[:, :, 1:-2, 1:-2].permute(0, 1, 4, 2, 3).to(planes.dtype, copy=True)
    return tuple(d.to(p.dtype) for d, p in zip((d_planes.contiguous(), d_w1, d_b1, d_w2, d_b2), (planes, w1, b1, w2, b2)))


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planes, w1, b1, w2, b2, o, d, depths, u, extra, matrix, white):
        *out, kept = _forward(planes, w1, b1, w2, b2, o, d, depths, u, extra, matrix, white)
        ctx.save_for_backward(planes, w1, b1, w2, b2, o, d, kept)
        ctx.rest = matrix, white
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        return (*_backward(*grads, *ctx.saved_tensors, *ctx.rest), *[None] * 7)


def _arguments(options, ray_origins, ray_directions, u_coarse, u_fine):
    def option(name, default=None):
        value = options.get(name) if hasattr(options, "get") else getattr(options, name, None)
        return default if value is None else value

    n, r, _ = ray_origins.shape
    samples, extra = option("depth_resolution"), option("depth_resolution_importance", 0)
    box_warp, axes = option("box_warp", 1.0), option("plane_axes", "eg3d")
    start, end = option("ray_start"), option("ray_end")
    if start == "auto":
        start, end = ray_limits(ray_origins, ray_directions, box_warp)
    u = ray_origins.new_full((1, 1, samples), 0.5) if u_coarse is None else u_coarse.reshape(n, r, samples)
    depths = coarse_depths(start, end, u, option("disparity_space_sampling", False)).expand(n, r, samples)
    if u_fine is None and extra:
        u_fine = (torch.arange(extra, device=u.device, dtype=u.dtype) + 0.5) / extra
    u_fine = u_fine.expand(n, r, extra).contiguous() if extra else None
    return depths, u_fine, extra, box_warp, axes, option("white_back", False)


def render_reference(planes, decoder, ray_origins, ray_directions, options, u_coarse=None, u_fine=None):
    args = _arguments(options, ray_origins, ray_directions, u_coarse, u_fine)
    return RenderOutput(*render_triplane_reference(planes, decoder, ray_origins, ray_directions, *args))


def render_triplane(
    planes: Tensor, decoder, ray_origins: Tensor, ray_directions: Tensor, options, u_coarse: Tensor | None = None,
    u_fine: Tensor | None = None,
) -> RenderOutput:
    depths, u, extra, box_warp, axes, white = _arguments(options, ray_origins, ray_directions, u_coarse, u_fine)
    return RenderOutput(*_Render.apply(
        planes, *decoder, ray_origins, ray_directions, depths, u, extra, projection(axes, box_warp), white
    ))
