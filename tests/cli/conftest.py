"""Files that commands read, sound and unsound ones."""

import json
import lzma
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from fastgen import checkpoint
from fastgen.camera import CameraDistribution
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher

# The convolutions of torchvision's vgg16.
VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """A teacher and a student that render in milliseconds, an original checkpoint, a text, by name."""
    folder = tmp_path_factory.mktemp("files")
    paths = {
        name: folder / name for name in ("teacher.safetensors", "student.safetensors", "cars.pkl", "a.txt")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher(
            z_dim=8,
            w_dim=16,
            img_resolution=128,
            plane_resolution=16,
            plane_channels=8,
            channel_base=128,
            channel_max=16,
            decoder_hidden=16,
            superresolution="SuperresolutionHybrid2X",
            superresolution_kwargs={"channels": [8, 4], "num_fp16_res": 0},
            rendering_kwargs={"depth_resolution": 6, "depth_resolution_importance": 4},
            neural_rendering_resolution=16,
        )
        # Random weights make a fog of one colour, which would hide a mistake.
        teacher.decoder.net[2].weight.data *= 8
        camera = {"camera": CameraDistribution().as_dict()}
        checkpoint.save(paths["teacher.safetensors"], "teacher", {"G": teacher}, camera)
        checkpoint.save(
            paths["student.safetensors"], "student", {"G": Student.from_teacher(teacher, "toy")}, camera
        )
    packed = Path(__file__).parents[1] / "data" / "eg3d_cars128_tiny.pkl.xz"
    paths["cars.pkl"].write_bytes(lzma.decompress(packed.read_bytes()))
    paths["a.txt"].write_text("nothing that anyone could load\n")
    paths["run"] = folder / "run"
    paths["run"].mkdir()
    (paths["run"] / "resume.pt").write_text("hello")
    for name, content in {
        "list": [1],
        "null": {"labels": [["a.png", None]]},
        "words": {"labels": [["a.png", ["one"] * 25]]},
    }.items():
        paths[name] = folder / name
        paths[name].mkdir()
        (paths[name] / "dataset.json").write_text(json.dumps(content))
    paths["zip"] = folder / "damaged.zip"
    with zipfile.ZipFile(paths["zip"], "w") as archive:
        archive.writestr("dataset.json", '{"labels": []}')
    paths["zip"].write_bytes(paths["zip"].read_bytes().replace(b'{"labels"', b'{"lapels"'))
    network = torch.nn.Sequential(torch.nn.Upsample((2, 2)), torch.nn.Flatten()).eval()
    paths["network"] = folder / "network.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(network, torch.zeros(2, 3, 128, 128, dtype=torch.uint8)).save(paths["network"])
    vgg = {f"features.{i}.{part}": torch.zeros(1) for i in VGG for part in ("weight", "bias")}
    paths["vgg"], paths["biasless"] = folder / "vgg.pth", folder / "biasless.pth"
    torch.save(vgg, paths["vgg"])
    torch.save({name: p for name, p in vgg.items() if name != "features.28.bias"}, paths["biasless"])
    return paths
