"""The loss terms, against their formulas."""

import math

import pytest
import torch
from torch import nn

from fastgen import load_teacher, presets
from fastgen.models.discriminator import DualDiscriminator
from fastgen.train.losses import (
    Perceptual,
    consistency,
    discriminator_loss,
    generator_loss,
    make_perceptual,
    r1_penalty,
    reconstruction_terms,
)
from fastgen.train.metrics import pose_pairs


def images(n: int = 2, side: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 32, side, side, generator=generator)
    image = torch.randn(n, 3, 2 * side, 2 * side, generator=generator)
    return {"feature_image": features, "image_raw": features[:, :3], "image": image}


def test_reconstruction():
    student, target = images(seed=1), images(seed=2)
    terms = reconstruction_terms(student, target, None, beta=0.5)
    assert list(terms) == ["lr_pixel", "hr_pixel"]
    for name, key in (("lr_pixel", "feature_image"), ("hr_pixel", "image")):
        error = (student[key] - target[key]).abs()
        expected = torch.where(error < 0.5, error.square(), error - 0.25).mean()
        torch.testing.assert_close(terms[name], expected)
    del student["image"]
    assert list(reconstruction_terms(student, target, None)) == ["lr_pixel"]


def test_consistency():
    """From one pose alone a warp changes nothing; and the next pose of three is the first, after the last."""
    c = presets.get("toy").camera.sample(2).repeat(3, 1)
    raw = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # A depth of another value somewhere, or all would count as empty.
    depth = torch.full((6, 1, 16, 16), 2.7)
    depth[:, :, 0, 0] = 3
    same = raw[:2].repeat(3, 1, 1, 1)
    assert consistency(same, depth, c, 3) < 1e-8
    assert consistency(raw, depth, c, 3) > 0.3
    only = same.clone()
    only[:2] += 0.5  # differs from the second pose's, and the third pose's from it
    assert consistency(only, depth, c, 3).item() == pytest.approx(2 / 3 * 0.25, rel=1e-3)


def test_consistency_of_true_views():
    """The toy's own images agree by its depth; by another pose's, or another latent's, they do not."""
    teacher = load_teacher("toy")
    random = torch.Generator().manual_seed(0)
    z, c = torch.randn(3, teacher.z_dim, generator=random), pose_pairs(teacher.camera, 3, random)
    c = c.unflatten(0, (3, 2)).transpose(0, 1).flatten(0, 1)  # one pose of all latents after the other
    with torch.no_grad():
        ws = teacher.mapping(z, c[:3]).repeat(2, 1, 1)
        out = teacher.synthesis(ws, c, neural_rendering_resolution=32)
    raw, depth = out["image_raw"], out["image_depth"]
    true = consistency(raw, depth, c, 2)
    assert true < 0.02
    assert consistency(raw, depth, c.roll(3, 0), 2) > 2 * true
    assert consistency(raw.roll(1, 0), depth, c, 2) > 2 * true
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(consistency(raw, depth, c, 2), true)


def test_adversarial():
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [3.0]])
    expected = sum(math.log1p(math.exp(-x)) for x in (0.5, 3.0)) / 2
    assert generator_loss(fake).item() == pytest.approx(expected)
    expected = (
        sum(math.log1p(math.exp(-x)) for x in (2.0, -1.0)) + sum(math.log1p(math.exp(x)) for x in (0.5, 3))
    ) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


class Quadratic(nn.Module):
    """logit = a/2 |image|^2 + b/2 |image_raw|^2, whose gradients are a image and b image_raw."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(3.0))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, c):
        squares = [x[key].square().sum(dim=(1, 2, 3)) / 2 for key in ("image", "image_raw")]
        return (self.a * squares[0] + self.b * squares[1])[:, None]


def test_r1_formula():
    real, d = images(n=3), Quadratic()
    penalty = r1_penalty(d, real, torch.zeros(3, 25))
    image, raw = (real[key].square().sum() / 3 for key in ("image", "image_raw"))
    torch.testing.assert_close(penalty, 9 * image + 0.25 * raw)
    penalty.backward()
    torch.testing.assert_close(d.a.grad, 6 * image)
    torch.testing.assert_close(d.b.grad, raw)


def test_r1_second_order():
    # Without the minibatch statistic the discriminator is piecewise linear in the images, and its gradient
    # there linear in each weight: the penalty is of degree 2, so by Euler <grad, weight> = 2 penalty.
    d = DualDiscriminator(25, 16, channel_base=128, channel_max=16, mapping_layers=2, mbstd_group_size=1)
    penalty = r1_penalty(d, images(n=4), torch.randn(4, 25))
    penalty.backward()
    assert penalty > 0
    for layer in (d.b16.fromrgb, d.b4.conv, d.b4.fc, d.b4.out):
        along = (layer.weight.grad * layer.weight).sum()
        # The float32 sum over a whole layer: some thousand terms of both signs.
        torch.testing.assert_close(along, 2 * penalty, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def random_vgg() -> Perceptual:
    return Perceptual("random-vgg")


def test_random_vgg(random_vgg):
    x, y = images(side=16, seed=1)["image"].tanh(), images(side=16, seed=2)["image"].tanh()
    assert random_vgg(x, x).item() == 0
    assert random_vgg(x, y).item() > random_vgg(x, 0.9 * x + 0.1 * y).item() > 0
    assert random_vgg.name == "random VGG16 features"
    assert not any(p.requires_grad for p in random_vgg.parameters())
    x.requires_grad_(True)
    random_vgg(x, y).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    # The random state of the caller is left alone, and the features are the same every time.
    before = torch.get_rng_state()
    again = Perceptual("random-vgg")
    assert torch.equal(torch.get_rng_state(), before)
    assert again(x, y).item() == random_vgg(x, y).item()


def test_small_images(random_vgg):
    small = images(side=4)
    terms = reconstruction_terms(small, images(side=4, seed=3), random_vgg)
    assert set(terms) == {"lr_pixel", "lr_perceptual", "hr_pixel", "hr_perceptual"}
    assert all(term > 0 for term in terms.values())


def test_lpips_reads_local_weights(random_vgg, tmp_path):
    vgg = {f"features.{name.split('.', 1)[1]}": p for name, p in random_vgg.net.net.named_parameters()}
    torch.save(vgg, tmp_path / "vgg16.pth")
    lpips = make_perceptual("lpips-vgg", tmp_path / "vgg16.pth")
    assert lpips.name == "LPIPS (VGG16)"
    for (_, mine), (_, theirs) in zip(
        lpips.net.net.named_parameters(), random_vgg.net.net.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    # Same backbone, but LPIPS weighs the channels, by what its package brings.
    for i in range(5):
        channels = getattr(lpips.net, f"lin{i}").model[1].weight
        assert channels.min() >= 0 and 0 < channels.max() < 100
    x, y = images(side=16, seed=1)["image"], images(side=16, seed=2)["image"]
    assert lpips(x, y) > 0 and lpips(x, y) != random_vgg(x, y)


def test_missing_weights(tmp_path):
    assert make_perceptual("none") is None
    with pytest.raises(ValueError, match="needs --perceptual-weights.*--perceptual random-vgg or none"):
        make_perceptual("lpips-vgg")
    with pytest.raises(FileNotFoundError, match=r"perceptual_weights: no such file: .*nothing\.pth"):
        make_perceptual("lpips-vgg", tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="not a file of weights"):
        make_perceptual("lpips-vgg", tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not a vgg16 state_dict: no features\.0\.bias"):
        make_perceptual("lpips-vgg", tmp_path / "other.pth")
