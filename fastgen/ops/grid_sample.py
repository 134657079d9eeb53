"""Bilinear samples of images, differentiable twice in the images and in the positions.

With pixel coordinates u = ((gx + 1) W - 1) / 2 and v likewise, and a, b their fractions, a sample is

    s = (1 - a)(1 - b) x00 + a (1 - b) x01 + (1 - a) b x10 + a b x11,     x = 0 outside the image,

ds/du = (1 - b)(x01 - x00) + b (x11 - x10), and the only second derivative in position is the mixed one,
d2s/du dv = x00 - x01 - x10 + x11. The first backward yields dx, linear in dy, and dgrid, linear in dy and x.
For gradients p of dx and q of dgrid,

    <dx, p> = <dy, sample(p)>,    <dgrid, q> = <dy, slope>,    slope = q_u ds/du + q_v ds/dv.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define, require, require_same_device, require_tensor, wide


def _corners(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all M positions the corners 00, 01, 10, 11: values [N, C, 4, M], index [N, 1, 4, M]; a, b [N, 1, M].

    Corners outside have value 0, and the index of a place behind the image.
    """
    n, c, h, w = x.shape
    u, v = (((grid.flatten(1, 2) + 1) * grid.new_tensor([w, h]) - 1) / 2).unbind(-1)
    left, top = u.detach().floor(), v.detach().floor()
    columns = torch.stack([left, left + 1, left, left + 1], 1)
    rows = torch.stack([top, top, top + 1, top + 1], 1)
    inside = (columns >= 0) & (columns < w) & (rows >= 0) & (rows < h)
    index = torch.where(inside, rows.long() * w + columns.long(), h * w)[:, None]
    pixels = F.pad(x.flatten(2), (0, 1))
    values = pixels.gather(2, index.flatten(2).expand(-1, c, -1)).unflatten(2, (4, -1))
    return values, index, (u - left)[:, None], (v - top)[:, None]


def _weights(a: Tensor, b: Tensor) -> Tensor:
    """The corners' weights [N, 1, 4, M]."""
    return torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], 2)


def _slope_weights(a: Tensor, b: Tensor, q: Tensor) -> Tensor:
    """The corners' weights in the derivative along q [N, M, 2] = (q_u, q_v)."""
    qu, qv = q.transpose(1, 2).split(1, 1)
    from_u = torch.stack([b - 1, 1 - b, -b, b], 2) * qu[:, :, None]
    return from_u + torch.stack([a - 1, -a, 1 - a, a], 2) * qv[:, :, None]


def _scatter(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Adds corner values [N, C, 4, M] up in an image like `like`."""
    n, c, h, w = like.shape
    pixels = values.new_zeros(n, c, h * w + 1)
    pixels = pixels.scatter_add(2, index.flatten(2).expand(-1, c, -1), values.flatten(2))
    return pixels[:, :, :-1].reshape(n, c, h, w)


def _scale(x: Tensor) -> Tensor:
    """(du/dgx, dv/dgy)."""
    return x.new_tensor([x.shape[3] / 2, x.shape[2] / 2])


def _same(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    x = wide(x)
    return x, *(other.to(x.dtype) for other in others)


def grid_sample_reference(x: Tensor, grid: Tensor) -> Tensor:
    """grid_sample by gathering the corners; differentiable to any order."""
    y, grid = _same(x, grid)
    values, _, a, b = _corners(y, grid)
    return (values * _weights(a, b)).sum(2).unflatten(2, grid.shape[1:3]).to(x.dtype)


def grid_sample_bwd_reference(dy: Tensor, x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dgrid for the gradient dy of grid_sample's result."""
    y, g, positions = _same(x, dy.flatten(2)[:, :, None], grid)
    values, index, a, b = _corners(y, positions)
    dx = _scatter(g * _weights(a, b), index, y)
    s = (values * g).sum(1, keepdim=True)
    du = (1 - b) * (s[:, :, 1] - s[:, :, 0]) + b * (s[:, :, 3] - s[:, :, 2])
    dv = (1 - a) * (s[:, :, 2] - s[:, :, 0]) + a * (s[:, :, 3] - s[:, :, 1])
    dgrid = torch.cat([du, dv], 1).transpose(1, 2) * _scale(y)
    return dx.to(x.dtype), dgrid.reshape(grid.shape).to(grid.dtype)


def _kernel(x, grid):
    if x.numel() == 0 or grid.numel() == 0:
        return x.new_zeros(*x.shape[:2], *grid.shape[1:3])
    y, grid = _same(x, grid)
    return F.grid_sample(y, grid, align_corners=False).to(x.dtype).contiguous()


def _kernel_bwd(dy, x, grid):
    if x.numel() == 0 or grid.numel() == 0:
        return x.new_zeros(x.shape), grid.new_zeros(grid.shape)
    y, dy, positions = _same(x, dy, grid)
    both = torch.ops.aten.grid_sampler_2d_backward(dy, y, positions, 0, 0, False, [True, True])
    return both[0].to(x.dtype).contiguous(), both[1].to(grid.dtype).contiguous()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def grid_sample_bwd2_reference(
    p: Tensor, q: Tensor, dy: Tensor, x: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(p * dx) + sum(q * dgrid) in dy, x and grid; differentiable to any order."""
    ddy, (_, dgrid) = _grid_sample(p, grid), grid_sample_bwd(dy, p, grid)
    y, g, positions, q = _same(x, dy.flatten(2)[:, :, None], grid, q.flatten(1, 2))
    q = q * _scale(y)
    values, index, a, b = _corners(y, positions)
    weights = _slope_weights(a, b, q)
    s = (values * g).sum(1)
    mixed = s[:, 0] - s[:, 1] - s[:, 2] + s[:, 3]
    slope = (values * weights).sum(2).view_as(dy)
    second = (mixed[..., None] * q.flip(-1) * _scale(y)).view_as(grid)
    ddy, dgrid = ddy + slope.to(dy.dtype), dgrid + second.to(grid.dtype)
    return ddy, _scatter(g * weights, index, y).to(x.dtype), dgrid


_grid_sample = define(
    "grid_sample(Tensor x, Tensor grid) -> Tensor",
    reference=grid_sample_reference,
    kernel=_kernel,
    fake=lambda x, grid: x.new_empty(*x.shape[:2], *grid.shape[1:3]),
    backward=lambda ctx, dy: grid_sample_bwd(dy, *ctx.saved_tensors),
    setup_context=_setup_context,
)
grid_sample_bwd = define(
    "grid_sample_bwd(Tensor dy, Tensor x, Tensor grid) -> (Tensor, Tensor)",
    reference=grid_sample_bwd_reference,
    kernel=_kernel_bwd,
    fake=lambda dy, x, grid: (x.new_empty(x.shape), grid.new_empty(grid.shape)),
    backward=lambda ctx, p, q: grid_sample_bwd2_reference(p, q, *ctx.saved_tensors),
    setup_context=_setup_context,
)


def grid_sample(
    x: Tensor,
    grid: Tensor,
) -> Tensor:
    """Bilinear samples, zeros outside, as torch's grid_sample with align_corners=False.

    x:         [N, C, H, W]
    grid:      [N, H', W', 2]: (column, row), where -1 and 1 are the outer edges of the image; it may have
               another dtype, such as float32 for 16-bit images
    Returns:   [N, C, H', W'], dtype of x.
    Raises:    ValueError on shapes and devices; TypeError on dtypes.
    Precision: computes in float32 (float64 for float64 x); differentiable twice in x and grid.
    """
    require_tensor("grid_sample", "x", x, "N C H W")
    require_tensor("grid_sample", "grid", grid, "N H' W' 2")
    require(grid.shape[3] == 2, "grid_sample", "grid must have 2 numbers a position, got {}", grid.shape)
    text = "grid must have the batch size of x, {}, got {}"
    require(grid.shape[0] == x.shape[0], "grid_sample", text, x.shape[0], grid.shape[0])
    text = "x must have at least one row and one column, got {}"
    require(x.shape[2] > 0 and x.shape[3] > 0, "grid_sample", text, x.shape)
    require_same_device("grid_sample", x=x, grid=grid)
    return _grid_sample(x, grid)
