"""What a run trains on: the teacher's targets, poses, and real images for the discriminator.

Everything drawn at random is a pure function of (seed, purpose, index), so a resumed run sees exactly the
data it would have seen, and a checkpoint stores no data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.camera import CameraDistribution

from .config import Phase, TrainConfig
from .dataset import ImageDataset, in_range, read_ahead
from .distributed import World


class Poses(Protocol):
    """Whatever poses are drawn from: fastgen.camera.CameraDistribution, or an ImageDataset's labels."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...  # [n, 25]


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """An independent CPU random generator for one purpose and index of a run."""
    words = np.random.SeedSequence([seed, index, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


class NerfGan(Protocol):
    """What the trainer asks of a teacher, a torch.nn.Module: a style of a latent, and images and depth of a
    style from a camera. It renders without noise: the same style and camera give the same images.

    z_dim, c_dim, w_dim, num_ws: of latents [N, z_dim] ~ N(0, 1), camera labels (25) and styles
    img_resolution:       of the final image, 128, 256 or 512, which a student's super-resolution makes
    neural_rendering_resolution, feature_channels: of the feature image that comes before it
    camera:               poses to render from; None: TrainConfig.camera names a preset

    Optional, and cheaper: `backbone_planes`, `render` and `super_resolve` as fastgen.models.teacher.Teacher's
    make what several poses of one style share only once. Of `mapping_network` and `superresolution` see
    Student.from_teacher.
    """

    z_dim: int
    c_dim: int
    w_dim: int
    num_ws: int
    img_resolution: int
    neural_rendering_resolution: int
    feature_channels: int
    camera: CameraDistribution | None

    def mapping(self, z: Tensor, c: Tensor) -> Tensor:
        """Latents and conditioning poses c [N, c_dim], to some without effect -> ws [N, num_ws, w_dim]."""
        ...

    def synthesis(
        self,
        ws: Tensor,  # [N, num_ws, w_dim]
        c: Tensor,  # [N, 25]  the camera
        neural_rendering_resolution: int | None = None,
        final: bool = True,
    ) -> dict[str, Tensor]:
        """Images in about [-1, 1] at any side h = w of the feature image; None: its own.

        Returns: feature_image [N, feature_channels, h, w]; image_raw [N, 3, h, w], its first channels;
          image_depth [N, 1, h, w], world units along the ray, and farthest where nothing is met; image
          [N, 3, H, W], H = W = img_resolution, which may be left out where not `final`.
        """
        ...


@torch.no_grad()
def render_targets(
    teacher: NerfGan,
    ws: Tensor,  # [L, num_ws, w_dim]
    c: Tensor,  # [L*k, 25]  k poses of each latent, together
    resolution: int | None = None,
    final: bool = True,
) -> dict[str, Tensor]:
    """The teacher's images of latents at poses; `resolution` is the feature map's side, None the teacher's.

    Returns: ws [L*k, num_ws, w_dim], c, feature_image [L*k, feature_channels, h, w], image_raw
      [L*k, 3, h, w], image_depth [L*k, 1, h, w], and if `final` image [L*k, 3, H, W]. Of a teacher with
      planes the first are copies made before the super-resolution runs, whatever that does to its input.
    """
    poses = c.shape[0] // ws.shape[0]
    planes = teacher.backbone_planes(ws) if hasattr(teacher, "backbone_planes") else None
    if poses > 1:
        ws = ws.repeat_interleave(poses, dim=0)
        planes = planes if planes is None else planes.repeat_interleave(poses, dim=0)
    if planes is None:
        out = teacher.synthesis(ws, c, neural_rendering_resolution=resolution, final=final)
    else:
        out = teacher.render(planes, c, neural_rendering_resolution=resolution)
    target = {key: out[key].detach().clone() for key in ("feature_image", "image_raw", "image_depth")}
    if final:
        image = out["image"] if planes is None else teacher.super_resolve(out["feature_image"], ws)
        target["image"] = image.detach()
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
        teacher: NerfGan,
        poses: Poses,
        config: TrainConfig,
        device: torch.device,
        world: World = World(),  # noqa: B008  (frozen)
    ):
        self.teacher, self.poses, self.config, self.device, self.world = teacher, poses, config, device, world
        self._kept: deque[tuple[int, dict[str, Tensor]]] = deque()
        self._kept_phase: Phase | None = None
        # On a GPU the teacher works beside the student, a step ahead, on a stream of its own.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[TrainConfig, int, dict[str, Tensor]] | None = None

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
        with config.autocast(self.device):
            target = render_targets(
                self.teacher, ws, c.flatten(0, 1).to(self.device), resolution, final=phase.resolution is None
            )
        if config.views == 1 or phase.resolution:
            del target["image_depth"]
        target = {name: t.float() for name, t in target.items()}
        if poses > 1:
            rows = {name: t.unflatten(0, (-1, poses)) for name, t in target.items()}
            target = {name: t.transpose(0, 1).flatten(0, 1) for name, t in rows.items()}
        return target

    def prefetch(self, step: int):
        """On a GPU, begin with the targets of a step, which batch(step) then hands out."""
        if self._side is not None:
            # Weights and stock may still be on their way.
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                self._ahead = self.config, step, self._batch(step)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The targets of a step: ws, c, feature_image, image_raw, and image but in a small phase."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._batch(step)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._side)
        if ahead[:2] != (self.config, step):
            return self._batch(step)  # stage 1 has been cut short
        for tensor in ahead[2].values():
            tensor.record_stream(now)
        return ahead[2]

    def _batch(self, step: int) -> dict[str, Tensor]:
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
        picks = self._picks(phase, generator_for(self.config.seed, f"replay {phase.first_step}", step))
        names = self._kept[0][1]
        batch = {name: torch.stack([self._kept[i][1][name][j] for i, j in picks]).float() for name in names}
        batch["image_raw"] = batch["feature_image"][:, :3]
        return batch

    def _picks(self, phase: Phase, random: torch.Generator) -> list[tuple[int, int]]:
        """This process's share of a batch from the stock: numbers of chunks, and rows in them."""
        views, batch = 1 if phase.resolution else self.config.views, phase.batch_size
        if views == 1:
            order = torch.randperm(len(self._kept) * batch, generator=random)[:batch]
            return [divmod(i, batch) for i in self.world.share(order).tolist()]
        # Latents, and so many poses of each; a chunk has one pose of all its latents after the other.
        poses = self.config.poses_per_latent
        latents = batch // poses
        order = torch.randint(len(self._kept) * latents, (batch // views,), generator=random)
        seen = torch.rand(batch // views, poses, generator=random).argsort(1)[:, :views]
        order, seen = self.world.share(order).tolist(), self.world.share(seen).T.tolist()
        pairs = [zip(order, of_pose, strict=True) for of_pose in seen]
        return [(i // latents, pose * latents + i % latents) for pair in pairs for i, pose in pair]


class RealStream:
    """Real images for the discriminator: a data set's, or where there is none the step's own targets.

    batch(step) is a pure function of configuration and step, so a worker of config.workers needs no more than
    the steps' numbers. As a context it ends the workers, and names the data set where one of them died.
    """

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
        self._batches: Iterator | None = None
        self._next = 0

    def batch(self, step: int, targets: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Images {'image', 'image_raw'} and their poses."""
        if self.dataset is None:
            return {key: targets[key] for key in ("image", "image_raw")}, targets["c"]
        pixels, c = (torch.from_numpy(array).to(self.device) for array in self._read(step))
        # Bytes until they are on the device: a quarter of what would be carried there.
        image = in_range(pixels)
        size = (self.raw_resolution, self.raw_resolution)
        raw = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        return {"image": image, "image_raw": raw}, c

    def _read(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        reals = _Reals(self.config, self.dataset, self.world)
        if not self.config.workers:
            batch = reals[step]
        else:
            if self._batches is None or step != self._next:
                steps = range(step, max(self.config.steps, step + 1))
                self._batches = read_ahead(reals, steps, self.config.workers)
            batch = self._next_batch()
            self._next = step + 1
        if isinstance(batch, Exception):
            raise batch
        return batch

    def _next_batch(self) -> tuple[np.ndarray, np.ndarray] | Exception:
        try:
            return next(self._batches)
        except Exception as error:
            # Data arrives as data and errors as values, so this is a worker's end, whichever way it shows.
            reason = str(error) or type(error).__name__
        # Not while the error is handled: it holds on to the other workers.
        self._batches = None
        raise self._died(reason)

    def _died(self, reason: str) -> ChildProcessError:
        where = self.dataset.files.where
        return ChildProcessError(f"{where}: a worker died, for want of memory it may be: {reason}")

    def __enter__(self) -> RealStream:
        return self

    def __exit__(self, kind, error, trace):
        self._batches = None
        # DataLoader's handler of SIGCHLD raises wherever the training is.
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise self._died(str(error)) from error


class _Reals:
    """The batches of bytes and poses by step, or the error in place of one. Arrays, not tensors: through a
    pipe they cost the trainer a third of what tensors in shared memory do, and no room in /dev/shm."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, world: World):
        self.config, self.dataset, self.world = config, dataset, world

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray] | Exception:
        try:
            random = generator_for(self.config.seed, "reals", step)
            return self.dataset.batch(self.config.batch_size, random, self.world.rows)
        except (OSError, ValueError) as error:
            # Raised in a worker, it would arrive as a traceback.
            return error
