"""`fastgen evaluate`: a student's metrics beside its teacher's own."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

import torch

import fastgen
from fastgen import info, pictures
from fastgen._files import write_text
from fastgen._text import table

from . import pose as pose_net
from .config import TrainConfig
from .data import generator_for
from .dataset import ImageDataset
from .features import Features, Pooled
from .loop import find_poses
from .losses import Perceptual
from .metrics import evaluate


def run(
    student: str | Path,
    teacher: str | Path,
    data: str | Path | None = None,
    images: int = 128,
    features: str | Path | None = None,
    identity: str | Path | None = None,
    perceptual_weights: str | Path | None = None,
    pose: str | Path = "auto",
    camera: str = "auto",
    json: str | Path | None = None,
    device: str = "auto",
) -> dict:
    """Measure a student of `teacher`, print a table and write a JSON file; the options are those of `fastgen
    evaluate`.

    Returns: what the file holds.
    Raises: ValueError or OSError on options that can't be met, before anything is rendered.
    """
    options = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    device = info.find_device(device)
    config = TrainConfig(camera=camera)
    models = {"student": fastgen.load_student(student), "teacher": fastgen.load_teacher(teacher)}
    resolution = models["teacher"].img_resolution
    reference = ImageDataset(data, option="data") if data else None
    if reference and reference.resolution != resolution:
        raise ValueError(
            f"data: {data} has images of {reference.resolution} pixels, the teacher makes {resolution}"
        )
    poses = find_poses(config, models["teacher"], reference)
    if not _is_of(poses=poses, **models):
        raise ValueError(f"student: {student} was distilled from another teacher than {teacher}")
    perceptual = Perceptual("lpips-vgg" if perceptual_weights else "random-vgg", perceptual_weights)
    networks = {
        "perceptual": perceptual,
        "identity": Features(identity, resolution, "identity") if identity else Pooled(perceptual),
        "features": Features(features, resolution) if features else None,
        "pose": None,
    }
    if str(pose) == "auto":
        pose = "toy" if str(teacher) == "toy" else "none"
    if str(pose) != "none":
        networks["pose"] = pose_net.load(pose_net.TOY if str(pose) == "toy" else pose)
    json = pictures.prepare(json or Path(student).with_suffix(".evaluation.json"), ".json")
    if data and not features:
        print(
            "data: gives the poses alone; FID and KID, which compare with it, need --features",
            file=sys.stderr,
        )

    models, networks = (
        {key: net and net.to(device) for key, net in nets.items()} for nets in (models, networks)
    )
    found = evaluate(poses=poses, images=images, reference=reference, **models, **networks)
    found |= {"options": options, "machine": info.machine(), "versions": info.versions()}
    write_text(json, dumps(found, indent=2) + "\n")
    print(table([f"{found['images']} images", "teacher", "student"], rows(found)))
    print("\n" + "\n".join([*_notes(found), f"All numbers: {json}"]))
    return found


def rows(m: dict) -> list[list[str]]:
    """What `metrics.evaluate` has measured, as a table's rows: what, the teacher's own, the student's."""

    def number(name: str, form: str) -> str:
        return "-" if m[name] is None else format(m[name], form)

    def both(what: str, name: str, form: str) -> list[str]:
        return [what, *(number(f"{name}_{who}", form) for who in ("teacher", "student"))]

    found = [
        ["PSNR to the teacher, dB", "", number("psnr_db", ".2f")],
        ["SSIM to the teacher", "", number("ssim", ".3f")],
    ]
    if m["perceptual_name"] != "none":
        by = m["perceptual_name"]
        found.append([f"Perceptual distance to the teacher, by {by}", "", number("perceptual", ".4f")])
    found.append(["Sharpness, mean gradient relative to the teacher's", "", number("sharpness", ".3f")])
    dbs = (number(f"reprojection_psnr_{who}_db", ".2f") for who in ("teacher", "student"))
    found.append(["Reprojection consistency, PSNR in dB", *dbs])
    if m["identity_name"] != "none":
        what = f"Identity at two poses, cosine of {m['identity_name']}"
        found.append(both(what, "identity", ".3f"))
        found.append(["The same cosine of different latents", number("identity_others", ".3f"), ""])
    if m["pose_degrees_teacher"] is not None:
        found.append(both("Pose, mean error in degrees", "pose_degrees", ".2f"))
    if m["features_name"] != "none":
        for name in ("FID", "KID"):
            found.append(both(f"{name} by {m['features_name']}", name.lower(), ".4g"))
    return found


def _notes(m: dict) -> list[str]:
    """What the table doesn't say: of how many images FID is, and what was not measured."""
    notes = [f"{m['images']} images: latents and poses that training doesn't use, two poses of each latent."]
    if m["features_name"] != "none":
        whose = "of the data set" if m["options"]["data"] else "of the teacher's at other latents"
        few = min(m["fid_images"], m["reference_images"]) <= m["features_size"]
        biased = "; so few make FID too high" if few else ""
        notes.append(
            f"FID and KID: {m['fid_images']} images, one of each latent, against {m['reference_images']} "
            f"{whose}, by {m['features_size']} features{biased}."
        )
    else:
        notes.append("FID and KID: not measured; they need a network, --features FILE.")
    if m["pose_degrees_teacher"] is None:
        notes.append("Pose: not measured; it needs a network, --pose.")
    return notes


def _is_of(student, teacher, poses) -> bool:
    """Whether a student has the latents, styles and image size of a teacher: it keeps its mapping."""
    sizes = [(net.z_dim, net.img_resolution) for net in (student, teacher)]
    if sizes[0] != sizes[1]:
        return False
    random = generator_for(0, "mapping")
    z, c = torch.randn(1, teacher.z_dim, generator=random), poses.sample(1, random)
    with torch.no_grad():
        a, b = (net.mapping(z, c) for net in (student, teacher))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
