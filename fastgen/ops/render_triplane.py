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

The op works on blocks of rays small enough to stay in cache, keeps only depths [N, R, T] between forward
and backward, and evaluates everything else again. It gathers from a channels-last copy of the
planes with a border of zeros, so that a sample is one weighted sum of 3 x 4 rows (an embedding bag).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, require, require_same_device, require_shape, wide
from .sample_triplane import projection, sample_triplane_reference

# Samples decoded at a time: what fits a core's cache, and what fills a GPU.
_BLOCK = {"cpu": 1 << 13, "cuda": 1 << 19}


class RenderOutput(NamedTuple):
    features: Tensor  # [N, R, C] in [-1, 1]
    depth: Tensor  # [N, R, 1] world units
    weight: Tensor  # [N, R, 1] in [0, 1]


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


def _depth(total: Tensor, weight: Tensor, depths: Tensor) -> Tensor:
    """Mean depths within the range of all; rays that meet nothing are farthest away."""
    if depths.numel() == 0:
        return total
    empty = weight == 0
    # Dividing 0 by 1 there keeps NaN out of the gradient.
    depth = total / torch.where(empty, 1.0, weight)
    return torch.where(empty | depth.isnan(), torch.inf, depth).clamp(depths.amin(), depths.amax())


def _decode(planes, w1, b1, w2, b2, origins, directions, depths, matrix):
    """sigma [N, R, T] and colour [N, R, T, C] at depths by differentiable ops."""
    dtype = origins.dtype
    points = origins[:, :, None] + depths[..., None] * directions[:, :, None]
    x = sample_triplane_reference(planes.to(dtype), points.flatten(1, 2), matrix, True)
    x = F.linear(F.softplus(F.linear(x, w1.to(dtype), b1.to(dtype))), w2.to(dtype), b2.to(dtype))
    x = x.unflatten(1, depths.shape[1:])
    return x[..., 0], x[..., 1:].sigmoid() * 1.002 - 0.001


def _composite(sigma, colour, depths, white_back):
    """features, depth, weight of sorted samples by differentiable ops."""
    w = _weights(sigma, depths)
    weight = w.sum(-1, keepdim=True)
    v = _ends(w)
    features = (v[..., None, :] @ colour)[..., 0, :]
    if white_back:
        features = features + 1 - weight
    return features * 2 - 1, _depth((v * depths).sum(-1, keepdim=True), weight, depths), weight


def render_triplane_reference(
    planes: Tensor,  # [N, 3, F, H, W]
    w1: Tensor,  # [D, F]
    b1: Tensor,  # [D]
    w2: Tensor,  # [1 + C, D]
    b2: Tensor,  # [1 + C]
    ray_origins: Tensor,  # [N, R, 3]
    ray_directions: Tensor,  # [N, R, 3]
    depths: Tensor,  # [N, R, S], ascending
    u_fine: Tensor | None,  # [N, R, K], None for a single pass
    projection: list[float],  # 6 x 3
    white_back: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """features, depth, weight, and all depths [N, R, T], sorted; differentiable to any order, but in u_fine."""
    scene = planes, w1, b1, w2, b2, ray_origins, ray_directions
    sigma, colour = _decode(*scene, depths, projection)
    if u_fine is not None:
        with torch.no_grad():
            fine = importance_depths(_weights(sigma, depths), depths, u_fine)
        fine_sigma, fine_colour = _decode(*scene, fine, projection)
        depths, order = torch.cat([depths, fine], -1).sort(-1)
        sigma = torch.cat([sigma, fine_sigma], -1).gather(-1, order)
        colour = torch.cat([colour, fine_colour], -2)
        colour = colour.gather(-2, order[..., None].expand_as(colour))
    features, depth, weight = _composite(sigma, colour, depths, white_back)
    return features.to(planes.dtype), depth, weight, depths.detach()


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
        size = torch.tensor([[w / 2], [h / 2]] * 3, dtype=dtype)
        m = (torch.tensor(matrix, dtype=dtype).view(6, 3) * size).to(device)
        # Column -1, the first of the border, has index 0.
        centre = size[:, 0].to(device) + 0.5
        self.origin = (ray_origins.reshape(-1, 1, 3) * m).sum(-1) + centre
        self.direction = (ray_directions.reshape(-1, 1, 3) * m).sum(-1)
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
        weights = torch.stack([above - above_right, above_right, y - below_right, below_right], -1)
        return rows.view(-1, 12), weights.view(-1, 12)

    def decode(self, rows: Tensor, weights: Tensor, shape) -> tuple[Tensor, ...]:
        """The decoder's input and hidden layer [M, ...], sigma [r, T], colour [r, T, C] before its stretch."""
        x = F.embedding_bag(rows, self.table, mode="sum", per_sample_weights=weights)
        h = _softplus(torch.addmm(self.b1, x, self.w1.t()))
        sigma = (h @ self.w2[0] + self.b2[0]).view(shape)
        gate = torch.addmm(self.b2[1:], h, self.w2[1:].t()).sigmoid_().view(*shape, -1)
        return x, h, sigma, gate


def _blocks(rays: int, samples: int, device: torch.device) -> list[slice]:
    step = max(1, _BLOCK.get(device.type, _BLOCK["cpu"]) // samples)
    return [slice(i, min(i + step, rays)) for i in range(0, rays, step)]


def _forward(planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, matrix, white_back):
    n, r, s = depths.shape
    scene = _Scene(planes, w1, b1, w2, b2, ray_origins, ray_directions, matrix)
    coarse = depths.reshape(n * r, s)
    u_fine = None if u_fine is None else u_fine.reshape(n * r, -1)
    kept = coarse.new_empty(n * r, s + (0 if u_fine is None else u_fine.shape[1]))
    features = kept.new_empty(n * r, w2.shape[0] - 1)
    weight, total = kept.new_empty(2, n * r, 1)
    for rays in _blocks(n * r, kept.shape[1], planes.device):
        t = coarse[rays]
        *_, sigma, gate = scene.decode(*scene.corners(rays, t), t.shape)
        order = None
        if u_fine is not None:
            fine = importance_depths(_weights(sigma, t), t, u_fine[rays])
            *_, fine_sigma, fine_gate = scene.decode(*scene.corners(rays, fine), fine.shape)
            t, order = torch.cat([t, fine], -1).sort(-1)
            sigma = torch.cat([sigma, fine_sigma], -1).gather(-1, order)
        w = _weights(sigma, t)
        v = _ends(w)
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
    depth = _depth(total, weight, kept)
    return (
        features.to(planes.dtype).view(n, r, features.shape[1]),
        depth.view(n, r, 1),
        weight.view(n, r, 1),
        kept.view(n, r, kept.shape[1]),
    )


def _forward_fake(planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, matrix, white_back):
    n, r, s = depths.shape
    samples = s + (0 if u_fine is None else u_fine.shape[2])
    one = depths.new_empty(n, r, 1)
    return planes.new_empty(n, r, w2.shape[0] - 1), one, one.new_empty(n, r, 1), one.new_empty(n, r, samples)


def _backward(df, dd, dw, planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, matrix, white_back):
    """Gradients of planes and decoder at fixed, sorted depths."""
    n, r, samples = depths.shape
    scene = _Scene(planes, w1, b1, w2, b2, ray_origins, ray_directions, matrix)
    depths = depths.reshape(n * r, samples)
    df, dd, dw = (g.reshape(n * r, g.shape[2]).to(depths.dtype) for g in (df, dd, dw))
    d_table = torch.zeros_like(scene.table)
    d_w1, d_b1, d_w2, d_b2 = (torch.zeros_like(t) for t in (scene.w1, scene.b1, scene.w2, scene.b2))
    for rays in _blocks(n * r, samples, planes.device):
        t, g = depths[rays], 2 * df[rays]
        rows, corner_weights = scene.corners(rays, t)
        x, h, sigma, gate = scene.decode(rows, corner_weights, t.shape)
        alpha, light, keep = _alpha(sigma, t)
        w = alpha * light
        v = _ends(w)

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
        d_sigma = _ends(d_alpha * t.diff(dim=-1) * (1 - alpha) * slope).view(-1, 1)

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
            d_table.index_add_(0, rows[:, k], d_x * corner_weights[:, k, None])
    d_planes = d_table.view(scene.shape)[:, :, 1:-2, 1:-2].permute(0, 1, 4, 2, 3).contiguous()
    grads = d_planes, d_w1, d_b1, d_w2, d_b2
    return tuple(d.to(p.dtype) for d, p in zip(grads, (planes, w1, b1, w2, b2), strict=True))


def _setup_context(ctx, inputs, output):
    *scene, _, _, ctx.matrix, ctx.white_back = inputs
    ctx.save_for_backward(*scene, output[3])
    ctx.mark_non_differentiable(output[3])


def _backward_forward(ctx, df, dd, dw, _):
    grads = _render_triplane_bwd(df, dd, dw, *ctx.saved_tensors, ctx.matrix, ctx.white_back)
    return *grads, *[None] * 6


def _setup_context_bwd(ctx, inputs, output):
    *tensors, ctx.matrix, ctx.white_back = inputs
    ctx.save_for_backward(*tensors)


def _backward_bwd(ctx, *second):
    """The gradient of the gradient, by the differentiable ops; memory grows with all samples here."""
    *inputs, origins, directions, depths = ctx.saved_tensors
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        (df, dd, dw), scene = inputs[:3], inputs[3:]
        features, depth, weight = _composite(
            *_decode(*scene, origins, directions, depths, ctx.matrix), depths, ctx.white_back
        )
        first = torch.autograd.grad((features, depth, weight), scene, (df, dd, dw), create_graph=True)
        grads = torch.autograd.grad(first, inputs, second, create_graph=recorded, materialize_grads=True)
    return *grads, *[None] * 5


_render_triplane = define(
    "render_triplane(Tensor planes, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor ray_origins,"
    " Tensor ray_directions, Tensor depths, Tensor? u_fine, float[] projection, bool white_back)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=render_triplane_reference,
    kernel=_forward,
    fake=_forward_fake,
    backward=_backward_forward,
    setup_context=_setup_context,
)
_render_triplane_bwd = define(
    "render_triplane_bwd(Tensor df, Tensor dd, Tensor dw, Tensor planes, Tensor w1, Tensor b1, Tensor w2,"
    " Tensor b2, Tensor ray_origins, Tensor ray_directions, Tensor depths, float[] projection, bool white_back)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=lambda df, dd, dw, *args: tuple(x.new_empty(x.shape) for x in args[:5]),
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
)


def _read_options(options: Mapping | object) -> dict:
    """What the renderer needs of options, checked."""
    op = "render_triplane"
    if not isinstance(options, Mapping):
        require(
            dataclasses.is_dataclass(options), op, "options must be a mapping or dataclass, got {!r}", options
        )
        options = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    defaults = {
        "depth_resolution_importance": 0,
        "box_warp": 1.0,
        "white_back": False,
        "disparity_space_sampling": False,
        "clamp_mode": "softplus",
        "plane_axes": "eg3d",
    }
    o = {**defaults, **options}
    for name in ("ray_start", "ray_end", "depth_resolution"):
        require(name in o, op, "options must have {}, got {}", name, sorted(map(str, options)))
    start, end, fine = o["ray_start"], o["ray_end"], o["depth_resolution_importance"]
    numbers = all(isinstance(v, int | float) for v in (start, end))
    require(
        (start == end == "auto") if not numbers else start < end,
        op,
        "ray_start and ray_end must be numbers, the first one smaller, or both 'auto', got {!r} and {!r}",
        start,
        end,
    )
    require(
        isinstance(fine, int) and fine >= 0, op, "depth_resolution_importance must be >= 0, got {!r}", fine
    )
    least = 4 if fine else 2
    samples = o["depth_resolution"]
    require(
        isinstance(samples, int) and samples >= least,
        op,
        "depth_resolution must be at least {}, got {!r}",
        least,
        samples,
    )
    disparity = o["disparity_space_sampling"]
    require(
        not (disparity and numbers and start <= 0), op, "ray_start must be > 0 for disparity, got {!r}", start
    )
    require(o["clamp_mode"] == "softplus", op, "clamp_mode must be 'softplus', got {!r}", o["clamp_mode"])
    return o


def render_triplane(
    planes: Tensor,  # [N, 3, F, H, W]
    decoder: Sequence[Tensor],  # w1 [D, F], b1 [D], w2 [1 + C, D], b2 [1 + C]
    ray_origins: Tensor,  # [N, R, 3] world units
    ray_directions: Tensor,  # [N, R, 3]
    options: Mapping | object,  # mapping or dataclass
    u_coarse: Tensor | None = None,  # [N, R, S, 1] in [0, 1)
    u_fine: Tensor | None = None,  # [N, R, S_importance] in [0, 1)
) -> RenderOutput:
    """Render rays through three feature planes and a two-layer decoder.

    Depths spread from ray_start to ray_end, jittered by u_coarse; features by sample_triplane(reduce='mean');
    softplus(x w1' + b1) w2' + b2 is density and colour before a sigmoid; then, where weights are large,
    depth_resolution_importance more depths by u_fine. Without u_coarse and u_fine samples lie in the middle of
    their intervals: the result is deterministic. Options: ray_start, ray_end (world units, or both 'auto': where
    rays meet the cube of side box_warp), depth_resolution S, depth_resolution_importance (0: one pass), box_warp,
    white_back, disparity_space_sampling, plane_axes; others are not looked at.
    Returns:   features [N, R, C] in [-1, 1], dtype of planes; depth [N, R, 1] world units; weight [N, R, 1].
    Raises:    ValueError on shapes and values, TypeError on dtypes.
    Precision: computes in float32 (float64 for float64); differentiable in planes and decoder, not in u_fine;
               with respect to rays, which takes memory for all samples, too. Otherwise memory grows with
               R (C + S + S_importance). A second derivative takes memory for all samples.
    Source:    Chan et al. 2022, sec. 4; Max 1995.
    """
    op = "render_triplane"
    require_shape(op, "planes", planes, [None, 3, None, None, None], "N 3 F H W")
    n, _, f, h, w = planes.shape
    require(h > 0 and w > 0, op, "planes must have at least one row and one column, got {}", planes.shape)
    is_four = isinstance(decoder, list | tuple) and len(decoder) == 4
    require(is_four, op, "decoder must be four tensors w1, b1, w2, b2, got {}", type(decoder).__name__)
    w1, b1, w2, b2 = decoder
    require_shape(op, "w1", w1, [None, f], "D F")
    require_shape(op, "b1", b1, [w1.shape[0]], "D")
    require_shape(op, "w2", w2, [None, w1.shape[0]], "1+C D")
    require_shape(op, "b2", b2, [w2.shape[0]], "1+C")
    require(w2.shape[0] >= 2, op, "w2 must have at least 2 rows, density and a colour, got {}", w2.shape)
    require_shape(op, "ray_origins", ray_origins, [n, None, 3], "N R 3")
    r = ray_origins.shape[1]
    require_shape(op, "ray_directions", ray_directions, [n, r, 3], "N R 3")
    o = _read_options(options)
    samples, fine = o["depth_resolution"], o["depth_resolution_importance"]
    if u_coarse is not None:
        require_shape(op, "u_coarse", u_coarse, [n, r, samples, 1], "N R S 1")
    if u_fine is not None and fine:
        require_shape(op, "u_fine", u_fine, [n, r, fine], "N R S_importance")
    require_same_device(
        op, planes=planes, w1=w1, b1=b1, w2=w2, b2=b2, ray_origins=ray_origins,
        ray_directions=ray_directions, u_coarse=u_coarse, u_fine=u_fine,
    )  # fmt: skip
    matrix = projection(op, o["plane_axes"], o["box_warp"])

    dtype = torch.promote_types(wide(planes).dtype, wide(ray_origins).dtype)
    origins, directions = ray_origins.to(dtype), ray_directions.to(dtype)
    start, end = o["ray_start"], o["ray_end"]
    if start == "auto":
        start, end = ray_limits(origins, directions, o["box_warp"])
    u = origins.new_full((1, 1, samples), 0.5) if u_coarse is None else u_coarse[..., 0].to(dtype)
    depths = coarse_depths(start, end, u, o["disparity_space_sampling"]).expand(n, r, samples)
    if not fine:
        u_fine = None
    elif u_fine is None:
        u_fine = ((torch.arange(fine, device=u.device, dtype=dtype) + 0.5) / fine).expand(n, r, fine)
    else:
        u_fine = u_fine.to(dtype)
    arguments = planes, w1, b1, w2, b2, origins, directions, depths, u_fine, matrix, bool(o["white_back"])
    # The op knows no gradient of rays.
    on_rays = torch.is_grad_enabled() and (origins.requires_grad or directions.requires_grad)
    return RenderOutput(*(render_triplane_reference if on_rays else _render_triplane)(*arguments)[:3])
