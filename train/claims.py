"""The paper's claims, and steps past it, as experiments: the runs, and what their numbers say.

Every run is BASE with some fields changed. What the paper claims: Shahbazi et al., "NeRF-GAN Distillation for
Efficient 3D-Aware Generation with Convolutions", arXiv 2303.12865. The teacher is small and so are the runs;
what holds here may not hold there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from .config import PRESETS, UNWATCHED

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
# Fewer steps than two stages have, in more time: whole images from the first one on, as growth would have a
# discriminator see small ones. At a rate of 0.01 instead of 0.002 the images of 800 such steps collapsed.
SINGLE = ADVERSARIAL | {"curriculum": "single-stage", "growth": (), "stage1_steps": 500, "stage2_steps": 500}
# The same but for the adversarial loss, so that no more is said of that than what it does.
CONTROL = SINGLE | {"curriculum": "reconstruction-only", "hr_interval": 1}
CONTROL |= {"lr": PRESETS["toy"].lr_adversarial, "betas": PRESETS["toy"].betas_adversarial}
# Sizes of students for EG3D, as much narrower as the toy teacher is; a super-resolution that starts from
# scratch sees every step of whole images.
SIZED = {"student_scale": 0.25, "style_lr_multiplier": 1.0, "hr_interval": 1, "stage1_steps": 2400}
SIZED |= {"curriculum": "reconstruction-only", "stage2_steps": 0, "lambda_consistency": 0.1}
# VGG16 costs more than all the rest on two cores.
PERCEPTUAL = {"perceptual": "random-vgg", "growth": ((16, 720, 4), (32, 400, 4))}
PERCEPTUAL |= {"stage1_steps": 1150, "stage2_steps": 30}

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
# Differences that mean nothing; `page` takes what other seeds changed, where these have run.
MARGINS = {
    "psnr_db": 0.4,
    "perceptual": 0.03,
    "sharpness": 0.05,
    "reprojection_psnr_student_db": 1.4,
    "identity_student": 0.04,
    "pose_degrees_student": 0.11,
}
Rows = dict[str, dict]


def value_of(key: str, row: dict) -> str:
    return "" if row[key] is None else format(row[key], COLUMNS[key][1])


def _compared(key: str, rows: Rows) -> str:
    name = COLUMNS[key][0]
    return f"{name}: " + ", ".join(f"{run} {value_of(key, row)}" for run, row in rows.items())


def _learnt(rows: Rows) -> str:
    row = list(rows.values())[-1]
    others = max(row["other_latent_db"], row["other_pose_db"])
    return f"{'Shown' if row['psnr_db'] > others + 3 else 'Not shown'}: {_beside(rows)}"


def _beside(rows: Rows) -> str:
    """The last run's likeness to the teacher, beside that of the teacher's other images."""
    row = list(rows.values())[-1]
    return (
        f"{row['psnr_db']:.2f} dB to the teacher's image. The teacher's image of another latent from that "
        f"pose has {row['other_latent_db']:.2f} dB, that of the latent from a pose up to 17 degrees away "
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
    keys = {"psnr_db": True, "perceptual": False, "sharpness": True}
    keys |= {"reprojection_psnr_student_db": True, "identity_student": True, "pose_degrees_student": False}
    for name, row in rows.items():
        if name != "all terms":
            better, worse = (
                [COLUMNS[k][0] for k, up in keys.items() if (_more(k, a, b) if up else _more(k, b, a))]
                for a, b in ((whole, row), (row, whole))
            )
            but = f", worse by {', '.join(worse)}" if worse else ""
            said.append(f"{name}: the whole is better by {', '.join(better) or 'nothing'}{but}")
    return "; ".join(said) + "."


def _best(key: str, sign: int, rows: Rows) -> str:
    order = sorted(rows, key=lambda run: -sign * rows[run][key])
    return _compared(key, {run: rows[run] for run in order}) + "."


def _within(rows: Rows) -> str:
    """What each smaller student has more or less than the full ones."""
    said = []
    for full in (name for name in rows if name.startswith("full")):
        others = []
        for name, row in rows.items():
            if not name.startswith("full"):
                keys = "psnr_db", "reprojection_psnr_student_db"
                more = [row[key] - rows[full][key] for key in keys]
                others.append(f"{name} {more[0]:+.2f} dB of PSNR and {more[1]:+.2f} dB of reprojection")
        said.append(f"Against {full}: {'; '.join(others)}.")
    return " ".join(said)


def margins_of(rows: Rows) -> dict[str, float]:
    """What another seed changes: the largest less the smallest."""
    values = {key: [row[key] for row in rows.values()] for key in MARGINS}
    return {key: max(found) - min(found) for key, found in values.items()}


def _spread(rows: Rows) -> str:
    said = [f"{COLUMNS[key][0]} {margin:.3g}" for key, margin in margins_of(rows).items()]
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
        "The paper: the full objective from the beginning gives sharp but 3D-inconsistent images. Compared "
        "with the same steps without the adversarial loss. (Identity is high where the pose is ignored.)",
        functools.partial(_less_consistent, "single stage", "its steps without adv"),
        {
            "single stage": SINGLE,
            "its steps without adv": CONTROL,
            "reconstruction only": ADVERSARIAL | {"curriculum": "reconstruction-only"},
        },
    ),
    "two-stage": Experiment(
        "Two stages against one",
        "The paper: reconstruction first, then both, is more consistent than both from the start.",
        functools.partial(_less_consistent, "single stage", "two stages"),
        {"two stages": ADVERSARIAL, "single stage": SINGLE, "its steps without adv": CONTROL},
    ),
    "ablation": Experiment(
        "Each term left out",
        "The paper: every term of the loss helps. The perceptual distance is of random VGG16 features here, "
        "which the column of that name is, too. The final image's terms have about 34 steps and the "
        "adversarial one 30, in which nothing can be seen of them; see [weights](#weights-of-the-terms).",
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
        "The same steps, arranged otherwise; of the single stage fewer, which take longer.",
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
        _beside,
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
        "How small may a student be? Equal steps, reconstruction only, a quarter as wide as for EG3D. A full "
        "student's super-resolution is the teacher's and learns slowly, in one run as fast as all else; the "
        "others' begins as plain enlargement and learns as the renderer does. What an image of each costs: "
        "[images](../benchmarks/results/images-intel-r-xeon-r-processor.md).",
        _within,
        {"full": SIZED | {"student": "full"}}
        | {"full, one rate": SIZED | {"student": "full", "lr_superresolution": 1.0}}
        | {size: SIZED | {"student": size} for size in ("medium", "compact", "tiny")},
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
