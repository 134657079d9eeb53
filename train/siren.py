"""A second kind of NeRF-GAN: a small generator after pi-GAN, without planes and without super-resolution.

    python -m fastgen.train.siren --out out/siren --minutes 8

z -> mapping -> w -> frequencies and phases of a SIREN, whose input is a point in space; volume rendering of
single rays makes the final image directly. It learns the procedural heads in `scenes` by regression, as the
toy teacher does (`toy`), without that one's image phase.
Source: Chan et al. 2021, "pi-GAN: Periodic Implicit Generative Adversarial Networks"; Sitzmann et al. 2020,
"Implicit Neural Representations with Periodic Activation Functions" (initialisation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import camera
from fastgen.models.layers import MappingNetwork, require_shape
from fastgen.ops import RenderOutput, _march

from . import scenes, toy

# SIREN's omega_0, and what a density is, per world unit, where the network says 1.
OMEGA, DENSITY = 30.0, 200.0
# Points that are in memory at once where no gradient is asked for.
CHUNK = 2**17


class Siren(nn.Module):
    """pi-GAN's generator, at any width; a fastgen.train.data.NerfGan whose pose is only the camera's.

    z_dim, c_dim, w_dim:  latent, camera label (25) and style
    mapping_layers:       of the mapping network
    hidden, film_layers:  width and number of the layers sin(gamma (W x + b) + beta)
    feature_channels:     of the rendered feature image; the first 3 are the raw image
    img_resolution, neural_rendering_resolution: sides of the final image and of the feature image
    radius:               points are divided by it, world units
    ray_start, ray_end, samples: depths along a ray, world units, and their number

    `config` holds all of these as plain values; Siren(**config) builds the same network.
    """

    num_ws = 1
    conditioning_scale = 0.0
    camera = None

    def __init__(
        self,
        z_dim: int = scenes.Z_DIM,
        c_dim: int = 25,
        w_dim: int = 64,
        mapping_layers: int = 2,
        hidden: int = 64,
        film_layers: int = 4,
        feature_channels: int = 32,
        img_resolution: int = 128,
        neural_rendering_resolution: int = 64,
        radius: float = scenes.RADIUS,
        ray_start: float = 2.4,
        ray_end: float = 2.95,
        samples: int = 32,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.feature_channels, self.radius, self.samples = feature_channels, radius, samples
        self.img_resolution, self.neural_rendering_resolution = img_resolution, neural_rendering_resolution
        self.ray_start, self.ray_end = ray_start, ray_end

        self.mapping_network = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, mapping_layers)
        toy.ignore_pose(self.mapping_network)
        widths = [3] + [hidden] * film_layers
        self.layers = nn.ModuleList(nn.Linear(i, hidden) for i in widths[:-1])
        self.films = nn.ModuleList(nn.Linear(w_dim, 2 * hidden) for _ in self.layers)
        self.head = nn.Linear(hidden, 1 + feature_channels)
        with torch.no_grad():
            for layer, width in zip(self.layers, widths[:-1], strict=True):
                layer.weight.uniform_(-1, 1).mul_(1 / 3 if width == 3 else math.sqrt(6 / width) / OMEGA)
                layer.bias.zero_()
            for film in self.films:
                film.weight.normal_().mul_(0.25 / math.sqrt(w_dim))
                film.bias.zero_()
                film.bias[hidden:].uniform_(-math.pi, math.pi)
            self.head.weight.uniform_(-1, 1).mul_(math.sqrt(6 / hidden))
            self.head.weight[0].mul_(0.1)
            self.head.bias.zero_()
            # Empty space to begin with.
            self.head.bias[0] = -0.25

    def mapping(
        self,
        z: Tensor,  # [N, z_dim]  N(0, 1)
        c: Tensor,  # [N, c_dim]  without effect
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Latents to styles ws [N, 1, w_dim]; see MappingNetwork."""
        require_shape("Siren.mapping", "z", z, (None, self.z_dim), "[N, z_dim]")
        require_shape("Siren.mapping", "c", c, (None, self.c_dim), "[N, c_dim]")
        c = c * self.conditioning_scale
        return self.mapping_network(z, c, truncation_psi, truncation_cutoff, update_emas)

    def sample(self, xyz: Tensor, ws: Tensor, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """Density and colour at points xyz [N, M, 3] in world units.

        channels: only the first so many, for less work. Returns: sigma [N, M, 1] before softplus(sigma - 1),
        rgb [N, M, feature_channels] in (0, 1).
        """
        require_shape("Siren.sample", "xyz", xyz, (ws.shape[0], None, 3), "[N, M, 3]")
        x = xyz / self.radius
        for layer, film in zip(self.layers, self.films, strict=True):
            gamma, beta = film(ws[:, 0]).unsqueeze(1).chunk(2, -1)
            gamma = OMEGA * (1 + gamma)
            # gamma (W x + b) + beta in one product.
            x = torch.baddbmm(gamma * layer.bias + beta, x, layer.weight.t() * gamma).sin()
        rows = slice(None if channels is None else 1 + channels)
        x = F.linear(x, self.head.weight[rows], self.head.bias[rows])
        return x[..., :1] * DENSITY, torch.sigmoid(x[..., 1:])

    def march(
        self,
        ws: Tensor,  # [N, 1, w_dim]
        origins: Tensor,  # [N, R, 3]
        directions: Tensor,  # [N, R, 3]  unit
        u: Tensor | None = None,  # [N, R, samples] in [0, 1)
        channels: int | None = None,
    ) -> RenderOutput:
        """Volume rendering of rays on white, stratified by u, or with None at the strata's middles.

        Returns: features, depth and weight as those of ops.render_triplane; channels as in `sample`.
        """
        if u is None:
            u = origins.new_full((*origins.shape[:2], self.samples), 0.5)
        depths = _march.coarse_depths(self.ray_start, self.ray_end, u, disparity=False)
        points = origins.unsqueeze(2) + depths.unsqueeze(-1) * directions.unsqueeze(2)
        field = self.sample(points.flatten(1, 2), ws, channels)
        sigma, colour = (t.unflatten(1, depths.shape[1:]) for t in field)
        features, depth, w = _march.composite(sigma[..., 0], colour, depths, white_back=True)
        return RenderOutput(features, depth, w.sum(-1, keepdim=True))

    def synthesis(
        self,
        ws: Tensor,  # [N, 1, w_dim]
        c: Tensor,  # [N, 25]  the camera
        neural_rendering_resolution: int | None = None,
        final: bool = True,
    ) -> dict[str, Tensor]:
        """Styles to images, each rendered at its own resolution.

        Returns: feature_image [N, feature_channels, h, w] and image_raw [N, 3, h, w], its first channels, in
        [-1, 1]; image_depth [N, 1, h, w] in world units along the ray; and if `final` image [N, 3, H, W].
        """
        require_shape("Siren.synthesis", "ws", ws, (None, 1, self.w_dim), "[N, 1, w_dim]")
        require_shape("Siren.synthesis", "c", c, (ws.shape[0], 25), "[N, 25]")
        features, depth = self._render(ws, c, neural_rendering_resolution or self.neural_rendering_resolution)
        out = {"feature_image": features, "image_raw": features[:, :3], "image_depth": depth}
        return {"image": self._render(ws, c, self.img_resolution, 3)[0]} | out if final else out

    def _render(self, ws: Tensor, c: Tensor, size: int, channels: int | None = None) -> tuple[Tensor, Tensor]:
        count = max(1, CHUNK // (self.samples * max(1, len(ws))))
        parts = zip(*(t.split(count, 1) for t in camera.rays(c, size)), strict=True)
        outs = [self.march(ws, *rays, channels=channels) for rays in parts]
        features, depth = (torch.cat([out[i] for out in outs], 1) for i in range(2))
        return tuple(t.transpose(1, 2).unflatten(2, (size, size)).contiguous() for t in (features, depth))

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs,
    ) -> dict[str, Tensor]:
        """`mapping` and `synthesis` with one pose for both."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), c, **synthesis_kwargs)


@dataclass(frozen=True)
class SirenConfig(toy.ToyConfig):
    """A run. As ToyConfig's, but for the image phase, of which there is none."""

    out: str = "out/siren"
    minutes: float = 8.0
    rays_from: float = 0.35
    image_from: float = 1.0
    points: int = 1024
    rays: int = 128
    lr: float = 2e-3
    lr_mapping: float = 150.0

    def __post_init__(self):
        super().__post_init__()
        if self.image_from != 1:
            raise ValueError("SirenConfig: image_from must be 1, there is no super-resolution to train")


def field_loss(siren: Siren, config: SirenConfig, draw: toy.Draw) -> dict[str, Tensor]:
    """Densities around and colours at the surface, without rendering."""
    z, c = draw.normal(config.latents, scenes.Z_DIM), draw.poses(config.latents)
    field = partial(siren.sample, ws=siren.mapping(z, c, update_emas=True), channels=3)
    return toy.field_terms(field, scenes.heads(z), c, config.points, draw)


def ray_loss(siren: Siren, config: SirenConfig, draw: toy.Draw) -> dict[str, Tensor]:
    """Volume-rendered single rays, each against one anywhere in its pixel; and a little of the field."""
    z, c = draw.normal(config.latents, scenes.Z_DIM), draw.poses(config.latents)
    ws = siren.mapping(z, c, update_emas=True)
    field = partial(siren.sample, ws=ws, channels=3)
    u = draw.uniform(config.latents, config.rays, siren.samples)
    march = partial(siren.march, ws, u=u, channels=3)
    return toy.ray_terms(field, march, z, c, siren.img_resolution, config, draw)


def train(config: SirenConfig) -> Siren:
    """One run; returns the averaged generator, which fastgen.load_teacher reads from
    out/teacher.safetensors.
    """
    return toy.train(config, Siren, {"field": field_loss, "rays": ray_loss})


def main() -> None:
    """The command line: every field of SirenConfig is an option."""
    import tyro

    fastgen.keep_memory()
    train(tyro.cli(SirenConfig, prog="python -m fastgen.train.siren"))


if __name__ == "__main__":
    main()
