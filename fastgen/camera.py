"""Cameras: the 25-number label of EG3D, poses, rays, and distributions of poses.

A label c [N, 25] is the camera-to-world matrix (16 numbers, row-major, OpenCV axes: x right, y down, z
forward; world units), then the intrinsics (9, row-major) in units of the image size: focal length, centre
0.5, skew.
Angles are in radians. Azimuth h and polar angle v are pi/2 in front of the object, where the camera stands on
+z and y is up; h grows to the camera's right. The true angle from +y is arccos(1 - 2 v / pi), so that a
uniform v is uniform on the sphere, and 1 radian in v is 0.64 radians in space near the horizon.
Source: Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks", supplement.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def look_at(
    azimuth: Tensor | float,  # [N] radians
    polar: Tensor | float,  # [N] radians
    pivot: Sequence[float] | Tensor = (0.0, 0.0, 0.0),  # [3] or [N, 3] world units
    radius: Tensor | float = 1.0,  # [N] world units, from the origin of the world
) -> Tensor:
    """Poses of cameras on a sphere around the world's origin, which look at `pivot`, without roll.

    origin = radius * (sin p cos(pi - h), cos p, sin p sin(pi - h)), p = arccos(1 - 2 v / pi).
    Returns: camera-to-world matrices [N, 4, 4].
    """
    h, v, radius = torch.broadcast_tensors(
        *(torch.atleast_1d(torch.as_tensor(t, dtype=torch.float32)) for t in (azimuth, polar, radius))
    )
    pivot = torch.as_tensor(pivot, dtype=torch.float32, device=h.device)
    if pivot.shape[-1:] != (3,) or pivot.ndim > 2:
        raise ValueError(f"look_at: pivot must have shape [3] or [N, 3], got {list(pivot.shape)}")
    # At the poles the camera's right-hand side is undefined.
    phi = torch.arccos(1 - 2 * v.clamp(1e-5, math.pi - 1e-5) / math.pi)
    theta = math.pi - h
    origin = (
        torch.stack([phi.sin() * theta.cos(), phi.cos(), phi.sin() * theta.sin()], dim=-1) * radius[:, None]
    )
    forward = torch.nn.functional.normalize(pivot - origin, dim=-1)
    up = forward.new_tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = -torch.nn.functional.normalize(torch.linalg.cross(up, forward), dim=-1)
    down = torch.nn.functional.normalize(torch.linalg.cross(forward, right), dim=-1)
    top = torch.stack([right, down, forward, origin], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(top.shape[0], 1, 4)
    return torch.cat([top, bottom], dim=1)


def focal_from_fov(fov_degrees: float) -> float:
    """Focal length in image sizes of a field of view, by EG3D's formula (its pi and sqrt 2 are rounded)."""
    return 1 / (math.tan(fov_degrees * 3.14159 / 360) * 1.414)


def intrinsics(fov_degrees: float | None = None, focal: float | None = None, n: int = 1) -> Tensor:
    """Normalised pinhole matrices [n, 3, 3] from either a field of view or a focal length in image sizes."""
    if (fov_degrees is None) == (focal is None):
        raise ValueError("intrinsics: give either fov_degrees or focal")
    focal = focal_from_fov(fov_degrees) if focal is None else focal
    return torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=torch.float32).repeat(n, 1, 1)


def label(cam2world: Tensor, intrinsics: Tensor) -> Tensor:  # [N, 4, 4], [N, 3, 3] or [1, 3, 3] -> c [N, 25]
    """Join poses and intrinsics to labels."""
    n = cam2world.shape[0]
    intrinsics = intrinsics.to(cam2world).expand(n, 3, 3)
    return torch.cat([cam2world.reshape(n, 16), intrinsics.reshape(n, 9)], dim=1)


def split_label(c: Tensor) -> tuple[Tensor, Tensor]:  # [N, 25] -> [N, 4, 4], [N, 3, 3]
    """The pose and the intrinsics of labels."""
    if not isinstance(c, Tensor):
        raise TypeError(f"camera: c must be a tensor [N, 25], got {type(c).__name__}")
    if c.ndim != 2 or c.shape[1] != 25:
        raise ValueError(f"camera: c must have shape [N, 25], got {list(c.shape)}")
    return c[:, :16].reshape(-1, 4, 4), c[:, 16:].reshape(-1, 3, 3)


def mirror(c: Tensor) -> Tensor:  # [N, 25] -> [N, 25]
    """Labels of images flipped left to right: the cameras' mirror images in the plane x = 0.

    With F = diag(-1, 1, 1, 1) the pose M becomes F M F: the second F turns the camera's x axis back to the
    right of what is now its image. The centre and the skew of the intrinsics follow.
    """
    pose, k = split_label(c)
    flip = pose.new_tensor([-1.0, 1.0, 1.0, 1.0])
    k = k.clone()
    k[:, 0, 1].neg_()
    k[:, 0, 2] = 1 - k[:, 0, 2]
    return label(pose * flip[:, None] * flip, k)


def angles(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N, 25]
    """Where the cameras of labels stand, as look_at takes it: azimuth, polar angle and radius, [N] each.

    Azimuths are in [-pi/2, 3 pi/2], half a turn to either side of the front. The pivot is not looked at.
    """
    x, y, z = split_label(c)[0][:, :3, 3].unbind(1)
    radius = (x * x + y * y + z * z).sqrt()
    return math.pi / 2 + torch.atan2(x, z), math.pi / 2 * (1 - y / radius.clamp_min(1e-12)), radius


def rays(c: Tensor, resolution: int) -> tuple[Tensor, Tensor]:  # [N, 25]
    """Rays through the pixel centres of a square image, row by row, x first.

    Returns: origins [N, R, 3] in world units and unit directions [N, R, 3], R = resolution^2.
    """
    cam2world, k = split_label(c)
    if resolution < 1:
        raise ValueError(f"camera.rays: resolution must be at least 1, got {resolution}")
    centre = (torch.arange(resolution, device=c.device, dtype=c.dtype) + 0.5) / resolution
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    fx, skew, cx = (k[:, 0, i, None] for i in range(3))
    fy, cy = k[:, 1, 1, None], k[:, 1, 2, None]
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    # No matrix product: autocast and TF32 would misplace a ray by a pixel.
    right, down, forward = cam2world[:, None, :3, :3].unbind(-1)
    directions = x[..., None] * right + y[..., None] * down + forward
    origins = cam2world[:, None, :3, 3].expand(-1, resolution * resolution, -1)
    return origins, torch.nn.functional.normalize(directions, dim=-1)


@dataclass(frozen=True)
class CameraDistribution:
    """Where a data set's cameras stand.

    Angles are in radians; a spread is half the interval ('uniform') or the standard deviation ('gaussian').
    focal is in image sizes, pivot and radius in world units.
    """

    focal: float = 4.2647
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)
    radius: float = 2.7
    azimuth_mean: float = math.pi / 2
    azimuth_spread: float = 0.3
    polar_mean: float = math.pi / 2
    polar_spread: float = 0.155
    kind: str = "gaussian"

    def __post_init__(self):
        if self.kind not in ("uniform", "gaussian"):
            raise ValueError(f"CameraDistribution: kind must be 'uniform' or 'gaussian', got {self.kind!r}")
        object.__setattr__(self, "pivot", tuple(float(p) for p in self.pivot))

    def at(self, azimuth: Tensor | float, polar: Tensor | float) -> Tensor:
        """Labels [N, 25] of cameras of this distribution at given angles [N] in radians."""
        pose = look_at(azimuth, polar, self.pivot, self.radius)
        return label(pose, intrinsics(focal=self.focal))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n labels [n, 25]; on the CPU, so that a seed gives the same poses everywhere."""
        if self.kind == "gaussian":
            draw = torch.randn(n, 2, generator=generator)
        else:
            draw = torch.rand(n, 2, generator=generator) * 2 - 1
        h = self.azimuth_mean + self.azimuth_spread * draw[:, 0]
        return self.at(h, self.polar_mean + self.polar_spread * draw[:, 1])

    def front(self) -> Tensor:
        """The label [1, 25] of the central pose."""
        return self.at(self.azimuth_mean, self.polar_mean)

    def orbit(self, frames: int) -> Tensor:
        """Labels [frames, 25] of a closed tour: a full turn where the azimuths cover one, else an ellipse."""
        t = torch.arange(frames) / max(frames, 1) * 2 * math.pi
        if self.azimuth_spread >= 3:
            return self.at(self.azimuth_mean + t, self.polar_mean)
        reach = 1.5 if self.kind == "gaussian" else 0.9
        h = self.azimuth_mean + reach * self.azimuth_spread * t.sin()
        return self.at(h, self.polar_mean + reach * self.polar_spread * t.cos())

    def as_dict(self) -> dict:
        """As plain JSON values; CameraDistribution(**d) is the way back."""
        return asdict(self) | {"pivot": list(self.pivot)}


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrices [N, 3, 3] times vectors [N, R, 3], in full precision always."""
    return (matrix[:, None] * x[..., None, :]).sum(-1)


def warp_by_depth(
    image_a: Tensor,  # [N, 3, H, W]  seen from pose A
    depth_a: Tensor,  # [N, 1, h, w]  world units along the ray, from pose A
    depth_b: Tensor,  # [N, 1, h, w]  likewise from pose B
    c_a: Tensor,  # [N, 25]
    c_b: Tensor,  # [N, 25]
    occlusion: float = 2.0,
    silhouette: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """What pose B should see, by an image from pose A and the depth of both.

    Every pixel of B is lifted to its surface point, projected into A, and looked up there. It counts as
    visible if it falls inside A, and, in units of what a pixel of the depth map covers at its distance,
    A's depth there is within `occlusion` of the point's distance to A's camera (nothing stands before it),
    and depth varies by less than `silhouette` over the 3 x 3 pixels around it in B (a slope of 68 degrees at
    most: no edge of the shape). Nor does it count at its map's farthest depth, which is where empty rays end.
    Returns: image [N, 3, H, W] and visibility [N, 1, H, W], boolean.
    """
    n, _, height, width = image_a.shape
    covers = 1 / (c_b[:, 16].reshape(n, 1, 1, 1) * depth_b.shape[2])  # a pixel's side, per unit of distance
    empty = depth_b >= depth_b.amax(dim=(1, 2, 3), keepdim=True) * (1 - 1e-3)
    # A pixel next to a silhouette mixes two depths; a window's spread finds it.
    spread = F.max_pool2d(depth_b, 3, 1, 1) + F.max_pool2d(-depth_b, 3, 1, 1)
    usable = (~empty & (spread < silhouette * covers * depth_b)).float()
    depth = F.interpolate(depth_b, (height, width), mode="bilinear", align_corners=False)
    usable = F.interpolate(usable, (height, width), mode="nearest") > 0

    origins, directions = rays(c_b, height)
    points = origins + directions * depth.flatten(2).transpose(1, 2)
    world2cam = torch.linalg.inv(c_a[:, :16].reshape(n, 4, 4))
    local = _times(world2cam[:, :3, :3], points) + world2cam[:, None, :3, 3]
    projected = _times(c_a[:, 16:].reshape(n, 3, 3), local)
    grid = (projected[..., :2] / projected[..., 2:].clamp(min=1e-6) * 2 - 1).reshape(n, height, width, 2)

    seen = F.grid_sample(depth_a, grid, mode="bilinear", padding_mode="border", align_corners=False)
    distance = local.norm(dim=-1).reshape(n, 1, height, width)
    inside = (grid.abs() < 1).all(dim=-1)[:, None] & (local[..., 2] > 0).reshape(n, 1, height, width)
    visible = usable & inside & ((seen - distance).abs() < occlusion * covers * distance)
    return F.grid_sample(image_a, grid, mode="bilinear", padding_mode="border", align_corners=False), visible
