"""EG3D's volume renderer: sample, decode, march, importance-sample, merge, march.

The formulas are in _march. The op itself works on blocks of rays (_render_blocks) and keeps only the depths
[N, R, T] of all samples between forward and backward. The reference is the same of differentiable ops, with
everything in memory; it also serves gradients of rays and, at the depths that were kept, second derivatives.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import (
    define,
    differentiate,
    require,
    require_same_device,
    require_shape,
    wide_dtype,
    without_autocast,
)
from ._march import coarse_depths, composite, importance_depths, ray_limits, weights
from ._render_blocks import backward, forward
from .sample_triplane import projection, sample_triplane_reference


class RenderOutput(NamedTuple):
    features: Tensor  # [N, R, C] in [-1, 1]
    depth: Tensor  # [N, R, 1] world units
    weight: Tensor  # [N, R, 1] in [0, 1]


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
    features, depth, w = composite(sigma, colour, depths, white_back)
    return features, depth, w.sum(-1, keepdim=True)


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
    """features, depth, weight, and all depths [N, R, T], sorted; differentiable to any order."""
    scene = planes, w1, b1, w2, b2, ray_origins, ray_directions
    sigma, colour = _decode(*scene, depths, projection)
    if u_fine is not None:
        with torch.no_grad():
            fine = importance_depths(weights(sigma, depths), depths, u_fine)
        fine_sigma, fine_colour = _decode(*scene, fine, projection)
        depths, order = torch.cat([depths, fine], -1).sort(-1)
        sigma = torch.cat([sigma, fine_sigma], -1).gather(-1, order)
        colour = torch.cat([colour, fine_colour], -2)
        colour = colour.gather(-2, order[..., None].expand_as(colour))
    features, depth, weight = _composite(sigma, colour, depths, white_back)
    return features.to(planes.dtype), depth, weight, depths.detach()


def _forward_fake(planes, w1, b1, w2, b2, ray_origins, ray_directions, depths, u_fine, matrix, white_back):
    n, r, s = depths.shape
    samples = s + (0 if u_fine is None else u_fine.shape[2])
    one = depths.new_empty(n, r, 1)
    return planes.new_empty(n, r, w2.shape[0] - 1), one, one.new_empty(n, r, 1), one.new_empty(n, r, samples)


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

    def first(df, dd, dw, *scene):
        decoded = _decode(*scene, origins, directions, depths, ctx.matrix)
        outputs = _composite(*decoded, depths, ctx.white_back)
        return torch.autograd.grad(outputs, scene, (df, dd, dw), create_graph=True)

    return *differentiate(first, inputs, second), *[None] * 5


_render_triplane = define(
    "render_triplane(Tensor planes, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor ray_origins,"
    " Tensor ray_directions, Tensor depths, Tensor? u_fine, float[] projection, bool white_back)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=render_triplane_reference,
    kernel=forward,
    fake=_forward_fake,
    backward=_backward_forward,
    setup_context=_setup_context,
    triton="render_triplane",
)
_render_triplane_bwd = define(
    "render_triplane_bwd(Tensor df, Tensor dd, Tensor dw, Tensor planes, Tensor w1, Tensor b1, Tensor w2,"
    " Tensor b2, Tensor ray_origins, Tensor ray_directions, Tensor depths, float[] projection,"
    " bool white_back) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=backward,
    fake=lambda df, dd, dw, *args: tuple(x.new_empty(x.shape) for x in args[:5]),
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
    triton="render_triplane",
)


def _read_options(options: Mapping | object) -> dict:
    """What the renderer needs of options, checked."""
    op = "render_triplane"
    if not isinstance(options, Mapping):
        is_record = dataclasses.is_dataclass(options) and not isinstance(options, type)
        require(is_record, op, "options must be a mapping or dataclass, got {!r}", options)
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
    planes: Tensor,
    decoder: Sequence[Tensor],
    ray_origins: Tensor,
    ray_directions: Tensor,
    options: Mapping | object,
    u_coarse: Tensor | None = None,
    u_fine: Tensor | None = None,
) -> RenderOutput:
    """Render rays through three feature planes and a two-layer decoder.

    Depths spread from ray_start to ray_end, jittered by u_coarse; features by sample_triplane, reduce='mean';
    softplus(x w1' + b1) w2' + b2 is density and colour, before softplus(. - 1) and a sigmoid; then, where
    weights are large, more depths by u_fine, which take no part in differentiation. Without u_coarse and
    u_fine samples lie in the middle of their intervals, and the result is deterministic.
    planes:    [N, 3, F, H, W]
    decoder:   w1 [D, F], b1 [D], w2 [1 + C, D], b2 [1 + C]
    ray_origins: [N, R, 3], world units
    ray_directions: [N, R, 3]
    options:   a mapping or dataclass: ray_start, ray_end (world units, or both 'auto': where rays meet the
               cube of side box_warp), depth_resolution S, depth_resolution_importance (0: a single pass),
               box_warp, white_back, disparity_space_sampling, plane_axes as for sample_triplane, clamp_mode
               (only 'softplus'); others are not looked at
    u_coarse:  [N, R, S, 1] in [0, 1)
    u_fine:    [N, R, S_importance] in [0, 1)
    Returns:   features [N, R, C] in [-1, 1], dtype of planes; depth [N, R, 1] world units; weight [N, R, 1].
    Raises:    ValueError on shapes and values, TypeError on dtypes.
    Precision: computes in float32 (float64 for float64); memory grows with R (C + S + S_importance).
               Differentiable in planes and decoder; in rays, and twice, with memory for all colours.
    Source:    Chan et al. 2022, sec. 4; Max 1995.
    """
    op = "render_triplane"
    require_shape(op, "planes", planes, [None, 3, None, None, None], "N 3 F H W")
    n, _, f, h, w = planes.shape
    require(h > 0 and w > 0, op, "planes must have at least one row and one column, got {}", planes.shape)
    text = "decoder must be four tensors w1, b1, w2, b2, got {}"
    if not isinstance(decoder, list | tuple):
        raise TypeError(f"{op}: {text.format(type(decoder).__name__)}")
    require(len(decoder) == 4, op, text, len(decoder))
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

    dtype = torch.promote_types(wide_dtype(planes), wide_dtype(ray_origins))
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
    # The op knows no gradient of rays; what stands in for it must not see autocast either.
    on_rays = torch.is_grad_enabled() and (origins.requires_grad or directions.requires_grad)
    render = without_autocast(render_triplane_reference) if on_rays else _render_triplane
    return RenderOutput(*render(*arguments)[:3])
