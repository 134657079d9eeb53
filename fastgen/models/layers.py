"""StyleGAN2's building blocks on fastgen's ops, for teacher, student, super-resolution and discriminator.

Every weight is stored at unit scale and multiplied by its He constant at run time ("equalised learning
rate"), so that one learning rate fits all layers. N batch, C channels, H rows, W columns, I in and O out
features.
Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN".
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._define import is_transformed
from ..ops._dispatch import has_kernel
from ..ops.modulated_conv2d import modulated_conv2d_chained, takes_modulated

FILTER = (1, 3, 3, 1)
NOISE_MODES = ("const", "random", "none")


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Feature maps at a resolution: halved with every doubling, at most `channel_max`, at least 1."""
    return max(1, min(channel_base // resolution, channel_max))


def second_moment_normalise(x: Tensor) -> Tensor:  # [N, I] -> [N, I]
    """Scale each row to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def require_shape(owner: str, name: str, x: Tensor, expected: tuple[int | None, ...], axes: str) -> None:
    """Raise, naming `owner` and `name`, unless x is a tensor of the expected shape (None: any size)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor {axes}, got {type(x).__name__}")
    if x.ndim != len(expected) or any(
        e is not None and e != s for e, s in zip(expected, x.shape, strict=True)
    ):
        sizes = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{owner}: {name} must have shape {axes} = [{sizes}], got {list(x.shape)}")


class FullyConnectedLayer(nn.Module):
    """Equalised linear layer, `act(x @ (weight * lr_multiplier / sqrt(I)).T + bias * lr_multiplier)`.

    activation: any name of `ops.bias_act`. The weight starts as N(0, 1) / lr_multiplier.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """The weight [O, I] and bias [O] that the layer really applies."""
        return self.weight * self.weight_gain, None if self.bias is None else self.bias * self.bias_gain

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:  # [..., I] -> [..., O]
        """gain: of all that comes before the activation."""
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        bias = rows.new_zeros(1) if self.bias is None else self.bias.to(x.dtype)
        # Gains on the way, not in a pass over the weight.
        scales = {"alpha": self.weight_gain * gain, "beta": self.bias_gain * gain}
        y = torch.addmm(bias, rows, self.weight.to(x.dtype).t(), **scales)
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.activation == "linear" else ops.bias_act(y, act=self.activation)


class MappingNetwork(nn.Module):
    """z, c -> w, repeated `num_ws` times (or [N, w_dim] when num_ws is None).

    z and the embedded c are each normalised to unit mean square, concatenated, and go through `num_layers`
    lrelu layers. z_dim or c_dim may be 0: that input is then left out (and None). `w_avg` follows the mean of
    w when called with update_emas=True; w_avg_beta None means that it is not kept.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.num_layers = (
            z_dim,
            c_dim,
            w_dim,
            num_ws,
            num_layers,
        )
        self.w_avg_beta = w_avg_beta
        if w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, w_dim)
        features = z_dim + (w_dim if c_dim > 0 else 0)
        for i in range(num_layers):
            layer = FullyConnectedLayer(features, w_dim, activation="lrelu", lr_multiplier=lr_multiplier)
            setattr(self, f"fc{i}", layer)
            features = w_dim

    def forward(
        self,
        z: Tensor | None,  # [N, z_dim]
        c: Tensor | None,  # [N, c_dim]
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Map to the style space; ws in the first `truncation_cutoff` places (None: in all) are pulled
        towards the mean, lerp(w_avg, w, truncation_psi).

        Returns: ws [N, num_ws, w_dim].
        """
        parts = []
        if self.z_dim > 0:
            require_shape("mapping", "z", z, (None, self.z_dim), "[N, z_dim]")
            parts.append(second_moment_normalise(z.to(self.fc0.weight.dtype)))
        if self.c_dim > 0:
            require_shape("mapping", "c", c, (None, self.c_dim), "[N, c_dim]")
            parts.append(second_moment_normalise(self.embed(c.to(self.fc0.weight.dtype))))
        if len(parts) == 2 and z.shape[0] != c.shape[0]:
            raise ValueError(f"mapping: z and c must have one batch size, got {z.shape[0]} and {c.shape[0]}")
        x = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)

        if update_emas and self.w_avg_beta is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return x if truncation_psi == 1 else self.w_avg.lerp(x, truncation_psi)
        ws = x.unsqueeze(1).expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws.contiguous()
        if truncation_cutoff is None:
            return self.w_avg.lerp(ws, truncation_psi)
        return torch.cat(
            [self.w_avg.lerp(ws[:, :truncation_cutoff], truncation_psi), ws[:, truncation_cutoff:]], dim=1
        )


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, lrelu (gain sqrt 2), clamp.

    `resolution` is the output's and the stored noise's; `up` 2 doubles the size with the [1, 3, 3, 1] filter.
    noise_strength starts at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.resolution, self.up, self.padding, self.conv_clamp = resolution, up, kernel_size // 2, conv_clamp
        self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.register_buffer("noise_const", torch.randn([resolution, resolution]))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros([out_channels]))

    def forward(
        self,
        x: Tensor,  # [N, I, h, w]
        w: Tensor,  # [N, w_dim]
        noise_mode: str = "random",
        styles: Tensor | None = None,  # affine(w), if x is multiplied by it already
        next_styles: Tensor | None = None,  # [N, O]: what the result is to be multiplied by
    ) -> Tensor:
        """Returns: [N, O, resolution, resolution], in x's dtype."""
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        noise = None
        if noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        elif noise_mode == "random":
            shape = [x.shape[0], 1, self.resolution, self.resolution]
            noise = torch.randn(shape, device=x.device) * self.noise_strength
        arguments = {
            "noise": noise,
            "up": self.up,
            "padding": self.padding,
            "resample_filter": self.resample_filter,
            "flip_weight": self.up == 1,
            "bias": self.bias,
            "act": "lrelu",
            "clamp": self.conv_clamp,
        }
        modulated = styles is not None
        styles = styles if modulated else self.affine(w)
        if not modulated and next_styles is None:
            return ops.modulated_conv2d(x, self.weight, styles, **arguments)
        arguments |= {"modulated": modulated, "next_styles": next_styles}
        return modulated_conv2d_chained(x, self.weight, styles, **arguments)


class ToRGBLayer(nn.Module):
    """Modulated 1x1 convolution to the image, without demodulation."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None = None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn([out_channels, in_channels, 1, 1]))
        self.bias = nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # [N, I, H, W], [N, w_dim] -> [N, O, H, W]
        styles = self.affine(w, self.weight_gain)
        return ops.modulated_conv2d(
            x, self.weight, styles, demodulate=False, bias=self.bias, clamp=self.conv_clamp
        )


class SynthesisBlock(nn.Module):
    """One resolution of the 'skip' generator: (conv0,) conv1, and toRGB added to the upsampled image.

    in_channels 0: the first block, which starts from a learned constant. `up` False keeps the input's size.
    Activations are of `compute_dtype` if that is set (see compute_in); else of float16 where use_fp16 is set
    and the input is on a GPU. The image is summed in the weights' type.
    """

    compute_dtype: torch.dtype | None = None
    # Where convolutions are fastest on that: on a CPU, and wherever there are kernels for what follows them.
    channels_last: bool = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        up: bool = True,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
    ):
        super().__init__()
        self.in_channels, self.resolution, self.up, self.use_fp16 = in_channels, resolution, up, use_fp16
        self.num_conv, self.num_torgb = (1 if in_channels == 0 else 2), 1
        self.register_buffer("resample_filter", ops.setup_filter(list(FILTER)))
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn([out_channels, resolution, resolution]))
        else:
            factor = 2 if up else 1
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, up=factor, conv_clamp=conv_clamp
            )
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, conv_clamp=conv_clamp)
        self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp=conv_clamp)

    def forward(
        self,
        x: Tensor | None,  # [N, C, h, w]; None in the first block
        img: Tensor | None,  # [N, img_channels, h, w], or None
        ws: Tensor,  # [N, num_conv + num_torgb, w_dim]
        noise_mode: str = "random",
        extra: Tensor | None = None,  # [N, out_channels, H, W], added to what conv1 takes
    ) -> tuple[Tensor, Tensor]:
        """Returns: x [N, C, H, W] and img [N, img_channels, H, W], H = W = resolution."""
        half = torch.float16 if self.use_fp16 and ws.device.type == "cuda" else ws.dtype
        dtype = self.compute_dtype or half
        w = ws.unbind(dim=1)
        if self.in_channels == 0:
            x = self.const.unsqueeze(0).expand(ws.shape[0], -1, -1, -1)
        x = x.to(dtype)
        fast = x.device.type == "cpu" or has_kernel("filtered_bias_act", x)
        if self.channels_last and fast and not is_transformed():  # vmap has no memory formats
            x = x.contiguous(memory_format=torch.channels_last)
        styles = None
        if self.in_channels != 0:
            if extra is None and takes_modulated(x, self.resolution**2, self.conv1.weight):
                styles = self.conv1.affine(w[1])
            x = self.conv0(x, w[0], noise_mode, next_styles=styles)
        if extra is not None:
            x = x + extra.to(x.dtype)
        x = self.conv1(x, w[self.num_conv - 1], noise_mode, styles)
        y = self.torgb(x, w[self.num_conv]).to(ws.dtype)
        if img is None:
            return x, y
        if self.up:
            img = ops.upsample2d(img, self.resample_filter)
        return x, img + y


def compute_in(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Have all synthesis blocks of a model compute in this dtype; None: as each was made."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16, float64 or None, got {dtype!r}")
    for module in model.modules():
        if isinstance(module, SynthesisBlock):
            module.compute_dtype = dtype


class SynthesisNetwork(nn.Module):
    """StyleGAN2 'skip' synthesis from a learned 4x4 constant to `img_resolution`, a power of two.

    Channels at a resolution: min(channel_base // resolution, channel_max). The `num_fp16_res` highest
    resolutions compute in float16 on a GPU; give conv_clamp (256) with it.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
        num_fp16_res: int = 0,
    ):
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise ValueError(f"img_resolution must be a power of two, at least 4, got {img_resolution}")
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.block_resolutions = [2**i for i in range(2, img_resolution.bit_length())]
        first_fp16 = max(2 ** (img_resolution.bit_length() - num_fp16_res), 8)
        channels = 0
        for res in self.block_resolutions:
            before, channels = channels, channels_at(res, channel_base, channel_max)
            fp16 = num_fp16_res > 0 and res >= first_fp16
            block = SynthesisBlock(
                before, channels, w_dim, res, img_channels, conv_clamp=conv_clamp, use_fp16=fp16
            )
            setattr(self, f"b{res}", block)
        # Each toRGB shares its w with the next block's first convolution; the last one has its own.
        self.num_ws = 2 * len(self.block_resolutions)

    def forward(
        self,
        ws: Tensor,  # [N, num_ws, w_dim]
        noise_mode: str = "random",
        resolution: int | None = None,
        extra: Callable[[int], Tensor | None] = lambda resolution: None,
    ) -> Tensor:
        """Returns: [N, img_channels, img_resolution, img_resolution], or the smaller sum at `resolution`; in
        memory as the convolutions left it. extra(resolution) is what that block's conv1 gets added.
        """
        require_shape("synthesis", "ws", ws, (None, self.num_ws, self.w_dim), "[N, num_ws, w_dim]")
        ws = ws.to(self.b4.const.dtype)
        x = img = None
        first = 0
        for res in self.block_resolutions:
            if resolution is not None and res > resolution:
                break
            block = getattr(self, f"b{res}")
            inner = ws[:, first : first + block.num_conv + 1]
            x, img = block(x, img, inner, noise_mode, extra(res))
            first += block.num_conv
        return img
