"""The student: the teacher's call shape, style space and super-resolution; a file that alone can render."""

import pytest
import torch

import fastgen
from fastgen import camera, checkpoint
from fastgen.camera import CameraDistribution
from fastgen.models.student import SIZES, Student
from fastgen.models.teacher import Teacher


@pytest.fixture
def teacher(small_config) -> Teacher:
    return Teacher(**small_config).eval().requires_grad_(False)


@pytest.fixture
def student(teacher) -> Student:
    return Student.from_teacher(teacher, "toy")


def test_call_shape(teacher, student):
    z, c = torch.randn(3, teacher.z_dim), CameraDistribution().sample(3)
    student.requires_grad_(False)
    ws = student.mapping(z, c, truncation_psi=0.7, truncation_cutoff=3)
    assert torch.equal(ws, teacher.mapping(z, c, truncation_psi=0.7, truncation_cutoff=3))
    mine, theirs = student.synthesis(ws, c, noise_mode="const"), teacher.synthesis(ws, c)
    assert {name: image.shape for name, image in mine.items()} == {
        name: image.shape for name, image in theirs.items() if name != "image_depth"
    }
    assert torch.equal(mine["image_raw"], mine["feature_image"][:, :3])
    assert torch.equal(student(z, c, truncation_psi=0.7, truncation_cutoff=3)["image"], mine["image"])
    # As code written for a generator that samples rays calls it; positions too are the teacher's.
    u = torch.rand(3, 64, 6)
    called = student.synthesis(ws, c, 8, "const", u_coarse=u[..., None], u_fine=u)
    assert all(torch.equal(called[name], image) for name, image in mine.items())
    # The same super-resolution of the same features.
    features = theirs["feature_image"]
    assert torch.equal(student.super_resolve(features, ws), teacher.super_resolve(features, ws))


def test_mapping_follows_the_mean_as_the_teacher(teacher, student):
    z, c = torch.randn(3, teacher.z_dim), CameraDistribution().sample(3)
    before = student.teacher_mapping.w_avg.clone()
    for model in (teacher, student):
        model.mapping(z, c)
    assert torch.equal(student.teacher_mapping.w_avg, before)
    for model in (teacher, student):
        model.mapping(z, c, update_emas=True)
    assert torch.equal(student.teacher_mapping.w_avg, teacher.backbone.mapping.w_avg)
    assert not torch.equal(student.teacher_mapping.w_avg, before)


def test_what_is_trained(teacher, student):
    frozen = {name.split(".")[0] for name, p in student.named_parameters() if not p.requires_grad}
    # The super-resolution adds no noise ('none'), so its strength has no say.
    assert not any(
        p.requires_grad for n, p in student.superresolution.named_parameters() if "noise_strength" in n
    )
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert frozen == {"teacher_mapping", "superresolution"} and trained == {
        "pose_mapping",
        "renderer",
        "superresolution",
    }
    z, c = torch.randn(2, teacher.z_dim), CameraDistribution().sample(2)
    # Blocks begin by adding nothing: make them count, to see every weight get a gradient.
    for resolution in student.renderer.block_resolutions:
        torch.nn.init.normal_(getattr(student.renderer, f"b{resolution}").torgb.weight)
    images = student(z, c)
    (images["image"].square().mean() + images["feature_image"].square().mean()).backward()
    still = [
        name
        for name, p in student.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]
    assert not still


def test_latent_and_pose_both_matter(teacher, student):
    z, c = torch.randn(2, teacher.z_dim), CameraDistribution().sample(2)
    ws = student.mapping(z, c)
    image = student.render(ws, c)["feature_image"]
    assert not torch.allclose(image[0], student.render(ws, c.flip(0))["feature_image"][0])
    assert not torch.allclose(image[0], student.render(ws.flip(0), c)["feature_image"][0])
    # Each image depends on its own row alone.
    one = student.render(ws[:1], c[:1])["feature_image"]
    # Convolutions of other batch sizes sum in another order.
    torch.testing.assert_close(one, image[:1], rtol=1e-4, atol=1e-5)


def test_growing_goes_on_where_it_was(student):
    ws, c = torch.randn(1, student.num_ws, student.w_dim), CameraDistribution().front()
    small = student.render(ws, c, resolution=4)["feature_image"]
    assert small.shape == (1, 32, 4, 4)
    whole = student.render(ws, c)["feature_image"]
    assert torch.equal(whole, fastgen.ops.upsample2d(small, student.renderer.b8.resample_filter))


def test_conditioning_that_the_teacher_ignores(small_config):
    kwargs = small_config["rendering_kwargs"] | {"c_gen_conditioning_zero": True}
    teacher = Teacher(**small_config | {"rendering_kwargs": kwargs})
    student = Student.from_teacher(teacher, "toy")
    z, (a, b) = torch.randn(1, 8), CameraDistribution().sample(2).split(1)
    assert torch.equal(student.mapping(z, a), student.mapping(z, b))
    assert torch.equal(student.mapping(z, a), teacher.mapping(z, b))


@pytest.mark.parametrize("size", SIZES)
def test_sizes(small_config, size):
    with torch.device("meta"):
        student = Student.from_teacher(Teacher(**small_config), size)
    first = student.renderer.b4.conv1.weight
    assert first.shape[0] == min(SIZES[size].channel_base // 4, SIZES[size].channel_max)


def test_narrower_super_resolution(small_config):
    teacher = Teacher(**small_config | {"superresolution_kwargs": {"channels": [128, 48]}})
    widths = {"full": [128, 48], "medium": [64, 24], "compact": [32, 32], "tiny": [16, 16]}
    for size, expected in widths.items():
        made = Student.from_teacher(teacher, size, scale=1 / 16)
        blocks = made.superresolution.block0, made.superresolution.block1
        assert [block.conv1.weight.shape[0] for block in blocks] == expected
        assert made.superresolution_is_trained == (size == "full")
        assert made.superresolution.subpixel == (size in ("compact", "tiny"))
    assert made.config["channel_base"] == 256 and made.config["style_dim"] == 32


def test_subpixel(teacher):
    """It only enlarges to begin with; each pixel of half the size gives four."""
    made = Student.from_teacher(teacher, "tiny", scale=1 / 16)
    part, ws = made.superresolution, torch.randn(2, made.num_ws, made.w_dim)
    features = torch.randn(2, 32, part.input_resolution, part.input_resolution)
    enlarged = features[:, :3]
    while enlarged.shape[-1] < part.img_resolution:
        enlarged = fastgen.ops.upsample2d(enlarged, part.block1.resample_filter)
    torch.testing.assert_close(made.super_resolve(features, ws), enlarged)
    # Of block1's twelve channels 4k to 4k + 3 are colour k: of two rows, two columns each.
    with torch.no_grad():
        part.block1.torgb.bias.copy_(torch.arange(12))
        added = made.super_resolve(features, ws) - enlarged
    expected = torch.arange(12.0).view(3, 2, 2).repeat(1, *[part.img_resolution // 2] * 2)
    torch.testing.assert_close(added, expected.expand_as(added), rtol=0, atol=1e-4)


def test_file(teacher, student, tmp_path):
    cameras = CameraDistribution(radius=1.7, kind="uniform")
    checkpoint.save(tmp_path / "s.safetensors", "student", {"G": student}, {"camera": cameras.as_dict()})
    loaded = fastgen.load_student(tmp_path / "s.safetensors")
    assert loaded.config == student.config and loaded.camera == cameras
    z, c = torch.randn(1, loaded.z_dim), loaded.camera.front()
    with torch.no_grad():
        assert torch.equal(loaded(z, c)["image"], student(z, c)["image"])
    with pytest.raises(ValueError, match="it holds a student, expected a teacher"):
        fastgen.load_teacher(tmp_path / "s.safetensors")


def test_errors(teacher, student):
    c = CameraDistribution().sample(2)
    with pytest.raises(ValueError, match=r"Student.mapping: z must have shape .*, got \[2, 5\]"):
        student.mapping(torch.randn(2, 5), c)
    with pytest.raises(ValueError, match=r"Student.render: ws must have shape"):
        student.synthesis(torch.randn(2, student.num_ws, 7), c)
    with pytest.raises(ValueError, match=r"Student.render: c must have shape .* = \[1, 25\], got \[2, 25\]"):
        student.synthesis(torch.randn(1, student.num_ws, student.w_dim), c)
    with pytest.raises(ValueError, match="neural_rendering_resolution must be 8, .* or None, got 16"):
        student.synthesis(torch.randn(2, student.num_ws, student.w_dim), c, 16)
    with pytest.raises(ValueError, match="size must be one of full, medium, .*, toy, got 'small'"):
        Student.from_teacher(teacher, "small")
    with pytest.raises(ValueError, match="scale must be above 0 and at most 1, got 2"):
        Student.from_teacher(teacher, scale=2)
    with pytest.raises(ValueError, match="pose_input must be 'mapping' or 'rays', got 'pixels'"):
        Student(pose_input="pixels")
    with pytest.raises(ValueError, match="style_dims must be from 1 to 512, got 0"):
        Student(style_dims=0)
    with pytest.raises(ValueError, match="img_resolution must be 128"):
        Student.from_teacher(teacher, "toy", img_resolution=256)


def test_rays_come_in_at_every_resolution(teacher):
    plain = Student.from_teacher(teacher, "toy", pose_input="rays")
    ws, c = torch.randn(2, plain.num_ws, plain.w_dim), CameraDistribution().sample(2)
    for resolution in plain.renderer.block_resolutions:
        torch.nn.init.normal_(getattr(plain.renderer, f"b{resolution}").torgb.weight)
    image = plain.render(ws, c)["feature_image"]
    for resolution in plain.renderer.block_resolutions:
        layer = getattr(plain.ray_maps, f"r{resolution}")
        assert not layer.weight.any()  # it begins where a student without rays does
        torch.nn.init.normal_(layer.weight)
        assert not torch.allclose(plain.render(ws, c)["feature_image"], image)
        torch.nn.init.zeros_(layer.weight)
    # A line's coordinates: the same for every point of the ray, and of the right pixel.
    origins, directions = camera.rays(c, 4)
    line = torch.cat([directions, torch.linalg.cross(origins + 0.7 * directions, directions)], -1)
    torch.testing.assert_close(plain.ray_maps.encode(c, 4)[:, :6], line.transpose(1, 2).unflatten(2, (4, 4)))
