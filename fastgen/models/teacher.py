"""The teacher: an EG3D-compatible tri-plane generator.

z, c -> mapping -> ws -> backbone -> three feature planes -> volume rendering from c -> feature image ->
super-resolution -> image. State names follow the released checkpoints.
Source: Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks".
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import camera, ops
from .layers import FullyConnectedLayer, MappingNetwork, SynthesisNetwork, require_shape
from .superresolution import SuperResolution

# What `rendering_kwargs` may leave out. Depths are in world units; ray_start and ray_end may be 'auto'.
RENDERING = {
    "depth_resolution": 48,
    "depth_resolution_importance": 48,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1,
    "white_back": False,
    "disparity_space_sampling": False,
    "clamp_mode": "softplus",
    "c_scale": 1,
    "c_gen_conditioning_zero": False,
    "gpc_reg_prob": 0.5,
    "sr_antialias": True,
    "superresolution_noise_mode": "none",
    "decoder_lr_mul": 1,
}
RENDER_OPTIONS = (
    "depth_resolution",
    "depth_resolution_importance",
    "ray_start",
    "ray_end",
    "box_warp",
    "white_back",
    "disparity_space_sampling",
    "clamp_mode",
)


class TriplaneBackbone(nn.Module):
    """Mapping and synthesis of the feature planes; a container that gives the state its names."""

    def __init__(self, synthesis: SynthesisNetwork, mapping: MappingNetwork):
        super().__init__()
        self.synthesis = synthesis
        self.mapping = mapping


class TriplaneDecoder(nn.Module):
    """Mean plane feature at a point -> density before softplus, and a feature colour."""

    def __init__(self, in_features: int, hidden: int, out_features: int, lr_multiplier: float = 1.0):
        super().__init__()
        self.net = nn.Sequential(
            FullyConnectedLayer(in_features, hidden, lr_multiplier=lr_multiplier),
            nn.Softplus(),
            FullyConnectedLayer(hidden, 1 + out_features, lr_multiplier=lr_multiplier),
        )

    def effective(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1 [D, F], b1 [D], w2 [1 + C, D], b2 [1 + C], as `ops.render_triplane` takes them."""
        return *self.net[0].effective(), *self.net[2].effective()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # [..., F]
        """Returns: sigma [..., 1] and colour [..., C] in (-0.001, 1.001)."""
        x = self.net(features)
        return x[..., :1], torch.sigmoid(x[..., 1:]) * 1.002 - 0.001


class Teacher(nn.Module):
    """EG3D's generator, at any width.

    z_dim, c_dim, w_dim:  latent, camera label (25) and style
    img_resolution:       of the final image; the super-resolution's
    plane_resolution, plane_channels: of each of the three feature planes
    feature_channels:     of the rendered feature image; the first 3 are the raw image
    channel_base, channel_max: the backbone's width, min(channel_base // resolution, channel_max)
    mapping_layers:       of the mapping network
    conv_clamp, num_fp16_res: of the backbone (float16 at its highest resolutions on a GPU)
    decoder_hidden:       width of the decoder's hidden layer
    superresolution, superresolution_kwargs: name, and `channels`, `num_fp16_res` of SuperResolution
    rendering_kwargs:     overrides of RENDERING; other entries are kept, for training
    neural_rendering_resolution: side of the rendered feature image
    plane_axes:           'eg3d' (the released checkpoints') or 'fixed'; see ops.sample_triplane

    `config` holds all of these as plain values; Teacher(**config) builds the same network.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 25,
        w_dim: int = 512,
        img_resolution: int = 512,
        plane_resolution: int = 256,
        plane_channels: int = 32,
        feature_channels: int = 32,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 2,
        conv_clamp: float | None = None,
        num_fp16_res: int = 0,
        decoder_hidden: int = 64,
        superresolution: str = "SuperresolutionHybrid8XDC",
        superresolution_kwargs: Mapping | None = None,
        rendering_kwargs: Mapping | None = None,
        neural_rendering_resolution: int = 64,
        plane_axes: str = "eg3d",
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["superresolution_kwargs"] = dict(superresolution_kwargs or {})
        self.config["rendering_kwargs"] = dict(rendering_kwargs or {})
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.neural_rendering_resolution = img_resolution, neural_rendering_resolution
        self.plane_channels, self.feature_channels = plane_channels, feature_channels
        self.rendering_kwargs = RENDERING | self.config["rendering_kwargs"]
        self.plane_axes = plane_axes

        synthesis = SynthesisNetwork(
            w_dim, plane_resolution, 3 * plane_channels, channel_base, channel_max, conv_clamp, num_fp16_res
        )
        self.num_ws = synthesis.num_ws
        mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, mapping_layers)
        self.backbone = TriplaneBackbone(synthesis, mapping)
        self.superresolution = SuperResolution(
            superresolution,
            feature_channels,
            w_dim,
            antialias=self.rendering_kwargs["sr_antialias"],
            **self.config["superresolution_kwargs"],
        )
        if self.superresolution.img_resolution != img_resolution:
            raise ValueError(
                f"Teacher: img_resolution must be {self.superresolution.img_resolution} "
                f"with {superresolution}, got {img_resolution}"
            )
        lr_multiplier = self.rendering_kwargs["decoder_lr_mul"]
        self.decoder = TriplaneDecoder(plane_channels, decoder_hidden, feature_channels, lr_multiplier)

    @property
    def mapping_network(self) -> MappingNetwork:
        """What makes ws; a student copies it."""
        return self.backbone.mapping

    @property
    def conditioning_scale(self) -> float:
        """What `mapping` multiplies c by: c_scale, or 0 with c_gen_conditioning_zero."""
        kwargs = self.rendering_kwargs
        return 0.0 if kwargs["c_gen_conditioning_zero"] else float(kwargs["c_scale"])

    @property
    def render_options(self) -> dict:
        """The options of `ops.render_triplane`."""
        return {k: self.rendering_kwargs[k] for k in RENDER_OPTIONS} | {"plane_axes": self.plane_axes}

    def mapping(
        self,
        z: Tensor,  # [N, z_dim]  N(0, 1)
        c: Tensor,  # [N, c_dim]  the conditioning pose
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Latent and conditioning pose to styles; see MappingNetwork.

        Returns: ws [N, num_ws, w_dim].
        """
        require_shape("Teacher.mapping", "z", z, (None, self.z_dim), "[N, z_dim]")
        require_shape("Teacher.mapping", "c", c, (None, self.c_dim), "[N, c_dim]")
        c = c * self.conditioning_scale
        return self.mapping_network(z, c, truncation_psi, truncation_cutoff, update_emas)

    def backbone_planes(self, ws: Tensor, noise_mode: str = "const") -> Tensor:  # [N, num_ws, w_dim]
        """Returns: planes [N, 3, plane_channels, plane_resolution, plane_resolution]."""
        return self.backbone.synthesis(ws, noise_mode).unflatten(1, (3, self.plane_channels))

    def render(
        self,
        planes: Tensor,  # [N, 3, F, H, W]
        c: Tensor,  # [N, 25]  the camera
        neural_rendering_resolution: int | None = None,
        u_coarse: Tensor | None = None,  # [N, R, S, 1] in [0, 1)
        u_fine: Tensor | None = None,  # [N, R, S_importance] in [0, 1)
    ) -> dict[str, Tensor]:
        """Volume rendering of planes from a camera; u None means deterministic midpoint sampling.

        Returns: feature_image [N, feature_channels, h, w] and image_raw [N, 3, h, w], its first channels, in
        [-1, 1]; image_depth [N, 1, h, w] in world units along the ray.
        """
        require_shape("Teacher.render", "c", c, (None, 25), "[N, 25]")
        size = neural_rendering_resolution or self.neural_rendering_resolution
        # Sixteen bits would misplace the camera.
        origins, directions = camera.rays(c.to(torch.promote_types(planes.dtype, torch.float32)), size)
        out = ops.render_triplane(
            planes, self.decoder.effective(), origins, directions, self.render_options, u_coarse, u_fine
        )
        features = out.features.transpose(1, 2).unflatten(2, (size, size)).contiguous()
        depth = out.depth.transpose(1, 2).unflatten(2, (size, size))
        return {"feature_image": features, "image_raw": features[:, :3], "image_depth": depth}

    def super_resolve(self, feature_image: Tensor, ws: Tensor, noise_mode: str | None = None) -> Tensor:
        """Feature image [N, feature_channels, h, w] -> image [N, 3, H, W], about [-1, 1].

        noise_mode None means rendering_kwargs' superresolution_noise_mode.
        """
        noise_mode = self.rendering_kwargs["superresolution_noise_mode"] if noise_mode is None else noise_mode
        return self.superresolution(feature_image, ws, noise_mode)

    def synthesis(
        self,
        ws: Tensor,  # [N, num_ws, w_dim]
        c: Tensor,  # [N, 25]  the camera
        neural_rendering_resolution: int | None = None,
        noise_mode: str = "const",
        u_coarse: Tensor | None = None,
        u_fine: Tensor | None = None,
        final: bool = True,
    ) -> dict[str, Tensor]:
        """Styles to images: backbone_planes, render, super_resolve. The noise mode is the backbone's.

        Returns: image [N, 3, H, W] if `final`, and image_raw, image_depth, feature_image as `render` gives
        them.
        """
        rendered = self.render(
            self.backbone_planes(ws, noise_mode), c, neural_rendering_resolution, u_coarse, u_fine
        )
        if not final:
            return rendered
        return {"image": self.super_resolve(rendered["feature_image"], ws)} | rendered

    def sample(self, xyz: Tensor, ws: Tensor, noise_mode: str = "const") -> tuple[Tensor, Tensor]:
        """Density and colour at points xyz [N, M, 3] in world units.

        Returns: sigma [N, M, 1] before softplus(sigma - 1), rgb [N, M, feature_channels] in (-0.001, 1.001).
        """
        require_shape("Teacher.sample", "xyz", xyz, (None, None, 3), "[N, M, 3]")
        planes = self.backbone_planes(ws, noise_mode)
        features = ops.sample_triplane(
            planes, xyz, self.rendering_kwargs["box_warp"], plane_axes=self.plane_axes, reduce="mean"
        )
        return self.decoder(features)

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs,
    ) -> dict[str, Tensor]:
        """`mapping` and `synthesis` with one pose for conditioning and camera."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, c, **synthesis_kwargs)
