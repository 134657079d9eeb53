"""Train the toy teacher: an EG3D generator of the procedural heads in `scenes`.

    python -m fastgen.train.toy --out out/toy --minutes 60

The heads are known exactly, so there is nothing adversarial here, only regression, in three phases:
  field   densities and colours at points in space, which need no rendering: shape and colour, fast;
  rays    volume rendering of single rays, each against one jittered analytic ray through the same pixel;
  image   patches of the feature image through the super-resolution, against jittered analytic pixels.
One sample per pixel is enough: with a squared error the mean of its noise is the anti-aliased image.

The schedule follows the clock (--minutes) or, repeatable to the bit, a number of steps (--steps). A run that
was stopped goes on from its last checkpoint when it is started again with --resume.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen import camera, checkpoint, ops, pictures, presets
from fastgen.models.layers import MappingNetwork
from fastgen.models.teacher import Teacher

from . import scenes

HELD_OUT_SEED = 2**31
# Densities are regressed as a clamped ramp across the surface, per world unit.
SIGMA, SHELL = 200.0, 0.01
LOG_EVERY = 25


@dataclass(frozen=True)
class ToyConfig:
    """A run. Lengths are optimiser steps unless they say minutes."""

    out: str = "out/toy"
    """Folder for checkpoint.pt, config.json, stats.jsonl, grid_*.png and teacher.safetensors."""
    minutes: float = 90.0
    """Wall time of the whole run, evaluation included; the schedule follows the clock."""
    steps: int = 0
    """If above 0: this many steps instead, whatever they take."""
    rays_from: float = 0.24
    """Share of the run after which the field phase ends."""
    image_from: float = 0.85
    """Share of the run after which the image phase begins."""
    latents: int = 8
    """Heads per step in the field and rays phases."""
    points: int = 2048
    """Points per head in the field phase; half of them near the surface."""
    rays: int = 384
    """Rays per head in the rays phase."""
    patches: int = 8
    """Heads per step in the image phase, a patch of each."""
    patch: int = 24
    """Side of a patch in pixels of the feature image."""
    lr: float = 8e-3
    """Adam's learning rate; falls to a fiftieth of it on a cosine."""
    lr_image: float = 2e-3
    """The same for the image phase, which begins anew."""
    lr_mapping: float = 20.0
    """The mapping network's learning rate as a multiple: its layers learn at a hundredth by construction."""
    ema: float = 0.996
    """Decay per step of the averaged weights, which are evaluated and saved."""
    seed: int = 0
    """Fixes initial weights, heads and poses."""
    report_every: int = 500
    """Steps between evaluation, grid and checkpoint."""
    held_out: int = 12
    """Heads in the evaluation."""
    threads: int = 0
    """Threads; 0: PyTorch's choice."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', ..."""
    resume: bool = False
    """Go on from the checkpoint in `out`."""

    def __post_init__(self):
        if self.steps <= 0 and self.minutes <= 0:
            raise ValueError("ToyConfig: minutes must be above 0 where steps is 0")
        if not 0 <= self.rays_from <= self.image_from <= 1:
            raise ValueError("ToyConfig: must be 0 <= rays_from <= image_from <= 1")


def poses(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Labels [n, 25] of the toy's cameras."""
    return presets.get("toy").camera.sample(n, generator)


def picture(z: Tensor, c: Tensor, resolution: int, samples: int = 2) -> tuple[Tensor, Tensor]:
    """The analytic images of latents z [N, 16] from cameras c [N, 25], samples^2 rays a pixel.

    Returns: image [N, 3, H, W] in [-1, 1]; depth [N, 1, H, W] at each pixel's middle, inf on the background.
    """

    def shade(size):
        colour, depth, mask = scenes.shade(scenes.heads(z), *camera.rays(c, size))
        depth = torch.where(mask, depth, torch.inf)
        return (t.transpose(1, 2).unflatten(2, (size, size)) for t in (colour, depth))

    image, depth = shade(resolution * samples)
    if samples > 1:
        _, depth = shade(resolution)
    return F.avg_pool2d(image, samples), depth


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; a is clamped to it."""
    return float(10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean()))


def build_teacher() -> Teacher:
    """An untrained toy teacher: empty space, and a super-resolution that only enlarges."""
    teacher = Teacher(**presets.get("toy").teacher)
    with torch.no_grad():
        # The density has to span hundreds where colours span one.
        teacher.decoder.net[2].weight[0] *= 10
        teacher.decoder.net[2].bias[0] = -SIGMA / 4
        ignore_pose(teacher.mapping_network)
        for block in (teacher.superresolution.block0, teacher.superresolution.block1):
            block.torgb.weight.zero_()
    return teacher


@torch.no_grad()
def ignore_pose(mapping: MappingNetwork) -> None:
    """Prepare a mapping that is given c = 0: its embedding stays 0, and z alone gives w its variance."""
    mapping.embed.requires_grad_(False)
    mapping.fc0.weight *= (mapping.fc0.weight.shape[1] / mapping.z_dim) ** 0.5


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """Latents [n, 16] and poses [n, 25] that no run trains on."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return torch.randn(n, scenes.Z_DIM, generator=generator), poses(n, generator)


class Draw:
    """Everything random in a run, from one generator on the CPU."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def poses(self, n: int) -> Tensor:
        return poses(n, self.generator).to(self.device)

    def ball(self, n: int, m: int, radius: float) -> Tensor:
        """Points [n, m, 3], uniform in a ball."""
        direction = F.normalize(self.normal(n, m, 3), dim=-1)
        return direction * radius * self.uniform(n, m, 1) ** (1 / 3)

    def anywhere(self, n: int, m: int) -> Tensor:
        """Points [n, m, 3]: two of three where heads are, the rest anywhere that a camera sees."""
        few = m // 3
        return torch.cat([self.ball(n, m - few, 0.3), (self.uniform(n, few, 3) - 0.5) * 0.8], 1)


def aim(c: Tensor, targets: Tensor, jitter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rays from cameras c [N, 25] through targets [N, R, 3], moved in the image plane by jitter [N, R, 2]."""
    pose, _ = camera.split_label(c)
    if jitter is not None:
        targets = targets + jitter @ pose[:, :3, :2].transpose(1, 2)
    origins = pose[:, None, :3, 3].expand_as(targets)
    return origins, F.normalize(targets - origins, dim=-1)


def field_loss(teacher: Teacher, config: ToyConfig, draw: Draw) -> dict[str, Tensor]:
    """Densities around and colours at the surface, without rendering."""
    z, c = draw.normal(config.latents, scenes.Z_DIM), draw.poses(config.latents)
    planes = teacher.backbone_planes(teacher.mapping(z, c, update_emas=True), "none")
    return field_terms(partial(decode, teacher, planes), scenes.heads(z), c, config.points, draw)


def decode(teacher: Teacher, planes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour of planes at points [N, M, 3], as Teacher.sample."""
    options = teacher.render_options
    return teacher.decoder(
        ops.sample_triplane(planes, points, options["box_warp"], options["plane_axes"], reduce="mean")
    )


def field_terms(
    field: Callable[[Tensor], tuple[Tensor, Tensor]], h: scenes.Heads, c: Tensor, count: int, draw: Draw
) -> dict[str, Tensor]:
    """The field phase's losses at `count` points per head, half of them near the surface that c sees.

    field: points [N, M, 3] -> sigma [N, M, 1], and rgb [N, M, at least 3] in about (0, 1).
    """
    n, half = len(c), count // 2
    with torch.no_grad():
        near, _, hit = scenes.trace(h, *aim(c, draw.ball(n, half, 0.27)), steps=16)
        near = near + 0.006 * draw.normal(n, half, 3)
        target = scenes.colour(h, near)
        points = torch.cat([near, draw.anywhere(n, count - half)], 1)
        ramp = (scenes.distance(h, points) / -SHELL).clamp(-1, 1)
    sigma, rgb = field(points)
    density = (sigma[..., 0] / SIGMA - ramp).square().mean()
    colour = ((rgb[:, :half, :3] * 2 - 1 - target).square() * hit).mean() * 2
    return {"density": density, "colour": colour}


def ray_loss(teacher: Teacher, config: ToyConfig, draw: Draw) -> dict[str, Tensor]:
    """Volume-rendered single rays, each against one anywhere in its pixel; and a little of the field."""
    z, c = draw.normal(config.latents, scenes.Z_DIM), draw.poses(config.latents)
    planes = teacher.backbone_planes(teacher.mapping(z, c, update_emas=True), "none")
    march = partial(render, teacher, planes, draw=draw)
    return ray_terms(
        partial(decode, teacher, planes), march, z, c, teacher.neural_rendering_resolution, config, draw
    )


def ray_terms(
    field: Callable[[Tensor], tuple[Tensor, Tensor]],
    march: Callable[[Tensor, Tensor], ops.RenderOutput],
    z: Tensor,
    c: Tensor,
    resolution: int,
    config: ToyConfig,
    draw: Draw,
) -> dict[str, Tensor]:
    """The rays phase's losses; field as in field_terms, march renders rays, resolution is the image's."""
    n, r = config.latents, config.rays
    pixel = presets.get("toy").camera.radius / (c[0, 16] * resolution)
    targets, h = draw.anywhere(n, r), scenes.heads(z)
    with torch.no_grad():
        jitter = (draw.uniform(n, r, 2) - 0.5) * pixel
        target, _, hit = scenes.shade(h, *aim(c, targets, jitter))
    out = march(*aim(c, targets))
    field = field_terms(field, h, c, config.points // 2, draw)
    return {
        "raw": (out.features[..., :3] - target).square().mean(),
        "mask": (out.weight - hit.float()).square().mean(),
        "density": 0.1 * field["density"],
        "colour": 0.5 * field["colour"],
    }


def image_loss(teacher: Teacher, config: ToyConfig, draw: Draw) -> dict[str, Tensor]:
    """Patches of the feature image, and what the super-resolution makes of them."""
    n, side, full = config.patches, config.patch, teacher.neural_rendering_resolution
    z, c = draw.normal(n, scenes.Z_DIM), draw.poses(n)
    # Half of them near the middle, half from beyond the image, clamped: most of those at an edge, half in a
    # corner, for there the convolutions see padding, which the middle teaches nothing about.
    spread = torch.where(torch.arange(n, device=z.device) % 2 == 0, 0.5, 3.0).unsqueeze(1)
    corner = ((0.5 + (draw.uniform(n, 2) - 0.5) * spread) * (full - side)).round().clamp(0, full - side)
    with torch.no_grad():
        jitter = draw.uniform(n, 4 * side * side, 2) - 0.5
        colour, _, _ = scenes.shade(scenes.heads(z), *patch_rays(c, corner * 2, 2 * side, 2 * full, jitter))
        target = colour.transpose(1, 2).unflatten(2, (2 * side, 2 * side))
    ws = teacher.mapping(z, c, update_emas=True)
    out = render(teacher, teacher.backbone_planes(ws, "none"), *patch_rays(c, corner, side, full), None)
    features = out.features.transpose(1, 2).unflatten(2, (side, side)).contiguous()
    # The blocks, not super_resolve: a patch keeps its size.
    w = ws[:, -1:].expand(-1, 3, -1)
    x, image = teacher.superresolution.block0(features, features[:, :3], w, "none")
    _, image = teacher.superresolution.block1(x, image, w, "none")

    # Near a cut edge the convolutions see padding where the whole image would go on.
    at = torch.arange(2 * side, device=z.device)
    keep = ((at >= 4) | (corner[..., None] == 0)) & ((at < 2 * side - 4) | (corner[..., None] == full - side))
    keep = (keep[:, 1, :, None] & keep[:, 0, None, :]).float()[:, None]
    # The rim of the whole image is little of it, and all that teaches what to do about the padding there.
    rim = ((at < 4) & (corner[..., None] == 0)) | ((at >= 2 * side - 4) & (corner[..., None] == full - side))
    keep = keep * (1 + 7 * (rim[:, 1, :, None] | rim[:, 0, None, :]).float()[:, None])
    error = (image - target).square() * keep
    raw = (features[:, :3] - F.avg_pool2d(target, 2)).square().mean()
    return {"image": error.sum() / (3 * keep.sum()), "raw": 0.5 * raw}


def patch_rays(c: Tensor, corner: Tensor, side: int, full: int, jitter: Tensor | None = None):
    """Rays [N, side^2, 3] of a square of pixels of a full x full image, whose first is corner [N, 2]."""
    pose, k = camera.split_label(c)
    at = torch.arange(side, device=c.device) + 0.5
    v, u = torch.meshgrid(at, at, indexing="ij")
    uv = torch.stack([u.flatten(), v.flatten()], -1) + corner[:, None]
    uv = (uv if jitter is None else uv + jitter) / full - 0.5
    uv = F.pad(uv / k[:, None, :1, 0], (0, 1), value=1.0)
    directions = F.normalize(uv @ pose[:, :3, :3].transpose(1, 2), dim=-1)
    return pose[:, None, :3, 3].expand_as(directions), directions


def render(teacher: Teacher, planes: Tensor, origins: Tensor, directions: Tensor, draw: Draw | None):
    """Volume rendering of rays, at random depths or, without `draw`, at the deterministic midpoints."""
    options = teacher.render_options
    u = (None, None)
    if draw is not None:
        shape = directions.shape[:2]
        u = (
            draw.uniform(*shape, options["depth_resolution"], 1),
            draw.uniform(*shape, options["depth_resolution_importance"]).sort(-1).values,
        )
    return ops.render_triplane(planes, teacher.decoder.effective(), origins, directions, options, *u)


def learning_rate(config: ToyConfig, progress: float, step: int) -> float:
    """Linear over the first 100 steps, then a cosine to a fiftieth; one of its own in the image phase."""
    begin, end, peak = 0.0, config.image_from, config.lr
    if progress >= config.image_from:
        begin, end, peak = config.image_from, 1.0, config.lr_image
    cosine = 0.5 * (1 + math.cos(math.pi * min((progress - begin) / max(end - begin, 1e-9), 1.0)))
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)


@torch.no_grad()
def evaluate(teacher: Teacher, z: Tensor, c: Tensor, truth: Tensor) -> tuple[dict[str, float], Tensor]:
    """PSNR on held-out heads, of the final image and of the raw one, and the images."""
    outs = [teacher(a, b) for a, b in zip(z.split(4), c.split(4), strict=True)]
    image, raw = (torch.cat([o[key] for o in outs]) for key in ("image", "image_raw"))
    return {"psnr_db": psnr(image, truth), "psnr_raw_db": psnr(raw, F.avg_pool2d(truth, 2))}, image


def train(
    config: ToyConfig,
    build: Callable[[], nn.Module] = build_teacher,
    losses: dict[str, Callable] | None = None,
) -> nn.Module:
    """One run; returns the averaged teacher, which is also in out/teacher.safetensors.

    build and losses, those of the phases 'field', 'rays' and 'image', make it a run of another generator.
    """
    losses_of = losses or {"field": field_loss, "rays": ray_loss, "image": image_loss}
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if config.device == "auto" else config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    out = pictures.prepare_folder(config.out)
    torch.manual_seed(config.seed)
    teacher, average = build().to(device), build().to(device)
    average.load_state_dict(teacher.state_dict())
    mapping = [p for p in teacher.mapping_network.parameters() if p.requires_grad]
    among = {id(p) for p in teacher.mapping_network.parameters()}
    rest = [p for p in teacher.parameters() if id(p) not in among]
    groups = [{"params": rest, "scale": 1.0}, {"params": mapping, "scale": config.lr_mapping}]
    adam = torch.optim.Adam(groups, lr=config.lr, betas=(0.9, 0.99), eps=1e-10)
    draw = Draw(config.seed, device)
    step, before = 0, 0.0
    if config.resume:
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        teacher.load_state_dict(state["teacher"])
        average.load_state_dict(state["average"])
        adam.load_state_dict(state["adam"])
        draw.generator.set_state(state["generator"].cpu())
        step, before = state["step"], state["seconds"]
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")

    z, c = (t.to(device) for t in held_out(config.held_out))
    with torch.no_grad():
        size = teacher.img_resolution
        truth = torch.cat([picture(a, b, size)[0] for a, b in zip(z.split(4), c.split(4), strict=True)])
    start, sums, counted = time.monotonic(), {}, 0
    if not config.resume:
        (out / "stats.jsonl").unlink(missing_ok=True)

    def seconds() -> float:
        return before + time.monotonic() - start

    def progress() -> float:
        return step / config.steps if config.steps else seconds() / (60 * config.minutes)

    done = progress()
    while done < 1:
        phase = "field" if done < config.rays_from else "rays" if done < config.image_from else "image"
        losses = losses_of[phase](teacher, config, draw)
        adam.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        for group in adam.param_groups:
            group["lr"] = group["scale"] * learning_rate(config, done, step)
        # What a phase doesn't touch has no gradient, and Adam leaves it.
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        adam.step()
        step += 1
        follow(average, teacher, min(config.ema, step / (step + 10)))

        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.detach()
        counted += 1
        done = progress()
        report = step % config.report_every == 0 or done >= 1
        if report or step % LOG_EVERY == 0:
            line = {"step": step, "seconds": round(seconds(), 1), "phase": phase}
            line |= {key: float(value) / counted for key, value in sums.items()}
            sums, counted = {}, 0
            if report:
                measured, images = evaluate(average, z, c, truth)
                line |= measured
                rows = [list(truth[:8]), list(images[:8])]
                pictures.save_png(out / f"grid_{step:06d}.png", pictures.sheet(rows, ["analytic", "teacher"]))
            with open(out / "stats.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            numbers = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
            print(f"{100 * min(done, 1):5.1f} %", *numbers, sep="  ", flush=True)
        if report:
            state = {
                "teacher": teacher.state_dict(),
                "average": average.state_dict(),
                "adam": adam.state_dict(),
            }
            state |= {"generator": draw.generator.get_state(), "step": step, "seconds": seconds()}
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
    export(average, out / "teacher.safetensors")
    return average


def export(teacher: Teacher, path: str | Path) -> None:
    """Write the teacher with its cameras, as `load_teacher` reads it."""
    checkpoint.save(path, "teacher", {"G": teacher}, {"camera": presets.get("toy").camera.as_dict()})


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards a model's; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def main() -> None:
    """The command line: every field of ToyConfig is an option."""
    import tyro

    fastgen.keep_memory()  # A step's backward is up to twenty times faster for it.
    train(tyro.cli(ToyConfig, prog="python -m fastgen.train.toy"))


if __name__ == "__main__":
    main()
