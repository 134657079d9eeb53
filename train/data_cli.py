"""The commands on data sets: `fastgen data check` and `fastgen data toy`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastgen import presets
from fastgen._text import complain, table

if TYPE_CHECKING:
    import numpy as np

    from .dataset_check import Report

_SHOWN = 20


@dataclass(frozen=True)
class Check:
    """Validate a data set: a table of its images and labels, and every fault with its file. Exit code 2 where
    there is one."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .zip or a folder in EG3D's layout: images, and their labels in dataset.json."""
    deep: tyro.conf.FlagCreatePairsOff[bool] = False
    """Decode every image; without, only headers are read."""
    workers: int = 2
    """Processes that read images; 0: this one."""
    preset: Literal[("none", *presets.PRESETS)] = "none"
    """Require the resolution of this preset, and show its poses beside the labels."""

    def __post_init__(self):
        if not 0 <= self.workers <= 256:
            raise ValueError(f"workers must be from 0 to 256, got {self.workers}")

    def run(self):
        from fastgen import pictures

        from .dataset_check import check

        def progress(items, total):
            return pictures.progress(items, total, "check")

        preset = None if self.preset == "none" else self.preset
        report = check(self.path, self.deep, self.workers, preset, progress)
        print(_summary(self.path, report))
        if len(report.labels):
            print("\n" + _cameras(report, preset))
        for error in report.errors[:_SHOWN]:
            complain("data check", error)
        if more := report.errors[_SHOWN:]:
            complain("data check", f"{self.path}: and {len(more)} more")
        if report.errors:
            sys.exit(2)


@dataclass(frozen=True)
class Toy:
    """Write a data set in EG3D's layout: analytic images of the toy teacher's heads, with their labels."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.zip")]
    """The .zip file to write."""
    images: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="N")]
    """Images."""
    resolution: int = presets.get("toy").resolution
    """Their side in pixels."""
    seed: int = 0
    """Fixes heads and poses. Image I is the same in a data set of any length."""

    def __post_init__(self):
        for name, least, most in (("images", 1, 1_000_000), ("resolution", 4, 1024), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {getattr(self, name)}")

    def run(self):
        from fastgen import pictures

        from .dataset import write_zip

        # Before the first image is rendered, and not after the last.
        pictures.prepare(self.out, ".zip")
        print(write_zip(self.out, pictures.progress(self._items(), self.images, "render")))

    def _items(self) -> Iterator[tuple[np.ndarray, list[float]]]:
        import torch

        from fastgen import pictures

        from . import scenes, toy
        from .data import generator_for

        for i in range(self.images):
            random = generator_for(self.seed, "toy data set", i)
            z, c = torch.randn(1, scenes.Z_DIM, generator=random), toy.poses(1, random)
            image, _ = toy.picture(z, c, self.resolution)
            yield pictures.pixels(image)[0], c[0].tolist()


@dataclass(frozen=True)
class Data:
    """Data sets in EG3D's layout: check one, or write one of the toy teacher's heads."""

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Check | Toy]]

    def run(self):
        self.action.run()


def _summary(path: Path, report: Report) -> str:
    width, height = report.size or (0, 0)
    fits = [name for name, p in presets.PRESETS.items() if (p.resolution, p.resolution) == report.size]
    rows = [
        ["images", f"{report.images:,}"],
        ["image files without a label", f"{report.unlabelled:,}"],
        ["resolution", f"{width} x {height}" if report.size else "unknown"],
        ["presets of this resolution", ", ".join(fits) or "none"],
    ]
    if len(report.labels):
        rows.append(["labels whose mirror image is one, too", f"{100 * report.mirrored:.1f} %"])
    return table([str(path), ""], rows)


def _cameras(report: Report, preset: str | None) -> str:
    """How the labels lie, in the angles of CameraDistribution."""
    import math

    from fastgen import camera

    azimuth, polar, radius = camera.angles(report.labels)
    columns = {
        "yaw, radians (azimuth - pi/2)": azimuth - math.pi / 2,
        "pitch, radians (polar angle - pi/2)": polar - math.pi / 2,
        "radius": radius,
        "focal length, image sizes": report.labels[:, 16],
    }
    head = ["labels", "mean", "std", "min", "max"]
    rows = [
        [name, *(f"{float(v):.4f}" for v in (x.mean(), x.std(unbiased=False), x.min(), x.max()))]
        for name, x in columns.items()
    ]
    if preset:
        c = presets.get(preset).camera
        # A uniform distribution's spread is half its interval.
        share = 1 if c.kind == "gaussian" else 3**-0.5
        expected = [
            (c.azimuth_mean - math.pi / 2, c.azimuth_spread * share),
            (c.polar_mean - math.pi / 2, c.polar_spread * share),
            (c.radius, 0.0),
            (c.focal, 0.0),
        ]
        head += [f"{preset}: mean", "std"]
        rows = [[*row, f"{a:.4f}", f"{b:.4f}"] for row, (a, b) in zip(rows, expected, strict=True)]
    return table(head, rows)
