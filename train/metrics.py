"""How close a student is to its teacher, how good and how consistent in 3D both are, and how fast.

Images are in [-1, 1]; PSNR and SSIM take that as a data range of 2, after clamping.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import camera

from .data import Poses, generator_for, render_targets
from .dataset import ImageDataset
from .features import as_bytes
from .pose import degrees


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [N], in dB."""
    error = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian) of each image [N]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = (x.clamp(-1, 1).float(), y.clamp(-1, 1).float())
    return structural_similarity_index_measure(*pair, data_range=2.0, reduction="none")


def sharpness(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of each image [N]."""
    x = x.clamp(-1, 1)
    return sum(x.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3)) / 2


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


def fid_and_kid(
    features: Tensor,  # [N, D]  of the images to be judged
    reference: Tensor,  # [M, D]  of what they should be like
    subsets: int = 100,
    most: int = 1000,
) -> tuple[float | None, float | None]:
    """The Fréchet distance (Heusel et al. 2017) and the kernel distance (Binkowski et al. 2018) of features.

    The second is the mean over random subsets, of a fixed seed, of `most` images or all there are; its mean
    over draws is 0 for images alike, where the first has a bias, large unless N and M are well above D.
    Returns: both, None where N or M is below 2. Raises: ValueError if a feature is not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    pair = {False: features.double().cpu(), True: reference.double().cpu()}
    size = min(map(len, pair.values()))
    if size < 2:
        return None, None
    if not all(x.isfinite().all() for x in pair.values()):
        raise ValueError("features: some are not finite")
    # Given features, so that an image goes through the network once.
    given = torch.nn.Identity()
    given.num_features = features.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that features are kept
        torch.manual_seed(0)
        distances = (
            FrechetInceptionDistance(feature=given),
            KernelInceptionDistance(feature=given, subsets=subsets, subset_size=min(size, most)),
        )
        for distance in distances:
            for real, x in pair.items():
                distance.update(x, real=real)
        return distances[0].compute().item(), distances[1].compute()[0].item()


@torch.no_grad()
def evaluate(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    poses: Poses,
    images: int = 64,
    batch_size: int = 8,
    seed: int = 1_000_003,
    perceptual: torch.nn.Module | None = None,
    identity: torch.nn.Module | None = None,
    pose: torch.nn.Module | None = None,
    features: torch.nn.Module | None = None,
    reference: ImageDataset | None = None,
) -> dict[str, float | int | str | None]:
    """Compare student and teacher at latents and poses of a seed that training does not use.

    Every latent is seen from two poses, A and B, at most 0.3 radians apart, with one conditioning pose.
    perceptual: distance of images [N, 3, H, W] in [-1, 1].
    identity:   bytes [N, 3, H, W] to embeddings [N, D] of who is seen, whatever the pose; of a module whose
                `centred` is True, the deviations from the mean over a model's images count.
    pose:       images [N, 3, H, W] in [-1, 1] to the unit vectors [N, 3] along which their cameras look.
    features:   bytes [N, 3, H, W] to the features [N, D] that FID and KID compare, of images A.
    reference:  what they are compared with: all images of a data set; None: as many of the teacher's, at
                other latents.
    Returns: psnr_db and ssim (mean over images), perceptual with perceptual_name (None and 'none' without
      one), sharpness (relative to the teacher's), reprojection_psnr_{teacher,student}_db (A's image warped
      to B by the teacher's depth against B's own image; None if no pixel is visible in both),
      reprojection_visible (share of pixels compared), and images.
      identity_{teacher,student}: mean cosine of the embeddings of A and B, identity_others: that of different
      latents of the teacher, with identity_name; pose_degrees_{teacher,student}: mean angle between the
      direction found and the true one; {fid,kid}_{teacher,student} with features_name, features_size (D),
      fid_images, and reference_images. None where the network is not given.
    """
    device = next(student.parameters()).device
    totals: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": [], "perceptual": [], "sharpness": []}
    errors = {"teacher": 0.0, "student": 0.0}
    embedded, turned, seen = ({name: [] for name in errors} for _ in range(3))
    pixels = visible_pixels = 0
    latents = max(1, batch_size // 2)
    batches = math.ceil(images / (2 * latents))
    for index in range(batches):
        random = generator_for(seed, "evaluation", index)
        z = torch.randn(latents, teacher.z_dim, generator=random).to(device)
        c = pose_pairs(poses, latents, random).to(device)
        target = render_targets(teacher, teacher.mapping(z, c[::2]), c, student.neural_rendering_resolution)
        image = student.synthesis(target["ws"], c)["image"]
        totals["psnr_db"].append(psnr(image, target["image"]))
        totals["ssim"].append(ssim(image, target["image"]))
        totals["sharpness"].append(sharpness(image) / sharpness(target["image"]).clamp(min=1e-6))
        if perceptual is not None:
            totals["perceptual"].append(perceptual(image, target["image"])[None])
        depth = target["image_depth"]
        for name, view in (("teacher", target["image"]), ("student", image)):
            warped, visible = camera.warp_by_depth(view[::2], depth[::2], depth[1::2], c[::2], c[1::2])
            difference = (warped.clamp(-1, 1) - view[1::2].clamp(-1, 1)).square().mean(dim=1, keepdim=True)
            errors[name] += difference[visible].sum().item()
            if identity is not None:
                embedded[name].append(identity(as_bytes(view)).float().unflatten(0, (latents, 2)))
            if pose is not None:
                turned[name].append(degrees(pose(view), c))
            if features is not None:
                seen[name].append(features(as_bytes(view[::2])).double().cpu())
        pixels += visible.numel()
        visible_pixels += int(visible.sum())
    result = {key: torch.cat(values).mean().item() if values else None for key, values in totals.items()}
    for name, total in errors.items():
        mean = max(total / max(visible_pixels, 1), 1e-12)
        result[f"reprojection_psnr_{name}_db"] = 10 * math.log10(4 / mean) if visible_pixels else None
    result["reprojection_visible"] = visible_pixels / pixels
    result["images"] = 2 * latents * batches

    result["identity_others"] = None
    for name in errors:
        result[f"identity_{name}"] = result[f"pose_degrees_{name}"] = None
        if embedded[name]:
            both = torch.cat(embedded[name])
            if getattr(identity, "centred", False):
                both = both - both.mean(dim=(0, 1))
            a, b = both.unbind(1)
            result[f"identity_{name}"] = F.cosine_similarity(a, b).mean().item()
            if name == "teacher" and len(a) > 1:
                result["identity_others"] = F.cosine_similarity(a, b.roll(1, 0)).mean().item()
        if turned[name]:
            result[f"pose_degrees_{name}"] = torch.cat(turned[name]).mean().item()
    result |= dict.fromkeys(("fid_teacher", "fid_student", "kid_teacher", "kid_student"))
    result |= dict.fromkeys(("features_size", "fid_images", "reference_images"))
    if features is not None:
        if reference is None:
            others = _images(teacher, poses, latents, batches, seed, student.neural_rendering_resolution)
        else:
            rows = torch.arange(len(reference)).split(batch_size)
            others = (torch.stack([reference[i][0] for i in some.tolist()]) for some in rows)
        like = torch.cat([features(as_bytes(view.to(device))).double().cpu() for view in others])
        for name, found in seen.items():
            result[f"fid_{name}"], result[f"kid_{name}"] = fid_and_kid(torch.cat(found), like)
        result["features_size"], result["reference_images"] = like.shape[1], len(like)
        result["fid_images"] = latents * batches
    networks = {"perceptual": perceptual, "identity": identity, "features": features}
    return result | {f"{key}_name": getattr(net, "name", "none") for key, net in networks.items()}


def _images(
    teacher: torch.nn.Module, poses: Poses, latents: int, batches: int, seed: int, resolution: int
) -> Iterator[Tensor]:
    """Batches of a teacher's images [latents, 3, H, W], one of each latent, that are not measured."""
    device = next(teacher.parameters()).device
    for index in range(batches):
        random = generator_for(seed, "reference", index)
        z = torch.randn(latents, teacher.z_dim, generator=random).to(device)
        c = poses.sample(latents, random).to(device)
        yield render_targets(teacher, teacher.mapping(z, c), c, resolution)["image"]


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
