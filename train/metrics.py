"""How close a student is to its teacher, how consistent both are in 3D, and how fast.

Images are in [-1, 1]; PSNR and SSIM take that as a data range of 2, after clamping.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import camera

from .data import Poses, generator_for, render_targets


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [N], in dB."""
    error = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian) of each image [N]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = (x.clamp(-1, 1).float(), y.clamp(-1, 1).float())
    return structural_similarity_index_measure(*pair, data_range=2.0, reduction="none")


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
    most: no edge of the shape). Nor does it count at the farthest depth, which is where empty rays end.
    Returns: image [N, 3, H, W] and visibility [N, 1, H, W], boolean.
    """
    n, _, height, width = image_a.shape
    covers = 1 / (c_b[:, 16].reshape(n, 1, 1, 1) * depth_b.shape[2])  # a pixel's side, per unit of distance
    empty = depth_b >= depth_b.amax() * (1 - 1e-3)
    # A pixel next to a silhouette mixes two depths; a window's spread finds it.
    spread = F.max_pool2d(depth_b, 3, 1, 1) + F.max_pool2d(-depth_b, 3, 1, 1)
    usable = (~empty & (spread < silhouette * covers * depth_b)).float()
    depth = F.interpolate(depth_b, (height, width), mode="bilinear", align_corners=False)
    usable = F.interpolate(usable, (height, width), mode="nearest") > 0

    origins, directions = camera.rays(c_b, height)
    points = origins + directions * depth.flatten(2).transpose(1, 2)
    world2cam = torch.linalg.inv(c_a[:, :16].reshape(n, 4, 4))
    local = points @ world2cam[:, :3, :3].transpose(1, 2) + world2cam[:, None, :3, 3]
    projected = local @ c_a[:, 16:].reshape(n, 3, 3).transpose(1, 2)
    grid = (projected[..., :2] / projected[..., 2:].clamp(min=1e-6) * 2 - 1).reshape(n, height, width, 2)

    seen = F.grid_sample(depth_a, grid, mode="bilinear", padding_mode="border", align_corners=False)
    distance = local.norm(dim=-1).reshape(n, 1, height, width)
    inside = (grid.abs() < 1).all(dim=-1)[:, None] & (local[..., 2] > 0).reshape(n, 1, height, width)
    visible = usable & inside & ((seen - distance).abs() < occlusion * covers * distance)
    return F.grid_sample(image_a, grid, mode="bilinear", padding_mode="border", align_corners=False), visible


def pose_pairs(
    poses: Poses, n: int, generator: torch.Generator | None = None, within: float = 0.3, tries: int = 256
) -> Tensor:
    """Labels [2 n, 25]: n times a pose, and one that looks at most `within` radians away from it.

    The second is the first of `tries` draws that does, else the closest, whatever poses are drawn from.
    """
    first, others = poses.sample(n, generator), poses.sample(n * tries, generator).unflatten(0, (n, tries))
    forward = [2, 6, 10]  # the third column of the pose
    cosine = (first[:, None, forward] * others[..., forward]).sum(-1)
    near = cosine >= math.cos(within)
    # Where one is near enough argmax finds the first of them, for all of them are equal.
    pick = torch.where(near.any(1, keepdim=True), near.float(), cosine).argmax(1)
    return torch.stack([first, others[torch.arange(n), pick]], 1).flatten(0, 1)


@torch.no_grad()
def evaluate(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    poses: Poses,
    images: int = 64,
    batch_size: int = 8,
    seed: int = 1_000_003,
    perceptual: torch.nn.Module | None = None,
) -> dict[str, float | int | str | None]:
    """Compare student and teacher at latents and poses of a seed that training does not use.

    Every latent is seen from two poses, A and B, at most 0.3 radians apart, with one conditioning pose.
    Returns: psnr_db and ssim (mean over images), perceptual with perceptual_name (None and 'none' without
      one), reprojection_psnr_{teacher,student}_db (A's image warped to B by the teacher's depth against B's
      own image; None if no pixel is visible in both), reprojection_visible (share of pixels compared), and
      images.
    """
    device = next(student.parameters()).device
    totals: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "perceptual": []}
    errors = {"teacher": 0.0, "student": 0.0}
    pixels = visible_pixels = 0
    latents = max(1, batch_size // 2)
    for index in range(math.ceil(images / (2 * latents))):
        random = generator_for(seed, "evaluation", index)
        z = torch.randn(latents, teacher.z_dim, generator=random).to(device)
        c = pose_pairs(poses, latents, random).to(device)
        target = render_targets(teacher, teacher.mapping(z, c[::2]), c, student.neural_rendering_resolution)
        image = student.synthesis(target["ws"], c)["image"]
        totals["psnr_db"].append(psnr(image, target["image"]))
        totals["ssim"].append(ssim(image, target["image"]))
        if perceptual is not None:
            totals["perceptual"].append(perceptual(image, target["image"])[None])
        depth = target["image_depth"]
        for name, view in (("teacher", target["image"]), ("student", image)):
            warped, visible = warp_by_depth(view[::2], depth[::2], depth[1::2], c[::2], c[1::2])
            difference = (warped.clamp(-1, 1) - view[1::2].clamp(-1, 1)).square().mean(dim=1, keepdim=True)
            errors[name] += difference[visible].sum().item()
        pixels += visible.numel()
        visible_pixels += int(visible.sum())
    result = {key: torch.cat(values).mean().item() if values else None for key, values in totals.items()}
    for name, total in errors.items():
        mean = max(total / max(visible_pixels, 1), 1e-12)
        result[f"reprojection_psnr_{name}_db"] = 10 * math.log10(4 / mean) if visible_pixels else None
    result["reprojection_visible"] = visible_pixels / pixels
    result["perceptual_name"] = getattr(perceptual, "name", "none")
    result["images"] = 2 * latents * math.ceil(images / (2 * latents))
    return result


def milliseconds(call: Callable[[], object], repeats: int = 10, warmup: int = 2) -> float:
    """Median wall time of a call in milliseconds, after warm-up; waits for the GPU where there is one."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for i in range(warmup + repeats):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if i >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.no_grad()
def milliseconds_per_image(
    model: torch.nn.Module, poses: Poses, batch_size: int, repeats: int = 10, warmup: int = 2
) -> float:
    """Median milliseconds an image of mapping + synthesis takes, at one batch size."""
    device = next(model.parameters()).device
    random = generator_for(0, "timing")
    z = torch.randn(batch_size, model.z_dim, generator=random).to(device)
    c = poses.sample(batch_size, random).to(device)
    return milliseconds(lambda: model.synthesis(model.mapping(z, c), c), repeats, warmup) / batch_size
