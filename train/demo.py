"""The demo: distil a small teacher within minutes, and write down what came of it.

`run` is `fastgen demo`: it fits the training into a time budget, runs both stages, measures the student on
latents and poses that training doesn't use, times both networks, and writes report.md, metrics.json,
pictures, a film and the student.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastgen
from fastgen import info, pictures

from .config import PRESETS, UNWATCHED, TrainConfig
from .evaluate import rows
from .loop import distil
from .losses import Perceptual
from .metrics import evaluate, milliseconds_per_image, psnr

# Latents of the pictures and of the film: seeds that no other part of a run draws from.
SEEDS = (3, 5, 8, 13, 21, 34, 55, 89)
FILMED = 2


def run(
    out: str | Path,
    teacher: str = "toy",
    minutes: float = 8.0,
    length: float | None = None,
    images: int = 128,
    frames: int = 120,
    perceptual_weights: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Distil `teacher`, and fill the folder `out`; the options are those of `fastgen demo`.

    Returns: what metrics.json holds; times are medians.
    Raises: ValueError or OSError on options that can't be met; KeyboardInterrupt on Ctrl-C, and on
      SIGTERM while it trains.
    """
    started = time.monotonic()
    out = Path(out)
    config = dataclasses.replace(
        PRESETS["toy"],
        teacher=teacher,
        out=str(out / "run"),
        seed=seed,
        device=device,
        # Odd, or it would never meet the steps that have a final image, every hr_interval-th.
        log_every=3,
        **UNWATCHED | {"grid_every": 100},
    )
    name = Path(teacher).stem
    teacher = fastgen.load_teacher(teacher).to(info.find_device(device))
    perceptual = Perceptual("lpips-vgg" if perceptual_weights else "random-vgg", perceptual_weights)
    if teacher.camera is None:
        raise ValueError(f"{config.teacher}: the file doesn't say where its cameras stand")

    for folder in (out, out / "run"):
        pictures.prepare_folder(folder)

    # A teacher whose feature map is small needs no phases that lead up to a larger one.
    growth = tuple(phase for phase in config.growth if phase[0] < teacher.neural_rendering_resolution)
    config = dataclasses.replace(config, growth=growth)

    print(f"[1/4] {name}: {_size(teacher)}; how fast is this machine?", flush=True)
    # What is left of the budget when measuring, pictures and film are done; on a slow machine half of it all
    # the same, for they need a student.
    end = started + 60 * minutes - min(_seconds_afterwards(teacher, images, frames), 30 * minutes)
    stage2_by = math.inf
    if length is not None:
        end = math.inf  # a length and a seed fix the student: no clock has a say
    else:
        length, stage2 = _affordable(config, teacher, end)
        # The machine may be busier by then.
        stage2_by = end - 1.3 * stage2
    config = config.scaled(length)
    share = "" if length == 1 else f", {length:.1%} of the full length"
    steps = f"{config.stage1_steps} + {config.stage2_steps} steps"
    print(f"[2/4] distillation: {steps}{share}", flush=True)
    _clear(out / "run")
    began = time.monotonic()
    result = distil(config, teacher, deadline=end, stage2_by=stage2_by)
    if result.interrupted and time.monotonic() < end:
        raise KeyboardInterrupt
    planned, config = config.stage1_steps, result.config
    trained = time.monotonic() - began
    student = result.student

    print("[3/4] measuring on held-out images", flush=True)
    perceptual = perceptual.to(next(student.parameters()).device)
    metrics = evaluate(student, teacher, teacher.camera, images, perceptual=perceptual)
    metrics |= _speed(student, teacher)

    print("[4/4] pictures and film", flush=True)
    _side_by_side(out / "side_by_side.png", student, teacher, name)
    _curves(out / "curves.png", out / "run" / "stats.jsonl", config)
    _film(out / "orbit.mp4", student, teacher, frames)
    (out / "student.safetensors").write_bytes((out / "run" / "student.safetensors").read_bytes())
    metrics |= {
        "teacher": name,
        "length": length,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "stage1_steps": config.stage1_steps,
        "stage2_steps": config.stage2_steps,
        "stage1_steps_planned": planned,
        "steps_done": result.step,
        "seed": seed,
        "perceptual_loss": config.perceptual,
        "train_s": round(trained, 1),
        "wall_s": round(time.monotonic() - started, 1),
        "machine": info.machine(),
        "versions": info.versions(),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (out / "report.md").write_text(_report(metrics))
    print(f"\n{_table(metrics)}\n\nAll of it is in {out}")
    return metrics


def _seconds_afterwards(teacher: nn.Module, images: int, frames: int) -> float:
    """About how long measuring, pictures and film take: by the teacher's images, and as much again."""
    seconds = milliseconds_per_image(teacher, teacher.camera, 4, repeats=2, warmup=1) / 1e3
    timing = 12 * (1 + 8)
    return 40 + 2 * seconds * (images + timing + FILMED * frames + len(SEEDS))


def _affordable(config: TrainConfig, teacher: nn.Module, end: float) -> tuple[float, float]:
    """The share of the steps that can be done by `end`, at most 1, and the seconds that stage 2 then takes;
    found by trying some of every phase.

    The share is rounded down to twentieths, so that it doesn't follow every flicker of a machine's speed: a
    length and a seed fix the student.
    """
    # What isn't done at every step recurs after as many.
    tried = 1 + math.lcm(math.ceil(config.replay_reuse), config.hr_interval)
    trial = dataclasses.replace(
        config,
        growth=tuple((side, tried, images) for side, _, images in config.growth),
        stage1_steps=tried * (len(config.growth) + 1),
        stage2_steps=tried,
        log_every=1,
        **UNWATCHED,
    )
    with tempfile.TemporaryDirectory() as folder:
        # A machine that needs a fifth of its time for a trial can't afford more than the least.
        latest = time.monotonic() + 0.2 * (end - time.monotonic())
        tries = distil(dataclasses.replace(trial, out=folder), teacher, progress=False, deadline=latest)
        if tries.interrupted and time.monotonic() < latest:
            raise KeyboardInterrupt
        if tries.interrupted:
            return 0.05, max(0.0, 0.1 * (end - time.monotonic()))
        lines = [json.loads(line) for line in (Path(folder) / "stats.jsonl").read_text().splitlines()]
    grown = [steps for _, steps, _ in config.growth]
    needed = []
    for i, steps in enumerate([*grown, config.stage1_steps - sum(grown), config.stage2_steps]):
        # The first step of a phase pays for what is done once.
        seconds = [line["seconds_per_step"] for line in lines[i * tried + 1 : (i + 1) * tried]]
        needed.append(steps * sum(seconds) / len(seconds))
    # A tenth more for held-out images, and for what a trial doesn't see.
    left = end - time.monotonic()
    share = min(max(math.floor(20 * left / (1.1 * sum(needed))), 1), 20) / 20
    return share, share * needed[-1]


def _clear(folder: Path):
    """Remove what an earlier demo left, which the loop would go on from."""
    for old in (folder / "resume.pt", folder / "student.safetensors", *folder.glob("grids/*.png")):
        old.unlink(missing_ok=True)


def _speed(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Milliseconds per image of both, at batch 1 and 8."""
    found = {}
    for suffix, batch in (("", 1), ("_batch8", 8)):
        for name, model in (("teacher", teacher), ("student", student)):
            found[f"{name}_ms{suffix}"] = milliseconds_per_image(model, teacher.camera, batch)
        found[f"speedup{suffix}"] = found[f"teacher_ms{suffix}"] / found[f"student_ms{suffix}"]
    return found


def _styles(teacher: nn.Module, count: int) -> list[Tensor]:
    device = next(teacher.parameters()).device
    z, front = pictures.latents(SEEDS[:count], teacher.z_dim).to(device), teacher.camera.front().to(device)
    return [teacher.mapping(latent, front) for latent in z.split(1)]


@torch.inference_mode()
def _side_by_side(path: Path, student: nn.Module, teacher: nn.Module, name: str):
    """Teacher, student and their difference: the same latents, seen from the same poses."""
    poses, degrees = pictures.sweep(teacher.camera, len(SEEDS))
    poses = poses.to(next(teacher.parameters()).device).split(1)
    pairs = [
        [next(pictures.views(model, w, c)) for model in (teacher, student)]
        for w, c in zip(_styles(teacher, len(SEEDS)), poses, strict=True)
    ]
    similar = torch.cat([psnr(a, b) for a, b in pairs]).tolist()
    # White where they agree, black where they differ by a quarter of the range, channels averaged.
    difference = [
        (1 - 4 * (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean(1, keepdim=True)).expand_as(a) for a, b in pairs
    ]
    rows = [*zip(*pairs, strict=True), difference]
    captions = [
        [f"seed {seed}, {angle}" for seed, angle in zip(SEEDS, degrees, strict=True)],
        [f"{db:.1f} dB" for db in similar],
    ]
    labels = ["teacher", "student", "difference x 4"]
    title = f"{name}: teacher and student at the same latents and poses"
    pictures.save_png(path, pictures.sheet(rows, labels, captions, title))


def _film(path: Path, student: nn.Module, teacher: nn.Module, frames: int):
    """Teacher left, student right, one row for each of some latents, on a closed tour."""
    poses = teacher.camera.orbit(frames).to(next(teacher.parameters()).device)
    styles = {f"seed {seed}": w for seed, w in zip(SEEDS, _styles(teacher, FILMED), strict=False)}
    pictures.save_orbit(path, {"teacher": teacher, "student": student}, styles, poses)


def _curves(path: Path, stats: Path, config: TrainConfig):
    """Loss terms, and the similarity to the teacher, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in stats.read_text().splitlines()]
    terms = {
        "lr_pixel": "pixel, low resolution",
        "hr_pixel": "pixel, final",
        "lr_perceptual": "perceptual, low resolution",
        "hr_perceptual": "perceptual, final",
        "consistency": "consistency",
        "adv": "adversarial",
        "discriminator": "discriminator",
    }
    similar = {
        "raw_psnr_db": "training batch, low resolution",
        "psnr_db": "training batch, final",
        "heldout_psnr_db": "held-out, final, averaged weights",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axes, names in ((left, terms), (right, similar)):
        for key, label in names.items():
            if points := [(line["step"], line[key]) for line in lines if key in line]:
                # Batches are small: a point is the mean of some, at most 150 a curve.
                some = math.ceil(len(points) / 150)
                means = [np.mean(points[i : i + some], axis=0) for i in range(0, len(points), some)]
                style = {"marker": "." if len(means) < 50 else "", "linewidth": 1.8 if "held" in key else 1}
                axes.plot(*np.transpose(means), label=label, **style)
    left.set(yscale="log", title="Loss terms, unweighted", xlabel="step", ylabel="loss")
    right.set(title="Similarity to the teacher", xlabel="step", ylabel="PSNR in dB")
    for axes in (left, right):
        grown = 0
        for side, steps, _ in config.growth:
            grown += steps
            label = f"{side} x {side} ends"
            axes.axvline(grown, color="gray", linestyle=":", linewidth=1, label=label)
        axes.axvline(config.stage1_steps, color="black", linestyle="--", linewidth=1, label="stage 2 begins")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(m: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        *rows(m),
        *(
            (f"ms per image, batch {batch}", f"{m[f'teacher_ms{s}']:.1f}", f"{m[f'student_ms{s}']:.1f}")
            for s, batch in (("", 1), ("_batch8", 8))
        ),
        ("Speed-up, batch 1 / batch 8", "", f"{m['speedup']:.1f} x / {m['speedup_batch8']:.1f} x"),
        ("Parameters", f"{m['teacher_parameters'] / 1e6:.2f} M", f"{m['student_parameters'] / 1e6:.2f} M"),
    ]
    head = [("", "teacher", "student"), ("---", "---:", "---:")]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *lines])


def _report(m: dict) -> str:
    cut = "" if m["length"] == 1 else f", {m['length']:.3g} of the full length"
    if m["stage1_steps"] < m["stage1_steps_planned"]:
        cut += f", the first number cut from {m['stage1_steps_planned']} by the time budget"
    if m["steps_done"] < m["stage1_steps"] + m["stage2_steps"]:
        cut += f", stopped at step {m['steps_done']} by the time budget"
    second = m["steps_done"] > m["stage1_steps"]
    adversarial = ", and in the second part the adversarial loss" if second else ""
    return f"""# Distilling {m["teacher"]}

{_table(m)}

Quality: {m["images"]} held-out images, final resolution; reprojection compares the
{m["reprojection_visible"]:.0%} of the pixels that are visible from both poses, pooled.
Blur alone can raise it, so it says little without the rows above. Times: mapping and synthesis, medians.

Training: {m["stage1_steps"]} + {m["stage2_steps"]} steps{cut}; {m["train_s"]:.0f} s of {m["wall_s"]:.0f} s in
all; seed {m["seed"]}.
Losses: smooth L1 of feature map and final image{adversarial}; perceptual
loss: {m["perceptual_loss"]}. The toy's preset has none: VGG16 is costly on two cores, and no
trained weights for it are shipped.

Machine: {info.summary()}.

![Teacher and student at the same latents and poses](side_by_side.png)

![Loss terms and held-out PSNR over steps](curves.png)

Film, teacher left, student right: [orbit.mp4](orbit.mp4).
The student: [student.safetensors](student.safetensors).
"""


def _size(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.2f} M parameters, {model.img_resolution} x {model.img_resolution}"
