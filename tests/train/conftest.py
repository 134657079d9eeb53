"""A teacher that renders in milliseconds, and a configuration that trains on it within seconds."""

import lzma
from pathlib import Path

import pytest
import torch

from fastgen.camera import CameraDistribution
from fastgen.models.teacher import Teacher
from fastgen.train.config import TrainConfig


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
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
            superresolution_kwargs={"channels": [4, 4]},
            rendering_kwargs={"depth_resolution": 6, "depth_resolution_importance": 4, "white_back": True},
            neural_rendering_resolution=16,
        )
    teacher.camera = CameraDistribution()
    return teacher.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The golden checkpoint: a narrow EG3D generator as an original pickle."""
    packed = Path(__file__).parents[1] / "data" / "eg3d_cars128_tiny.pkl.xz"
    path = tmp_path_factory.mktemp("original") / "eg3d_cars128_tiny.pkl"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    return path


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        student="toy",
        perceptual="none",
        batch_size=2,
        stage1_steps=3,
        stage2_steps=3,
        discriminator_channels=128,
        discriminator_channel_max=8,
        r1_interval=2,
        log_every=1,
        grid_every=0,
        checkpoint_every=0,
        tensorboard=False,
        device="cpu",
    )
