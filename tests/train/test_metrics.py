"""The metrics: against formulas, and the teacher measured against itself."""

import math
from types import SimpleNamespace

import pytest
import torch

import fastgen
from fastgen import camera, checkpoint
from fastgen.train import pose
from fastgen.train.features import Features, Pooled, as_bytes
from fastgen.train.losses import Perceptual
from fastgen.train.metrics import (
    evaluate,
    fid_and_kid,
    milliseconds,
    milliseconds_per_image,
    pose_pairs,
    psnr,
    ssim,
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
    warped, visible = camera.warp_by_depth(image_a, depth_a, depth_b, a, b)
    assert visible.float().mean() > 0.6
    error = (warped - image_b).abs().masked_fill(~visible, 0)
    # At the rim the lookup is up to half a pixel off, that is 0.01 units, and the sine's slope is 9 a unit.
    assert error.max() < 0.1 and error.mean() < 0.005


def test_hidden_points_are_invisible():
    c = camera.CameraDistribution().front()
    image, depth = plane(c, 16)
    depth_b = depth.clone()
    depth_b[:, :, 0, 0] = 4
    assert camera.warp_by_depth(image, depth, depth_b, c, c)[1].sum() >= 14 * 14
    # Something nearer covers the left half in A.
    nearer = depth.clone()
    nearer[..., :8] *= 0.8
    visible = camera.warp_by_depth(image, nearer, depth_b, c, c)[1]
    assert not visible[..., :7].any() and visible[..., 1:-1, 9:].all()


def test_silhouettes_and_occluders_are_told_apart_from_slopes():
    c = camera.CameraDistribution(focal=2.0).front()
    image, depth = plane(c, 32)
    pixel = 1 / (2.0 * 32)  # at distance 1
    depth[:, :, 0, 0] = 20
    slanted = depth * (1 + pixel) ** torch.arange(32.0)
    assert camera.warp_by_depth(image, slanted, slanted, c, c)[1][..., 2:-2, 2:-2].all()
    # Three pixels of depth a pixel are a silhouette.
    steep = depth * (1 + 3 * pixel) ** torch.arange(32.0)
    assert not camera.warp_by_depth(image, steep, steep, c, c)[1][..., 1:-1].any()
    # Seen where A has something three pixels nearer, not where it is one.
    for nearer, visible in ((1, True), (3, False)):
        seen = camera.warp_by_depth(image, depth * (1 - nearer * pixel), depth, c, c)[1]
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


class Thumbnail(torch.nn.Module):
    """Bytes to the colours of `side` x `side` tiles; keeps what it was given."""

    name = "thumbnails"

    def __init__(self, side: int):
        super().__init__()
        self.side, self.seen = side, []

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen.append(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, self.side).flatten(1)


class Still:
    """One pose only."""

    def sample(self, n, generator=None):
        return camera.CameraDistribution().front().expand(n, 25)


def test_identity(teacher):
    found = [
        evaluate(Echo(teacher, noise), teacher, poses, images=8, identity=Thumbnail(16))
        for poses, noise in ((Still(), 0), (Still(), 0.5), (teacher.camera, 0))
    ]
    assert found[0]["identity_teacher"] == pytest.approx(1) == found[0]["identity_student"]
    assert found[1]["identity_teacher"] == pytest.approx(1) and found[1]["identity_student"] < 0.999
    for one in found:
        assert one["identity_others"] < one["identity_teacher"] - 1e-4
    assert found[2]["identity_teacher"] < 1 - 1e-5
    assert found[0]["identity_name"] == "thumbnails" and found[0]["features_name"] == "none"
    assert found[0]["fid_student"] is None is found[0]["pose_degrees_student"]


def test_pooled_features_are_centred(teacher):
    identity = Pooled(Perceptual("random-vgg"))
    assert identity.name == "centred, pooled random VGG16 features"
    found = evaluate(Echo(teacher), teacher, Still(), images=8, identity=identity)
    # Of four deviations from a mean the cosines are about -1/3.
    assert found["identity_teacher"] == pytest.approx(1) and found["identity_others"] < 0.5


def test_fid_of_gaussians():
    """Between Gaussians it is the distance of the means, squared, and that of the deviations."""
    x, y = torch.randn(2, 5_000, 4).unbind()
    assert fid_and_kid(x, x)[0] == pytest.approx(0, abs=1e-5)
    assert fid_and_kid(x, y + 1)[0] == pytest.approx(4, rel=0.05)
    assert fid_and_kid(x, 3 * y)[0] == pytest.approx(4 * 2**2, rel=0.05)


@pytest.mark.filterwarnings("ignore:Metric")
def test_kid_is_its_formula_and_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    images = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8)
    images[12:] //= 2
    network = Thumbnail(2)
    x, y = network(images).double().split(12)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    same = sum((kernel(a, a).sum() - kernel(a, a).trace()) / (12 * 11) for a in (x, y))
    found = fid_and_kid(x, y)[1]
    assert found == pytest.approx(float(same - 2 * kernel(x, y).mean())) and found > 0.05
    theirs = KernelInceptionDistance(feature=network, subset_size=12)
    theirs.update(images[:12], real=False)
    theirs.update(images[12:], real=True)
    assert found == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    # Of subsets the mean, the same every time, and nothing else's random numbers.
    state = torch.get_rng_state()
    assert fid_and_kid(x, y, most=6) == fid_and_kid(x, y, most=6)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(fid_and_kid(x, x.flip(0))[1]) < found / 4


def test_few_or_infinite_features():
    assert fid_and_kid(torch.randn(1, 4), torch.randn(9, 4)) == (None, None)
    with pytest.raises(ValueError, match="features: some are not finite"):
        fid_and_kid(torch.full((3, 4), math.nan), torch.randn(9, 4))


def test_fid_and_kid_of_a_student(teacher):
    network = Thumbnail(2)
    good = evaluate(Echo(teacher), teacher, teacher.camera, images=16, features=network)
    bad = evaluate(Echo(teacher, 0.8), teacher, teacher.camera, images=16, features=Thumbnail(2))
    for name in ("fid", "kid"):
        assert good[f"{name}_teacher"] == bad[f"{name}_teacher"]
        near, far = (abs(one[f"{name}_student"] - one[f"{name}_teacher"]) for one in (good, bad))
        assert near < far / 3 and bad[f"{name}_student"] > good[f"{name}_student"]
    assert good["fid_images"] == 8 == good["reference_images"] and good["features_size"] == 12
    # Teacher and student of a batch in turn, then the reference: other images.
    images = torch.cat([batch[:4] for batch in network.seen[:4:2]])
    assert len(network.seen) == 6 and not torch.equal(network.seen[4], network.seen[0])
    reference = [(image / 127.5 - 1, None) for image in images]
    own = evaluate(Echo(teacher), teacher, teacher.camera, images=16, features=network, reference=reference)
    assert own["fid_teacher"] == pytest.approx(0, abs=1e-6) and own["reference_images"] == 8
    assert own["kid_teacher"] <= 0 < own["fid_student"]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_features_of_a_file(tmp_path):
    from torchvision.models import inception_v3

    images = as_bytes(torch.rand(2, 3, 40, 40) * 2 - 1)
    images[1] //= 4
    small = torch.nn.Sequential(torch.nn.Flatten(), Bytes(), torch.nn.Linear(4800, 5)).eval()
    torch.jit.trace(small, images).save(tmp_path / "a.pt")
    shapes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(small, (images,), dynamic_shapes=shapes), tmp_path / "a.pt2")
    for name in ("a.pt", "a.pt2"):
        network = Features(tmp_path / name, 40)
        assert network.name == name
        torch.testing.assert_close(network(images), small(images))
        with pytest.raises(ValueError, match=f"identity: .*{name} does not take bytes .2, 3, 32, 32.: "):
            Features(tmp_path / name, 32, "identity")
    inception = inception_v3(weights=None, init_weights=False).eval()
    for weight in inception.parameters():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")  # or the image is lost on the way
    torch.save(inception.state_dict(), tmp_path / "inception.pth")
    network = Features(tmp_path / "inception.pth", 40)
    inception.fc = torch.nn.Identity()
    big = torch.nn.functional.interpolate(images / 127.5 - 1, (299, 299), mode="bilinear", antialias=True)
    torch.testing.assert_close(network(images), inception(big))
    assert network.name == "torchvision's Inception v3" and network(images).shape == (2, 2048)
    assert network(images).std(0).mean() > 0.01


class Bytes(torch.nn.Module):
    def forward(self, x):
        return x.float() / 255


def test_degrees():
    cameras = camera.CameraDistribution(pivot=(0, 0, 0))
    c = cameras.at(torch.full((4,), math.pi / 2) + torch.tensor([0, 1e-4, 0.1, math.pi]), math.pi / 2)
    found = pose.degrees(pose.forward(c[:1]), c)
    torch.testing.assert_close(found, torch.tensor([0, 1e-4, 0.1, math.pi]).rad2deg(), rtol=1e-3, atol=1e-4)


def test_poses_of_the_toy_are_told():
    teacher, net = fastgen.load_teacher("toy"), pose.load()
    image, c = pose.pictures_of(teacher, teacher.camera, 32, torch.Generator().manual_seed(5))
    assert pose.degrees(net(image), c).mean() < 2.5
    assert pose.degrees(net(image), c.roll(1, 0)).mean() > 15
    assert pose.TOY.stat().st_size < 150_000


def test_pose_of_evaluate(teacher):
    class Front(torch.nn.Module):
        def forward(self, images):
            return pose.forward(Still().sample(len(images)))

    still = evaluate(Echo(teacher), teacher, Still(), images=8, pose=Front())
    assert still["pose_degrees_teacher"] == still["pose_degrees_student"] == 0
    turning = evaluate(Echo(teacher), teacher, teacher.camera, images=8, pose=Front())
    # The cameras' angles vary by 17 and 9 degrees, the vertical one by more where it is a cosine's.
    assert 8 < turning["pose_degrees_teacher"] < 40


def test_pose_network_is_trained(teacher, tmp_path, capsys):
    checkpoint.save(tmp_path / "teacher.safetensors", "teacher", {"G": teacher})
    config = pose.PoseConfig(tmp_path / "pose.safetensors", 0.02, str(tmp_path / "teacher.safetensors"), 32)
    net = pose.train(config)
    assert "degrees on 32 others: mean" in capsys.readouterr().out
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(image), pose.load(config.out)(image))
    torch.testing.assert_close(net(image).norm(dim=1), torch.ones(2))


def test_timing(teacher, monkeypatch):
    clock = iter([0, 10, 11, 20, 23, 30, 32])
    monkeypatch.setattr("fastgen.train.metrics.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls = []
    assert milliseconds(lambda: calls.append(1), repeats=3, warmup=1) == 2000
    assert len(calls) == 4
    monkeypatch.undo()
    assert milliseconds_per_image(teacher, teacher.camera, 2, repeats=1, warmup=0) > 0
