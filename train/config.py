"""Every choice of a distillation run, in one frozen dataclass.

Choices that the paper fixes (Shahbazi et al., arXiv 2303.12865) are marked P; the rest is fastgen's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fastgen import presets
from fastgen._files import write_text
from fastgen.models.student import SIZES

Curriculum = Literal["two-stage", "single-stage", "ramp", "reconstruction-only"]
PerceptualKind = Literal["lpips-vgg", "random-vgg", "none"]
_CHOICES = {
    "curriculum": Curriculum.__args__,
    "perceptual": PerceptualKind.__args__,
    "student": tuple(SIZES),
    "cooldown": ("none", "cosine"),
    "pose_input": ("mapping", "rays"),
    "precision": ("float32", "bfloat16"),
}
_AT_LEAST_1 = (
    *(
        "batch_size",
        "accumulate",
        "poses_per_latent",
        "replay_reuse",
        "r1_interval",
        "hr_interval",
        "log_every",
    ),
    *("grid_images", "discriminator_channels", "discriminator_channel_max"),
)
_AT_LEAST_0 = (
    *(
        "replay",
        "stage1_steps",
        "stage2_steps",
        "ramp_steps",
        "warmup_steps",
        "grid_every",
        "orbit_every",
        "checkpoint_every",
    ),
    *("r1_gamma", "ema_half_life", "ema_rampup", "lr_superresolution", "workers", "seed"),
)


class Phase(NamedTuple):
    """A stretch of a run with one size of batch."""

    first_step: int
    resolution: int | None
    """Side of the feature map; None: the whole one, and the final image."""
    batch_size: int


@dataclass(frozen=True)
class TrainConfig:
    """What one run does. Lengths are optimiser steps, image counts are images; presets are PRESETS[...]."""

    # What is distilled, from what, to where.
    teacher: str = "toy"
    """'toy' (shipped), a .safetensors of `fastgen convert` or fastgen.train.siren, or an original .pkl."""
    out: str = "out/train"
    """Folder for config.json, stats.jsonl, sample grids, TensorBoard events, checkpoints."""
    student: Literal[tuple(SIZES)] = "full"
    """Size: 'full' is the paper's, 'compact' the one for speed, 'toy' fits the toy teacher."""
    student_scale: float = 1.0
    """Of the renderer's widths, for a teacher narrower than EG3D's."""
    style_lr_multiplier: float | None = None
    """Learning rate of the pose mapping as a fraction of the student's; None: the size's, which is 0.01 as of
    StyleGAN's mapping, and 1 for 'toy'."""
    pose_input: Literal["mapping", "rays"] = "mapping"
    """How the pose reaches the student: 'mapping' by its style alone, as the paper's; 'rays' in addition by a
    map of each pixel's ray at every resolution."""
    style_share: float = 1.0
    """Share of the style code's numbers that the student's renderer sees, for an ablation."""
    camera: str = "auto"
    """Render poses: 'auto' (the data set's labels when reals is one, else what the checkpoint or its data set
    says), or the name of a preset in fastgen.presets whose pose distribution to use."""
    neural_rendering_resolution: int | None = None
    """Side of the feature map in pixels; None: the teacher's own."""

    # Targets.
    reals: str = "teacher"
    """Real images for the discriminator: 'teacher' (its own), or an EG3D zip or folder with dataset.json."""
    mirror: bool = False
    """Double the data set of reals by the mirror images and their labels, as EG3D can in training. Not for
    one on disk that has them already, as EG3D's preparation of FFHQ makes it."""
    batch_size: int = 16
    """Images per step, of all processes together. With a discriminator each of several has 4 or 8, ..."""
    accumulate: int = 1
    """Parts that a process computes its share of a batch in, one after the other, for want of memory.
    With a discriminator each of several has a multiple of 4 images."""
    gpc_reg_prob: float = 0.5
    """Probability that the pose which conditions the mapping is another image's, as EG3D trains."""
    poses_per_latent: int = 1
    """Poses rendered from one latent's tri-planes: more make targets cheaper, but share a conditioning pose.
    """
    replay: int = 0
    """Targets kept and drawn from at random; 0: every target is fresh. For when the teacher is the
    bottleneck.
    """
    replay_reuse: float = 1.0
    """Uses of a kept target on average: each step renders batch_size / replay_reuse new ones."""

    # Curriculum (P: reconstruction first, then reconstruction + adversarial).
    curriculum: Curriculum = "two-stage"
    """P: 'two-stage'. 'single-stage' is adversarial from step 0, 'ramp' raises its weight linearly over
    ramp_steps from the end of stage 1, 'reconstruction-only' never has it.
    """
    stage1_steps: int = 100_000
    """Steps of reconstruction only."""
    stage2_steps: int = 100_000
    """Steps after stage 1."""
    growth: tuple[tuple[int, int, int], ...] = ()
    """Phases that stage 1 begins with: (side of the feature map, steps, images per step), sides ascending.
    Teacher and student cost the square of the side, and layout is learnt at the smallest. No terms of the
    final image; the steps count towards stage1_steps. Ours, for short runs."""
    ramp_steps: int = 50_000
    """Steps over which 'ramp' raises the adversarial weight from 0 to 1."""

    # Loss weights (P: which terms there are).
    lambda_lr_pixel: float = 1.0
    """Smooth L1 between feature maps."""
    lambda_lr_perceptual: float = 1.0
    """Perceptual distance between raw images."""
    lambda_hr_pixel: float = 1.0
    """Smooth L1 between final images."""
    lambda_hr_perceptual: float = 1.0
    """Perceptual distance between final images."""
    lambda_consistency: float = 0.0
    """Squared difference between the student's raw image of one pose, warped by the teacher's depth, and its
    raw image of another pose of the latent, where both see the surface; not in the phases of growth. Ours;
    needs poses_per_latent from 2."""
    # Of 0, 0.005, 0.02 and 0.1, tried on one toy student for a stage 2 of 150 steps, PSNR is the same within
    # 0.01 dB, the perceptual distance 0.1311, 0.1304, 0.1303, 0.1299, sharpness (mean gradient, relative to
    # the teacher's) 0.863, 0.868, 0.873, 0.876, and reprojection consistency 27.63, 27.55, 27.48, 27.39 dB.
    lambda_adv: float = 0.02
    """Generator's adversarial loss. More of it buys sharpness with 3D consistency."""
    hr_interval: int = 1
    """Stage 1 computes the terms of the final image every so many steps. The super-resolution starts trained,
    so that where it is most of the work, skipping it buys steps for the renderer."""
    smooth_l1_beta: float = 1.0
    """Where smooth L1 turns from quadratic to linear, in image units ([-1, 1])."""
    perceptual: PerceptualKind = "lpips-vgg"
    """'lpips-vgg' needs perceptual_weights; 'random-vgg' has random features; 'none' leaves the terms out."""
    perceptual_weights: str | None = None
    """torchvision's vgg16 state_dict on disk (vgg16-397923af.pth). Never downloaded."""
    r1_gamma: float = 1.0
    """Weight of the R1 penalty on real images: r1_gamma / 2 * |gradient|^2."""
    r1_interval: int = 16
    """R1 every so many discriminator steps, times as much."""

    # Optimisation.
    lr: float = 2e-3
    """Student's learning rate in stage 1 (Adam)."""
    lr_adversarial: float = 1e-3
    """Student's learning rate once the adversarial loss is on."""
    lr_discriminator: float = 2e-3
    """Discriminator's learning rate (Adam)."""
    lr_superresolution: float = 1.0
    """The super-resolution's learning rate as a fraction of the student's, where it starts as the teacher's.
    """
    warmup_steps: int = 0
    """Steps over which the student's learning rate rises from 0 at the start."""
    cooldown: Literal["none", "cosine"] = "none"
    """'cosine' lowers the student's learning rate to a tenth over each stage."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Student's Adam betas in stage 1."""
    betas_adversarial: tuple[float, float] = (0.0, 0.99)
    """Adam betas of the discriminator, and of the student once the adversarial loss is on."""
    ema_half_life: float = 10_000.0
    """Half-life of the averaged weights, in images. The average is what is evaluated and saved."""
    ema_rampup: float = 0.05
    """Early on the half-life is at most this fraction of the images seen."""
    discriminator_channels: int = 32768
    """channel_base of a discriminator that the checkpoint does not bring: its width times resolution."""
    discriminator_channel_max: int = 512
    """Its largest width."""
    discriminator_from_teacher: bool = True
    """Start from the checkpoint's discriminator when it has one."""

    # Running.
    device: str = "auto"
    """'auto' (GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of teacher, student, discriminator and perceptual network (autocast); weights, losses, R1 and the
    optimisers are float32. On a GPU a checkpoint's own networks keep the float16 layers that they name, its
    discriminator in R1 too."""
    compile: bool = False
    """torch.compile for teacher and student: minutes at each change of shape, for a long run on a GPU."""
    timeout: float = 600.0
    """Seconds after which a process of several (torchrun, SLURM) that does not answer ends the run."""
    workers: int = 0
    """Processes that read the data set of reals ahead, with the same batches whatever their number; 0: the
    training reads it. A batch is one worker's."""
    seed: int = 0
    """Fixes targets, batches and initial weights; below 2^63."""
    resume: bool = False
    """Continue the run in `out` from its checkpoint; losses go on as if it had never stopped. On the command
    line the run's own options are the defaults. Only stage2_steps may be raised, and learning rates, betas,
    what decides how often something is written, accumulate, workers, timeout and compile may change."""
    log_every: int = 10
    """Steps between lines of stats.jsonl."""
    grid_every: int = 1000
    """Steps between sample grids; 0: none."""
    grid_images: int = 8
    """Columns of the grid."""
    orbit_every: int = 10_000
    """Steps between films of a latent, teacher and student side by side; 0: none."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    tensorboard: bool = True
    """Write TensorBoard events."""

    def __post_init__(self):
        for name in ("betas", "betas_adversarial"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "growth", tuple(tuple(phase) for phase in self.growth))
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if isinstance(value, float):
                self._require(name, math.isfinite(value), "a finite number")
            if name in _AT_LEAST_1:
                self._require(name, value >= 1, "at least 1")
            if name in _AT_LEAST_0 or name.startswith("lambda_"):
                self._require(name, value >= 0, "at least 0")
            if name in ("lr", "lr_adversarial", "lr_discriminator", "smooth_l1_beta", "timeout"):
                self._require(name, value > 0, "above 0")
            if name.startswith("betas"):
                inside = len(value) == 2 and all(0 <= beta < 1 for beta in value)
                self._require(name, inside, "two numbers in [0, 1)")
            if name in _CHOICES:
                self._require(name, value in _CHOICES[name], "one of " + ", ".join(_CHOICES[name]))
        self._require("gpc_reg_prob", 0 <= self.gpc_reg_prob <= 1, "in [0, 1]")
        self._require("student_scale", 0 < self.student_scale <= 1, "above 0 and at most 1")
        multiplier = self.style_lr_multiplier is None or self.style_lr_multiplier > 0
        self._require("style_lr_multiplier", multiplier, "above 0")
        self._require("style_share", 0 < self.style_share <= 1, "above 0 and at most 1")
        doubled = not self.mirror or self.reals != "teacher"
        self._require("mirror", doubled, "False when reals is 'teacher'")
        self._require("seed", self.seed < 2**63, "below 2^63")
        cameras = ("auto", *presets.PRESETS)
        self._require("camera", self.camera in cameras, "one of " + ", ".join(cameras))
        side = self.neural_rendering_resolution
        sound = side is None or (side >= 4 and side & (side - 1) == 0)
        self._require("neural_rendering_resolution", sound, "a power of two from 4")
        ramps = self.curriculum == "ramp"
        self._require("ramp_steps", not ramps or self.ramp_steps > 0, "at least 1 when curriculum is 'ramp'")
        sides = [phase[0] for phase in self.growth]
        sound = all(len(p) == 3 and min(p) > 0 and p[0] >= 4 and p[0] & (p[0] - 1) == 0 for p in self.growth)
        sound = sound and sides == sorted(set(sides))
        self._require("growth", sound, "(side, steps, images) phases, sides ascending powers of two from 4")
        empty_where_adversarial = not self.growth or self.curriculum != "single-stage"
        self._require("growth", empty_where_adversarial, "empty when curriculum is 'single-stage'")
        growing = sum(phase[1] for phase in self.growth)
        least = f"at least the steps of growth ({growing}; none with a bare --growth)"
        self._require("stage1_steps", self.stage1_steps >= growing, least)
        batches = [self.batch_size, *(phase[2] for phase in self.growth)]
        for batch in batches:
            divides = batch % self.poses_per_latent == 0
            self._require("poses_per_latent", divides, f"a divisor of every batch size ({batch})")
        paired = self.poses_per_latent > 1 and self.batch_size % self.views == 0
        paired = paired or self.lambda_consistency == 0
        self._require("lambda_consistency", paired, "0 where poses_per_latent is 1, or batch_size is odd")
        enough = self.replay == 0 or self.replay >= max(batches)
        self._require("replay", enough, f"0, or at least a batch ({max(batches)})")
        self._require("replay_reuse", self.replay > 0 or self.replay_reuse == 1, "1 when replay is 0")

    def _require(self, name: str, condition: bool, expected: str):
        if not condition:
            raise ValueError(f"TrainConfig: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def steps(self) -> int:
        """Length of the whole run in steps."""
        return self.stage1_steps + self.stage2_steps

    def scaled(self, share: float) -> TrainConfig:
        """The same run with every stage and phase scaled to a share, above 0, of its steps."""

        def part(steps: int) -> int:
            return math.ceil(steps * share)

        growth = tuple((side, part(steps), images) for side, steps, images in self.growth)
        rest = part(self.stage1_steps - sum(steps for _, steps, _ in self.growth))
        return dataclasses.replace(
            self,
            growth=growth,
            stage1_steps=sum(steps for _, steps, _ in growth) + rest,
            stage2_steps=part(self.stage2_steps),
            ramp_steps=part(self.ramp_steps),
        )

    def shortened(self, step: int) -> TrainConfig:
        """The same run with a stage 1 that ends at `step`, earlier than it would, wherever that is in it."""
        growth, first = [], 0
        for side, steps, images in self.growth:
            if first < step:
                growth.append((side, min(steps, step - first), images))
            first += steps
        return dataclasses.replace(self, growth=tuple(growth), stage1_steps=step)

    def phase(self, step: int) -> Phase:
        """The phase that a step is in."""
        first = 0
        for resolution, steps, batch_size in self.growth:
            if step < first + steps:
                return Phase(first, resolution, batch_size)
            first += steps
        return Phase(first, None, self.batch_size)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of `precision`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @property
    def views(self) -> int:
        """Poses of a latent in a batch, one pose of all latents after the other; 1: whatever comes. In the
        phases of growth whatever comes."""
        if self.lambda_consistency == 0:
            return 1
        return 2 if self.replay else self.poses_per_latent

    @property
    def has_discriminator(self) -> bool:
        """Whether any step of the run is adversarial."""
        return self.steps > 0 and max(self.adversarial_weight(0), self.adversarial_weight(self.steps - 1)) > 0

    def adversarial_weight(self, step: int) -> float:
        """The curriculum: the factor in [0, 1] on lambda_adv at a step; at 0 no discriminator runs."""
        if self.curriculum == "reconstruction-only" or self.lambda_adv == 0:
            return 0.0
        if self.curriculum == "single-stage":
            return 1.0
        if self.curriculum == "ramp":
            # The first step of the ramp already has a weight, so that the discriminator runs from there.
            return min(max((step - self.stage1_steps + 1) / self.ramp_steps, 0.0), 1.0)
        return float(step >= self.stage1_steps)

    def learning_rate(self, step: int) -> float:
        """The student's learning rate at a step."""
        adversarial = self.adversarial_weight(step) > 0
        rate = self.lr_adversarial if adversarial else self.lr
        if self.cooldown == "cosine":
            second = step >= self.stage1_steps and self.curriculum in ("two-stage", "ramp")
            if second:
                done = (step - self.stage1_steps) / max(self.stage2_steps, 1)
            else:
                done = step / max(
                    self.stage1_steps if self.curriculum in ("two-stage", "ramp") else self.steps, 1
                )
            rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate

    def save(self, path: str | Path):
        """Write the resolved configuration as JSON."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read what `save` wrote. ValueError names fields that do not exist."""
        try:
            values = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: not a configuration")
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path}: no such TrainConfig field: {', '.join(unknown)}")
        for field in dataclasses.fields(cls):
            value, kind = values.get(field.name, field.default), type(field.default)
            kinds = (int, float) if kind is float else kind
            sound = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
            if kind in (bool, int, float, str) and not sound:
                raise ValueError(f"{path}: {field.name} must be of type {kind.__name__}, got {value!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None


_paper = TrainConfig()

UNWATCHED = {"grid_every": 0, "orbit_every": 0, "checkpoint_every": 0, "tensorboard": False}
"""Fields of a run that keeps no pictures on the way and saves at its end only."""

PRESETS: dict[str, TrainConfig] = {
    **{
        name: dataclasses.replace(_paper, camera=name, r1_gamma=presets.get(name).r1_gamma)
        for name in ("ffhq512", "afhqcats512", "shapenetcars128")
    },
    # Minutes on two CPU cores. Most steps are small: one at 16 x 16 costs a fifth of one at 64 x 64, and
    # teaches the layout. What counts is the number of steps and a high rate: at 16 x 16, 1000 steps of 16
    # images at a rate of 0.01 reached 21.1 dB in 60 s, at 0.05 22.5 dB, and 4000 steps of 4 images 23.7 dB in
    # 112 s (one seed, one thread; with standardised inputs, which were worth 0.3 dB and are not kept).
    # The super-resolution starts trained, so it learns rarely and slowly.
    "toy": dataclasses.replace(
        _paper,
        student="toy",
        # VGG16 is costly on two cores, and no trained weights are shipped.
        perceptual="none",
        batch_size=4,
        poses_per_latent=4,
        replay=1024,
        replay_reuse=8.0,
        growth=((16, 4000, 4), (32, 3000, 4)),
        stage1_steps=9500,
        stage2_steps=150,
        hr_interval=8,
        # At a fifth of the steps, 0, 0.03 and 0.1 reached 21.3, 21.1 and 21.0 dB to the teacher, and a
        # reprojection consistency of 26.9, 28.5 and 30.6 dB, where the teacher's own is 30.9.
        lambda_consistency=0.1,
        lr=0.05,
        lr_adversarial=2e-3,
        lr_superresolution=0.02,
        cooldown="cosine",
        ema_half_life=400.0,
        discriminator_channels=1024,
        discriminator_channel_max=64,
        grid_every=250,
        orbit_every=2500,
        checkpoint_every=500,
    ),
}
"""Starting points; `dataclasses.replace(PRESETS['toy'], out=...)` makes a run of one."""
