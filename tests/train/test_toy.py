"""The toy teacher: its scenes, its training, and the file that is shipped."""

import dataclasses
import json
import math

import pytest
import torch

import fastgen
from fastgen import camera, checkpoint, presets
from fastgen.train import scenes, toy

Z = torch.randn(3, scenes.Z_DIM, generator=torch.Generator().manual_seed(1))
C = toy.poses(3, torch.Generator().manual_seed(2))


def test_rays_in_any_subset_give_the_same_colours():
    h = scenes.heads(Z)
    origins, directions = camera.rays(C, 24)
    whole = scenes.shade(h, origins, directions)
    some = torch.randperm(24 * 24, generator=torch.Generator().manual_seed(3))[:77]
    for all_, few in zip(whole, scenes.shade(h, origins[:, some], directions[:, some]), strict=True):
        # Vector and scalar code paths of exp, sin and sqrt differ in the last bits; edges amplify them.
        torch.testing.assert_close(all_[:, some].float(), few.float(), rtol=0, atol=1e-3)


def test_pictures_are_repeatable_and_depend_on_the_direction_of_z_only():
    image, depth = toy.picture(Z, C, 16)
    again, _ = toy.picture(Z, C, 16)
    assert torch.equal(image, again)
    assert image.shape == (3, 3, 16, 16) and depth.shape == (3, 1, 16, 16)
    scaled, _ = toy.picture(Z * 7, C, 16)
    assert toy.psnr(scaled, image) > 50


def test_heads_are_inside_the_frame_on_white():
    image, depth = toy.picture(Z, C, 64)
    border = torch.cat([image[..., 0], image[..., -1], image[..., 0, :], image[..., -1, :]], -1)
    assert (border == 1).all()
    covered = depth.isfinite().float().mean((1, 2, 3))
    assert ((covered > 0.1) & (covered < 0.6)).all()
    limits = toy.build_teacher().rendering_kwargs
    seen = depth[depth.isfinite()]
    assert seen.amin() > limits["ray_start"] and seen.amax() < limits["ray_end"]


def test_distance_is_what_rays_meet():
    h = scenes.heads(Z)
    origins, directions = camera.rays(C, 24)
    points, _, mask = scenes.trace(h, origins, directions)
    d = scenes.distance(h, points)[mask[..., 0]]
    # 4e-3 is the tolerance of a hit, before the last step.
    assert d.abs().max() < 5e-3 and d.abs().median() < 1e-5
    inside = points + 0.01 * directions
    assert (scenes.distance(h, inside)[mask[..., 0]] < 2e-3).float().mean() > 0.95


def test_a_surface_point_has_one_colour_from_every_side():
    """Look at the points that one camera sees from another: where nothing is between, the colours agree."""
    h = scenes.heads(Z[:1])
    at = presets.get("toy").camera.at
    one, other = at(math.pi / 2 - 0.3, math.pi / 2), at(math.pi / 2 + 0.3, math.pi / 2)
    origins, directions = camera.rays(one, 64)
    points, depth, mask = scenes.trace(h, origins, directions)
    colour = scenes.colour(h, points)
    start = other[:, None, [3, 7, 11]].expand_as(points)
    distance = (points - start).norm(dim=-1, keepdim=True)
    seen, far, hit = scenes.shade(h, start, (points - start) / distance)
    same = (mask & hit & ((far - distance).abs() < 1e-3))[..., 0]
    assert same.sum() > 300
    assert (colour - seen).abs()[same].mean() < 0.01


def test_latents_change_the_heads():
    image, _ = toy.picture(Z, C[:1].expand(3, -1), 32)
    assert toy.psnr(image[:1], image[1:2]) < 20 and toy.psnr(image[1:2], image[2:]) < 20


SMALL = {
    "steps": 3,
    "latents": 1,
    "points": 16,
    "rays": 8,
    "patches": 1,
    "patch": 16,
    "report_every": 1,
    "held_out": 1,
    "rays_from": 0.3,
    "image_from": 0.6,
}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_three_steps_of_training_resume_exactly(tmp_path, monkeypatch):
    config = toy.ToyConfig(out=str(tmp_path / "whole"), **SMALL)
    whole = toy.train(config)
    lines = losses(tmp_path / "whole")
    assert [line["phase"] for line in lines] == ["field", "rays", "image"]
    assert all(math.isfinite(line["psnr_db"]) for line in lines)

    def stop(*_):
        raise KeyboardInterrupt

    # Stopped after the first checkpoint, then resumed.
    with monkeypatch.context() as patch:
        patch.setattr(toy, "ray_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.train(dataclasses.replace(config, out=str(tmp_path / "parts")))
    parts = toy.train(dataclasses.replace(config, out=str(tmp_path / "parts"), resume=True))
    assert losses(tmp_path / "parts") == lines
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    loaded = fastgen.load_teacher(tmp_path / "whole" / "teacher.safetensors")
    z, c = toy.held_out(1)
    with torch.no_grad():
        assert torch.equal(loaded(z, c)["image"], whole(z, c)["image"])
    assert loaded.camera == presets.get("toy").camera
    assert list((tmp_path / "whole").glob("grid_*.png"))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="rays_from <= image_from"):
        toy.ToyConfig(rays_from=0.8, image_from=0.2)
    with pytest.raises(ValueError, match="minutes must be above 0"):
        toy.ToyConfig(minutes=0)


def test_the_embedded_teacher_shows_the_analytic_heads():
    assert checkpoint.TOY.stat().st_size <= 8e6
    teacher = fastgen.load_teacher("toy")
    # Other latents and poses than training's own evaluation looks at.
    z, c = (t[-24:] for t in toy.held_out(64))
    truth, depth = toy.picture(z, c, 128)
    with torch.no_grad():
        out = teacher(z, c)
    assert toy.psnr(out["image"], truth) >= 25
    assert toy.psnr(out["image_raw"], torch.nn.functional.avg_pool2d(truth, 2)) >= 25
    # Its geometry too: median depth error on the head, of a head 0.3 deep.
    depth = depth[..., ::2, ::2]
    error = (out["image_depth"] - depth).abs()[depth.isfinite()]
    assert error.median() < 0.02
