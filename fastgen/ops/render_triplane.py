"""EG3D's volume renderer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sample_triplane import sample_triplane


class RenderOutput(NamedTuple):
    features: Tensor
    depth: Tensor
    weight: Tensor


def _option(options, name, default=None):
    value = options.get(name, default) if hasattr(options, "get") else getattr(options, name, default)
    return default if value is None else value


def ray_limits(origins: Tensor, directions: Tensor, start, end, box_warp: float) -> tuple[Tensor, Tensor]:
    """Depths [N, R, 1] or scalars where rays begin and end."""
    if start != "auto":
        return origins.new_tensor(start), origins.new_tensor(end)
    a = (-box_warp / 2 - origins) / directions
    b = (box_warp / 2 - origins) / directions
    entry = torch.minimum(a, b).amax(-1, keepdim=True)
    leave = torch.maximum(a, b).amin(-1, keepdim=True)
    hit = leave > entry
    some = hit.any()
    first = torch.where(some, torch.where(hit, entry, torch.inf).amin(), 0.0)
    last = torch.where(some, torch.where(hit, entry, -torch.inf).amax(), box_warp)
    return torch.where(hit, entry, first), torch.where(hit, leave, last)


def coarse_depths(start: Tensor, end: Tensor, u, samples: int, disparity: bool) -> Tensor:
    t = (torch.arange(samples, device=start.device, dtype=start.dtype) + u) / (samples - 1)
    return 1 / ((1 - t) / start + t / end) if disparity else start + t * (end - start)


def importance_depths(weights: Tensor, depths: Tensor, u: Tensor) -> Tensor:
    n, r, s = depths.shape
    w = F.max_pool1d(weights.flatten(0, 1)[:, None], 2, stride=1, padding=1)
    w = F.avg_pool1d(w, 2, stride=1)[:, 0] + 0.01
    w = w[:, 1:-1].reshape(n, r, s - 3) + 1e-5
    cdf = F.pad((w / w.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    edges = (depths[..., 1:] + depths[..., :-1])[..., :-1] / 2
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=s - 3)
    c0, c1 = cdf.gather(-1, below), cdf.gather(-1, above)
    e0, e1 = edges.gather(-1, below), edges.gather(-1, above)
    width = torch.where(c1 - c0 < 1e-5, 1.0, c1 - c0)
    return e0 + (u - c0) / width * (e1 - e0)


def _decode(planes, decoder, points, box_warp, plane_axes):
    w1, b1, w2, b2 = decoder
    x = sample_triplane(planes, points, box_warp, plane_axes, reduce="mean")
    x = F.linear(F.softplus(F.linear(x, w1, b1)), w2, b2)
    return x[..., 0], x[..., 1:].sigmoid() * 1.002 - 0.001


def march_weights(sigma: Tensor, depths: Tensor) -> Tensor:
    density = F.softplus((sigma[..., 1:] + sigma[..., :-1]) / 2 - 1)
    alpha = -torch.expm1(-density * depths.diff(dim=-1))
    through = (1 - alpha + 1e-10).cumprod(-1)
    return alpha * F.pad(through[..., :-1], (1, 0), value=1.0)


def render_triplane_reference(planes, decoder, ray_origins, ray_directions, options, u_coarse=None, u_fine=None):
    n, r, _ = ray_origins.shape
    samples = _option(options, "depth_resolution")
    extra = _option(options, "depth_resolution_importance", 0)
    box_warp = _option(options, "box_warp", 1.0)
    axes = _option(options, "plane_axes", "eg3d")

    def decode(depths):
        points = ray_origins[:, :, None] + depths[..., None] * ray_directions[:, :, None]
        sigma, colour = _decode(planes, decoder, points.flatten(1, 2), box_warp, axes)
        return sigma.view(n, r, -1), colour.view(n, r, depths.shape[-1], -1)

    start, end = ray_limits(
        ray_origins, ray_directions, _option(options, "ray_start"), _option(options, "ray_end"), box_warp
    )
    u = 0.5 if u_coarse is None else u_coarse.view(n, r, samples)
    disparity = _option(options, "disparity_space_sampling", False)
    depths = coarse_depths(start, end, u, samples, disparity).expand(n, r, samples)
    sigma, colour = decode(depths)
    if extra:
        with torch.no_grad():
            if u_fine is None:
                u_fine = ((torch.arange(extra, device=depths.device) + 0.5) / extra).to(depths.dtype)
            fine = importance_depths(march_weights(sigma, depths), depths, u_fine.expand(n, r, extra))
        sigma2, colour2 = decode(fine)
        depths, order = torch.cat([depths, fine], -1).sort(-1)
        sigma = torch.cat([sigma, sigma2], -1).gather(-1, order)
        colour = torch.cat([colour, colour2], -2)
        colour = colour.gather(-2, order[..., None].expand_as(colour))
    w = march_weights(sigma, depths)
    weight = w.sum(-1, keepdim=True)
    # Averaging neighbouring colours and then weighting them is weighting each by the mean of its two weights.
    each = (F.pad(w, (1, 0)) + F.pad(w, (0, 1))) / 2
    features = (each[..., None, :] @ colour)[..., 0, :]
    if _option(options, "white_back", False):
        features = features + 1 - weight
    depth = (each * depths).sum(-1, keepdim=True) / weight
    depth = depth.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return RenderOutput(features * 2 - 1, depth.clamp(depths.amin(), depths.amax()), weight)


render_triplane = render_triplane_reference
