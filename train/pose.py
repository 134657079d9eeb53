"""Which way a camera looks, told from its image: a small network, to measure poses with.

    python -m fastgen.train.pose --out pose.safetensors

trains one on the images of a teacher, the toy unless --teacher names another; that of the toy is shipped. It
learns from a growing stock of images, and from their mirror images, colours and sharpness varied, so that an
image of the same pose by a student, which is softer, is told alike. The schedule follows the clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import fastgen
from fastgen import camera, info, pictures

from .data import Poses, generator_for, render_targets

TOY = Path(fastgen.__file__).parent / "assets" / "toy_pose.safetensors"
SIDE = 64
# Random numbers of training and of the test, apart from each other's and from evaluate's.
SEED, HELD_OUT_SEED = 0, 2_000_003


class PoseNet(nn.Module):
    """Images to the directions in which their cameras look."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 32, 48, 64):
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.net = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(16 * width, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(
        self,
        images: Tensor,  # [N, 3, H, W]  in [-1, 1], of any size
    ) -> Tensor:
        """Returns: unit vectors [N, 3] in the world, that is azimuth and polar angle."""
        images = F.interpolate(images.float().clamp(-1, 1), (SIDE, SIDE), mode="area")
        found = F.normalize(self.net(images), dim=1)
        if not self.training:
            # The mean with what the mirror image says: a fifth less error.
            mirrored = F.normalize(self.net(images.flip(3)), dim=1)
            found = F.normalize(found + mirrored * mirrored.new_tensor([-1, 1, 1]), dim=1)
        return found

    def save(self, path: str | Path):
        """Write the weights, in 16 bits."""
        Path(path).write_bytes(save({name: t.half() for name, t in self.state_dict().items()}))


def load(path: str | Path = TOY) -> PoseNet:
    """The network of a file.

    Raises: FileNotFoundError or ValueError where it is missing or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"pose: no such file: {path}")
    net = PoseNet()
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        raise ValueError(f"pose: {path} is not a file of python -m fastgen.train.pose") from None
    return net.eval().requires_grad_(False)


def degrees(
    directions: Tensor,  # [N, 3]  unit vectors
    c: Tensor,  # [N, 25]
) -> Tensor:
    """Angles [N] in degrees between directions and those in which cameras look."""
    # By the chord, as the arc cosine has no digits left at small angles.
    chord = (directions - forward(c)).norm(dim=1)
    return 2 * (chord / 2).clamp(max=1).asin().rad2deg()


def forward(c: Tensor) -> Tensor:  # [N, 25] -> [N, 3]
    """The directions in which cameras look."""
    return camera.split_label(c)[0][:, :3, 2]


def pictures_of(teacher: nn.Module, poses: Poses, n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 64, 64] of a teacher, four poses of each latent, and their labels [n, 25]; n is a
    multiple of four."""
    device = next(teacher.parameters()).device
    z = torch.randn(n // 4, teacher.z_dim, generator=random).to(device)
    c = poses.sample(n, random).to(device)
    image = render_targets(teacher, teacher.mapping(z, c[::4]), c)["image"]
    return F.interpolate(image.clamp(-1, 1), (SIDE, SIDE), mode="area"), c


def varied(images: Tensor, random: torch.Generator) -> Tensor:
    """Images [N, 3, 64, 64] with other contrast, brightness and colours, a third of them blurred."""
    n = len(images)
    gain, shift = (torch.randn(n, 3, 1, 1, generator=random) for _ in range(2))
    images = images * (1 + 0.1 * gain) + 0.05 * shift
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(torch.rand(n, 1, 1, 1, generator=random) < 1 / 3, blurred, images)


@dataclass(frozen=True)
class PoseConfig:
    """A run."""

    out: Path
    """The .safetensors file to write."""
    minutes: float = 14.0
    """Wall time, half of it for images of the teacher."""
    teacher: str = "toy"
    """'toy', or a teacher's .safetensors or .pkl, which says where its cameras stand."""
    held_out: int = 512
    """Images that it is tested on."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', ..."""

    def __post_init__(self):
        for name in ("minutes", "held_out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def train(config: PoseConfig) -> PoseNet:
    """One run; prints the errors on images that it did not train on."""
    device = info.find_device(config.device)
    pictures.prepare(config.out, ".safetensors")
    teacher = fastgen.load_teacher(config.teacher).to(device)
    if teacher.camera is None:
        raise ValueError(f"{config.teacher}: the file doesn't say where its cameras stand")
    torch.manual_seed(SEED)
    net, random = PoseNet().to(device), generator_for(SEED, "pose")
    adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    stock: list[tuple[Tensor, Tensor]] = []
    start, step, rendering, done = time.monotonic(), 0, 0.0, 0.0
    while done < 1:
        began = time.monotonic()
        # What is rendered at last would hardly be seen.
        if rendering <= 0.5 * (began - start) and done < 0.8:
            image, c = pictures_of(teacher, teacher.camera, 32, random)
            stock += zip((image * 127).to(torch.int8).cpu(), c.cpu(), strict=True)
            rendering += time.monotonic() - began
        picks = torch.randint(len(stock), (64,), generator=random).tolist()
        image = torch.stack([stock[i][0] for i in picks]) / 127
        c = torch.stack([stock[i][1] for i in picks])
        image[::2], c[::2] = image[::2].flip(3), camera.mirror(c[::2])
        image = varied(image, random)
        loss = (net(image.to(device)) - forward(c).to(device)).square().sum(1).mean()
        done = (time.monotonic() - start) / (60 * config.minutes)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * max(1 - done, 0.003)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        step += 1
        if step % 250 == 0:
            print(
                f"{100 * min(done, 1):5.1f} %  step {step}  images {len(stock)}  loss {loss:.3g}", flush=True
            )
    net.save(config.out)
    net = load(config.out).to(device)
    error = held_out_errors(net, teacher, teacher.camera, config.held_out)
    print(
        f"{config.out}: {step} steps, {len(stock)} images; degrees on {len(error)} others: mean "
        f"{error.mean():.2f}, median {error.median():.2f}, 95 % below {error.quantile(0.95):.2f}"
    )
    return net


@torch.no_grad()
def held_out_errors(net: PoseNet, teacher: nn.Module, poses: Poses, images: int = 512) -> Tensor:
    """Degrees [images] by which a network errs on images of a teacher that no run trains on."""
    random = generator_for(HELD_OUT_SEED, "pose")
    found = []
    for _ in range(0, images, 32):
        image, c = pictures_of(teacher, poses, 32, random)
        found.append(degrees(net(image), c))
    return torch.cat(found)[:images]


def main():
    """The command line: every field of PoseConfig is an option."""
    import tyro

    fastgen.keep_memory()
    train(tyro.cli(PoseConfig, prog="python -m fastgen.train.pose"))


if __name__ == "__main__":
    main()
