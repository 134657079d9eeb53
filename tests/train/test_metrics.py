"""The metrics: against formulas, and the teacher measured against itself."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastgen import camera
from fastgen.train.metrics import (
    evaluate,
    milliseconds,
    milliseconds_per_image,
    pose_pairs,
    psnr,
    ssim,
    warp_by_depth,
)


def test_psnr_and_ssim():
    x = torch.zeros(2, 3, 16, 16)
    y = x.clone()
    y[0] += 0.2
    y[1] += 0.02
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0]))
    # Values outside [-1, 1] are clamped, as they are when an image is written.
    assert psnr(torch.full((1, 3, 4, 4), 5.0), torch.ones(1, 3, 4, 4)).item() > 100
    noise = torch.rand(2, 3, 32, 32)
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert ssim(noise, torch.rand(2, 3, 32, 32)).max() < 0.5


def plane(c: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and depth of the plane z = 0, coloured by its position."""
    origins, directions = camera.rays(c, side)
    depth = -origins[..., 2:] / directions[..., 2:]
    points = origins + depth * directions
    image = torch.stack([points[..., 0] * 2, points[..., 1] * 2, (9 * points[..., 0]).sin()], dim=1)
    return image.unflatten(2, (side, side)), depth.transpose(1, 2).unflatten(2, (side, side))


def test_warp_finds_the_same_points():
    cameras = camera.CameraDistribution(azimuth_spread=0.3, kind="uniform")
    a, b = cameras.sample(3), cameras.sample(3)
    (image_a, depth_a), (image_b, depth_b) = plane(a, 32), plane(b, 32)
    # A far corner, so that the farthest depth, which counts as empty, is not the plane.
    depth_b[:, :, 0, 0] = 4
    warped, visible = warp_by_depth(image_a, depth_a, depth_b, a, b)
    assert visible.float().mean() > 0.6
    error = (warped - image_b).abs().masked_fill(~visible, 0)
    # At the rim the lookup is up to half a pixel off, that is 0.01 units, and the sine's slope is 9 a unit.
    assert error.max() < 0.1 and error.mean() < 0.005


def test_hidden_points_are_invisible():
    c = camera.CameraDistribution().front()
    image, depth = plane(c, 16)
    depth_b = depth.clone()
    depth_b[:, :, 0, 0] = 4
    assert warp_by_depth(image, depth, depth_b, c, c)[1].sum() >= 14 * 14
    # Something nearer covers the left half in A.
    nearer = depth.clone()
    nearer[..., :8] *= 0.8
    visible = warp_by_depth(image, nearer, depth_b, c, c)[1]
    assert not visible[..., :7].any() and visible[..., 1:-1, 9:].all()


def test_silhouettes_and_occluders_are_told_apart_from_slopes():
    c = camera.CameraDistribution(focal=2.0).front()
    image, depth = plane(c, 32)
    pixel = 1 / (2.0 * 32)  # at distance 1
    depth[:, :, 0, 0] = 20
    slanted = depth * (1 + pixel) ** torch.arange(32.0)
    assert warp_by_depth(image, slanted, slanted, c, c)[1][..., 2:-2, 2:-2].all()
    # Three pixels of depth a pixel are a silhouette.
    steep = depth * (1 + 3 * pixel) ** torch.arange(32.0)
    assert not warp_by_depth(image, steep, steep, c, c)[1][..., 1:-1].any()
    # Seen where A has something three pixels nearer, not where it is one.
    for nearer, visible in ((1, True), (3, False)):
        seen = warp_by_depth(image, depth * (1 - nearer * pixel), depth, c, c)[1]
        assert seen[..., 2:-2, 2:-2].all() == visible


def test_pose_pairs_look_alike():
    wide = camera.CameraDistribution(azimuth_spread=math.pi, polar_spread=0.5, kind="uniform")
    forward = pose_pairs(wide, 50, torch.Generator().manual_seed(0))[:, [2, 6, 10]]
    angle = (forward[::2] * forward[1::2]).sum(1).clamp(max=1).arccos()
    assert angle.max() <= 0.3 + 1e-3 and angle.min() > 0

    class Labels:
        """Two poses only, half a turn apart: the closest one has to do."""

        def sample(self, n, generator=None):
            c = wide.at(torch.tensor([0.0, math.pi]), torch.tensor([1.5, 1.5]))
            return c[torch.randint(2, (n,), generator=generator)]

    pairs = pose_pairs(Labels(), 5, torch.Generator().manual_seed(0))
    assert torch.equal(pairs[::2], pairs[1::2])


class Echo(torch.nn.Module):
    """A student that is the teacher, with noise of a given strength."""

    def __init__(self, teacher, noise=0.0):
        super().__init__()
        self.teacher, self.noise = teacher, noise
        self.z_dim, self.neural_rendering_resolution = teacher.z_dim, teacher.neural_rendering_resolution

    def synthesis(self, ws, c):
        image = self.teacher.synthesis(ws, c)["image"].clamp(-0.9, 0.9)
        return {"image": image + self.noise * torch.randn(image.shape).clamp(-1, 1)}


def test_evaluate(teacher):
    good = evaluate(Echo(teacher, 0.01), teacher, teacher.camera, images=4, batch_size=4)
    bad = evaluate(Echo(teacher, 0.2), teacher, teacher.camera, images=4, batch_size=4)
    assert good["images"] == 4 and good["perceptual"] is None and good["perceptual_name"] == "none"
    assert good["psnr_db"] > bad["psnr_db"] + 3 and good["ssim"] > bad["ssim"]
    assert 0 < good["reprojection_visible"] <= 1
    # The reference line is the teacher's own.
    assert good["reprojection_psnr_teacher_db"] == bad["reprojection_psnr_teacher_db"]
    assert good["reprojection_psnr_student_db"] > bad["reprojection_psnr_student_db"]
    assert math.isfinite(good["reprojection_psnr_teacher_db"])


def test_perceptual_is_named(teacher):
    class Mean(torch.nn.Module):
        name = "mean difference"

        def forward(self, x, y):
            return (x - y).mean().abs()

    found = evaluate(Echo(teacher), teacher, teacher.camera, images=2, batch_size=2, perceptual=Mean())
    assert found["perceptual_name"] == "mean difference" and found["perceptual"] >= 0


def test_timing(teacher, monkeypatch):
    clock = iter([0, 10, 11, 20, 23, 30, 32])
    monkeypatch.setattr("fastgen.train.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls = []
    assert milliseconds(lambda: calls.append(1), repeats=3, warmup=1) == 2000
    assert len(calls) == 4
    monkeypatch.undo()
    assert milliseconds_per_image(teacher, teacher.camera, 2, repeats=1, warmup=0) > 0
