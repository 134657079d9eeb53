"""Bilinear samples from three planes."""

import torch
import torch.nn.functional as F
from torch import Tensor

_AXES = {"eg3d": (0, 1, 0, 2, 2, 0), "fixed": (0, 1, 0, 2, 2, 1)}


def projection(plane_axes, box_warp: float) -> list[float]:
    """Rows of the 6x3 matrix that maps a world point to (column, row) of planes 0, 1, 2, in [-1, 1]."""
    scale = 2 / box_warp
    if isinstance(plane_axes, str):
        return [scale * (axis == k) for axis in _AXES[plane_axes] for k in range(3)]
    inverse = torch.linalg.inv(torch.as_tensor(plane_axes, dtype=torch.float64))
    return (scale * inverse[:, :, :2].transpose(1, 2)).flatten().tolist()


def project(coordinates: Tensor, matrix: list[float]) -> Tensor:
    """World points [..., 3] to plane coordinates [..., 6]; elementwise, so that no TF32 or autocast touches them."""
    rows = []
    for r in range(6):
        terms = [coordinates[..., k] * a for k, a in enumerate(matrix[3 * r : 3 * r + 3]) if a != 0]
        rows.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(coordinates[..., 0]))
    return torch.stack(rows, -1)


def sample_triplane(
    planes: Tensor, coordinates: Tensor, box_warp: float = 1.0, plane_axes="eg3d", reduce: str | None = None
) -> Tensor:
    n, p, c, h, w = planes.shape
    m = coordinates.shape[1]
    grid = project(coordinates, projection(plane_axes, box_warp)).view(n, m, 3, 2).transpose(1, 2)
    out = F.grid_sample(
        planes.reshape(n * p, c, h, w), grid.reshape(n * p, 1, m, 2).to(planes.dtype), padding_mode="zeros",
        align_corners=False,
    ).view(n, p, c, m).transpose(2, 3)
    return out.mean(1) if reduce == "mean" else out
