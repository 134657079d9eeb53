"""Marching along rays: depths, weights, and what they say about each other.

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
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ray_limits(origins: Tensor, directions: Tensor, box_warp: float) -> tuple[Tensor, Tensor]:
    """Depths [N, R, 1] at which rays enter and leave the cube of side box_warp around the origin."""
    if origins.numel() == 0:
        return origins[..., :1], origins[..., :1]
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
    """Depths from start to end (numbers or [N, R, 1]), even or even in 1 / depth, jittered by u [..., S]."""
    samples = u.shape[-1]
    t = (torch.arange(samples, device=u.device, dtype=u.dtype) + u) / (samples - 1)
    return 1 / ((1 - t) / start + t / end) if disparity else start + t * (end - start)


def importance_depths(weights: Tensor, depths: Tensor, u: Tensor) -> Tensor:
    """Depths drawn where weights [..., S-1] between depths [..., S] are large, by u [..., K] in [0, 1)."""
    peaks = torch.maximum(weights[..., 1:], weights[..., :-1])
    pdf = (peaks[..., 1:] + peaks[..., :-1]) / 2 + (0.01 + 1e-5)
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    edges = (depths[..., 1:-1] + depths[..., :-2]) / 2
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=edges.shape[-1] - 1)
    c0, c1 = cdf.gather(-1, below), cdf.gather(-1, above)
    e0, e1 = edges.gather(-1, below), edges.gather(-1, above)
    width = torch.where(c1 - c0 < 1e-5, 1.0, c1 - c0)
    return e0 + (u - c0) / width * (e1 - e0)


def softplus(x: Tensor) -> Tensor:
    # log(1 + e^x) to one rounding of 1, in half of log1p's time; above 40 it is x in every dtype.
    return torch.maximum(x, x.clamp(max=40).exp_().add_(1).log_())


def alphas(sigma: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha [..., T - 1], the light that reaches each interval, and the part of it that each lets through."""
    density = F.softplus((sigma[..., 1:] + sigma[..., :-1]) / 2 - 1)
    keep = torch.exp(-density * depths.diff(dim=-1))
    alpha = 1 - keep
    keep = keep + 1e-10
    return alpha, F.pad(keep[..., :-1].cumprod(-1), (1, 0), value=1.0), keep


def weights(sigma: Tensor, depths: Tensor) -> Tensor:
    """w [..., T - 1] of sorted samples [..., T]."""
    alpha, light, _ = alphas(sigma, depths)
    return alpha * light


def ends(w: Tensor) -> Tensor:
    """Half of what intervals [..., T - 1] have, at each of their two ends: [..., T]."""
    return (F.pad(w, (1, 0)) + F.pad(w, (0, 1))) / 2


def mean_depth(total: Tensor, weight: Tensor, depths: Tensor) -> Tensor:
    """Mean depths within the range of all; rays that meet nothing are farthest away."""
    if depths.numel() == 0:
        return total
    empty = weight == 0
    # Dividing 0 by 1 there keeps NaN out of the gradient.
    depth = total / torch.where(empty, 1.0, weight)
    return torch.where(empty | depth.isnan(), torch.inf, depth).clamp(depths.amin(), depths.amax())


def composite(sigma: Tensor, colour: Tensor, depths: Tensor, white_back: bool):
    """F [..., C], D [..., 1] and w [..., T - 1] of sorted samples [..., T], colour [..., T, C]."""
    w = weights(sigma, depths)
    weight = w.sum(-1, keepdim=True)
    v = ends(w)
    features = (v[..., None, :] @ colour)[..., 0, :]
    if white_back:
        features = features + 1 - weight
    return features * 2 - 1, mean_depth((v * depths).sum(-1, keepdim=True), weight, depths), w
