"""Data sets in EG3D's layout: read, mirrored, read ahead by workers, checked, and written."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
import zipfile

import pytest
import torch
from PIL import Image

from fastgen import camera, pictures
from fastgen.camera import CameraDistribution
from fastgen.train import scenes, toy
from fastgen.train.data import RealStream, generator_for
from fastgen.train.dataset import ImageDataset, write_zip
from fastgen.train.dataset_check import check

CPU = torch.device("cpu")


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
    assert images.shape == (8, 16, 16, 3)
    # Every image keeps its own label.
    assert (images[:, 0, 0, 2] == labels[:, 0] * 51).all() and len(set(labels[:, 0])) > 1
    assert data.sample(5, generator_for(0, "test")).shape == (5, 25)


def test_real_images(tmp_path, config):
    targets = {"image": torch.rand(2, 3, 16, 16), "image_raw": torch.rand(2, 3, 8, 8), "c": torch.rand(2, 25)}
    real, c = RealStream(config, 8, None, CPU).batch(0, targets)
    assert torch.equal(real["image"], targets["image"]) and torch.equal(c, targets["c"])
    stream = RealStream(config, 8, ImageDataset(dataset(tmp_path / "data")), CPU)
    real, c = stream.batch(0, targets)
    assert real["image"].shape == (2, 3, 16, 16) and real["image_raw"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(real["image_raw"][:, 2, 0, 0], c[:, 0] * 51 / 127.5 - 1)
    again, _ = stream.batch(0, targets)
    assert torch.equal(again["image"], real["image"]) and torch.equal(again["image_raw"], real["image_raw"])


def test_bad_datasets(tmp_path):
    with pytest.raises(FileNotFoundError, match="reals: .*nothing: no such data set"):
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


def damage(archive, name):
    """Overwrite the middle of a stored file of a zip."""
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo(name)
    with archive.open("r+b") as file:
        # The header of an entry without extra fields is 30 bytes and the name.
        file.seek(info.header_offset + 30 + len(name) + info.file_size // 2)
        file.write(b"damaged!")
    return archive


def write(path, n=6, side=16):
    """A zip of n images of noise, whose labels are the toy's."""
    pixels = torch.randint(256, (n, side, side, 3), generator=generator_for(0, "noise")).byte().numpy()
    return write_zip(path, zip(pixels, toy.poses(n, generator_for(0, "poses")).tolist(), strict=True))


def test_mirrored_images(tmp_path):
    z, c = torch.randn(2, scenes.Z_DIM), toy.poses(2)
    image, _ = toy.picture(z, c, 32, samples=1)
    path = write_zip(tmp_path / "a.zip", zip(pictures.pixels(image), c.tolist(), strict=True))
    data = ImageDataset(path, mirror=True)
    assert len(data) == 4 and torch.equal(data.labels[:2], c)
    flipped, labels = (torch.stack(parts) for parts in zip(data[2], data[3], strict=True))
    # The mirrored head, seen from the mirrored pose: rays are mirrored, and meet the head as it was.
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    colour, _, _ = scenes.shade(scenes.heads(z), *(rays * mirror for rays in camera.rays(labels, 32)))
    wanted = colour.transpose(1, 2).unflatten(2, (32, 32))
    # Bytes round; at outlines a float32 rounding of the ray decides what it meets.
    assert ((flipped - wanted).abs() > 0.01).float().mean() < 0.005
    assert ((data[0][0] - wanted[0]).abs() > 0.01).float().mean() > 0.1
    # Half of what is drawn is mirrored.
    drawn = data.sample(200, generator_for(0, "test"))
    mirrored = (drawn[:, None] == data.labels[2:]).all(2).any(1)
    assert 70 < mirrored.sum() < 130


def test_workers_make_the_same_batches(tmp_path, config):
    config = dataclasses.replace(
        config, reals="a.zip", mirror=True, batch_size=3, stage1_steps=0, stage2_steps=6
    )
    data = ImageDataset(write(tmp_path / "a.zip"), mirror=True)
    alone = RealStream(config, 8, data, CPU)
    expected = [alone.batch(step, {}) for step in range(6)]
    state = torch.get_rng_state()
    # From the start; from the middle, as a resumed run; and a step again.
    with RealStream(dataclasses.replace(config, workers=2), 8, data, CPU) as stream:
        for step in (0, 1, 2, 4, 5, 1):
            images, c = stream.batch(step, {})
            for key, image in images.items():
                assert torch.equal(image, expected[step][0][key]), (step, key)
            assert torch.equal(c, expected[step][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_named_by_whoever_reads_it(tmp_path, config, workers):
    name = "00000/img00000002.png"
    # Large enough for a zip not to have met its checksum when the header has been read.
    data = ImageDataset(damage(write(tmp_path / "a.zip", side=64), name))
    stream = RealStream(dataclasses.replace(config, workers=workers, batch_size=6), 8, data, CPU)
    with (
        pytest.raises(ValueError, match=rf"^reals: .*a\.zip: can't read the image {name}: .*CRC") as error,
        stream,
    ):
        for step in range(20):
            stream.batch(step, {})
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


class Ending(ImageDataset):
    """Who reads a batch of it ends as if the system had ended it, for want of memory."""

    def batch(self, n, generator=None, rows=slice(None)):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("waiting", [True, False])
def test_worker_that_dies_is_told(tmp_path, config, waiting):
    """Whether the trainer waits for the batch, or computes."""
    data = (Ending if waiting else ImageDataset)(write(tmp_path / "a.zip"))
    config = dataclasses.replace(config, workers=1, stage2_steps=10_000)
    message = r"^reals: .*a\.zip: a worker died, for want of memory it may be: .*DataLoader worker"
    with pytest.raises(ChildProcessError, match=message), RealStream(config, 8, data, CPU) as stream:
        stream.batch(0, {})
        (worker,) = multiprocessing.active_children()
        # What is sent to the group is not for workers.
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        for step in range(1, 20):
            stream.batch(step, {})
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(60)
    assert not multiprocessing.active_children()


def test_zip_is_written_whole_or_not_at_all(tmp_path):
    first, second = write(tmp_path / "a.zip"), write(tmp_path / "new" / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [*(f"00000/img{i:08d}.png" for i in range(6)), "dataset.json"]

    def items():
        yield next(iter(ImageDataset(first)))[0].permute(1, 2, 0).byte().numpy(), [0.0] * 25
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_zip(first, items())
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.zip"]


def test_check_of_a_sound_data_set(tmp_path):
    path = write(tmp_path / "a.zip")
    for deep, workers in ((False, 0), (True, 2)):
        seen = []
        report = check(
            path, deep, workers, progress=lambda items, total, seen=seen: seen.append(total) or items
        )
        assert (report.images, report.unlabelled, report.size) == (6, 0, (16, 16))
        assert report.errors == [] and seen == [6] and report.mirrored == 0
        assert torch.equal(report.labels, ImageDataset(path).labels)
    both = ImageDataset(path, mirror=True)
    doubled = zip(both.batch(12)[0], both.labels.tolist(), strict=True)
    assert check(write_zip(tmp_path / "b.zip", doubled)).mirrored == 1


def test_check_names_every_fault(tmp_path):
    """Whatever is wrong with a file or a label is told with its name, and the rest is read all the same."""
    front = CameraDistribution().front()
    labels = {f"{name}.png": front[0].clone() for name in "abcdefghijklmnop"}
    labels["b.png"][0] = 0.9
    labels["c.png"][[0, 4, 8]] *= -1
    labels["d.png"][[1, 5, 9, 2, 6, 10]] *= -1  # OpenGL's axes
    labels["e.png"][[16, 20]] *= 512
    labels["f.png"][18] = 256
    labels["g.png"][15] = 2
    labels["h.png"][24] = 0
    path = tmp_path / "data"
    path.mkdir()
    for name in (*labels, "extra.png"):
        size = {"i.png": (8, 8), "j.png": (16, 12)}.get(name, (16, 16))
        Image.effect_noise(size, 50).convert("RGB").save(path / name)
    content = (path / "k.png").read_bytes()
    (path / "k.png").write_bytes(content[: len(content) // 2])
    (path / "l.png").write_text("hello")
    (path / "m.png").unlink()
    entries = [[name, label.tolist()] for name, label in labels.items()]
    entries += [["o.png", [0, 1]], ["p.png", [0] * 25], ["notes.txt", [0] * 25], [3]]
    (path / "dataset.json").write_text(json.dumps({"labels": entries}))
    archive = zipped(path, tmp_path / "data.zip")
    with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr("a.png", "once more")
        opened.writestr("a.png", (path / "a.png").read_bytes())
    damage(archive, "n.png")
    expected = {
        "b.png": "the pose's rotation is not orthonormal",
        "c.png": "the pose's rotation is a reflection",
        "d.png": "the camera looks away from the origin",
        "e.png": "the focal length is not in image sizes",
        "f.png": "the centre is not in image sizes",
        "g.png": "the pose's last row is not 0, 0, 0, 1",
        "h.png": "the intrinsics are not a pinhole camera's",
        "i.png has 8 x 8 pixels": "most images 16 x 16",
        "j.png has 16 x 12 pixels": "images must be square",
        "the image l.png": "not an image, by its first bytes",
        "has no": "m.png",
        "the label of o.png": "must have 25 numbers",
        "names p.png": "twice",
        "the label of 3": "must have 25 numbers",
    }
    broken = {"the image k.png": "truncated", "the image n.png": "CRC"}
    for place, deep, more in ((archive, True, {"holds a.png": "3 times"} | broken), (path, False, {})):
        report = check(place, deep)
        found = list(report.errors)
        for name, reason in (expected | more).items():
            (line,) = [line for line in found if name in line and reason in line]
            assert line.startswith(str(place)) and "\n" not in line
            found.remove(line)
        assert not found
        assert (report.images, report.unlabelled, report.size) == (16, 1, (16, 16))
        assert len(report.labels) == 9
    with pytest.raises(FileNotFoundError, match="nothing: no such data set"):
        check(tmp_path / "nothing")
    (path / "dataset.json").write_text('{"labels": [["a.txt", ' + str([0] * 25) + "]]}")
    with pytest.raises(ValueError, match=r"data: dataset\.json names no \.png"):
        check(path)


def test_check_by_preset(tmp_path):
    (error,) = check(write(tmp_path / "a.zip"), preset="ffhq512").errors
    assert error.endswith("a.zip has images of 16 x 16 pixels, ffhq512 of 512 x 512")
    assert not check(write(tmp_path / "b.zip", 1, 128), preset="toy").errors
