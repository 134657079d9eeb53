"""The golden checkpoint: a narrow cars generator as an original pickle, and the original's outputs."""

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The golden checkpoint's pickle."""
    path = tmp_path_factory.mktemp("original") / "eg3d_cars128_tiny.pkl"
    path.write_bytes(lzma.decompress((DATA / "eg3d_cars128_tiny.pkl.xz").read_bytes()))
    return path


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Inputs and outputs of the original code on the golden checkpoint."""
    with np.load(DATA / "eg3d_cars128_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="session")
def small_config() -> dict:
    """Keywords of a Teacher that renders in milliseconds."""
    return {
        "z_dim": 8,
        "w_dim": 16,
        "img_resolution": 128,
        "plane_resolution": 16,
        "plane_channels": 8,
        "channel_base": 128,
        "channel_max": 16,
        "decoder_hidden": 16,
        "superresolution": "SuperresolutionHybrid2X",
        "superresolution_kwargs": {"channels": [8, 4]},
        "rendering_kwargs": {"depth_resolution": 6, "depth_resolution_importance": 6, "white_back": True},
        "neural_rendering_resolution": 8,
    }
