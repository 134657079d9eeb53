"""The training loop: one visible function, `distil`, for every curriculum.

A run's folder holds config.json, stats.jsonl (a line every log_every steps), grids/*.png (teacher row,
student row), orbits/*.mp4, TensorBoard events, resume.pt (all it takes to go on exactly) and
student.safetensors (the averaged student, what fastgen.load_student reads)."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastgen
from fastgen import checkpoint, pictures, presets
from fastgen.camera import CameraDistribution
from fastgen.info import find_device
from fastgen.models.discriminator import DualDiscriminator
from fastgen.models.student import Student

from .config import TrainConfig
from .data import Poses, RealStream, TargetStream
from .dataset import ImageDataset
from .distributed import World, start
from .losses import (
    consistency,
    discriminator_loss,
    generator_loss,
    make_perceptual,
    r1_penalty,
    reconstruction_terms,
)
from .metrics import psnr
from .run import (
    LastGood,
    Log,
    Samples,
    StopSignals,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)

KEEP_EVERY = 10
"""Steps between copies of the state, to go back to from losses that are not finite."""


@dataclass
class Run:
    """What `distil` leaves behind."""

    student: Student
    """The averaged student, in eval mode."""
    config: TrainConfig
    """What was done: the given one, or one with a shorter stage 1."""
    teacher: nn.Module
    poses: Poses
    out: Path
    step: int
    """Steps done."""
    interrupted: bool
    """Stopped by Ctrl-C, SIGTERM or the deadline, after saving."""
    world: World = World()
    """This process among several."""
    discriminator: nn.Module | None = None

    @property
    def is_first(self) -> bool:
        """Of several processes the one that writes."""
        return self.world.is_first


def distil(
    config: TrainConfig,
    teacher: nn.Module | None = None,
    progress: bool = True,
    deadline: float = math.inf,
    stage2_by: float = math.inf,
) -> Run:
    """Train a student of a teacher.

    `teacher` overrides config.teacher with a module of the protocol data.NerfGan. Both times are of
    time.monotonic(): past `stage2_by` stage 1 ends where it is and stage 2 begins, past `deadline` the run
    saves and stops. Writes to config.out; see the module's docstring.
    Raises: ValueError or FileNotFoundError on a configuration that cannot run, before anything is written;
      FloatingPointError naming the term and step on a loss or gradient that is not finite, after saving the
      state at a step of the last KEEP_EVERY that had none.
    """
    with start(find_device(config.device), config.timeout) as (world, device):
        return _distil(config, teacher, progress, deadline, stage2_by, world, device)


def _distil(
    config: TrainConfig,
    teacher: nn.Module | None,
    progress: bool,
    deadline: float,
    stage2_by: float,
    world: World,
    device: torch.device,
) -> Run:
    out = Path(config.out)
    saved = read_checkpoint(out / "resume.pt", config)
    _require_divisible(config, world)
    dataset = None if config.reals == "teacher" else ImageDataset(config.reals, config.mirror)
    perceptual = make_perceptual(config.perceptual, config.perceptual_weights)
    if perceptual is not None:
        perceptual = perceptual.to(device)
    from_file = config.discriminator_from_teacher and teacher is None
    if teacher is None:
        teacher = fastgen.load_teacher(config.teacher)
    teacher = teacher.to(device).eval().requires_grad_(False)
    if dataset is not None and dataset.resolution != teacher.img_resolution:
        raise ValueError(
            f"reals: {config.reals} has images of {dataset.resolution} pixels, the teacher makes "
            f"{teacher.img_resolution}"
        )
    poses = find_poses(config, teacher, dataset)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        seen = None if config.style_share == 1 else math.ceil(config.style_share * teacher.w_dim)
        overrides = {"pose_input": config.pose_input, "style_dims": seen}
        if config.style_lr_multiplier is not None:
            overrides["style_lr_multiplier"] = config.style_lr_multiplier
        student = Student.from_teacher(
            teacher, config.student, config.neural_rendering_resolution, config.student_scale, **overrides
        ).to(device)
        discriminator = (
            _make_discriminator(config, teacher, from_file).to(device) if config.has_discriminator else None
        )
    if discriminator is not None:
        _require_same_groups(config, world, discriminator)
    if config.growth and config.growth[-1][0] > student.neural_rendering_resolution:
        raise ValueError(
            f"growth: sides must be at most the feature map's, {student.neural_rendering_resolution}, got "
            f"{config.growth[-1][0]}"
        )
    average = copy.deepcopy(student).eval().requires_grad_(False)
    student_optimiser = torch.optim.Adam(
        [
            {"params": list(student.renderer_parameters()), "scale": 1.0},
            {
                "params": list(student.superresolution.parameters()),
                "scale": config.lr_superresolution if student.superresolution_is_trained else 1.0,
            },
        ],
        fused=True,
    )
    discriminator_optimiser = discriminator and torch.optim.Adam(
        discriminator.parameters(), **_discriminator_adam(config), fused=True
    )
    parts = {
        "student": student,
        "average": average,
        "discriminator": discriminator,
        "student_optimiser": student_optimiser,
        "discriminator_optimiser": discriminator_optimiser,
    }
    parts = {name: part for name, part in parts.items() if part is not None}
    step = saved_step = images = 0
    if saved is not None:
        step = saved_step = saved["step"]
        images = saved["images"]
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            set_random_state(saved["random"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
            raise ValueError(f"resume: {out / 'resume.pt'} is damaged, or another network's") from None
        del saved
        # The optimiser's own are from before.
        if discriminator:
            discriminator_optimiser.param_groups[0].update(_discriminator_adam(config))

    targets = TargetStream(teacher, poses, config, device, world)
    reals = RealStream(config, student.neural_rendering_resolution, dataset, device, world)
    samples = log = None
    if world.is_first:
        pictures.prepare_folder(out)
        config.save(out / "config.json")
        if config.grid_every or config.orbit_every:
            samples = Samples(config, teacher, poses, device)
        log = Log(out, config, step)

    def save():
        if not world.is_first:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        write_checkpoint(out / "resume.pt", {**state, "step": step, "images": images}, config)
        save_student(out / "student.safetensors", average, poses, teacher, config.teacher)

    good = LastGood(parts if world.is_first else {})
    quiet = contextlib.nullcontext()
    compiled = _compiled(teacher, student) if config.compile else quiet
    bar = _progress(progress and world.is_first)
    with StopSignals() as stop, log or quiet, reals, compiled, bar:
        task = bar.add_task("", total=config.steps, completed=step)
        while step < config.steps:
            started = time.perf_counter()
            now = time.monotonic()
            late = step < config.stage1_steps and now > stage2_by
            stopping, shorten = world.agree([stop.requested or now >= deadline, late], device)
            if stopping:
                break
            if shorten:
                # Written down: from here on it is that run, and resumes as one.
                config = targets.config = config.shortened(step)
                if world.is_first:
                    config.save(out / "config.json")
                bar.update(task, total=config.steps)
            # Of what a checkpoint was just made of, too: none is newer than the copy.
            keep = step % KEEP_EVERY == 0 or step == saved_step
            random = random_state() if keep else None
            adversarial = config.adversarial_weight(step)
            for group in student_optimiser.param_groups:
                group["lr"] = config.learning_rate(step) * group["scale"]
                group["betas"] = config.betas_adversarial if adversarial else config.betas
            phase = config.phase(step)
            logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            target = targets.batch(step)
            if step + 1 < config.steps:
                targets.prefetch(step + 1)
            real = reals.batch(step, target) if adversarial else None
            student_optimiser.zero_grad(set_to_none=True)
            if adversarial:
                discriminator_optimiser.zero_grad(set_to_none=True)
            sums: dict[str, Tensor] = {}
            for part in range(config.accumulate):
                rows = slice(part, None, config.accumulate)
                wanted = {name: x[rows] for name, x in target.items()}
                ws, c = wanted["ws"], wanted["c"]

                # Student.
                with config.autocast(device):
                    fake = student.render(ws, c, resolution=phase.resolution)
                    if phase.resolution is None and (adversarial or step % config.hr_interval == 0):
                        fake["image"] = student.super_resolve(fake["feature_image"], ws)
                    fake = {name: image.float() for name, image in fake.items()}
                    terms = reconstruction_terms(fake, wanted, perceptual, config.smooth_l1_beta)
                    if config.views > 1 and phase.resolution is None:
                        depth = wanted["image_depth"]
                        terms["consistency"] = consistency(fake["image_raw"], depth, c, config.views)
                    if adversarial:
                        discriminator.requires_grad_(False)
                        terms["adv"] = generator_loss(discriminator(fake, c).float())
                weights = {name: getattr(config, f"lambda_{name}") for name in terms}
                if adversarial:
                    weights["adv"] *= adversarial
                loss = sum(weights[name] * term for name, term in terms.items())
                (loss / config.accumulate).backward()
                terms["loss"] = loss
                fake = {name: image.detach() for name, image in fake.items()}
                for name, image in (("raw_psnr_db", "image_raw"), ("psnr_db", "image")):
                    if logs and image in fake:
                        terms[name] = psnr(fake[image], wanted[image]).mean()

                # Discriminator.
                if adversarial:
                    discriminator.requires_grad_(True)
                    images_real, c_real = {name: x[rows] for name, x in real[0].items()}, real[1][rows]
                    with config.autocast(device):
                        logits = [discriminator(images_real, c_real), discriminator(fake, c)]
                    loss = discriminator_loss(*(x.float() for x in logits))
                    terms["discriminator"] = loss
                    if step % config.r1_interval == 0 and config.r1_gamma > 0:
                        terms["r1"] = r1_penalty(discriminator, images_real, c_real)
                        loss = loss + config.r1_gamma / 2 * config.r1_interval * terms["r1"]
                    (loss / config.accumulate).backward()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach() / config.accumulate

            # One state on all processes: gradients and terms are means.
            networks = [student, discriminator] if adversarial else [student]
            for network in networks:
                world.average([p.grad for p in network.parameters() if p.grad is not None])
            world.average(list(sums.values()))
            for name, network in zip(("gradient", "discriminator_gradient"), networks, strict=False):
                sums[name] = _gradient_norm(network)
            # What is not finite never reaches a weight; but the update before may be what has led to it.
            try:
                values = _finite(sums, step)
            except FloatingPointError as error:
                if good.step is None:
                    raise FloatingPointError(f"{error}; nothing was saved, no step was good") from None
                step, images = good.restore()
                save()
                saved = f"--resume goes on from step {step}, which was good"
                raise FloatingPointError(f"{error}; {saved}") from None
            if keep:
                good.keep(step, images, random)
            student_optimiser.step()
            if adversarial:
                discriminator_optimiser.step()
            images += phase.batch_size
            _update_average(average, student, config, images, phase.batch_size)

            step += 1
            if logs:
                values |= {
                    "adversarial_weight": adversarial,
                    "learning_rate": config.learning_rate(step - 1),
                    "images": images,
                    "seconds_per_step": time.perf_counter() - started,
                }
                if log is not None:
                    log.write(step, values)
                stage = "reconstruction + adversarial" if adversarial else "reconstruction"
                bar.update(task, description=f"{stage}, {values['raw_psnr_db']:.1f} dB")
            if config.grid_every and samples and (step % config.grid_every == 0 or step == config.steps):
                sheet, similar = samples.grid(step, average)
                log.write(step, {"heldout_psnr_db": similar})
                log.picture(step, "samples", sheet)
            if config.orbit_every and samples and step % config.orbit_every == 0:
                samples.orbit(step, average)
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                save()
                saved_step = step
            bar.update(task, completed=step)
        if saved_step != step or not (out / "student.safetensors").exists():
            save()
    return Run(average, config, teacher, poses, out, step, step < config.steps, world, discriminator)


@contextlib.contextmanager
def _compiled(*networks: nn.Module) -> Iterator[None]:
    """Within, what teachers and students render with is compiled, at its first call."""
    calls = ("synthesis", "backbone_planes", "render", "super_resolve")
    there = [(network, call) for network in networks for call in calls if hasattr(network, call)]
    for network, call in there:
        setattr(network, call, torch.compile(getattr(network, call)))
    try:
        yield
    finally:
        for network, call in there:
            delattr(network, call)


def _require_divisible(config: TrainConfig, world: World):
    """Every process, and every part that it accumulates, has as much of a batch as all others."""
    parts = world.size * config.accumulate
    batches = [("batch_size", config.batch_size), *(("growth", images) for _, _, images in config.growth)]
    for name, batch in batches:
        latents = batch // config.poses_per_latent
        if batch % parts or latents % world.size:
            raise ValueError(
                f"{name}: {batch} images ({latents} latents) must divide into {world.size} processes x "
                f"{config.accumulate} parts (accumulate): change --batch-size, the images of --growth, "
                "--poses-per-latent or --accumulate"
            )
    if config.batch_size // config.views % parts:
        raise ValueError(
            f"lambda_consistency: {config.views} poses of a latent stay together, and so batch_size // "
            f"{config.views} must divide into {world.size} processes x {config.accumulate} parts "
            f"(accumulate), got {config.batch_size}"
        )


def _require_same_groups(config: TrainConfig, world: World, discriminator: DualDiscriminator):
    """A part of a batch is compared within groups as large as the whole batch is; then they are the same."""
    parts, layer = world.size * config.accumulate, discriminator.b4.mbstd
    batch, share = config.batch_size, config.batch_size // parts
    if layer.group(share) != layer.group(batch):
        raise ValueError(
            f"batch_size: the discriminator compares {layer.group(batch)} of {batch} images with each other, "
            f"and only {layer.group(share)} of the {share} that each of {world.size} processes x "
            f"{config.accumulate} parts (accumulate) has; give each a multiple of {layer.group_size}, by a "
            "larger --batch-size, fewer processes or a smaller --accumulate"
        )


def find_poses(config: TrainConfig, teacher: nn.Module, dataset: ImageDataset | None = None) -> Poses:
    """The distribution of render poses that a configuration means (see TrainConfig.camera)."""
    if config.camera != "auto":
        return presets.get(config.camera).camera
    if dataset is not None:
        return dataset
    if getattr(teacher, "camera", None) is None:
        raise ValueError(
            f"camera: the teacher's file names no poses; choose one of {', '.join(presets.PRESETS)}"
        )
    return teacher.camera


def save_student(path: Path, student: Student, poses: Poses, teacher: nn.Module, name: str):
    """Write a student for fastgen.load_student, with poses to render from and the teacher it comes from."""
    source = checkpoint.TOY if name == "toy" else Path(name)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else None
    # Labels are no distribution to render from later: then the teacher's own.
    cameras = poses if isinstance(poses, CameraDistribution) else getattr(teacher, "camera", None)
    header = {
        "camera": cameras.as_dict() if cameras is not None else None,
        "teacher": {"name": source.name if sha256 else name, "sha256": sha256},
    }
    checkpoint.save(path, "student", {"G": student}, header)


def _make_discriminator(config: TrainConfig, teacher: nn.Module, from_file: bool) -> nn.Module:
    found = fastgen.load_discriminator(config.teacher) if from_file else None
    if found is not None:
        return found.train()
    # In `precision`, on a GPU too.
    return DualDiscriminator(
        teacher.c_dim,
        teacher.img_resolution,
        num_fp16_res=0,
        channel_base=config.discriminator_channels,
        channel_max=config.discriminator_channel_max,
    )


def _discriminator_adam(config: TrainConfig) -> dict:
    """Learning rate and betas of the discriminator's optimiser."""
    # With R1 every r1_interval steps only, StyleGAN2 (Karras et al. 2020, appendix B) slows Adam by this
    # ratio.
    ratio = config.r1_interval / (config.r1_interval + 1)
    betas = tuple(beta**ratio for beta in config.betas_adversarial)
    return {"lr": config.lr_discriminator * ratio, "betas": betas}


@torch.no_grad()
def _update_average(average: nn.Module, student: nn.Module, config: TrainConfig, images: int, batch: int):
    """Move the averaged weights towards the student's; buffers are copied."""
    half_life = min(config.ema_half_life, images * config.ema_rampup)
    keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
    # The frozen mapping is the same in both.
    pairs = [p for p in zip(average.parameters(), student.parameters(), strict=True) if p[1].requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - keep)
    for mean, now in zip(average.buffers(), student.buffers(), strict=True):
        mean.copy_(now)


def _gradient_norm(network: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def _finite(terms: dict[str, Tensor], step: int) -> dict[str, float]:
    """The terms as numbers, in one transfer; FloatingPointError on the first that is not finite."""
    values = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: the loss term {name} is {value}")
    return values


def _progress(enabled: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
