"""What a run trains on: the teacher's targets, poses, and real images for the discriminator.

Everything drawn at random is a pure function of (seed, purpose, index), so a resumed run sees exactly the
data it would have seen, and a checkpoint stores no data."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import deque
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Phase, TrainConfig
from .distributed import World

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Poses(Protocol):
    """Whatever poses are drawn from: fastgen.camera.CameraDistribution, or an ImageDataset's labels."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...  # [n, 25]


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """An independent CPU random generator for one purpose and index of a run."""
    words = np.random.SeedSequence([seed, index, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


@torch.no_grad()
def render_targets(
    teacher: torch.nn.Module,
    ws: Tensor,  # [L, num_ws, w_dim]
    c: Tensor,  # [L*k, 25]  k poses of each latent, together
    resolution: int | None = None,
    final: bool = True,
) -> dict[str, Tensor]:
    """The teacher's images of latents at poses, by midpoint sampling; `resolution` is the feature map's side.

    Returns: ws [L*k, num_ws, w_dim], c, feature_image [L*k, 32, h, w], image_raw [L*k, 3, h, w], image_depth
      [L*k, 1, h, w], and if `final` image [L*k, 3, H, W]. The first are copies made before the
      super-resolution runs, whatever that does to its input.
    """
    poses = c.shape[0] // ws.shape[0]
    planes = teacher.backbone_planes(ws)
    if poses > 1:
        planes, ws = (t.repeat_interleave(poses, dim=0) for t in (planes, ws))
    out = teacher.render(planes, c, neural_rendering_resolution=resolution)
    target = {key: out[key].detach().clone() for key in ("feature_image", "image_raw", "image_depth")}
    if final:
        target["image"] = teacher.super_resolve(out["feature_image"], ws).detach()
    return {"ws": ws, "c": c} | target


class TargetStream:
    """Batches of teacher targets: batch(step) is a pure function of the configuration and the step, and of
    several processes each has its share of it.

    With config.replay, a batch is drawn from the last `replay` rendered targets, kept in 16 bits; every
    replay_reuse steps a new chunk of one batch is rendered. A chunk, too, depends on its number only: after a
    resume the chunks still in use are rendered again. Each phase of config.growth begins with an empty stock.
    """

    def __init__(
        self,
        teacher: torch.nn.Module,
        poses: Poses,
        config: TrainConfig,
        device: torch.device,
        world: World = World(),  # noqa: B008  (frozen)
    ):
        self.teacher, self.poses, self.config, self.device, self.world = teacher, poses, config, device, world
        self._kept: deque[tuple[int, dict[str, Tensor]]] = deque()
        self._kept_phase: Phase | None = None

    def chunk(self, phase: Phase, index: int) -> dict[str, Tensor]:
        """Render the share of the targets number `index` of a phase: one batch, poses_per_latent poses of
        each latent, one pose of all the latents after the other.
        """
        config, poses = self.config, self.config.poses_per_latent
        random = generator_for(config.seed, f"targets {phase.first_step}", index)
        latents = phase.batch_size // poses
        z = torch.randn(latents, self.teacher.z_dim, generator=random)
        c = self.poses.sample(phase.batch_size, random)
        # The conditioning pose is the (first) render pose, or with probability gpc_reg_prob another one.
        swap = torch.rand(latents, 1, generator=random) < config.gpc_reg_prob
        conditioning = torch.where(swap, self.poses.sample(latents, random), c[::poses])
        z, conditioning, c = map(self.world.share, (z, conditioning, c.unflatten(0, (latents, poses))))
        with torch.no_grad():
            ws = self.teacher.mapping(z.to(self.device), conditioning.to(self.device))
        resolution = phase.resolution or config.neural_rendering_resolution
        target = render_targets(
            self.teacher, ws, c.flatten(0, 1).to(self.device), resolution, final=phase.resolution is None
        )
        del target["image_depth"]
        if poses > 1:
            rows = {name: t.unflatten(0, (-1, poses)) for name, t in target.items()}
            target = {name: t.transpose(0, 1).flatten(0, 1) for name, t in rows.items()}
        return target

    def batch(self, step: int) -> dict[str, Tensor]:
        """The targets of a step: ws, c, feature_image, image_raw, and image but in a small phase."""
        phase = self.config.phase(step)
        step -= phase.first_step
        if not self.config.replay:
            return self.chunk(phase, step)
        if phase != self._kept_phase:
            self._kept.clear()
            self._kept_phase = phase
        newest = int(step / self.config.replay_reuse)
        oldest = max(0, newest + 1 - self.config.replay // phase.batch_size)
        while self._kept and self._kept[0][0] < oldest:
            self._kept.popleft()
        for index in range(self._kept[-1][0] + 1 if self._kept else oldest, newest + 1):
            chunk = self.chunk(phase, index)
            del chunk["image_raw"]
            kept = {name: t.half() if name in ("feature_image", "image") else t for name, t in chunk.items()}
            # All of it on each: a batch is drawn across all.
            self._kept.append((index, {name: self.world.gather(t) for name, t in kept.items()}))
        random = generator_for(self.config.seed, f"replay {phase.first_step}", step)
        order = torch.randperm(len(self._kept) * phase.batch_size, generator=random)[: phase.batch_size]
        picks = [divmod(i, phase.batch_size) for i in self.world.share(order).tolist()]
        names = self._kept[0][1]
        batch = {name: torch.stack([self._kept[i][1][name][j] for i, j in picks]).float() for name in names}
        batch["image_raw"] = batch["feature_image"][:, :3]
        return batch


class ImageDataset:
    """An EG3D data set: images in a folder or a .zip, with poses in its dataset.json.

    dataset.json is {"labels": [[file name, 25 numbers], ...]}; file names are relative to it, with forward
    slashes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"reals: no such data set: {path}")
        self._zip = None
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise ValueError(f"reals: {path} is neither a folder nor a zip file")
        try:
            with self._open("dataset.json") as file:
                content = json.load(file)
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(f"reals: {path} has no dataset.json") from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"reals: {path} is damaged: {error}") from None
        except ValueError as error:
            raise ValueError(f"reals: {path}: dataset.json is not JSON: {error}") from None
        labels = content.get("labels") if isinstance(content, dict) else None
        if not labels or not isinstance(labels, list):
            raise ValueError(f"reals: {path}: dataset.json has no labels")
        for entry in labels:
            pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if not pair or not _is_label(entry[1]):
                name = entry[0] if isinstance(entry, list) and entry else entry
                raise ValueError(f"reals: {path}: the label of {name} must have 25 numbers")
        images = [(name, label) for name, label in labels if name.lower().endswith(_IMAGE_SUFFIXES)]
        if not images:
            raise ValueError(f"reals: {path}: dataset.json names no {', '.join(_IMAGE_SUFFIXES)} file")
        self.names = [name for name, _ in images]
        self.labels = torch.tensor([label for _, label in images], dtype=torch.float32)
        sizes = [self._size(name) for name in self.names]
        self.resolution = sizes[0][0]
        for name, size in zip(self.names, sizes, strict=True):
            if size != (self.resolution, self.resolution):
                raise ValueError(
                    f"reals: {path}: images must be square and of one size, {self.names[0]} has "
                    f"{sizes[0][0]} x {sizes[0][1]} pixels, {name} {size[0]} x {size[1]}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] in [-1, 1] and label [25]."""
        from PIL import Image

        with self._open(self.names[index]) as file:
            pixels = np.array(Image.open(file).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, self.labels[index]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n poses [n, 25], drawn from the labels."""
        return self.labels[torch.randint(len(self), (n,), generator=generator)]

    def batch(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n images [n, 3, H, W] and their poses [n, 25], drawn at random."""
        items = [self[i] for i in torch.randint(len(self), (n,), generator=generator).tolist()]
        return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])

    def _size(self, name: str) -> tuple[int, int]:
        """Width and height; only the image's header is read."""
        from PIL import Image

        try:
            with self._open(name) as file:
                return Image.open(file).size
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(f"reals: {self.path} has no {name}") from None
        except (OSError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"reals: {self.path}: can't read the image {name}: {error}") from None

    def _open(self, name: str) -> IO[bytes]:
        if self.path.is_dir():
            return (self.path / name).open("rb")
        self._zip = self._zip or zipfile.ZipFile(self.path)
        return self._zip.open(name)


def _is_label(label: object) -> bool:
    return (
        isinstance(label, list)
        and len(label) == 25
        and all(type(x) in (int, float) and abs(x) < 1e30 for x in label)
    )


class RealStream:
    """Real images for the discriminator: a data set's, or where there is none the step's own targets."""

    def __init__(
        self,
        config: TrainConfig,
        raw_resolution: int,
        dataset: ImageDataset | None,
        device: torch.device,
        world: World = World(),  # noqa: B008  (frozen)
    ):
        self.config, self.raw_resolution, self.dataset, self.device = config, raw_resolution, dataset, device
        self.world = world

    def batch(self, step: int, targets: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Images {'image', 'image_raw'} and their poses."""
        if self.dataset is None:
            return {key: targets[key] for key in ("image", "image_raw")}, targets["c"]
        batch = self.dataset.batch(self.config.batch_size, generator_for(self.config.seed, "reals", step))
        image, c = map(self.world.share, batch)
        size = (self.raw_resolution, self.raw_resolution)
        raw = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        return {"image": image.to(self.device), "image_raw": raw.to(self.device)}, c.to(self.device)
