"""Networks that turn images into features: those of a file, for FID, KID and identities, and pooled VGG16's.

All take bytes [N, 3, H, W], so that what is rendered is seen as what a file holds, and have a `name`.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import Perceptual


def as_bytes(images: Tensor) -> Tensor:  # [N, 3, H, W] in [-1, 1]
    """Images as bytes [N, 3, H, W], as they are written to files."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


class Features(nn.Module):
    """The network of a file, which must take any number of images of one side.

    The file: TorchScript or what torch.export saves, of a network that maps bytes [N, 3, H, W] to [N, D]; or
    the state_dict of torchvision's inception_v3, whose last pooled features it gives then. Programs of the
    first two kinds run; the third holds no program. `option` is what errors call the path's option.
    Raises: FileNotFoundError or ValueError, naming the file and what is wrong with it. Nothing is ever
      downloaded.
    """

    def __init__(self, path: str | Path, resolution: int, option: str = "features"):
        super().__init__()
        where = f"{option}: {path}"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{option}: no such file: {path}")
        self.name = Path(path).name
        try:
            names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
            with warnings.catch_warnings():
                # TorchScript is deprecated; such files are there all the same.
                warnings.simplefilter("ignore", FutureWarning)
                if any("/code/" in name for name in names):
                    self.net = torch.jit.load(path, map_location="cpu").eval()
                elif any(name.endswith("/models/model.json") for name in names):
                    self.net = torch.export.load(path).module()
                else:
                    state = torch.load(path, map_location="cpu", weights_only=True)
                    self.net, self.name = _Inception(state), "torchvision's Inception v3"
        except Exception as error:  # some of many lines, some that advise to load it all the same
            raise ValueError(
                f"{where} is none of TorchScript, an exported program, torchvision's inception_v3 state_dict"
            ) from error
        for n in (2, 3, 1):
            try:
                with torch.no_grad():
                    found = self.net(torch.zeros(n, 3, resolution, resolution, dtype=torch.uint8))
            except Exception as error:
                reason = str(error).strip().splitlines()[-1:]
                images = f"bytes [{n}, 3, {resolution}, {resolution}]"
                raise ValueError(f"{where} does not take {images}: {''.join(reason)}") from error
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != n:
                found = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{where} must give features [{n}, D] of {n} images, got {found}")

    def forward(self, images: Tensor) -> Tensor:  # bytes [N, 3, H, W]
        """Returns: [N, D]."""
        return self.net(images)


class _Inception(nn.Module):
    """torchvision's Inception v3 up to its last pooling: bytes [N, 3, H, W] -> [N, 2048]."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        from torchvision.models import inception_v3

        with torch.device("meta"):
            self.net = inception_v3(weights=None, init_weights=False)
        self.net.load_state_dict(state, assign=True)
        self.net.fc = nn.Identity()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        # The ImageNet weights were trained in [-1, 1].
        size = {"size": (299, 299), "mode": "bilinear", "align_corners": False, "antialias": True}
        return self.net(F.interpolate(images.float() / 127.5 - 1, **size))


class Pooled(nn.Module):
    """The features of a perceptual distance, averaged over the image: bytes [N, 3, H, W] -> [N, 1472].

    They are those of a ReLU, so that all have one direction but for little: `evaluate` centres them.
    """

    centred = True

    def __init__(self, perceptual: Perceptual):
        super().__init__()
        self.perceptual = perceptual
        self.name = f"centred, pooled {'' if perceptual.trained else 'random '}VGG16 features"

    def forward(self, images: Tensor) -> Tensor:
        maps = self.perceptual.features(images.float() / 127.5 - 1)
        return torch.cat([x.mean(dim=(2, 3)) for x in maps], dim=1)
