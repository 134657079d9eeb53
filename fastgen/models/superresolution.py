"""The super-resolution that follows volume rendering: two StyleGAN2 blocks on the feature image.

Source: Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks", sec. 4.2.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from .layers import FILTER, SynthesisBlock, require_shape


@dataclass(frozen=True)
class Shape:
    """input and output: resolutions; channels: of the two blocks."""

    input: int
    output: int
    channels: tuple[int, int]
    # An input larger than `input` is left alone.
    only_enlarge: bool = False


SHAPES = {
    "SuperresolutionHybrid8XDC": Shape(128, 512, (256, 128)),
    "SuperresolutionHybrid8X": Shape(128, 512, (128, 64)),
    "SuperresolutionHybrid4X": Shape(128, 256, (128, 64), only_enlarge=True),
    "SuperresolutionHybrid2X": Shape(64, 128, (128, 64)),
}


class SuperResolution(nn.Module):
    """Feature image and its first three channels as RGB -> final image.

    name: one of SHAPES, which fixes the resolutions; `channels` overrides the widths of the two blocks.
    num_fp16_res > 0: float16 on a GPU, and activations clamped to 256 everywhere.
    antialias: of the bilinear resize to the input resolution.
    subpixel: the second block stays at half the image's resolution, and its toRGB gives each pixel's four
    (Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
    Convolutional Neural Network"). Ours: nothing wide is computed at full resolution.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 32,
        w_dim: int = 512,
        channels: tuple[int, int] | None = None,
        num_fp16_res: int = 4,
        antialias: bool = True,
        subpixel: bool = False,
    ):
        super().__init__()
        if name not in SHAPES:
            raise ValueError(f"superresolution must be one of {', '.join(SHAPES)}, got {name!r}")
        shape = SHAPES[name]
        self.in_channels, self.w_dim, self.antialias = in_channels, w_dim, antialias
        self.input_resolution, self.img_resolution = shape.input, shape.output
        self.only_enlarge = shape.only_enlarge
        first, second = channels or shape.channels
        fp16 = num_fp16_res > 0
        common = {"img_channels": 3, "conv_clamp": 256 if fp16 else None, "use_fp16": fp16}
        first_up = shape.output == 4 * shape.input
        self.block0 = SynthesisBlock(in_channels, first, w_dim, shape.output // 2, up=first_up, **common)
        self.subpixel = subpixel
        if subpixel:
            common |= {"up": False, "img_channels": 12}
        self.block1 = SynthesisBlock(first, second, w_dim, shape.output // (2 if subpixel else 1), **common)
        if not first_up:
            # Unused: it is in the released checkpoints of these shapes, and so in the state.
            self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))

    def forward(
        self,
        x: Tensor,  # [N, in_channels, h, w]  the feature image, about [-1, 1]
        ws: Tensor,  # [N, num_ws, w_dim]      only the last w is used
        noise_mode: str = "none",
    ) -> Tensor:
        """Returns: the image [N, 3, img_resolution, img_resolution], about [-1, 1]."""
        require_shape("superresolution", "x", x, (None, self.in_channels, None, None), "[N, C, h, w]")
        require_shape("superresolution", "ws", ws, (None, None, self.w_dim), "[N, num_ws, w_dim]")
        w = ws[:, -1:].expand(-1, 3, -1)
        size = self.input_resolution
        if x.shape[-1] < size or (x.shape[-1] > size and not self.only_enlarge):
            x = nn.functional.interpolate(
                x, size=(size, size), mode="bilinear", align_corners=False, antialias=self.antialias
            )
        image = x[:, :3]
        x, image = self.block0(x, image, w, noise_mode)
        if self.subpixel:
            _, four = self.block1(x, None, w, noise_mode)
            # As pixel_shuffle(four, 2), added without being made.
            four = four.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # N C h 2 w 2
            image = ops.upsample2d(image, self.block1.resample_filter)
            image = (image.reshape(four.shape) + four).reshape(image.shape)
        else:
            x, image = self.block1(x, image, w, noise_mode)
        return image.contiguous()
