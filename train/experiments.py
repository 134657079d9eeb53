"""The paper's experiments on the toy teacher, and steps past it, each from one configuration.

    python -m fastgen.train.experiments NAME [NAME ...] | all | page

Every run is BASE with some fields changed, trained in a folder of its own under --out, and measured on
held-out latents and poses; one that is there already is not done again. `page` writes docs/experiments.md,
with its table as a CSV and a picture of each experiment, from what --out holds.
What the paper claims: Shahbazi et al., "NeRF-GAN Distillation for Efficient 3D-Aware Generation with
Convolutions", arXiv 2303.12865. The teacher is small and so are the runs; what holds here may not hold there.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastgen
from fastgen import info, pictures

from . import pose, siren
from .config import PRESETS, UNWATCHED
from .data import generator_for
from .features import Pooled
from .loop import distil
from .losses import Perceptual
from .metrics import evaluate, pose_pairs, psnr

DOCS = Path(__file__).parents[1] / "docs"
# A fifth of the toy preset's steps, but for stage 2, and the paper's terms.
BASE = dataclasses.replace(
    PRESETS["toy"].scaled(0.2),
    stage2_steps=150,
    lambda_consistency=0.0,
    **UNWATCHED,
)
# An adversarial loss that has a say: at the preset's weight, 0.02, all curricula look alike.
ADVERSARIAL = {"stage2_steps": 400, "lambda_adv": 0.2}
# Of an adversarial loss that is left out, as small as that its stage stays.
NONE = 1e-9
# In about the time of two stages: whole images from the first step on, as growth would have a discriminator
# see small ones. At a rate of 0.01 instead of 0.002 the images of 800 such steps collapsed.
SINGLE = ADVERSARIAL | {"curriculum": "single-stage", "growth": (), "stage1_steps": 500, "stage2_steps": 500}
# Sizes of students for EG3D, as much narrower as the toy teacher is; a super-resolution that starts from
# scratch sees every step of whole images.
SIZED = {"student_scale": 0.25, "style_lr_multiplier": 1.0, "hr_interval": 1, "stage1_steps": 2400}
SIZED |= {"curriculum": "reconstruction-only", "stage2_steps": 0, "lambda_consistency": 0.1}
# VGG16 costs more than all the rest on two cores.
PERCEPTUAL = {"perceptual": "random-vgg", "growth": ((16, 300, 4), (32, 150, 4))}
PERCEPTUAL |= {"stage1_steps": 510, "stage2_steps": 60}

COLUMNS = {
    "psnr_db": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "perceptual": ("perceptual distance", ".4f"),
    "sharpness": ("sharpness", ".3f"),
    "reprojection_psnr_student_db": ("reprojection, dB", ".2f"),
    "identity_student": ("identity", ".3f"),
    "pose_degrees_student": ("pose error, degrees", ".2f"),
    "steps": ("steps", "d"),
    "train_s": ("training, s", ".0f"),
}
# What the teacher's own images have.
REFERENCE = ("reprojection_psnr_teacher_db", "identity_teacher", "pose_degrees_teacher")
IMAGES, CONTROLS = 128, 64
SEEDS = (3, 5, 8, 13, 21, 34, 55, 89)
# Differences that mean nothing; `page` takes what other seeds changed, where these have run.
MARGINS = {
    "psnr_db": 0.1,
    "perceptual": 0.002,
    "sharpness": 0.01,
    "reprojection_psnr_student_db": 0.1,
    "identity_student": 0.005,
    "pose_degrees_student": 0.1,
}
Rows = dict[str, dict]


def _of(key: str, row: dict) -> str:
    return "" if row[key] is None else format(row[key], COLUMNS[key][1])


def _compared(key: str, rows: Rows) -> str:
    name = COLUMNS[key][0]
    return f"{name}: " + ", ".join(f"{run} {_of(key, row)}" for run, row in rows.items())


def _learnt(rows: Rows) -> str:
    row = list(rows.values())[-1]
    others = max(row["other_latent_db"], row["other_pose_db"])
    return (
        f"{'Shown' if row['psnr_db'] > others + 3 else 'Not shown'}: {row['psnr_db']:.2f} dB to the "
        f"teacher's image. The teacher's image of another latent from that pose has "
        f"{row['other_latent_db']:.2f} dB, that of the latent from a pose up to 17 degrees away "
        f"{row['other_pose_db']:.2f} dB."
    )


def _more(key: str, a: dict, b: dict) -> bool:
    """Whether a's number is above b's by more than chance may explain."""
    return a[key] > b[key] + MARGINS[key]


def _less_consistent(first: str, second: str, rows: Rows) -> str:
    """Whether the first run is sharper than the second and less consistent by all measures, or by which."""
    a, b = rows[first], rows[second]
    worse = {
        "sharper": _more("sharpness", a, b),
        "reprojection": _more("reprojection_psnr_student_db", b, a),
        "identity": _more("identity_student", b, a),
        "pose": _more("pose_degrees_student", a, b),
    }
    said = "Shown" if all(worse.values()) else "In part" if any(worse.values()) else "Not shown"
    keys = (
        "reprojection_psnr_student_db",
        "identity_student",
        "pose_degrees_student",
        "psnr_db",
        "sharpness",
    )
    by = f" ({', '.join(name for name, is_so in worse.items() if is_so)})" if said == "In part" else ""
    return f"{said}{by}. " + "; ".join(_compared(key, rows) for key in keys) + "."


def _each_helps(rows: Rows) -> str:
    whole, said = rows["all terms"], []
    keys = {"psnr_db": True, "perceptual": False, "sharpness": True, "reprojection_psnr_student_db": True}
    for name, row in rows.items():
        if name != "all terms":
            better = [
                COLUMNS[k][0]
                for k, up in keys.items()
                if (_more(k, whole, row) if up else _more(k, row, whole))
            ]
            said.append(f"{name}: the whole is better by {', '.join(better) or 'nothing'}")
    return "; ".join(said) + "."


def _best(key: str, sign: int, rows: Rows) -> str:
    order = sorted(rows, key=lambda run: -sign * rows[run][key])
    return _compared(key, {run: rows[run] for run in order}) + "."


def _within(rows: Rows) -> str:
    """What each smaller student loses."""
    full, said = rows["full"], []
    for name, row in rows.items():
        if name != "full":
            lost = [full[key] - row[key] for key in ("psnr_db", "reprojection_psnr_student_db")]
            said.append(f"{name} loses {lost[0]:.2f} dB of PSNR and {lost[1]:.2f} dB of reprojection")
    return "; ".join(said) + "."


def _margins(rows: Rows) -> dict[str, float]:
    """What another seed changes: the largest less the smallest."""
    values = {key: [row[key] for row in rows.values()] for key in MARGINS}
    return {key: max(found) - min(found) for key, found in values.items()}


def _spread(rows: Rows) -> str:
    said = [f"{COLUMNS[key][0]} {margin:.3g}" for key, margin in _margins(rows).items()]
    return f"Largest less smallest: {', '.join(said)}. Smaller differences do not count as such on this page."


def _gain(rows: Rows) -> str:
    """Rays against the paper's way, by three seeds each, and the rest beside them."""
    said = []
    for key in ("psnr_db", "perceptual", "reprojection_psnr_student_db", "pose_degrees_student"):
        seeds = [
            [row[key] for label, row in rows.items() if label.startswith(f"{name}, seed")]
            for name in ("as the paper", "rays")
        ]
        means = [format(sum(values) / len(values), COLUMNS[key][1]) for values in seeds]
        # The same targets and batches for each seed.
        up = sum(after > before for before, after in zip(*seeds, strict=True))
        name = COLUMNS[key][0]
        said.append(f"{name}: {means[1]} with rays, {means[0]} without, higher in {up} of three seeds")
    others = {label: row for label, row in rows.items() if "seed" not in label}
    said += [_compared(key, others) for key in ("psnr_db", "reprojection_psnr_student_db")]
    return "; ".join(said) + "."


@dataclass(frozen=True)
class Experiment:
    """runs: by name, the fields of BASE that each changes; finding: what their numbers say of the claim."""

    title: str
    claim: str
    finding: Callable[[Rows], str]
    runs: dict[str, dict]


EXPERIMENTS = {
    "reconstruction": Experiment(
        "Reconstruction only",
        "The paper: reconstruction alone learns the mapping from styles and poses to images.",
        _learnt,
        {
            "reconstruction only": {"curriculum": "reconstruction-only", "stage2_steps": 0},
            "five times as long": {
                "curriculum": "reconstruction-only",
                "growth": PRESETS["toy"].growth,
                "stage1_steps": PRESETS["toy"].stage1_steps,
                "stage2_steps": 0,
            },
        },
    ),
    "single-stage": Experiment(
        "Adversarial from the start",
        "The paper: the full objective from the beginning gives sharp but 3D-inconsistent images.",
        functools.partial(_less_consistent, "single stage", "reconstruction only"),
        {"single stage": SINGLE, "reconstruction only": ADVERSARIAL | {"curriculum": "reconstruction-only"}},
    ),
    "two-stage": Experiment(
        "Two stages against one",
        "The paper: reconstruction first, then both, is more consistent than both from the start.",
        functools.partial(_less_consistent, "single stage", "two stages"),
        {"two stages": ADVERSARIAL, "single stage": SINGLE},
    ),
    "ablation": Experiment(
        "Each term left out",
        "The paper: every term of the loss helps. The perceptual distance is of random VGG16 features here, "
        "which the column of that name is, too.",
        _each_helps,
        {"all terms": PERCEPTUAL}
        | {
            f"without {name.replace('_', ' ')}": PERCEPTUAL | {f"lambda_{name}": 0.0}
            for name in ("lr_pixel", "lr_perceptual", "hr_pixel", "hr_perceptual")
        }
        | {"without adv": PERCEPTUAL | {"lambda_adv": NONE}},
    ),
    "weights": Experiment(
        "Weights of the terms",
        "How much adversarial loss, and how much weight for the final image, is best?",
        lambda rows: f"{_best('psnr_db', 1, rows)} {_best('sharpness', 1, rows)}",
        {
            **{f"adversarial {x}": {"lambda_adv": x or NONE} for x in (0, 0.02, 0.2, 1.0)},
            **{f"final image {x}": {"lambda_hr_pixel": x} for x in (0.3, 3.0)},
        },
    ),
    "style": Experiment(
        "Part of the style code withheld",
        "How much of w does a student need? The super-resolution sees all of it in every run.",
        functools.partial(_best, "psnr_db", 1),
        {f"{x:.0%} of w": {"style_share": x} for x in (1.0, 0.5, 0.25, 0.1)},
    ),
    "curricula": Experiment(
        "Other curricula",
        "The same steps, arranged otherwise; of the single stage, as many as take the same time.",
        lambda rows: f"{_best('psnr_db', 1, rows)} {_best('reprojection_psnr_student_db', 1, rows)}",
        {
            "two stages": ADVERSARIAL,
            "ramp": ADVERSARIAL | {"curriculum": "ramp", "ramp_steps": 400},
            "single stage": SINGLE,
            "reconstruction only": ADVERSARIAL | {"curriculum": "reconstruction-only"},
        },
    ),
    "second-teacher": Experiment(
        "A teacher of another kind",
        "The trainer asks of a teacher only `mapping` and `synthesis`: a SIREN after pi-GAN, trained on the "
        "same heads, has no planes and no super-resolution.",
        functools.partial(_best, "psnr_db", 1),
        {
            "student of a SIREN": {
                "teacher": "siren",
                "growth": ((16, 800, 4),),
                "stage1_steps": 1400,
                "stage2_steps": 50,
                "lr_superresolution": 1.0,
            }
        },
    ),
    "seeds": Experiment(
        "Other seeds",
        "How much do runs differ that differ in nothing else?",
        _spread,
        {f"seed {seed}": {"seed": seed} for seed in range(3)},
    ),
    "sizes": Experiment(
        "Smaller students",
        "How small may a student be? Equal steps, reconstruction only. What an image of each costs: "
        "[images](../benchmarks/results/images-intel-r-xeon-r-processor.md).",
        _within,
        {size: SIZED | {"student": size} for size in ("full", "medium", "compact", "tiny")},
    ),
    "beyond": Experiment(
        "Past the paper: closer to the teacher",
        "The paper's first open question is the correspondence with the teacher. Ours: rays as input maps, "
        "and a loss that has the student's views of a latent agree by the teacher's depth.",
        _gain,
        {
            **{f"as the paper, seed {seed}": {"seed": seed} for seed in range(3)},
            **{f"rays, seed {seed}": {"pose_input": "rays", "seed": seed} for seed in range(3)},
            "consistency 0.1": {"lambda_consistency": 0.1},
            "rays, consistency 0.1": {"pose_input": "rays", "lambda_consistency": 0.1},
        },
    ),
}


def run(name: str, out: Path) -> None:
    """Train and measure what is missing of an experiment's runs."""
    for label, changes in EXPERIMENTS[name].runs.items():
        folder = out / _key(changes)
        if (folder / "row.json").exists():
            continue
        config = dataclasses.replace(BASE, **changes | {"out": str(folder)})
        teacher = _teacher(config.teacher, out)
        print(f"{name}: {label}, {config.steps} steps", flush=True)
        (folder / "resume.pt").unlink(missing_ok=True)
        start = time.monotonic()
        done = distil(config, teacher, progress=False)
        if done.interrupted:
            raise KeyboardInterrupt
        student = done.student
        row = {"train_s": time.monotonic() - start, "steps": config.steps}
        perceptual = Perceptual("random-vgg")
        networks = {"perceptual": perceptual, "identity": Pooled(perceptual), "pose": pose.load()}
        row |= evaluate(student, teacher, teacher.camera, IMAGES, **networks) | _controls(teacher)
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
def _controls(teacher: nn.Module) -> dict[str, float]:
    """PSNR of the teacher's images to those of another latent, and to those of another pose."""
    random = generator_for(0, "experiments")
    c = pose_pairs(teacher.camera, CONTROLS, random)
    ws = teacher.mapping(torch.randn(CONTROLS, teacher.z_dim, generator=random), c[::2])

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
        MARGINS.update(_margins(seeds))
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
run changes is in [train/experiments.py](../train/experiments.py)."""


def _section(name: str, experiment: Experiment, rows: Rows) -> str:
    first = next(iter(rows.values()))
    keys = [key for key in COLUMNS if first[key] is not None]
    head = ["", *(COLUMNS[key][0] for key in keys)]
    teacher = {f"{key.replace('teacher', 'student')}": first[key] for key in REFERENCE}
    table = [head, ["---"] + ["---:"] * len(keys)]
    table += [[label, *(_of(key, row) for key in keys)] for label, row in rows.items()]
    table.append(["the teacher itself", *(_of(key, teacher) if key in teacher else "" for key in keys)])
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

    def command(names: tuple[str, ...], out: Path = Path("out/experiments"), docs: Path = DOCS) -> None:
        """Rerun the paper's experiments on the toy teacher.

        Args:
            names: of experiments; 'all'; 'page' writes the page of what is there, as 'all' does at last.
            out: folder of the runs.
            docs: folder of the page.
        """
        unknown = set(names) - {"all", "page", *EXPERIMENTS}
        if unknown or not names:
            raise SystemExit(
                f"names must be among all, page, {', '.join(EXPERIMENTS)}, got {' '.join(names)}"
            )
        for name in EXPERIMENTS if "all" in names else names:
            if name != "page":
                run(name, out)
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
