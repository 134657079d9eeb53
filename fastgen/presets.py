"""Named teachers: the networks, cameras and training hints of EG3D's data sets, and of the toy.

Source: Chan et al. 2022, supplement (training gammas, cameras); Chan et al. 2021, pi-GAN (spread of poses).
"""

import math
from dataclasses import dataclass

from .camera import CameraDistribution, focal_from_fov


@dataclass(frozen=True)
class Preset:
    """teacher: keywords of Teacher; camera: where to render from; r1_gamma: of the training."""

    teacher: dict
    camera: CameraDistribution
    r1_gamma: float = 1.0

    @property
    def resolution(self) -> int:
        """Side of the images, and of those of a data set for it, in pixels."""
        return self.teacher["img_resolution"]


_FACES = {
    "depth_resolution": 48,
    "depth_resolution_importance": 48,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1,
}

PRESETS = {
    "ffhq512": Preset(
        teacher={
            "img_resolution": 512,
            "superresolution": "SuperresolutionHybrid8XDC",
            "rendering_kwargs": _FACES,
            "neural_rendering_resolution": 128,
        },
        camera=CameraDistribution(
            focal=4.2647, pivot=(0, 0, 0.2), radius=2.7, azimuth_spread=0.3, polar_spread=0.155
        ),
        r1_gamma=1.0,
    ),
    "afhqcats512": Preset(
        teacher={
            "img_resolution": 512,
            "superresolution": "SuperresolutionHybrid8XDC",
            "rendering_kwargs": _FACES,
            "neural_rendering_resolution": 128,
        },
        camera=CameraDistribution(
            focal=4.2647, pivot=(0, 0, -0.06), radius=2.7, azimuth_spread=0.3, polar_spread=0.155
        ),
        r1_gamma=5.0,
    ),
    "shapenetcars128": Preset(
        teacher={
            "img_resolution": 128,
            "superresolution": "SuperresolutionHybrid2X",
            "rendering_kwargs": {
                "depth_resolution": 64,
                "depth_resolution_importance": 64,
                "ray_start": 0.1,
                "ray_end": 2.6,
                "box_warp": 1.6,
                "white_back": True,
                "c_gen_conditioning_zero": True,
            },
            "neural_rendering_resolution": 64,
        },
        # The cameras stand on the upper half of the sphere.
        camera=CameraDistribution(
            focal=focal_from_fov(45),
            pivot=(0, 0, 0),
            radius=1.7,
            azimuth_spread=math.pi,
            polar_mean=math.pi / 4,
            polar_spread=math.pi / 4,
            kind="uniform",
        ),
        r1_gamma=0.3,
    ),
    "toy": Preset(
        teacher={
            "z_dim": 16,
            "w_dim": 128,
            "img_resolution": 128,
            "plane_resolution": 64,
            "plane_channels": 24,
            "channel_base": 4096,
            "channel_max": 128,
            "decoder_hidden": 48,
            "superresolution": "SuperresolutionHybrid2X",
            "superresolution_kwargs": {"channels": (48, 24), "num_fp16_res": 0},
            "rendering_kwargs": {
                "depth_resolution": 16,
                "depth_resolution_importance": 16,
                "ray_start": 2.4,
                "ray_end": 2.95,
                "box_warp": 0.7,
                "white_back": True,
                "c_gen_conditioning_zero": True,
            },
            "neural_rendering_resolution": 64,
            "plane_axes": "fixed",
        },
        camera=CameraDistribution(
            focal=focal_from_fov(18.837),
            pivot=(0, 0, 0),
            radius=2.7,
            azimuth_spread=0.8,
            polar_spread=0.5,
            kind="uniform",
        ),
        r1_gamma=1.0,
    ),
}


def get(name: str) -> Preset:
    """The preset of that name; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
