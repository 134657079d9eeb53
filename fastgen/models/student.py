"""The student: a convolutional generator in the teacher's style space, which takes the pose as an input.

z, c -> the teacher's mapping (frozen) -> ws; ws, pose c -> pose mapping -> style -> StyleGAN2 synthesis ->
feature image -> super-resolution, which starts as the teacher's -> image. No volume is rendered.
Source: Shahbazi et al., "NeRF-GAN Distillation for Efficient 3D-Aware Generation with Convolutions",
arXiv 2303.12865.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import camera
from .layers import MappingNetwork, SynthesisNetwork, channels_at, require_shape
from .superresolution import SHAPES, SuperResolution


@dataclass(frozen=True)
class Size:
    """channel_*, style_*: of the renderer; superresolution: its widths as a share of the teacher's; subpixel:
    see SuperResolution, both blocks as wide as the first."""

    channel_base: int
    channel_max: int
    style_dim: int
    style_lr_multiplier: float = 0.01
    superresolution: float = 1.0
    subpixel: bool = False


SIZES = {
    "full": Size(32768, 512, 512),
    "medium": Size(16384, 512, 512, superresolution=1 / 2),
    "compact": Size(8192, 256, 512, superresolution=1 / 4, subpixel=True),
    "tiny": Size(4096, 128, 512, superresolution=1 / 8, subpixel=True),
    "toy": Size(2048, 64, 128, style_lr_multiplier=1.0),
}


class RayMaps(nn.Module):
    """The rays of a camera's pixels as maps for convolutions.

    A ray of origin o and direction d is the line (d, o x d), Plücker's coordinates, which do not depend on
    where along it o lies; each of the six is encoded by sines and cosines of four frequencies. A 1x1
    convolution, zero to begin with, turns the 54 numbers into a block's channels; equalised, as the others.
    """

    frequencies = (1.0, 2.0, 4.0, 8.0)

    def __init__(self, channels: dict[int, int]):  # by resolution
        super().__init__()
        features = 6 * (1 + 2 * len(self.frequencies))
        self.gain = features**-0.5
        for resolution, width in channels.items():
            layer = nn.Conv2d(features, width, 1, bias=False)
            nn.init.zeros_(layer.weight)
            setattr(self, f"r{resolution}", layer)

    def forward(self, c: Tensor, resolution: int) -> Tensor:  # [N, 25]
        """Returns: [N, channels, resolution, resolution]."""
        layer = getattr(self, f"r{resolution}")
        return nn.functional.conv2d(self.encode(c, resolution), layer.weight * self.gain)

    def encode(self, c: Tensor, resolution: int) -> Tensor:  # [N, 25]
        """Returns: the numbers [N, 54, resolution, resolution], the line's six first."""
        origins, directions = camera.rays(c, resolution)
        line = torch.cat([directions, torch.linalg.cross(origins, directions)], -1)
        waves = [f(line * frequency) for frequency in self.frequencies for f in (torch.sin, torch.cos)]
        return torch.cat([line, *waves], -1).transpose(1, 2).unflatten(2, (resolution, resolution))


def _same(teacher: nn.Module, shape: Size) -> dict:
    """The super-resolution's arguments: the teacher's, as wide as `shape` has it."""
    kwargs = dict(teacher.config["superresolution_kwargs"])
    if shape.superresolution < 1:
        blocks = teacher.superresolution.block0, teacher.superresolution.block1
        kwargs |= _narrowed([block.conv1.weight.shape[0] for block in blocks], shape)
    return {
        "superresolution": teacher.config["superresolution"],
        "superresolution_kwargs": kwargs,
        "sr_antialias": teacher.rendering_kwargs["sr_antialias"],
        "superresolution_noise_mode": teacher.rendering_kwargs["superresolution_noise_mode"],
    }


def _narrowed(widths: list[int], shape: Size) -> dict:
    """`channels` and `subpixel` of a super-resolution that would have these widths."""
    # In whole eights, which are what convolutions compute with.
    first, second = (min(8 * math.ceil(width * shape.superresolution / 8), width) for width in widths)
    return {"channels": [first, first], "subpixel": True} if shape.subpixel else {"channels": [first, second]}


def _from_scratch(teacher: nn.Module, shape: Size) -> dict:
    """The same of a teacher that has none: the first that makes images of its resolution, in float32."""
    names = {s.output: name for name, s in reversed(SHAPES.items())}
    if teacher.img_resolution not in names:
        sizes = ", ".join(map(str, sorted(names)))
        raise ValueError(f"Student: img_resolution must be one of {sizes}, got {teacher.img_resolution}")
    name = names[teacher.img_resolution]
    most = shape.channel_max, shape.channel_max // 2
    widths = [min(width, bound) for width, bound in zip(SHAPES[name].channels, most, strict=True)]
    return {"superresolution": name, "superresolution_kwargs": {"num_fp16_res": 0} | _narrowed(widths, shape)}


class Student(nn.Module):
    """The convolutional renderer with the teacher's call shape.

    z_dim, c_dim, w_dim, num_ws, mapping_layers: the teacher's mapping; 0 layers: there is none, and ws are
                          the teacher's own
    conditioning_scale:   what that mapping's c is multiplied by; 0 where the teacher ignores it
    img_resolution, neural_rendering_resolution, feature_channels: the images', as the teacher's
    channel_base, channel_max: the renderer's width, min(channel_base // resolution, channel_max)
    style_dim, style_layers, style_lr_multiplier: the pose mapping from w and c to the renderer's style
    pose_input:           'mapping': the pose enters through the pose mapping alone; 'rays': in addition each
                          pixel's ray, at every resolution (RayMaps)
    style_dims:           how many of w's numbers reach the renderer; None: all. For an ablation
    superresolution, superresolution_kwargs, sr_antialias, superresolution_noise_mode: as the teacher's

    `config` holds all of these as plain values; Student(**config) builds the same network.
    """

    # Whether it starts as the teacher's.
    superresolution_is_trained = False

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 25,
        w_dim: int = 512,
        num_ws: int = 14,
        mapping_layers: int = 2,
        conditioning_scale: float = 1.0,
        img_resolution: int = 512,
        neural_rendering_resolution: int = 64,
        feature_channels: int = 32,
        channel_base: int = 32768,
        channel_max: int = 512,
        style_dim: int = 512,
        style_layers: int = 3,
        style_lr_multiplier: float = 0.01,
        pose_input: str = "mapping",
        style_dims: int | None = None,
        superresolution: str = "SuperresolutionHybrid8XDC",
        superresolution_kwargs: Mapping | None = None,
        sr_antialias: bool = True,
        superresolution_noise_mode: str = "none",
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["superresolution_kwargs"] = dict(superresolution_kwargs or {})
        if pose_input not in ("mapping", "rays"):
            raise ValueError(f"Student: pose_input must be 'mapping' or 'rays', got {pose_input!r}")
        if style_dims is not None and not 1 <= style_dims <= w_dim:
            raise ValueError(f"Student: style_dims must be from 1 to {w_dim}, got {style_dims!r}")
        self.style_dims = style_dims
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.img_resolution, self.neural_rendering_resolution = img_resolution, neural_rendering_resolution
        self.conditioning_scale, self.superresolution_noise_mode = (
            conditioning_scale,
            superresolution_noise_mode,
        )

        self.teacher_mapping = None
        if mapping_layers > 0:
            self.teacher_mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws, mapping_layers)
            self.teacher_mapping.requires_grad_(False)
        self.renderer = SynthesisNetwork(
            style_dim, neural_rendering_resolution, feature_channels, channel_base, channel_max
        )
        widths = {r: channels_at(r, channel_base, channel_max) for r in self.renderer.block_resolutions}
        self.ray_maps = RayMaps(widths) if pose_input == "rays" else None
        # Every block but the first begins by adding nothing, so that a run that grows goes on where it was.
        for resolution in self.renderer.block_resolutions[1:]:
            nn.init.zeros_(getattr(self.renderer, f"b{resolution}").torgb.weight)
        self.pose_mapping = MappingNetwork(
            w_dim, 25, style_dim, self.renderer.num_ws, style_layers, style_lr_multiplier, w_avg_beta=None
        )
        self.superresolution = SuperResolution(
            superresolution,
            feature_channels,
            w_dim,
            antialias=sr_antialias,
            **self.config["superresolution_kwargs"],
        )
        if superresolution_noise_mode == "none":
            # Never in use: what waits for its gradient, as DistributedDataParallel does, would wait in vain.
            for name, parameter in self.superresolution.named_parameters():
                if name.endswith("noise_strength"):
                    parameter.requires_grad_(False)
        if self.superresolution.img_resolution != img_resolution:
            raise ValueError(
                f"Student: img_resolution must be {self.superresolution.img_resolution} with "
                f"{superresolution}, got {img_resolution}"
            )

    @classmethod
    def from_teacher(
        cls,
        teacher: nn.Module,
        size: str = "full",
        neural_rendering_resolution: int | None = None,
        scale: float = 1.0,
        **overrides,
    ) -> Student:
        """A new student of a teacher, of which it takes what there is; see fastgen.train.data.NerfGan.

        `teacher.mapping_network`, a MappingNetwork, is copied and frozen, and `teacher.conditioning_scale` (1
        without) is what its c is multiplied by; without one the student's `mapping` raises ValueError, and ws
        are the teacher's own. `teacher.superresolution`, as EG3D's Teacher has it, is the start of the
        student's, or, where the size has a narrower one, its model; without one it is made for the
        teacher's img_resolution. What does not start as the teacher's only enlarges to begin with.
        size: one of SIZES. neural_rendering_resolution None: the teacher's. scale: of the
        renderer's widths, for a teacher narrower than EG3D's. overrides: of the constructor's arguments.
        """
        if size not in SIZES:
            raise ValueError(f"Student: size must be one of {', '.join(SIZES)}, got {size!r}")
        if not 0 < scale <= 1:
            raise ValueError(f"Student: scale must be above 0 and at most 1, got {scale!r}")
        shape, mapping = SIZES[size], getattr(teacher, "mapping_network", None)
        mapping = mapping if isinstance(mapping, MappingNetwork) else None
        start = getattr(teacher, "superresolution", None)
        config = {
            "z_dim": teacher.z_dim,
            "c_dim": teacher.c_dim,
            "w_dim": teacher.w_dim,
            "num_ws": teacher.num_ws,
            "mapping_layers": mapping.num_layers if mapping is not None else 0,
            "conditioning_scale": getattr(teacher, "conditioning_scale", 1.0),
            "img_resolution": teacher.img_resolution,
            "neural_rendering_resolution": neural_rendering_resolution or teacher.neural_rendering_resolution,
            "feature_channels": teacher.feature_channels,
            "channel_base": round(shape.channel_base * scale),
            "channel_max": round(shape.channel_max * scale),
            "style_dim": round(shape.style_dim * scale),
            "style_lr_multiplier": shape.style_lr_multiplier,
        }
        config |= _from_scratch(teacher, shape) if start is None else _same(teacher, shape)
        student = cls(**config | overrides)
        if mapping is not None:
            student.teacher_mapping.load_state_dict(mapping.state_dict())
        mine = student.config["superresolution_kwargs"]
        if start is not None and mine == teacher.config["superresolution_kwargs"]:
            student.superresolution.load_state_dict(start.state_dict())
            student.superresolution_is_trained = True
        else:
            for block in (student.superresolution.block0, student.superresolution.block1):
                nn.init.zeros_(block.torgb.weight)
        return student

    def renderer_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that start from scratch: pose mapping and renderer."""
        for part in (self.pose_mapping, self.renderer, self.ray_maps):
            if part is not None:
                yield from part.parameters()

    def mapping(
        self,
        z: Tensor,  # [N, z_dim]  N(0, 1)
        c: Tensor,  # [N, c_dim]  the conditioning pose
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """The teacher's mapping: ws [N, num_ws, w_dim]. ValueError where it had none to copy."""
        require_shape("Student.mapping", "z", z, (None, self.z_dim), "[N, z_dim]")
        require_shape("Student.mapping", "c", c, (None, self.c_dim), "[N, c_dim]")
        if self.teacher_mapping is None:
            raise ValueError("Student.mapping: the teacher had no mapping_network to copy; its ws are needed")
        return self.teacher_mapping(
            z, c * self.conditioning_scale, truncation_psi, truncation_cutoff, update_emas
        )

    def render(
        self,
        ws: Tensor,  # [N, num_ws, w_dim]; the first w is used
        c: Tensor,  # [N, 25]  the camera
        noise_mode: str = "const",
        resolution: int | None = None,
    ) -> dict[str, Tensor]:
        """The convolutional stand-in for volume rendering. A smaller `resolution` stops at that block's sum.

        Returns: feature_image [N, feature_channels, h, w] and image_raw [N, 3, h, w], its first channels,
        about [-1, 1].
        """
        require_shape("Student.render", "ws", ws, (None, self.num_ws, self.w_dim), "[N, num_ws, w_dim]")
        require_shape("Student.render", "c", c, (ws.shape[0], 25), "[N, 25]")
        w = ws[:, 0]
        if self.style_dims is not None:
            w = torch.cat([w[:, : self.style_dims], torch.zeros_like(w[:, self.style_dims :])], 1)
        extra = {} if self.ray_maps is None else {"extra": functools.partial(self.ray_maps, c)}
        features = self.renderer(self.pose_mapping(w, c), noise_mode, resolution, **extra).contiguous()
        return {"feature_image": features, "image_raw": features[:, :3]}

    def super_resolve(self, feature_image: Tensor, ws: Tensor, noise_mode: str | None = None) -> Tensor:
        """Feature image [N, feature_channels, h, w] and the last w -> image [N, 3, H, W], about [-1, 1].

        noise_mode None means superresolution_noise_mode.
        """
        return self.superresolution(feature_image, ws, noise_mode or self.superresolution_noise_mode)

    def synthesis(
        self,
        ws: Tensor,  # [N, num_ws, w_dim]
        c: Tensor,  # [N, 25]  the camera
        neural_rendering_resolution: int | None = None,
        noise_mode: str = "const",
        u_coarse: Tensor | None = None,
        u_fine: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Styles and pose to images: render, super_resolve. The noise mode is the renderer's.

        neural_rendering_resolution: only the student's own, or None. u_coarse, u_fine: ignored, for the
        teacher's call shape; nothing is sampled along rays.
        Returns: image [N, 3, H, W], and feature_image, image_raw as `render` gives them.
        """
        if neural_rendering_resolution not in (None, self.neural_rendering_resolution):
            raise ValueError(
                f"Student.synthesis: neural_rendering_resolution must be {self.neural_rendering_resolution}, "
                f"which the student was made for, or None, got {neural_rendering_resolution!r}"
            )
        rendered = self.render(ws, c, noise_mode)
        return {"image": self.super_resolve(rendered["feature_image"], ws)} | rendered

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs,
    ) -> dict[str, Tensor]:
        """`mapping` and `synthesis` with one pose for conditioning and camera."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), c, **synthesis_kwargs)
