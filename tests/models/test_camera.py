"""Cameras: labels, poses, rays and distributions, against the original's and against geometry."""

import math

import pytest
import torch

from fastgen import camera, presets
from fastgen.camera import CameraDistribution


@pytest.mark.parametrize("name, index", [("ray_origins", 0), ("ray_directions", 1)])
def test_golden_rays(golden, name, index):
    # A dozen float32 operations per ray.
    torch.testing.assert_close(camera.rays(golden["c"], 16)[index], golden[name], rtol=0, atol=1e-6)


def test_golden_poses(golden):
    # The golden labels' angles follow from where the cameras stand; look_at must give back the whole matrix.
    pose, k = camera.split_label(golden["c"])
    x, y, z = pose[:, :3, 3].unbind(1)
    radius = pose[:, :3, 3].norm(dim=1)
    azimuth = math.pi - torch.atan2(z, x)
    polar = (1 - y / radius) * math.pi / 2
    # arccos and atan2 in float32.
    torch.testing.assert_close(camera.look_at(azimuth, polar, radius=radius), pose, rtol=0, atol=1e-5)
    torch.testing.assert_close(camera.intrinsics(fov_degrees=45, n=2), k, rtol=0, atol=1e-5)


def test_front_pose():
    c = CameraDistribution(focal=2.0, pivot=(0, 0, 0.2), radius=2.7).front()
    pose, k = camera.split_label(c)
    expected = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2.7], [0, 0, 0, 1]])
    # cos(pi / 2) in float32 is 4e-8, not 0.
    torch.testing.assert_close(pose[0], expected, rtol=0, atol=1e-6)
    assert k[0].tolist() == [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]


def test_poses_look_at_the_pivot():
    generator = torch.Generator().manual_seed(0)
    pivot = torch.tensor([0.1, -0.2, 0.3])
    angles = torch.rand(2, 50, generator=generator) * math.pi
    pose = camera.look_at(angles[0] * 2, angles[1], pivot, radius=2.0)
    rotation, origin = pose[:, :3, :3], pose[:, :3, 3]
    # Products of float32 unit vectors.
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(50, 3, 3), rtol=0, atol=1e-5)
    assert (torch.linalg.det(rotation) > 0).all()
    torch.testing.assert_close(origin.norm(dim=1), torch.full([50], 2.0))
    to_pivot = torch.nn.functional.normalize(pivot - origin, dim=1)
    torch.testing.assert_close(rotation[:, :, 2], to_pivot)
    # The middle ray of an odd image is the viewing direction, and no camera rolls.
    _, directions = camera.rays(camera.label(pose, camera.intrinsics(focal=1.5)), 5)
    torch.testing.assert_close(directions[:, 12], to_pivot)
    assert rotation[:, 1, 0].abs().max() < 1e-6


def test_camera_at_the_pole_is_finite():
    assert camera.look_at(1.0, torch.tensor([0.0, math.pi])).isfinite().all()


def test_rays_project_back_to_pixel_centres():
    c = CameraDistribution().sample(3, torch.Generator().manual_seed(0))
    c[:, 17] = 0.1  # skew
    c[:, 18], c[:, 20], c[:, 21] = 0.45, 3.5, 0.55
    origins, directions = camera.rays(c, 4)
    pose, k = camera.split_label(c)
    local = directions @ pose[:, :3, :3]
    pixels = (local / local[..., 2:]) @ k.mT
    grid = (torch.arange(4) + 0.5) / 4
    want = torch.stack([grid.repeat(4), grid.repeat_interleave(4), torch.ones(16)], dim=-1)
    torch.testing.assert_close(pixels, want.expand(3, 16, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 16))
    assert torch.equal(origins[:, 7], pose[:, :3, 3])


def test_label_round_trip():
    pose, k = camera.look_at(torch.tensor([1.0, 2.0]), 1.5), camera.intrinsics(focal=3.0)
    c = camera.label(pose, k)
    assert c.shape == (2, 25)
    assert torch.equal(camera.split_label(c)[0], pose)
    assert torch.equal(camera.split_label(c)[1], k.expand(2, 3, 3))


def test_ffhq_focal_length():
    # One camera, published as an angle and as a focal length that agree to three digits.
    assert camera.focal_from_fov(18.837) == pytest.approx(4.2647, rel=1e-3)


def angles_of(c):
    x, y, z = camera.split_label(c)[0][:, :3, 3].unbind(1)
    return math.pi - torch.atan2(z, x), (1 - y / torch.stack([x, y, z]).norm(dim=0)) * math.pi / 2


def test_uniform_distribution():
    d = CameraDistribution(azimuth_spread=0.8, polar_spread=0.35, kind="uniform")
    h, v = angles_of(d.sample(2000, torch.Generator().manual_seed(0)))
    for angle, spread in ((h, 0.8), (v, 0.35)):
        offset = angle - math.pi / 2
        assert 0.98 * spread < offset.abs().max() <= 1.0001 * spread
        assert offset.std() == pytest.approx(spread / math.sqrt(3), rel=0.05)


def test_gaussian_distribution():
    h, v = angles_of(CameraDistribution().sample(2000, torch.Generator().manual_seed(0)))
    assert h.std() == pytest.approx(0.3, rel=0.06) and v.std() == pytest.approx(0.155, rel=0.06)


def test_sampling_follows_the_generator():
    first, again, other = (
        CameraDistribution().sample(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_orbit_is_closed_and_round_trips(name):
    d = presets.get(name).camera
    c = d.orbit(24)
    assert c.shape == (24, 25) and c.isfinite().all()
    steps = (c - c.roll(1, 0)).norm(dim=1)
    assert steps.min() > 0 and steps.max() < 3 * steps.mean()
    assert CameraDistribution(**d.as_dict()) == d


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: camera.rays(torch.zeros(2, 16), 4),
            ValueError,
            r"c must have shape \[N, 25\], got \[2, 16\]",
        ),
        (lambda: camera.rays([0] * 25, 4), TypeError, r"c must be a tensor \[N, 25\], got list"),
        (lambda: camera.rays(torch.zeros(2, 25), 0), ValueError, "resolution must be at least 1, got 0"),
        (lambda: camera.intrinsics(), ValueError, "either fov_degrees or focal"),
        (lambda: camera.look_at(1.0, 1.0, pivot=(0.0, 0.0)), ValueError, r"pivot must have shape .*\[2\]"),
        (lambda: CameraDistribution(kind="normal"), ValueError, "kind must be .*got 'normal'"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mirrored_cameras_have_mirrored_rays():
    c = CameraDistribution(pivot=(0.1, 0, 0.2)).sample(5, torch.Generator().manual_seed(0))
    c[:, 17], c[:, 18] = 0.1, 0.45  # skew, centre
    mirrored = camera.mirror(c)
    assert torch.equal(camera.mirror(mirrored)[:, :18], c[:, :18])
    assert (torch.linalg.det(camera.split_label(mirrored)[0][:, :3, :3]) > 0).all()
    # The ray of a pixel is the mirror image of the flipped image's.
    for rays, of_mirrored in zip(camera.rays(c, 6), camera.rays(mirrored, 6), strict=True):
        flipped = rays.unflatten(1, (6, 6)).flip(2).flatten(1, 2) * torch.tensor([-1.0, 1.0, 1.0])
        torch.testing.assert_close(of_mirrored, flipped, rtol=0, atol=1e-6)


def test_angles_are_those_of_look_at():
    generator = torch.Generator().manual_seed(0)
    azimuth = (torch.rand(50, generator=generator) - 0.25) * 2 * math.pi
    polar, radius = (torch.rand(2, 50, generator=generator) * 2.9 + 0.1).unbind(0)
    c = camera.label(camera.look_at(azimuth, polar, (0.1, 0, 0), radius), camera.intrinsics(focal=2.0))
    for found, wanted in zip(camera.angles(c), (azimuth, polar, radius), strict=True):
        # arccos and atan2 in float32.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
