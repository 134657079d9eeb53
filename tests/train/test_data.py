"""Targets, poses and real images: repeatable, and read from EG3D's layout."""

import dataclasses
import json
import zipfile

import pytest
import torch
from PIL import Image

from fastgen.train.config import Phase
from fastgen.train.data import ImageDataset, RealStream, TargetStream, generator_for, render_targets

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


def dataset(folder, n=3, side=16):
    labels = []
    for i in range(n):
        name = f"0000{i % 2}/img{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (255, 0, 51 * i)).save(folder / name)
        labels.append([name, [float(i)] * 25])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_dataset(tmp_path, kind):
    path = dataset(tmp_path / "data")
    data = ImageDataset(path if kind == "folder" else zipped(path, tmp_path / "data.zip"))
    assert len(data) == 3 and data.resolution == 16
    image, label = data[2]
    expected = torch.tensor([1.0, -1.0, 102 / 127.5 - 1])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 16, 16))
    assert torch.equal(label, torch.full((25,), 2.0))
    images, labels = data.batch(8, generator_for(0, "test"))
    assert images.shape == (8, 3, 16, 16)
    # Every image keeps its own label.
    torch.testing.assert_close(images[:, 2, 0, 0], labels[:, 0] * 51 / 127.5 - 1)
    assert data.sample(5, generator_for(0, "test")).shape == (5, 25)


def test_real_images(tmp_path, config):
    targets = {"image": torch.rand(2, 3, 16, 16), "image_raw": torch.rand(2, 3, 8, 8), "c": torch.rand(2, 25)}
    real, c = RealStream(config, 8, None, CPU).batch(0, targets)
    assert torch.equal(real["image"], targets["image"]) and torch.equal(c, targets["c"])
    stream = RealStream(config, 8, ImageDataset(dataset(tmp_path / "data")), CPU)
    real, c = stream.batch(0, targets)
    assert real["image"].shape == (2, 3, 16, 16) and real["image_raw"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(real["image_raw"][:, 2, 0, 0], c[:, 0] * 51 / 127.5 - 1)
    assert equal(stream.batch(0, targets)[0], real)


def test_bad_datasets(tmp_path):
    with pytest.raises(FileNotFoundError, match="reals: no such data set"):
        ImageDataset(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="neither a folder nor a zip file"):
        ImageDataset(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no dataset\.json"):
        ImageDataset(tmp_path / "empty")
    path = dataset(tmp_path / "data")
    for content, message in [
        ("{", "is not JSON"),
        ("[1]", "has no labels"),
        ('{"labels": {"a.png": 1}}', "has no labels"),
        ('{"labels": [["a.png", null]]}', r"label of a\.png must have 25 numbers"),
        ('{"labels": [["a.png", 7]]}', r"label of a\.png must have 25 numbers"),
        (json.dumps({"labels": [["a.png", ["x"] * 25]]}), r"label of a\.png must have 25 numbers"),
        (json.dumps({"labels": [["a.png", [float("nan")] * 25]]}), r"label of a\.png must have 25 numbers"),
        ('{"labels": [3]}', "label of 3 must have 25 numbers"),
        ('{"labels": null}', "has no labels"),
        ('{"labels": [["a.png", [1, 2]]]}', r"label of a\.png must have 25 numbers"),
        (json.dumps({"labels": [["a.txt", [0] * 25]]}), r"names no \.png"),
    ]:
        (path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            ImageDataset(path)
    (path / "dataset.json").write_text(json.dumps({"labels": [["gone.png", [0] * 25]]}))
    with pytest.raises(FileNotFoundError, match=r"has no gone\.png"):
        ImageDataset(path)


def test_images_must_be_square_and_of_one_size(tmp_path):
    path = dataset(tmp_path / "data")
    last = path / "00000" / "img2.png"
    for size in ((8, 8), (16, 12)):
        Image.new("RGB", size).save(last)
        message = f"00000/img0.png has 16 x 16 pixels, 00000/img2.png {size[0]} x {size[1]}"
        with pytest.raises(ValueError, match=message):
            ImageDataset(path)
    last.write_text("hello")
    with pytest.raises(ValueError, match=r"can't read the image 00000/img2\.png"):
        ImageDataset(path)


def test_damaged_zip(tmp_path):
    archive = zipped(dataset(tmp_path / "data"), tmp_path / "data.zip")
    content = bytearray(archive.read_bytes())
    at = content.index(b'{"labels"')
    content[at : at + 20] = bytes(20)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"reals: .*data\.zip is damaged"):
        ImageDataset(archive)
