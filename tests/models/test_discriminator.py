"""The dual discriminator: equal to the original on the golden checkpoint, twice differentiable."""

import json

import pytest
import torch

import fastgen
from fastgen.models.discriminator import DualDiscriminator, MinibatchStdLayer

SMALL = {"img_resolution": 32, "channel_base": 256, "channel_max": 16}


@pytest.fixture(scope="module")
def small() -> DualDiscriminator:
    torch.manual_seed(0)
    return DualDiscriminator(**SMALL)


def batch(n: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = {"image": torch.randn(n, 3, 32, 32, generator=generator)}
    return images | {"image_raw": torch.randn(n, 3, 8, 8, generator=generator)}, torch.randn(
        n, 25, generator=generator
    )


def test_golden(original, golden):
    d = fastgen.load_discriminator(original)
    logits = d({"image": golden["d_image"], "image_raw": golden["d_image_raw"]}, golden["d_c"])
    assert logits.shape == golden["d_logits"].shape
    # The original summed in another order: a dozen float32 convolutions in a row.
    assert (logits - golden["d_logits"]).abs().max() <= 1e-4 * golden["d_logits"].abs().max()


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_any_batch(small, n):
    images, c = batch(n)
    logits = small(images, c)
    assert logits.shape == (n, 1) and logits.isfinite().all()


def test_shares_of_whole_groups_do_as_the_batch(small):
    images, c = batch(16)
    logits = small(images, c)
    for parts, same in ((2, True), (4, True), (8, False)):
        rows = [slice(part, None, parts) for part in range(parts)]
        shares = [small({name: x[some] for name, x in images.items()}, c[some]) for some in rows]
        alike = [
            torch.allclose(a, logits[b], rtol=1e-4, atol=1e-5) for a, b in zip(shares, rows, strict=True)
        ]
        assert all(alike) if same else not any(alike), parts


def test_every_input_counts(small):
    images, c = batch(2)
    logits = small(images, c)
    for other in ({**images, "image": images["image"] * 2}, {**images, "image_raw": images["image_raw"] * 2}):
        assert not torch.allclose(small(other, c), logits)
    assert not torch.allclose(small(images, c.flip(0)), logits)


def test_r1_penalty_reaches_every_weight():
    # R1 differentiates the squared gradient with respect to the images: twice through every op.
    torch.manual_seed(0)
    d = DualDiscriminator(**SMALL)
    images, c = batch(4)
    images = {name: x.requires_grad_() for name, x in images.items()}
    gradients = torch.autograd.grad(d(images, c).sum(), list(images.values()), create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    # Biases have none: the slope of a piecewise linear network does not move with them.
    for name, parameter in d.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_minibatch_std():
    # Samples 0 and 2 differ by 2 everywhere, 1 and 3 are equal: groups are strided over the batch.
    x = torch.tensor([1.0, 5.0, 3.0, 5.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    std = MinibatchStdLayer(group_size=2)(x)[:, 2, 0, 0]
    # sqrt(x + 1e-8), so that a variance of zero has a gradient.
    torch.testing.assert_close(std, torch.tensor([1.0, 1e-4, 1.0, 1e-4]))


def test_without_pose():
    d = DualDiscriminator(c_dim=0, **SMALL)
    assert d(batch(2)[0]).shape == (2, 1)


def test_config_rebuilds_the_same_network(small):
    other = DualDiscriminator(**json.loads(json.dumps(small.config)))
    other.load_state_dict(small.state_dict())
    images, c = batch(2)
    assert torch.equal(other(images, c), small(images, c))


def test_errors(small):
    images, c = batch(2)
    with pytest.raises(
        ValueError, match=r"image must have shape \[N, C, H, W\] = \[\*, 3, 32, 32\], got \[2, 3, 16, 16\]"
    ):
        small({**images, "image": torch.zeros(2, 3, 16, 16)}, c)
    with pytest.raises(ValueError, match=r"image_raw must have shape .*got \[1, 3, 8, 8\]"):
        small({**images, "image_raw": images["image_raw"][:1]}, c)
    with pytest.raises(ValueError, match=r"c must have shape \[N, c_dim\] = \[2, 25\], got \[2, 16\]"):
        small(images, c[:, :16])
    with pytest.raises(TypeError, match="c must be a tensor"):
        small(images)
    with pytest.raises(ValueError, match="img_resolution must be a power of two from 8, got 48"):
        DualDiscriminator(img_resolution=48)
