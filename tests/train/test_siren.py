"""Teachers that are not EG3D's: the SIREN, and one that has the trainer's protocol and nothing else."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgen
from fastgen import camera, checkpoint, pictures, presets
from fastgen.__main__ import main
from fastgen.models.student import Student
from fastgen.train import siren, toy
from fastgen.train.data import render_targets
from fastgen.train.loop import distil
from fastgen.train.metrics import evaluate
from fastgen.train.siren import Siren, SirenConfig

CAMERA = presets.get("toy").camera
TINY = {"w_dim": 8, "hidden": 8, "film_layers": 2, "samples": 8, "neural_rendering_resolution": 8}


@pytest.fixture
def tiny() -> Siren:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = Siren(**TINY)
    tiny.camera = CAMERA
    return tiny.eval().requires_grad_(False)


class Ball(nn.Module):
    """The protocol and nothing else: a ball without volume rendering, whose colour the latent turns."""

    z_dim, c_dim, w_dim, num_ws, feature_channels = 3, 25, 3, 2, 5
    img_resolution, neural_rendering_resolution, camera = 128, 8, CAMERA

    def mapping(self, z, c):
        return z.tanh().unsqueeze(1).expand(-1, self.num_ws, -1)

    def synthesis(self, ws, c, neural_rendering_resolution=None, final=True):
        features, depth = self.view(ws, c, neural_rendering_resolution or self.neural_rendering_resolution)
        out = {"feature_image": features, "image_raw": features[:, :3], "image_depth": depth}
        return out | {"image": self.view(ws, c, self.img_resolution)[0][:, :3]} if final else out

    def view(self, ws, c, size):
        origins, directions = camera.rays(c, size)
        middle = -(origins * directions).sum(-1)
        inside = 0.2**2 - (origins + middle[..., None] * directions).square().sum(-1)
        depth = torch.where(inside > 0, middle - inside.clamp(min=0).sqrt(), 3.0)[..., None]
        colour = torch.where(inside[..., None] > 0, ws[:, :1], 1.0)
        maps = torch.cat([colour, depth - 2.7, depth * 0], -1), depth
        return [t.transpose(1, 2).unflatten(2, (size, size)) for t in maps]


def test_gradients_reach_every_weight(tiny):
    tiny.requires_grad_(True).mapping_network.embed.requires_grad_(False)
    draw, config = toy.Draw(0, torch.device("cpu")), SirenConfig(latents=2, points=64, rays=16)
    for loss in (siren.field_loss, siren.ray_loss):
        tiny.zero_grad()
        sum(loss(tiny, config, draw).values()).backward()
        for name, p in tiny.named_parameters():
            wanted = not name.startswith("mapping_network.embed")
            assert (p.grad is not None and p.grad.isfinite().all() and p.grad.any()) == wanted, name


def test_films_are_the_papers_formula(tiny):
    ws, xyz = torch.randn(2, 1, 8), torch.randn(2, 5, 3) * 0.2
    x = xyz / tiny.radius
    for layer, film in zip(tiny.layers, tiny.films, strict=True):
        gamma, beta = film(ws).chunk(2, -1)
        x = torch.sin(siren.OMEGA * (1 + gamma) * layer(x) + beta)
    x = tiny.head(x)
    sigma, rgb = tiny.sample(xyz, ws)
    torch.testing.assert_close(sigma, x[..., :1] * siren.DENSITY, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rgb, x[..., 1:].sigmoid(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny.sample(xyz, ws, channels=3)[1], rgb[..., :3])


@pytest.mark.parametrize("chunk", [siren.CHUNK, 2**15])
def test_a_ball_is_seen_where_it_is(monkeypatch, chunk):
    monkeypatch.setattr(siren, "CHUNK", chunk)
    ball = Siren(**TINY | {"samples": 200})

    def sample(xyz, ws, channels=None):
        inside = (xyz.norm(dim=-1, keepdim=True) < 0.2).float()
        return inside * 4000 - 2000, (inside * 0.25).expand(-1, -1, channels or ball.feature_channels)

    monkeypatch.setattr(ball, "sample", sample)
    out = ball.synthesis(torch.zeros(1, 1, 8), CAMERA.front(), 65)
    depth, raw, image = out["image_depth"][0, 0], out["image_raw"][0], out["image"][0]
    step = (ball.ray_end - ball.ray_start) / (ball.samples - 1)
    assert abs(depth[32, 32] - 2.5) < step
    # Nothing is met in a corner: white, and farthest away.
    assert depth[0, 0] == depth.max() and abs(depth[0, 0] - ball.ray_end) <= step
    for picture in (raw, image):
        assert (picture[:, 0, 0] == 1).all()
        middle = picture[:, picture.shape[1] // 2, picture.shape[2] // 2]
        torch.testing.assert_close(middle, torch.full((3,), -0.5), rtol=0, atol=0.02)


def test_fog_is_as_dense_as_it_should_be(monkeypatch):
    fog = Siren(**TINY)
    monkeypatch.setattr(fog, "sample", lambda xyz, ws, channels=None: (xyz[..., :1] * 0 + 3, xyz * 0))
    origins, directions = camera.rays(CAMERA.front(), 2)
    out = fog.march(torch.zeros(1, 1, 8), origins, directions)
    passes = math.exp(-math.log1p(math.exp(3 - 1)) * (fog.ray_end - fog.ray_start))
    torch.testing.assert_close(out.weight, torch.full((1, 4, 1), 1 - passes))
    torch.testing.assert_close(out.features, torch.full((1, 4, 3), 2 * passes - 1))


def test_images(tiny):
    z, c = torch.randn(2, tiny.z_dim), CAMERA.sample(2)
    ws, out = tiny.mapping(z, c), tiny(z, c)
    assert {name: list(t.shape) for name, t in out.items()} == {
        "image": [2, 3, 128, 128],
        "feature_image": [2, 32, 8, 8],
        "image_raw": [2, 3, 8, 8],
        "image_depth": [2, 1, 8, 8],
    }
    assert torch.equal(out["image_raw"], out["feature_image"][:, :3])
    assert torch.equal(tiny.mapping(z, c.flip(0)), ws) and not torch.equal(ws[0], ws[1])
    small = tiny.synthesis(ws, c, 4, final=False)
    assert small["feature_image"].shape == (2, 32, 4, 4) and "image" not in small
    assert torch.equal(next(pictures.views(tiny, ws[:1], c[:1])), tiny.synthesis(ws[:1], c[:1])["image"])


def test_training_saves_what_load_teacher_reads(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(siren, "Siren", partial(Siren, **TINY | {"neural_rendering_resolution": 64}))
        small = {"latents": 1, "points": 16, "rays": 8, "report_every": 2, "held_out": 1, "device": "cpu"}
        trained = siren.train(SirenConfig(out=str(tmp_path / "siren"), steps=2, rays_from=0.5, **small))
    lines = (tmp_path / "siren" / "stats.jsonl").read_text()
    assert '"phase": "rays"' in lines and '"psnr_db"' in lines
    path = tmp_path / "siren" / "teacher.safetensors"
    loaded = fastgen.load_teacher(path)
    assert loaded.camera == CAMERA and loaded.config == trained.config
    z, c = toy.held_out(1)
    with torch.no_grad():
        assert torch.equal(loaded(z, c)["image"], trained(z, c)["image"])
    assert main(["render", "--model", str(path), "--seeds", "0", "--image", str(tmp_path / "a.png")]) == 0
    with pytest.raises(ValueError, match="image_from must be 1"):
        SirenConfig(image_from=0.9)


def test_both_stages_of_a_siren(tiny, config, tmp_path):
    checkpoint.save(tmp_path / "siren.safetensors", "teacher", {"G": tiny})
    config = dataclasses.replace(
        config, teacher=str(tmp_path / "siren.safetensors"), grid_every=6, grid_images=1, growth=((4, 1, 2),)
    )
    run = distil(config, progress=False)
    assert run.step == 6 and isinstance(run.teacher, Siren)
    loaded = fastgen.load_student(Path(config.out) / "student.safetensors")
    z, c = torch.randn(2, tiny.z_dim), CAMERA.sample(2)
    assert torch.equal(loaded.mapping(z, c), tiny.mapping(z, c))
    assert torch.equal(loaded(z, c)["image"], run.student(z, c)["image"])
    assert loaded.camera == CAMERA
    metrics = evaluate(run.student, run.teacher, CAMERA, images=2, batch_size=2)
    assert math.isfinite(metrics["psnr_db"])


def test_the_protocol_is_enough(config):
    config = dataclasses.replace(
        config,
        growth=((4, 1, 2),),
        poses_per_latent=2,
        replay=4,
        replay_reuse=2.0,
        grid_every=6,
        grid_images=1,
    )
    run = distil(config, Ball(), progress=False)
    assert run.step == 6
    assert list((Path(config.out) / "grids").iterdir())
    metrics = evaluate(run.student, run.teacher, CAMERA, images=4, batch_size=4)
    assert math.isfinite(metrics["psnr_db"])
    # Its depth is exact, and its colour is the same from every side.
    assert metrics["reprojection_psnr_teacher_db"] > 40 and metrics["reprojection_visible"] > 0.05
    loaded = fastgen.load_student(Path(config.out) / "student.safetensors")
    z, c = torch.randn(2, 3), CAMERA.sample(2)
    ws = run.teacher.mapping(z, c)
    assert torch.equal(loaded.synthesis(ws, c)["image"], run.student.synthesis(ws, c)["image"])
    with pytest.raises(ValueError, match="no mapping_network"):
        loaded.mapping(z, c)


def test_no_final_image_is_asked_for_where_none_is_needed(teacher):
    ball, c = Ball(), CAMERA.sample(4)
    for model in (ball, teacher):
        ws = model.mapping(torch.randn(2, model.z_dim), c[:2])
        assert "image" not in model.synthesis(ws, c[:2], 4, final=False)
        target = render_targets(model, ws, c, 4, final=False)
        assert "image" not in target and target["feature_image"].shape == (4, model.feature_channels, 4, 4)


def test_students_of_other_sizes():
    ball = Ball()
    assert Student.from_teacher(ball, "toy").config["superresolution"] == "SuperresolutionHybrid2X"
    # To begin with it only enlarges.
    student, c = Student.from_teacher(ball, "compact"), CAMERA.front()
    with torch.no_grad():
        student.renderer.b4.torgb.bias.fill_(0.5)
        out = student.synthesis(torch.randn(1, 2, 3), c)
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    wanted = nn.functional.interpolate(out["image_raw"], size=(128, 128), mode="bilinear")
    torch.testing.assert_close(out["image"][inner], wanted[inner], rtol=0, atol=0.05)
    ball.img_resolution = 64
    with pytest.raises(ValueError, match="img_resolution must be one of 128, 256, 512, got 64"):
        Student.from_teacher(ball, "toy")
