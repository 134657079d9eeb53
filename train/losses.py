"""The terms of the objective. Every one returns a scalar; weights and schedules are the loop's.

Images are in [-1, 1]. Reconstruction follows Shahbazi et al., arXiv 2303.12865; the adversarial part is the
non-saturating logistic loss (Goodfellow et al. 2014) with R1 (Mescheder et al. 2018).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import camera

# torchvision.models.vgg16().features: index of every convolution, and where lpips cuts it in slices.
_VGG_SLICES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}


class Perceptual(nn.Module):
    """Distance between images in the features of a VGG16; frozen, differentiable in both arguments.

    kind 'lpips-vgg': LPIPS (Zhang et al. 2018) with torchvision's ImageNet weights read from `weights`.
    kind 'random-vgg': the same network with random weights (of a fixed seed) and equal channel weights.
    `name` says which one it is, for reports.
    Raises: FileNotFoundError or ValueError on missing or foreign weights. Nothing is ever downloaded.
    """

    def __init__(self, kind: str = "lpips-vgg", weights: str | Path | None = None):
        super().__init__()
        import lpips

        if kind not in ("lpips-vgg", "random-vgg"):
            raise ValueError(f"Perceptual: kind must be lpips-vgg or random-vgg, got {kind!r}")
        state = _read_vgg(weights) if kind == "lpips-vgg" else None
        # lpips would first fill a whole VGG16 with random numbers, most of them in layers that it drops.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            net = lpips.LPIPS(
                net="vgg", pretrained=False, lpips=state is not None, pnet_rand=True, verbose=False
            )
        self.net = net.to_empty(device="cpu")
        self.net.scaling_layer = lpips.ScalingLayer()
        random = torch.Generator().manual_seed(0)
        for part, layers in _VGG_SLICES.items():
            for layer in layers:
                conv = getattr(getattr(self.net.net, f"slice{part}"), str(layer))
                if state is None:
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=random)
                    nn.init.zeros_(conv.bias)
                else:
                    for name, p in conv.named_parameters():
                        found = state[key := f"features.{layer}.{name}"]
                        if found.shape != p.shape:
                            raise ValueError(
                                f"perceptual_weights: {weights} is not a vgg16 state_dict: {key} has shape "
                                f"{tuple(found.shape)}, not {tuple(p.shape)}"
                            )
                        p.data.copy_(found)
        if state is not None:
            # The weights of the channels, which the package brings.
            heads = torch.load(
                Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True
            )
            self.net.load_state_dict(heads, strict=False)
        self.trained = state is not None
        self.name = "LPIPS (VGG16)" if self.trained else "random VGG16 features"
        self.requires_grad_(False).eval()

    def forward(
        self,
        x: Tensor,  # [N, 3, H, W]  in [-1, 1]
        y: Tensor,  # [N, 3, H, W]  in [-1, 1]
    ) -> Tensor:
        """Mean distance over the batch. Images below 32 pixels are enlarged: VGG16 halves four times."""
        return self.net(_enlarged(x), _enlarged(y)).mean()

    def features(self, x: Tensor) -> tuple[Tensor, ...]:  # [N, 3, H, W] in [-1, 1]
        """What the distance compares, unnormalised: the five feature maps [N, C, H / 2^i, W / 2^i]."""
        return tuple(self.net.net(self.net.scaling_layer(_enlarged(x))))


def _enlarged(x: Tensor) -> Tensor:
    scale = 32 / min(x.shape[2:])
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False) if scale > 1 else x


def make_perceptual(kind: str, weights: str | Path | None = None) -> Perceptual | None:
    """The distance that a configuration asks for; None for 'none'."""
    return None if kind == "none" else Perceptual(kind, weights)


def reconstruction_terms(
    student: dict[
        str, Tensor
    ],  # feature_image [N, 32, h, w], image_raw [N, 3, h, w], maybe image [N, 3, H, W]
    target: dict[str, Tensor],  # the teacher's, likewise
    perceptual: Perceptual | None,
    beta: float = 1.0,
) -> dict[str, Tensor]:
    """The reconstruction losses by name: {lr,hr}_pixel and, with a distance, {lr,hr}_perceptual."""
    terms = {"lr_pixel": F.smooth_l1_loss(student["feature_image"], target["feature_image"], beta=beta)}
    if perceptual is not None:
        terms["lr_perceptual"] = perceptual(student["image_raw"], target["image_raw"])
    if "image" in student:
        terms["hr_pixel"] = F.smooth_l1_loss(student["image"], target["image"], beta=beta)
        if perceptual is not None:
            terms["hr_perceptual"] = perceptual(student["image"], target["image"])
    return terms


def consistency(
    raw: Tensor,  # [V*L, 3, h, w]  the student's, one pose of L latents after the other
    depth: Tensor,  # [V*L, 1, h, w]  the teacher's
    c: Tensor,  # [V*L, 25]
    views: int,
) -> Tensor:
    """Mean squared difference between each image, warped to the next pose of its latent by the teacher's
    depth, and the image of that pose, over what both see of the surface; the mean over images."""
    raw_b, depth_b, c_b = (x.unflatten(0, (views, -1)).roll(-1, 0).flatten(0, 1) for x in (raw, depth, c))
    warped, visible = camera.warp_by_depth(raw, depth, depth_b, c, c_b)
    error = ((warped - raw_b).square() * visible).sum(dim=(1, 2, 3))
    return (error / (3 * visible.sum(dim=(1, 2, 3))).clamp(min=1)).mean()


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Non-saturating logistic loss of the generator: mean softplus(-D(fake))."""
    return F.softplus(-logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator: mean softplus(-D(real)) + mean softplus(D(fake))."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def r1_penalty(discriminator: nn.Module, real: dict[str, Tensor], c: Tensor) -> Tensor:
    """Mean over the batch of the squared norm of the logits' gradient in the real images, image and
    image_raw.

    Differentiable in the discriminator's weights (that is a second derivative of every op it uses).
    """
    inputs = {key: real[key].detach().requires_grad_(True) for key in ("image", "image_raw")}
    logits = discriminator(inputs, c)
    gradients = torch.autograd.grad(logits.sum(), list(inputs.values()), create_graph=True)
    return sum(g.square().sum(dim=(1, 2, 3)) for g in gradients).mean()


def _read_vgg(weights: str | Path | None) -> dict[str, Tensor]:
    if weights is None:
        raise ValueError(
            "--perceptual lpips-vgg needs --perceptual-weights: torchvision's vgg16 state_dict "
            "(vgg16-397923af.pth from download.pytorch.org/models); or choose --perceptual random-vgg or none"
        )
    if not Path(weights).is_file():
        raise FileNotFoundError(f"perceptual_weights: no such file: {weights}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whose message advises to load it all the same
        raise ValueError(f"perceptual_weights: {weights} is not a file of weights") from error
    state = state if isinstance(state, dict) else {}
    missing = [
        name
        for layers in _VGG_SLICES.values()
        for layer in layers
        for part in ("weight", "bias")
        if not isinstance(state.get(name := f"features.{layer}.{part}"), Tensor)
    ]
    if missing:
        raise ValueError(f"perceptual_weights: {weights} is not a vgg16 state_dict: no {missing[0]}")
    return state
