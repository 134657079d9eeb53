"""Targets and their poses: repeatable."""

import dataclasses

import pytest
import torch

from fastgen.train.config import Phase
from fastgen.train.data import TargetStream, generator_for, render_targets

CPU = torch.device("cpu")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_generators_are_independent():
    draws = {
        (seed, purpose, index): torch.rand(4, generator=generator_for(seed, purpose, index)).sum().item()
        for seed in (0, 1)
        for purpose in ("targets", "replay")
        for index in (0, 1)
    }
    assert len(set(draws.values())) == 8
    assert torch.rand(4, generator=generator_for(0, "targets", 0)).sum().item() == draws[0, "targets", 0]


def test_targets_are_the_teachers_images(teacher):
    z, c = torch.randn(2, teacher.z_dim), teacher.camera.sample(4)
    target = render_targets(teacher, teacher.mapping(z, c[::2]), c)
    for i in range(4):
        out = teacher.synthesis(target["ws"][i : i + 1], c[i : i + 1])
        for key in ("image", "image_raw", "feature_image", "image_depth"):
            # Batches of other sizes sum in another order.
            torch.testing.assert_close(target[key][i : i + 1], out[key], rtol=1e-4, atol=1e-4)
    assert "image" not in render_targets(teacher, target["ws"], c, resolution=8, final=False)


def test_targets_are_copies_taken_before_super_resolution(teacher):
    class Polluting(type(teacher)):
        def super_resolve(self, feature_image, ws, noise_mode=None):
            image = super().super_resolve(feature_image, ws, noise_mode)
            feature_image.add_(1)
            return image

    polluting = Polluting(**teacher.config).eval().requires_grad_(False)
    polluting.load_state_dict(teacher.state_dict())
    ws, c = teacher.mapping(torch.randn(1, teacher.z_dim), teacher.camera.front()), teacher.camera.front()
    assert equal(render_targets(polluting, ws, c), render_targets(teacher, ws, c))


@pytest.mark.parametrize("replay, views", [(0, 4), (16, 2)])
def test_poses_of_a_latent_stay_together_for_consistency(teacher, config, replay, views):
    config = dataclasses.replace(
        config, batch_size=8, poses_per_latent=4, replay=replay, lambda_consistency=1.0
    )
    assert config.views == views
    batch = TargetStream(teacher, teacher.camera, config, CPU).batch(3)
    ws, c = (batch[name].unflatten(0, (views, -1)) for name in ("ws", "c"))
    assert torch.equal(ws, ws[:1].expand_as(ws))
    assert all(not torch.equal(c[0, i], c[1, i]) for i in range(c.shape[1]))
    assert batch["image_depth"].shape == (8, 1, 16, 16)


def test_batches_depend_on_the_step_alone(teacher, config):
    config = dataclasses.replace(config, batch_size=4, poses_per_latent=2)
    stream = TargetStream(teacher, teacher.camera, config, CPU)
    batches = [stream.batch(step) for step in range(3)]
    assert not torch.equal(batches[0]["ws"], batches[1]["ws"])
    assert equal(TargetStream(teacher, teacher.camera, config, CPU).batch(2), batches[2])
    ws = batches[0]["ws"]
    assert torch.equal(ws[0], ws[2]) and not torch.equal(ws[0], ws[1])
    assert batches[0]["c"].unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_conditioning_pose(teacher, config, probability):
    config = dataclasses.replace(
        config, batch_size=4 if probability in (0, 1) else 64, gpc_reg_prob=probability
    )
    stream = TargetStream(teacher, teacher.camera, config, CPU)
    seen = []
    mapping = teacher.mapping
    try:
        teacher.mapping = lambda z, c: (seen.append(c), mapping(z, c))[1]
        batch = stream.chunk(Phase(0, 4, config.batch_size), 0)
    finally:
        del teacher.mapping
    same = (seen[0] == batch["c"]).all(dim=1)
    # Of 64 fair coins fewer than 16 or more than 48 heads are a matter of 1 in 20,000; the seed is fixed.
    low, high = {0: (4, 4), 0.5: (16, 48), 1: (0, 0)}[probability]
    assert low <= same.sum() <= high


def test_replay(teacher, config, monkeypatch):
    config = dataclasses.replace(
        config, batch_size=4, replay=8, replay_reuse=2.0, growth=((8, 4, 4),), stage1_steps=20
    )
    stream = TargetStream(teacher, teacher.camera, config, CPU)
    rendered = []
    chunk = stream.chunk

    def counted(phase, index):
        rendered.append((phase.resolution, index))
        return chunk(phase, index)

    monkeypatch.setattr(stream, "chunk", counted)
    batches = [stream.batch(step) for step in range(12)]
    assert rendered == [(8, 0), (8, 1), (None, 0), (None, 1), (None, 2), (None, 3)]
    assert batches[0]["feature_image"].shape[-1] == 8 and batches[4]["feature_image"].shape[-1] == 16
    assert "image" not in batches[0] and batches[4]["image"].shape[-1] == teacher.img_resolution
    # Only the last two chunks are still there, and a stream that begins late has the same ones.
    late = TargetStream(teacher, teacher.camera, config, CPU)
    assert equal(late.batch(11), batches[11])
    recent = torch.cat([chunk(config.phase(11), i)["ws"] for i in (2, 3)])
    assert all((w == recent).flatten(1).all(dim=1).any() for w in batches[11]["ws"])
