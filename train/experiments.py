"""The paper's experiments on the toy teacher, and steps past it, each from one configuration.

    python -m fastgen.train.experiments NAME [NAME ...] | all | page

Every run of claims.py is trained in a folder of its own under --out, and measured on held-out latents and
poses; one that is there already is not done again. `page` writes docs/experiments.md, with its table as a CSV
and a picture of each experiment, from what --out holds.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import fastgen
from fastgen import info, pictures

from . import pose, siren
from .claims import BASE, COLUMNS, EXPERIMENTS, MARGINS, Experiment, Rows, margins_of, value_of
from .config import TrainConfig
from .data import generator_for
from .features import Pooled
from .loop import distil
from .losses import Perceptual
from .metrics import evaluate, pose_pairs, psnr

DOCS = Path(__file__).parents[1] / "docs"
# What the teacher's own images have.
REFERENCE = ("reprojection_psnr_teacher_db", "identity_teacher", "pose_degrees_teacher")
IMAGES, CONTROLS = 128, 64
SEEDS = (3, 5, 8, 13, 21, 34, 55, 89)


def run(names: Iterable[str], out: Path, workers: int = 1) -> None:
    """Train and measure what is missing of the runs of experiments, `workers` at a time."""
    runs = {out / _key(changes): changes for name in names for changes in EXPERIMENTS[name].runs.values()}
    missing = [
        dataclasses.replace(BASE, **changes | {"out": str(folder)})
        for folder, changes in runs.items()
        if not (folder / "row.json").exists()
    ]
    one = functools.partial(_run, images=IMAGES, controls=CONTROLS)
    if workers == 1:
        for config in missing:
            one(config)
        return
    # So small a network gains little from a second thread.
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        list(pool.map(one, missing))


def _run(config: TrainConfig, images: int, controls: int) -> None:
    """Train and measure one run."""
    fastgen.keep_memory()
    folder = Path(config.out)
    teacher = _teacher(config.teacher, folder.parent)
    print(f"{folder}: {config.steps} steps", flush=True)
    (folder / "resume.pt").unlink(missing_ok=True)
    start = time.monotonic()
    done = distil(config, teacher, progress=False)
    if done.interrupted:
        raise KeyboardInterrupt
    student = done.student
    row = {"train_s": time.monotonic() - start, "steps": config.steps}
    perceptual = Perceptual("random-vgg")
    networks = {"perceptual": perceptual, "identity": Pooled(perceptual), "pose": pose.load()}
    row |= evaluate(student, teacher, teacher.camera, images, **networks) | _controls(teacher, controls)
    row |= {"machine": info.summary()}
    (folder / "row.json").write_text(json.dumps(row, indent=2) + "\n")


def _key(changes: dict) -> str:
    """A run's folder: equal runs of two experiments are one."""
    resolved = dataclasses.asdict(dataclasses.replace(BASE, **changes))
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:12]


def _teacher(name: str, out: Path) -> nn.Module:
    if name != "siren":
        return fastgen.load_teacher(name)
    path = out / "siren" / "teacher.safetensors"
    if not path.exists():
        siren.train(siren.SirenConfig(out=str(path.parent)))
    return fastgen.load_teacher(path)


@torch.no_grad()
def _controls(teacher: nn.Module, count: int) -> dict[str, float]:
    """PSNR of the teacher's images to those of another latent, and to those of another pose."""
    random = generator_for(0, "experiments")
    c = pose_pairs(teacher.camera, count, random)
    ws = teacher.mapping(torch.randn(count, teacher.z_dim, generator=random), c[::2])

    def images(ws: Tensor, c: Tensor) -> Tensor:
        return torch.cat(
            [teacher.synthesis(w, a)["image"] for w, a in zip(ws.split(4), c.split(4), strict=True)]
        )

    image = images(ws, c[::2])
    changed = {"other_latent_db": images(ws.roll(1, 0), c[::2]), "other_pose_db": images(ws, c[1::2])}
    return {name: psnr(x, image).mean().item() for name, x in changed.items()}


def _rows(name: str, out: Path) -> Rows | None:
    """What the runs of an experiment have; None where one is not there."""
    runs = EXPERIMENTS[name].runs if name in EXPERIMENTS else {}
    files = {label: out / _key(changes) / "row.json" for label, changes in runs.items()}
    if not files or not all(file.exists() for file in files.values()):
        return None
    return {label: json.loads(file.read_text()) for label, file in files.items()}


def page(out: Path, docs: Path) -> None:
    """Write docs/experiments.md, docs/experiments.csv and docs/experiments/*.png of the runs in `out`."""
    docs.mkdir(parents=True, exist_ok=True)
    text, lines = [HEAD], []
    if seeds := _rows("seeds", out):
        MARGINS.update(margins_of(seeds))
    for name, experiment in EXPERIMENTS.items():
        rows = _rows(name, out)
        if rows is None:
            text.append(
                f"## {experiment.title}\n\nNot run yet: `python -m fastgen.train.experiments {name}`."
            )
            continue
        _picture(docs / "experiments" / f"{name}.png", experiment, out)
        lines += [{"experiment": name, "run": label} | row for label, row in rows.items()]
        text.append(_section(name, experiment, rows))
    with open(docs / "experiments.csv", "w", newline="") as file:
        fields = ["experiment", "run", *COLUMNS, *REFERENCE, "machine"]
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (docs / "experiments.md").write_text("\n\n".join(text) + "\n")


HEAD = f"""# Experiments

Written by `python -m fastgen.train.experiments page`; do not edit. The runs are short, of the toy teacher,
with one seed and {IMAGES} held-out images: what another seed changes is [below](#other-seeds). PSNR, SSIM and
the perceptual distance (random VGG16 features) are to the teacher's image of the same latent and pose;
sharpness is the mean gradient relative to the teacher's; reprojection consistency, identity and pose error
are explained in [distillation](distillation.md). The rows are [experiments.csv](experiments.csv); what each
run changes is in [train/claims.py](../train/claims.py)."""


def _section(name: str, experiment: Experiment, rows: Rows) -> str:
    first = next(iter(rows.values()))
    keys = [key for key in COLUMNS if first[key] is not None]
    head = ["", *(COLUMNS[key][0] for key in keys)]
    teacher = {f"{key.replace('teacher', 'student')}": first[key] for key in REFERENCE}
    table = [head, ["---"] + ["---:"] * len(keys)]
    table += [[label, *(value_of(key, row) for key in keys)] for label, row in rows.items()]
    table.append(["the teacher itself", *(value_of(key, teacher) if key in teacher else "" for key in keys)])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows.values()))
    return "\n\n".join(
        [
            f"## {experiment.title}",
            f"`python -m fastgen.train.experiments {name}`. {experiment.claim}",
            lines,
            experiment.finding(rows),
            f"![The teacher's images, and those of each run](experiments/{name}.png)",
            f"{machines}.",
        ]
    )


@torch.inference_mode()
def _picture(path: Path, experiment: Experiment, out: Path) -> None:
    """The teacher's images above those of each run, at the same latents and poses."""
    teacher = _teacher(next(iter(experiment.runs.values())).get("teacher", "toy"), out)
    c, degrees = pictures.sweep(teacher.camera, len(SEEDS))
    ws = teacher.mapping(
        pictures.latents(SEEDS, teacher.z_dim), teacher.camera.front().expand(len(SEEDS), -1)
    )
    models = {"teacher": teacher}
    models |= {
        label: fastgen.load_student(out / _key(changes) / "student.safetensors")
        for label, changes in experiment.runs.items()
    }
    rows = [model.synthesis(ws, c)["image"] for model in models.values()]
    captions = [[f"seed {seed}, {angle}" for seed, angle in zip(SEEDS, degrees, strict=True)]]
    pictures.save_png(path, pictures.sheet(rows, list(models), captions, experiment.title))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    import tyro

    def command(
        names: tuple[str, ...],
        out: Path = Path("out/experiments"),
        docs: Path = DOCS,
        workers: int = torch.get_num_threads(),
    ) -> None:
        """Rerun the paper's experiments on the toy teacher.

        Args:
            names: of experiments; 'all'; 'page' writes the page of what is there, as 'all' does at last.
            out: folder of the runs.
            docs: folder of the page.
            workers: how many are trained at a time, each with its share of PyTorch's threads.
        """
        if workers < 1:
            raise SystemExit(f"workers must be at least 1, got {workers}")
        unknown = set(names) - {"all", "page", *EXPERIMENTS}
        if unknown or not names:
            raise SystemExit(
                f"names must be among all, page, {', '.join(EXPERIMENTS)}, got {' '.join(names)}"
            )
        run(EXPERIMENTS if "all" in names else [name for name in names if name != "page"], out, workers)
        if {"all", "page"} & set(names):
            page(out, docs)

    fastgen.keep_memory()
    tyro.cli(
        command,
        prog="python -m fastgen.train.experiments",
        args=argv,
        config=(tyro.conf.PositionalRequiredArgs,),
    )


if __name__ == "__main__":
    main()
