"""The renderer on blocks of rays, forward and backward, each small enough to stay in cache.

Features come from a channels-last copy of the planes with a border of zeros, so that a sample is one weighted
sum of 3 x 4 rows of a table: an embedding bag. The backward knows the sorted depths and evaluates everything
else again, by the formulas of _march.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._march import alphas, ends, importance_depths, mean_depth, softplus, weights
from .sample_triplane import project

# Samples decoded at a time: what fits a core's cache, and what fills a GPU.
BLOCK = {"cpu": 1 << 13, "cuda": 1 << 19}


class _Scene:
    """Planes as a table of rows with a border of zeros, rays in pixels of the planes, and the decoder."""

    def __init__(self, planes, w1, b1, w2, b2, ray_origins, ray_directions, matrix):
        n, _, c, h, w = planes.shape
        dtype, device = ray_origins.dtype, planes.device
        self.height, self.width = h, w
        table = planes.new_zeros(n, 3, h + 3, w + 3, c, dtype=dtype)
        table[:, :, 1:-2, 1:-2] = planes.permute(0, 1, 3, 4, 2)
        self.shape, self.table = table.shape, table.view(-1, c)
        self.w1, self.b1, self.w2, self.b2 = (t.to(dtype) for t in (w1, b1, w2, b2))
        # Numbers and no tensor of them, for which the host would wait.
        pixels = [m * (w if k % 6 < 3 else h) / 2 for k, m in enumerate(matrix)]
        self.direction = project(ray_directions.reshape(-1, 3), pixels)
        self.origin = project(ray_origins.reshape(-1, 3), pixels)
        # Column -1, the first of the border, has index 0.
        self.origin[:, 0::2] += w / 2 + 0.5
        self.origin[:, 1::2] += h / 2 + 0.5
        plane = (h + 3) * (w + 3)
        image = torch.arange(n, device=device).repeat_interleave(ray_origins.shape[1])
        self.first_row = image[:, None] * 3 * plane + torch.arange(3, device=device) * plane

    def corners(self, rays: slice, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows [M, 12] and their weights, of the samples of rays at depths [r, T]."""
        xy = torch.addcmul(self.origin[rays, None], self.direction[rays, None], depths[..., None])
        x, y = xy.unflatten(-1, (3, 2)).unbind(-1)
        x, y = x.clamp(0, self.width + 1), y.clamp(0, self.height + 1)
        # NaN becomes any integer: clamped again, it stays in the weights only.
        i, j = x.long().clamp_(0, self.width + 1), y.long().clamp_(0, self.height + 1)
        x, y = x - i, (y - j) / 3
        row = j.mul_(self.width + 3).add_(i).add_(self.first_row[rays, None])
        rows = torch.stack([row, row + 1, row + self.width + 3, row + self.width + 4], -1)
        above = 1 / 3 - y
        above_right, below_right = above * x, y * x
        mix = torch.stack([above - above_right, above_right, y - below_right, below_right], -1)
        return rows.view(-1, 12), mix.view(-1, 12)

    def decode(self, rows: Tensor, mix: Tensor, shape) -> tuple[Tensor, ...]:
        """The decoder's input and hidden layer [M, ...], sigma [r, T], sigmoids [r, T, C]."""
        x = F.embedding_bag(rows, self.table, mode="sum", per_sample_weights=mix)
        h = softplus(torch.addmm(self.b1, x, self.w1.t()))
        sigma = (h @ self.w2[0] + self.b2[0]).view(shape)
        gate = torch.addmm(self.b2[1:], h, self.w2[1:].t()).sigmoid_().view(*shape, -1)
        return x, h, sigma, gate


def _blocks(rays: int, samples: int, device: torch.device) -> list[slice]:
    step = max(1, BLOCK.get(device.type, BLOCK["cpu"]) // samples)
    return [slice(i, min(i + step, rays)) for i in range(0, rays, step)]


def forward(planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, matrix, white_back):
    n, r, s = depths.shape
    scene = _Scene(planes, w1, b1, w2, b2, ray_origins, ray_directions, matrix)
    coarse = depths.reshape(n * r, s)
    u_fine = None if u_fine is None else u_fine.reshape(n * r, u_fine.shape[2])
    kept = coarse.new_empty(n * r, s + (0 if u_fine is None else u_fine.shape[1]))
    features = kept.new_empty(n * r, w2.shape[0] - 1)
    weight, total = kept.new_empty(2, n * r, 1)
    for rays in _blocks(n * r, kept.shape[1], planes.device):
        t = coarse[rays]
        *_, sigma, gate = scene.decode(*scene.corners(rays, t), t.shape)
        order = None
        if u_fine is not None:
            fine = importance_depths(weights(sigma, t), t, u_fine[rays])
            *_, fine_sigma, fine_gate = scene.decode(*scene.corners(rays, fine), fine.shape)
            t, order = torch.cat([t, fine], -1).sort(-1)
            sigma = torch.cat([sigma, fine_sigma], -1).gather(-1, order)
        w = weights(sigma, t)
        v = ends(w)
        kept[rays], total[rays] = t, (v * t).sum(-1, keepdim=True)
        weight[rays] = light = w.sum(-1, keepdim=True)
        if order is None:
            out = (v[:, None] @ gate)[:, 0]
        else:
            # Rather than the colours, sort their weights: back.
            v = torch.empty_like(v).scatter_(-1, order, v)[:, None]
            out = (v[..., :s] @ gate + v[..., s:] @ fine_gate)[:, 0]
        # 2 (sum v (1.002 gate - 0.001) + [white_back] (1 - W)) - 1
        slope, constant = (-2.002, 1.0) if white_back else (-0.002, -1.0)
        features[rays] = out.mul_(2.004).add_(slope * light + constant)
    depth = mean_depth(total, weight, kept)
    return (
        features.to(planes.dtype).view(n, r, features.shape[1]),
        depth.view(n, r, 1),
        weight.view(n, r, 1),
        kept.view(n, r, kept.shape[1]),
    )


def backward(df, dd, dw, planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, matrix, white_back):
    """Gradients of planes and decoder at fixed, sorted depths."""
    n, r, samples = depths.shape
    scene = _Scene(planes, w1, b1, w2, b2, ray_origins, ray_directions, matrix)
    depths = depths.reshape(n * r, samples)
    df, dd, dw = (g.reshape(n * r, g.shape[2]).to(depths.dtype) for g in (df, dd, dw))
    d_table = torch.zeros_like(scene.table)
    d_w1, d_b1, d_w2, d_b2 = (torch.zeros_like(t) for t in (scene.w1, scene.b1, scene.w2, scene.b2))
    for rays in _blocks(n * r, samples, planes.device):
        t, g = depths[rays], 2 * df[rays]
        rows, mix = scene.corners(rays, t)
        x, h, sigma, gate = scene.decode(rows, mix, t.shape)
        alpha, light, keep = alphas(sigma, t)
        w = alpha * light
        v = ends(w)

        g_sum = g.sum(-1, keepdim=True)
        q = (gate @ g[..., None])[..., 0] * 1.002
        d_weights = (q[:, 1:] + q[:, :-1]) / 2 + dw[rays] - (1.001 if white_back else 0.001) * g_sum
        weight = w.sum(-1, keepdim=True)
        depth = (v * t).sum(-1, keepdim=True) / weight
        # The mean of a ray's depths stays within them; where it is NaN, nothing depends on the weights.
        d_depth = torch.where(depth.isnan(), 0.0, dd[rays] / weight)
        d_weights = d_weights + d_depth * ((t[:, 1:] + t[:, :-1]) / 2 - depth.nan_to_num())
        after = (d_weights * w).flip(-1).cumsum(-1).flip(-1)[:, 1:]
        d_alpha = d_weights * light - F.pad(after, (0, 1)) / keep
        slope = ((sigma[:, 1:] + sigma[:, :-1]) / 2 - 1).sigmoid()
        d_sigma = ends(d_alpha * t.diff(dim=-1) * (1 - alpha) * slope).view(-1, 1)

        d_gate = (gate - gate.square()).mul_(v[..., None] * 1.002).mul_(g[:, None]).flatten(0, 1)
        d_w2.addmm_(torch.cat([d_sigma, d_gate], 1).t(), h)
        d_b2[:1] += d_sigma.sum(0)
        d_b2[1:] += d_gate.sum(0)
        d_h = (d_gate @ scene.w2[1:]).addmm_(d_sigma, scene.w2[:1])
        # The derivative of softplus is 1 - exp(-softplus).
        d_h.addcmul_(d_h, h.neg_().exp_(), value=-1)
        d_w1.addmm_(d_h.t(), x)
        d_b1 += d_h.sum(0)
        d_x = d_h @ scene.w1
        for k in range(12):
            d_table.index_add_(0, rows[:, k], d_x * mix[:, k, None])
    d_planes = d_table.view(scene.shape)[:, :, 1:-2, 1:-2].permute(0, 1, 4, 2, 3).contiguous()
    grads = d_planes, d_w1, d_b1, d_w2, d_b2
    return tuple(d.to(p.dtype) for d, p in zip(grads, (planes, w1, b1, w2, b2), strict=True))
