"""Bilinear samples of three axis-aligned feature planes.

Plane p with axes e0, e1, e2 sees a point v at column and row (a, b) of v = a e0 + b e1 + c e2, so

    a = v . (e1 x e2) / d,    b = v . (e2 x e0) / d,    d = e0 . (e1 x e2);

times 2 / box_warp, -1 and 1 are the plane's outer edges. The three maps are one 6 x 3 matrix, passed as
numbers: the named axes only select coordinates.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._define import define, differentiate, like, require, require_same_device, require_shape, wide
from .grid_sample import grid_sample, grid_sample_bwd, grid_sample_bwd2_reference

AXES = {"eg3d": (0, 1, 0, 2, 2, 0), "fixed": (0, 1, 0, 2, 2, 1)}


def projection(op: str, plane_axes: str | Sequence | Tensor, box_warp: float) -> list[float]:
    """The rows of the matrix from world points to column and row of planes 0, 1 and 2."""
    require(
        isinstance(box_warp, int | float) and box_warp > 0,
        op,
        "box_warp must be positive, got {!r}",
        box_warp,
    )
    scale = 2 / box_warp
    if isinstance(plane_axes, str) and plane_axes in AXES:
        return [scale * (axis == k) for axis in AXES[plane_axes] for k in range(3)]
    if isinstance(plane_axes, Tensor):
        require_shape(op, "plane_axes", plane_axes, [3, 3, 3], "3 3 3")
        plane_axes = plane_axes.tolist()
    text = "plane_axes must be 'eg3d', 'fixed', or numbers or a tensor [3, 3, 3], got {!r}"
    require(_is_nested(plane_axes, 3), op, text, plane_axes)
    matrix = []
    for e0, e1, e2 in plane_axes:
        column, row = _cross(e1, e2), _cross(e2, e0)
        volume = sum(x * y for x, y in zip(e0, column, strict=True))
        invertible = volume != 0 and math.isfinite(volume)
        require(invertible, op, "plane_axes must be invertible, got {}", plane_axes)
        matrix += [scale * x / volume for x in (*column, *row)]
    return matrix


def _is_nested(x, depth: int) -> bool:
    """Numbers, in lists of three, in lists of three, ..."""
    if depth == 0:
        return isinstance(x, int | float)
    return isinstance(x, list | tuple) and len(x) == 3 and all(_is_nested(y, depth - 1) for y in x)


def _cross(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def project(points: Tensor, matrix: list[float]) -> Tensor:
    """World points [..., 3] to columns and rows [..., 6]; products that TF32 and autocast leave alone."""
    rows = []
    for r in range(0, 18, 3):
        terms = [points[..., k] * matrix[r + k] for k in range(3) if matrix[r + k] != 0]
        rows.append(sum(terms[1:], terms[0]))
    return torch.stack(rows, -1)


def _unproject(dgrid: Tensor, matrix: list[float], coordinates: Tensor) -> Tensor:
    """The gradient of project: [N, M, 6] to coordinates' [N, M, 3]."""
    columns = []
    for k in range(3):
        terms = [dgrid[..., r] * matrix[3 * r + k] for r in range(6) if matrix[3 * r + k] != 0]
        columns.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(dgrid[..., 0]))
    return torch.stack(columns, -1).to(coordinates.dtype)


def _to_grid(x: Tensor) -> Tensor:
    """Columns and rows [N, M, 6] as grid_sample takes them [3 N, 1, M, 2], and back."""
    return x.unflatten(-1, (3, 2)).transpose(1, 2).flatten(0, 1)[:, None]


def _from_grid(x: Tensor) -> Tensor:
    return x[:, 0].unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)


def _to_images(dy: Tensor, mean: bool) -> Tensor:
    """Gradients of samples, of grid_sample's [3 N, C, 1, M]."""
    dy = (wide(dy) / 3)[:, None].expand(-1, 3, -1, -1) if mean else dy
    return dy.flatten(0, 1).mT[:, :, None]


def sample_triplane_reference(
    planes: Tensor,  # [N, 3, C, H, W]
    coordinates: Tensor,  # [N, M, 3]
    projection: list[float],  # 6 x 3
    mean: bool,
) -> Tensor:
    """sample_triplane of differentiable ops."""
    out = grid_sample(planes.flatten(0, 1), _to_grid(project(coordinates, projection)))
    out = out.squeeze(2).unflatten(0, (planes.shape[0], 3)).transpose(2, 3)
    return wide(out).mean(1).to(planes.dtype) if mean else out.contiguous()


def sample_triplane_bwd_reference(
    dy: Tensor,  # [N, 3, M, C] or [N, M, C]
    planes: Tensor,
    coordinates: Tensor,
    projection: list[float],
    mean: bool,
    need_planes: bool,
    need_coordinates: bool,
) -> tuple[Tensor, Tensor]:
    """dplanes and dcoordinates for the gradient dy of the samples; what is not needed has shape [0]."""
    grid = _to_grid(project(coordinates, projection))
    dplanes, dgrid = grid_sample_bwd(_to_images(dy, mean), planes.flatten(0, 1), grid)
    return (
        like(dplanes.view(planes.shape), planes) if need_planes else planes.new_empty(0),
        _unproject(_from_grid(dgrid), projection, coordinates)
        if need_coordinates
        else coordinates.new_empty(0),
    )


def sample_triplane_bwd2_reference(
    ddplanes: Tensor | None,  # None for zeros
    ddcoordinates: Tensor | None,
    dy: Tensor,
    planes: Tensor,
    coordinates: Tensor,
    projection: list[float],
    mean: bool,
    need_dy: bool,
    need_planes: bool,
    need_coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of sum(ddplanes * dplanes) + sum(ddcoordinates * dcoordinates) the gradients in the other tensors."""
    p = torch.zeros_like(planes) if ddplanes is None else ddplanes
    q = torch.zeros_like(coordinates) if ddcoordinates is None else ddcoordinates
    grid, q = (_to_grid(project(x, projection)) for x in (coordinates, q))
    g = _to_images(dy, mean)
    ddy, dplanes, dgrid = grid_sample_bwd2_reference(p.flatten(0, 1), q, g, planes.flatten(0, 1), grid)
    ddy = ddy.squeeze(2).unflatten(0, (planes.shape[0], 3)).transpose(2, 3)
    ddy = (wide(ddy).mean(1) if mean else ddy).to(dy.dtype).contiguous()
    return (
        ddy if need_dy else dy.new_empty(0),
        like(dplanes.view(planes.shape), planes) if need_planes else planes.new_empty(0),
        _unproject(_from_grid(dgrid), projection, coordinates)
        if need_coordinates
        else coordinates.new_empty(0),
    )


def _fake(planes, coordinates, projection, mean):
    n, _, c, _, _ = planes.shape
    m = coordinates.shape[1]
    return planes.new_empty((n, m, c) if mean else (n, 3, m, c))


def _fake_bwd(dy, planes, coordinates, projection, mean, need_planes, need_coordinates):
    return (
        torch.empty_like(planes) if need_planes else planes.new_empty(0),
        coordinates.new_empty(coordinates.shape if need_coordinates else 0),
    )


def _fake_bwd2(p, q, dy, *args):
    *args, need_dy, need_planes, need_coordinates = args
    return dy.new_empty(dy.shape if need_dy else 0), *_fake_bwd(dy, *args, need_planes, need_coordinates)


def _setup_context(ctx, inputs, output):
    planes, coordinates, ctx.matrix, ctx.mean = inputs
    ctx.save_for_backward(planes, coordinates)


def _backward(ctx, dy):
    needs = ctx.needs_input_grad[:2]
    grads = _sample_triplane_bwd(dy, *ctx.saved_tensors, ctx.matrix, ctx.mean, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def _setup_context_bwd(ctx, inputs, output):
    dy, planes, coordinates, ctx.matrix, ctx.mean, _, _ = inputs
    ctx.save_for_backward(dy, planes, coordinates)
    # A gradient that nobody made is None, not zeros as large as the planes.
    ctx.set_materialize_grads(False)


def _backward_bwd(ctx, p, q):
    if p is None and q is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:3]
    needs = [needs[0], needs[1] and q is not None, needs[2]]
    grads = _sample_triplane_bwd2(p, q, *ctx.saved_tensors, ctx.matrix, ctx.mean, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 4


def _setup_context_bwd2(ctx, inputs, output):
    *tensors, ctx.matrix, ctx.mean, _, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_bwd2(ctx, *third):
    """Through the differentiable reference: higher derivatives are rare."""

    def second(*tensors):
        return sample_triplane_bwd2_reference(*tensors, ctx.matrix, ctx.mean, True, True, True)

    return *differentiate(second, ctx.saved_tensors, third), *[None] * 5


_sample_triplane = define(
    "sample_triplane(Tensor planes, Tensor coordinates, float[] projection, bool mean) -> Tensor",
    reference=sample_triplane_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    triton="sample_triplane",
)
_sample_triplane_bwd = define(
    "sample_triplane_bwd(Tensor dy, Tensor planes, Tensor coordinates, float[] projection, bool mean,"
    " bool need_planes, bool need_coordinates) -> (Tensor, Tensor)",
    reference=sample_triplane_bwd_reference,
    fake=_fake_bwd,
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
    triton="sample_triplane",
)
_sample_triplane_bwd2 = define(
    "sample_triplane_bwd2(Tensor? ddplanes, Tensor? ddcoordinates, Tensor dy, Tensor planes,"
    " Tensor coordinates, float[] projection, bool mean, bool need_dy, bool need_planes,"
    " bool need_coordinates) -> (Tensor, Tensor, Tensor)",
    reference=sample_triplane_bwd2_reference,
    fake=_fake_bwd2,
    backward=_backward_bwd2,
    setup_context=_setup_context_bwd2,
    triton="sample_triplane",
)


def sample_triplane(
    planes: Tensor,
    coordinates: Tensor,
    box_warp: float = 1.0,
    plane_axes: str | Sequence | Tensor = "eg3d",
    reduce: str | None = None,
) -> Tensor:
    """Features of points: each plane sampled bilinearly where the point projects to, zero outside.

    planes:    [N, 3, C, H, W]
    coordinates: [N, M, 3], world units
    box_warp:  side of the cube that the planes cover, world units
    plane_axes: 'eg3d': (x, y), (x, z), (z, x), as the released EG3D checkpoints have it, 'fixed': (x, y),
               (x, z), (z, y), or axes [3 planes, 3 axes, 3], nested lists of numbers or a tensor. The first
               axis of a plane runs along its columns, the second along its rows. A tensor is read on the host
               at each call: a wait for its device, and no tracing by torch.compile or torch.export. Axes get
               no gradient
    reduce:    None, or 'mean', over planes
    Returns:   [N, 3, M, C], or [N, M, C] for the mean over planes, dtype of planes. Planes' gradient comes in
               their layout; channels-last planes are the fast ones. CUDA C++ adds it up by atomics, in any
               order, but in a fixed one where torch.use_deterministic_algorithms is set.
    Raises:    ValueError on shapes and values, TypeError on dtypes.
    Precision: computes in float32 (float64 for float64); differentiable twice in planes and coordinates.
    Source:    Chan et al. 2022, sec. 3.2.
    """
    op = "sample_triplane"
    require_shape(op, "planes", planes, [None, 3, None, None, None], "N 3 C H W")
    require_shape(op, "coordinates", coordinates, [planes.shape[0], None, 3], "N M 3")
    text = "planes must have at least one row and one column, got {}"
    require(planes.shape[3] > 0 and planes.shape[4] > 0, op, text, planes.shape)
    require_same_device(op, planes=planes, coordinates=coordinates)
    require(reduce in (None, "mean"), op, "reduce must be None or 'mean', got {!r}", reduce)
    return _sample_triplane(planes, coordinates, projection(op, plane_axes, box_warp), reduce == "mean")
