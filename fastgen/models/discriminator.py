"""EG3D's dual discriminator: StyleGAN2's residual one, of (image, resized raw image), conditioned on pose.

Source: Chan et al. 2022, sec. 4.3; Karras et al. 2020; conditioning by projection, Miyato and Koyama 2018.
"""

import math

import torch
from torch import Tensor, nn

from .. import ops
from .layers import FILTER, FullyConnectedLayer, MappingNetwork, channels_at, require_shape


class Conv2dLayer(nn.Module):
    """Equalised convolution, bias, activation, clamp; `down` 2 halves the size with the [1, 3, 3, 1] filter.

    forward's gain multiplies the result (and the clamp).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        down: int = 1,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.activation, self.down, self.conv_clamp = activation, down, conv_clamp
        self.padding = kernel_size // 2
        self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))
        self.weight = nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.bias = nn.Parameter(torch.zeros([out_channels])) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = math.sqrt(2) if activation == "lrelu" else 1.0

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:  # [N, I, H, W] -> [N, O, H/down, W/down]
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = ops.conv2d_resample(x, weight, self.resample_filter, down=self.down, padding=self.padding)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return ops.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


class DiscriminatorBlock(nn.Module):
    """Halves the resolution: two 3x3 convolutions beside a 1x1 one, each scaled by sqrt 0.5, summed.

    in_channels 0: the first block, which starts with a 1x1 convolution of the image.
    """

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        img_channels: int,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
    ):
        super().__init__()
        self.in_channels, self.use_fp16 = in_channels, use_fp16
        lrelu = {"activation": "lrelu", "conv_clamp": conv_clamp}
        if in_channels == 0:
            self.fromrgb = Conv2dLayer(img_channels, tmp_channels, 1, **lrelu)
        self.conv0 = Conv2dLayer(tmp_channels, tmp_channels, 3, **lrelu)
        self.conv1 = Conv2dLayer(tmp_channels, out_channels, 3, down=2, **lrelu)
        self.skip = Conv2dLayer(tmp_channels, out_channels, 1, bias=False, down=2)
        self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, O, H/2, W/2]
        half = self.use_fp16 and x.device.type == "cuda"
        x = x.to(torch.float16 if half else self.conv0.weight.dtype)
        if self.in_channels == 0:
            x = self.fromrgb(x)
        y = self.skip(x, gain=math.sqrt(0.5))
        return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


class MinibatchStdLayer(nn.Module):
    """Append one channel: the standard deviation over a group of samples, averaged over features and pixels.

    Groups are as large as divides the batch, up to `group_size`; sample i is in group i mod (N / size).
    """

    def __init__(self, group_size: int = 4):
        super().__init__()
        self.group_size = group_size

    def group(self, n: int) -> int:
        """The size of the groups of a batch of n."""
        return max(g for g in range(1, self.group_size + 1) if n % g == 0)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C + 1, H, W]
        n, _, h, w = x.shape
        group = self.group(n)
        y = x.unflatten(0, (group, n // group))
        std = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[1, 2, 3])
        std = std.repeat(group).view(n, 1, 1, 1).expand(n, 1, h, w)
        return torch.cat([x, std], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> `cmap_dim` numbers a sample, projected on the embedded pose."""

    def __init__(
        self, channels: int, cmap_dim: int, mbstd_group_size: int = 4, conv_clamp: float | None = None
    ):
        super().__init__()
        self.cmap_dim = cmap_dim
        self.mbstd = MinibatchStdLayer(mbstd_group_size)
        self.conv = Conv2dLayer(channels + 1, channels, 3, activation="lrelu", conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(channels * 16, channels, activation="lrelu")
        self.out = FullyConnectedLayer(channels, cmap_dim or 1)

    def forward(self, x: Tensor, cmap: Tensor | None) -> Tensor:  # [N, C, 4, 4], [N, cmap_dim] -> [N, 1]
        x = self.conv(self.mbstd(x.to(self.fc.weight.dtype)))
        x = self.out(self.fc(x.flatten(1)))
        return x if cmap is None else (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)


class DualDiscriminator(nn.Module):
    """Logits of {'image', 'image_raw'} at a pose; positive means real.

    channel_base, channel_max: width, min(channel_base // resolution, channel_max)
    num_fp16_res: how many of the highest resolutions compute in float16 on a GPU
    mapping_layers: of the pose's mapping network; c_dim 0 leaves the pose out
    """

    def __init__(
        self,
        c_dim: int = 25,
        img_resolution: int = 512,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 4,
        conv_clamp: float | None = 256,
        mapping_layers: int = 8,
        mbstd_group_size: int = 4,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if img_resolution < 8 or img_resolution & (img_resolution - 1):
            raise ValueError(
                f"DualDiscriminator: img_resolution must be a power of two from 8, got {img_resolution}"
            )
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        self.block_resolutions = [2**i for i in range(img_resolution.bit_length() - 1, 2, -1)]
        first_fp16 = max(2 ** (img_resolution.bit_length() - num_fp16_res), 8)
        for res in self.block_resolutions:
            tmp, out = (channels_at(r, channel_base, channel_max) for r in (res, res // 2))
            block = DiscriminatorBlock(
                0 if res == img_resolution else tmp,
                tmp,
                out,
                2 * img_channels,
                conv_clamp=conv_clamp,
                use_fp16=num_fp16_res > 0 and res >= first_fp16,
            )
            setattr(self, f"b{res}", block)
        last = channels_at(4, channel_base, channel_max)
        cmap_dim = last if c_dim > 0 else 0
        if c_dim > 0:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, None, mapping_layers, w_avg_beta=None)
        self.b4 = DiscriminatorEpilogue(last, cmap_dim, mbstd_group_size, conv_clamp)
        self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))

    def forward(
        self,
        images: dict[str, Tensor],  # image [N, 3, H, W], image_raw [N, 3, h, w]; about [-1, 1]
        c: Tensor | None = None,  # [N, c_dim]
    ) -> Tensor:
        """Returns: logits [N, 1]."""
        size = self.img_resolution
        image, raw = images["image"], images["image_raw"]
        require_shape(
            "DualDiscriminator", "image", image, (None, self.img_channels, size, size), "[N, C, H, W]"
        )
        require_shape(
            "DualDiscriminator",
            "image_raw",
            raw,
            (image.shape[0], self.img_channels, None, None),
            "[N, C, h, w]",
        )
        if self.c_dim > 0:
            require_shape("DualDiscriminator", "c", c, (image.shape[0], self.c_dim), "[N, c_dim]")
        raw = nn.functional.interpolate(
            raw, size=(size, size), mode="bilinear", align_corners=False, antialias=True
        )
        x = torch.cat([image, raw], dim=1)
        for res in self.block_resolutions:
            x = getattr(self, f"b{res}")(x)
        return self.b4(x, self.mapping(None, c) if self.c_dim > 0 else None)
