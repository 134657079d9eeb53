"""Validation of an EG3D data set: everything that is wrong with it, file by file, and how its labels lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen import camera, presets

from .dataset import SUFFIXES, Files, label_fault, read_ahead

_CHUNK = 32
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    images: int
    """Images with a label, damaged ones included."""
    unlabelled: int
    """Image files that dataset.json does not name: they are never read."""
    size: tuple[int, int] | None
    """Width and height of most images."""
    labels: Tensor  # [N, 25]
    """Those that are sound."""
    errors: list[str]
    """A line for every fault, with the file and the reason."""

    @property
    def mirrored(self) -> float:
        """Share of the labels whose mirror image (camera.mirror) is a label, too."""
        seen, twins = (_rounded(labels) for labels in (self.labels, camera.mirror(self.labels)))
        known = set(seen)
        return sum(twin in known for twin in twins) / max(len(twins), 1)


def check(
    path: str | Path,
    deep: bool = False,
    workers: int = 0,
    preset: str | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Report:
    """Read a data set's labels and its images' headers, or with `deep` decode every image.

    workers: processes that read, 0 for this one. preset: whose resolution the images must have. progress:
    passes on what it is given, with the number of images.
    Raises: FileNotFoundError or ValueError where there is no data set, or no labels in it.
    """
    resolution = presets.get(preset).resolution if preset else None
    files = Files(path)
    names, errors = files.names(), []
    errors += [f"{files.where} holds {name} {n} times" for name, n in Counter(names).items() if n > 1]
    named: dict[str, list] = {}
    for entry in files.labels():
        if fault := label_fault(entry):
            errors.append(f"{files.where}: {fault}")
        elif entry[0] in named:
            errors.append(f"{files.where}: dataset.json names {entry[0]} twice")
        elif entry[0].lower().endswith(SUFFIXES):
            named[entry[0]] = entry[1]
    if not named and not errors:
        raise ValueError(f"{files.where}: dataset.json names no {', '.join(SUFFIXES)} file")

    labels, listed = torch.tensor(list(named.values())).reshape(-1, 25), list(named)
    faults = camera_faults(labels)
    errors += [f"{files.where}: {listed[i]}: {fault}" for i, fault in faults.items()]
    labels = labels[[i not in faults for i in range(len(labels))]]

    sizes: dict[str, tuple[int, int]] = {}
    chunks = [listed[i : i + _CHUNK] for i in range(0, len(listed), _CHUNK)]
    found = (item for chunk in read_ahead(_Sizes(files, deep), chunks, workers) for item in chunk)
    for name, size in zip(listed, progress(found, len(listed)), strict=True):
        if isinstance(size, str):
            errors.append(size)
        else:
            sizes[name] = size
    usual = Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    for name, size in sizes.items():
        wrong = f"{files.where}: {name} has {size[0]} x {size[1]} pixels"
        if size[0] != size[1]:
            errors.append(f"{wrong}, images must be square")
        elif size != usual:
            errors.append(f"{wrong}, most images {usual[0]} x {usual[1]}")
    if resolution and usual and usual != (resolution, resolution):
        errors.append(
            f"{files.where} has images of {usual[0]} x {usual[1]} pixels, {preset} of {resolution} x "
            f"{resolution}"
        )
    unlabelled = sum(name.lower().endswith(SUFFIXES) and name not in named for name in set(names))
    return Report(len(named), unlabelled, usual, labels, errors)


def camera_faults(labels: Tensor) -> dict[int, str]:  # [N, 25]
    """What is wrong with labels as cameras in EG3D's convention, by their indices."""
    pose, k = camera.split_label(labels)
    rotation, position = pose[:, :3, :3], pose[:, :3, 3]
    skewed = (rotation.mT @ rotation - torch.eye(3)).abs().amax((1, 2))
    last = pose.new_tensor([0, 0, 0, 1])
    focal, centre = k[:, [0, 1], [0, 1]], k[:, :2, 2]
    # The first that holds is told. NaN can't be: label_fault has seen to it.
    tests = [
        (((pose[:, 3] - last).abs() > _TOLERANCE).any(1), "the pose's last row is not 0, 0, 0, 1"),
        (skewed > _TOLERANCE, "the pose's rotation is not orthonormal"),
        (torch.linalg.det(rotation) < 0, "the pose's rotation is a reflection"),
        (
            (rotation[:, :, 2] * position).sum(1) > 0,
            "the camera looks away from the origin; its axes must be x right, y down, z forward",
        ),
        (
            ((k[:, 2] - last[1:]).abs() > _TOLERANCE).any(1) | (k[:, 1, 0].abs() > _TOLERANCE),
            "the intrinsics are not a pinhole camera's",
        ),
        (((focal < 0.1) | (focal > 100)).any(1), "the focal length is not in image sizes (0.1 to 100)"),
        (((centre < 0) | (centre > 1)).any(1), "the centre is not in image sizes, or outside the image"),
    ]
    faults: dict[int, str] = {}
    for wrong, fault in tests:
        for i in wrong.nonzero().flatten().tolist():
            faults.setdefault(i, fault)
    return dict(sorted(faults.items()))


class _Sizes:
    """Width and height of each image of a chunk of names, or the error in their place."""

    def __init__(self, files: Files, deep: bool):
        self.files, self.deep = files, deep

    def __getitem__(self, names: list[str]) -> list[tuple[int, int] | str]:
        return [self._size(name) for name in names]

    def _size(self, name: str) -> tuple[int, int] | str:
        try:
            with self.files.image(name, whole=self.deep) as image:
                if self.deep:
                    image.convert("RGB")
                return image.size
        except (OSError, ValueError) as error:
            return str(error)


def _rounded(labels: Tensor) -> list[tuple]:
    return list(map(tuple, (labels * 1000).round().int().tolist()))
