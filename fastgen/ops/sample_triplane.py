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

from ._define import define, require, require_same_device, require_shape, wide
from .grid_sample import grid_sample

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


def sample_triplane_reference(
    planes: Tensor,  # [N, 3, C, H, W]
    coordinates: Tensor,  # [N, M, 3]
    projection: list[float],  # 6 x 3
    mean: bool,
) -> Tensor:
    """sample_triplane of differentiable ops."""
    grid = project(coordinates, projection).unflatten(-1, (3, 2)).transpose(1, 2)
    out = grid_sample(planes.flatten(0, 1), grid.flatten(0, 1)[:, None]).unflatten(0, (planes.shape[0], 3))
    out = out.squeeze(3).transpose(2, 3)
    return wide(out).mean(1).to(planes.dtype) if mean else out


_sample_triplane = define(
    "sample_triplane(Tensor planes, Tensor coordinates, float[] projection, bool mean) -> Tensor",
    reference=sample_triplane_reference,
)


def sample_triplane(
    planes: Tensor,  # [N, 3, C, H, W]
    coordinates: Tensor,  # [N, M, 3], world units
    box_warp: float = 1.0,  # side of the cube that the planes cover, world units
    plane_axes: str | Sequence | Tensor = "eg3d",  # 'eg3d', 'fixed', or axes [3 planes, 3 axes, 3]
    reduce: str | None = None,  # None or 'mean', over planes
) -> Tensor:
    """Features of points: each plane sampled bilinearly where the point projects to, zero outside.

    The first axis of a plane runs along its columns, the second along its rows. 'eg3d' is (x, y), (x, z),
    (z, x), as the released EG3D checkpoints have it, 'fixed' (x, y), (x, z), (z, y). Other axes are nested
    lists of numbers, or a tensor; but that is read on the host at each call: a wait for its device, and no
    tracing by torch.compile or torch.export. They get no gradient.
    Returns:   [N, 3, M, C], or [N, M, C] for the mean over planes, dtype of planes.
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
