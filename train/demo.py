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

import torch
from torch import Tensor, nn

import fastgen
from fastgen import info, pictures

from .config import PRESETS, TrainConfig
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
    stage1_steps: int | None = None,
    stage2_steps: int | None = None,
    images: int = 128,
    frames: int = 120,
    perceptual_weights: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Distil `teacher`, and fill the folder `out`; the options are those of `fastgen demo`.

    Returns: what metrics.json holds; times are medians.
    Raises: ValueError or OSError on options that can't be met; KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    out = pictures.prepare_folder(out)
    config = dataclasses.replace(
        PRESETS["toy"],
        teacher=teacher,
        out=str(pictures.prepare_folder(out / "run")),
        seed=seed,
        device=device,
        stage1_steps=PRESETS["toy"].stage1_steps if stage1_steps is None else stage1_steps,
        stage2_steps=PRESETS["toy"].stage2_steps if stage2_steps is None else stage2_steps,
        log_every=5,
        grid_every=25,
        checkpoint_every=0,
        tensorboard=False,
    )
    name = Path(teacher).stem
    perceptual = Perceptual("lpips-vgg" if perceptual_weights else "random-vgg", perceptual_weights)
    teacher = fastgen.load_teacher(teacher)
    if teacher.camera is None:
        raise ValueError(f"{config.teacher}: the file doesn't say where its cameras stand")

    print(f"[1/4] {name}: {_size(teacher)}; how fast is this machine?", flush=True)
    # What is left of the budget when measuring, pictures and film are done.
    end = started + 60 * minutes - _seconds_afterwards(teacher, images, frames)
    share = 1.0
    if stage1_steps is None or stage2_steps is None:
        share = _share(config, teacher, end)
        config = dataclasses.replace(
            config,
            stage1_steps=math.ceil(config.stage1_steps * share),
            stage2_steps=math.ceil(config.stage2_steps * share),
        )

    fitted = "" if share == 1 else f" ({share:.0%} of the full length, to keep to {minutes:g} minutes)"
    print(f"[2/4] distillation: {_length(config)}{fitted}", flush=True)
    _clear(out / "run")
    began = time.monotonic()
    result = distil(config, teacher, deadline=end)
    if result.interrupted and time.monotonic() < end:
        raise KeyboardInterrupt
    trained = time.monotonic() - began
    student = result.student

    print(f"[3/4] measuring on {images} held-out images", flush=True)
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
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "stage1_steps": config.stage1_steps,
        "stage2_steps": config.stage2_steps,
        "steps_done": result.step,
        "batch_size": config.batch_size,
        "seed": seed,
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
    return 15 + 2 * seconds * (images + timing + FILMED * frames + len(SEEDS))


def _share(config: TrainConfig, teacher: nn.Module, end: float) -> float:
    """The share of the steps that can be done by `end`, by trying some of each stage; at most 1.

    It is rounded down to twentieths, so that it doesn't follow every flicker of a machine's speed: the same
    numbers of steps give the same student.
    """
    period = max(math.ceil(config.replay_reuse), config.hr_interval)
    length = 1 + 2 * period
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(
            config, out=folder, stage1_steps=length, stage2_steps=length, log_every=1, grid_every=0
        )
        distil(trial, teacher, progress=False)
        lines = [json.loads(line) for line in (Path(folder) / "stats.jsonl").read_text().splitlines()]
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    # The first step of a stage pays for what is done once.
    each = [sum(part) / len(part) for part in (seconds[1:length], seconds[length + 1 :])]
    # A tenth more for held-out images and for what a trial doesn't see.
    needed = 1.1 * (config.stage1_steps * each[0] + config.stage2_steps * each[1])
    return min(max(math.floor(20 * (end - time.monotonic()) / needed), 1), 20) / 20


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
    return [teacher.mapping(z[i : i + 1], front) for i in range(count)]


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
    rows = [
        [pictures.pixels(a)[0] for a, _ in pairs],
        [pictures.pixels(b)[0] for _, b in pairs],
        [pictures.pixels(1 - 4 * (a.clamp(-1, 1) - b.clamp(-1, 1)).abs())[0] for a, b in pairs],
    ]
    captions = [
        [f"seed {seed}, {angle}" for seed, angle in zip(SEEDS, degrees, strict=True)],
        [f"{db:.1f} dB" for db in similar],
    ]
    labels = ["teacher", "student", "difference x 4"]
    title = f"{name}: teacher and student at the same latents and poses"
    pictures.save_png(path, pictures.sheet(rows, labels, captions, title))


@torch.inference_mode()
def _film(path: Path, student: nn.Module, teacher: nn.Module, frames: int):
    """Teacher left, student right, one row for each of some latents, on a closed tour."""
    poses = teacher.camera.orbit(frames).to(next(teacher.parameters()).device)
    tracks = [pictures.views(model, w, poses) for w in _styles(teacher, FILMED) for model in (teacher, student)]
    labels = [f"seed {seed}" for seed in SEEDS[:FILMED]]

    def draw():
        for views in pictures.progress(zip(*tracks, strict=True), frames, "film"):
            images = [pictures.pixels(view)[0] for view in views]
            rows = [images[i : i + 2] for i in range(0, len(images), 2)]
            yield pictures.sheet(rows, labels, [["teacher", "student"]], scale=2)

    pictures.save_mp4(path, draw())


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
        "adv": "adversarial",
        "discriminator": "discriminator",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for key, label in terms.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            left.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 20 else "")
    left.set(yscale="log", title="Loss terms, unweighted", xlabel="step", ylabel="loss")
    for key, label in (("psnr_db", "training batch"), ("heldout_psnr_db", "held-out, averaged weights")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            right.plot(*zip(*points, strict=True), label=label, linewidth=1.2 if "held" in key else 0.7, marker="." if "held" in key else "")
    right.set(title="Final images against the teacher's", xlabel="step", ylabel="PSNR in dB")
    for axes in (left, right):
        axes.axvline(config.stage1_steps, color="gray", linestyle="--", linewidth=1, label="stage 2 begins")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(m: dict) -> str:
    """The results as a Markdown table."""
    rows = [
        ("PSNR to the teacher, dB", "", f"{m['psnr_db']:.2f}"),
        ("SSIM to the teacher", "", f"{m['ssim']:.3f}"),
        (f"Perceptual distance to the teacher, by {m['perceptual_name']}", "", f"{m['perceptual']:.4f}"),
        (
            "Reprojection consistency, PSNR in dB",
            f"{m['reprojection_psnr_teacher_db']:.2f}",
            f"{m['reprojection_psnr_student_db']:.2f}",
        ),
        *(
            (f"ms per image, batch {batch}", f"{m[f'teacher_ms{s}']:.1f}", f"{m[f'student_ms{s}']:.1f}")
            for s, batch in (("", 1), ("_batch8", 8))
        ),
        ("Speed-up, batch 1 / batch 8", "", f"{m['speedup']:.1f} x / {m['speedup_batch8']:.1f} x"),
        ("Parameters", f"{m['teacher_parameters'] / 1e6:.2f} M", f"{m['student_parameters'] / 1e6:.2f} M"),
    ]
    head = [("", "teacher", "student"), ("---", "---:", "---:")]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *rows])


def _report(m: dict) -> str:
    cut = "" if m["steps_done"] == m["stage1_steps"] + m["stage2_steps"] else f", stopped at step {m['steps_done']}"
    return f"""# Distilling {m["teacher"]}

{_table(m)}

Quality: {m["images"]} held-out images, final resolution; reprojection compares {m["reprojection_visible"]:.0%} of
the pixels, those visible from both poses. Times: mapping and synthesis, medians.
Training: {m["stage1_steps"]} + {m["stage2_steps"]} steps of {m["batch_size"]} images, seed {m["seed"]}{cut};
{m["train_s"]:.0f} s of {m["wall_s"]:.0f} s in all.
Machine: {info.summary()}; {m["machine"]["threads"]} threads.

![Teacher and student at the same latents and poses](side_by_side.png)

![Loss terms and held-out PSNR over steps](curves.png)

Film: [orbit.mp4](orbit.mp4), teacher left, student right. The student: [student.safetensors](student.safetensors).
"""


def _size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {model.img_resolution} x {model.img_resolution}"


def _length(config: TrainConfig) -> str:
    return f"{config.stage1_steps} + {config.stage2_steps} steps of {config.batch_size} images"
