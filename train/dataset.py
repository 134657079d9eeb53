"""EG3D's data sets: images in a folder or a .zip, with their camera labels in its dataset.json.

dataset.json is {"labels": [[file name, 25 numbers], ...]}; file names are relative to it, with forward
slashes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastgen import camera, pictures
from fastgen._files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")


class Files:
    """The files of a data set by their names; a zip is opened anew in every process that reads it.

    `option` is what errors call the path's option.
    Raises: FileNotFoundError, or ValueError where the path is neither a folder nor a zip file.
    """

    def __init__(self, path: str | Path, option: str = ""):
        self.path = Path(path)
        self.where = f"{option}: {path}" if option else str(path)
        self._zip: zipfile.ZipFile | None = None
        self._process = 0
        if not self.path.exists():
            raise FileNotFoundError(f"{self.where}: no such data set")
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise ValueError(f"{self.where} is neither a folder nor a zip file")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_zip": None}

    def open(self, name: str) -> IO[bytes]:
        """A file to read. FileNotFoundError or KeyError if there is none of that name."""
        return (self.path / name).open("rb") if self.path.is_dir() else self._archive().open(name)

    def names(self) -> list[str]:
        """Of all files; a zip can hold a name twice."""
        if self.path.is_dir():
            return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]
        return [name for name in self._archive().namelist() if not name.endswith("/")]

    def labels(self) -> list:
        """The entries of dataset.json, of which `label_fault` says whether they are names and labels.

        Raises: FileNotFoundError where there is no dataset.json, ValueError where it can't be read.
        """
        try:
            with self.open("dataset.json") as file:
                content = json.load(file)
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(f"{self.where} has no dataset.json") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.where} is damaged: {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.where}: dataset.json is not JSON: {error}") from None
        labels = content.get("labels") if isinstance(content, dict) else None
        if not labels or not isinstance(labels, list):
            raise ValueError(f"{self.where}: dataset.json has no labels")
        return labels

    @contextlib.contextmanager
    def image(self, name: str, whole: bool = True) -> Iterator[Image]:
        """A Pillow image; unless `whole`, only its header is read.

        Raises: FileNotFoundError, or ValueError where it can't be read, also from what is done within.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with self.open(name) as file, Image.open(io.BytesIO(file.read()) if whole else file) as image:
                yield image
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(f"{self.where} has no {name}") from None
        # Whatever else reading runs into, from the zip's checksum to the colours' number, is the content.
        except Exception as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "not an image, by its first bytes" if unknown else error
            raise ValueError(f"{self.where}: can't read the image {name}: {reason}") from None

    def _archive(self) -> zipfile.ZipFile:
        # A handle that came by fork shares its place in the file with the other process's.
        if self._zip is None or self._process != os.getpid():
            try:
                self._zip, self._process = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.where} is damaged: {error}") from None
        return self._zip


def label_fault(entry: object) -> str | None:
    """Why an entry of dataset.json is not a name and 25 numbers."""
    name, label = entry if isinstance(entry, list) and len(entry) == 2 else (entry, None)
    sound = isinstance(name, str) and isinstance(label, list) and len(label) == 25
    if sound and all(type(x) in (int, float) and abs(x) < 1e30 for x in label):
        return None
    name = name[0] if isinstance(name, list) and name else name
    return f"the label of {name} must have 25 numbers"


class ImageDataset:
    """The images and labels of a data set. With `mirror` there are twice as many: those flipped left to
    right, with the labels of mirrored cameras, follow all others.

    Raises: FileNotFoundError or ValueError, naming the file, where a label or an image's header is not sound,
      or images are not square and of one size. All headers are read.
    """

    def __init__(self, path: str | Path, mirror: bool = False, option: str = "reals"):
        self.files = Files(path, option)
        where, entries = self.files.where, self.files.labels()
        for entry in entries:
            if fault := label_fault(entry):
                raise ValueError(f"{where}: {fault}")
        images = [(name, label) for name, label in entries if name.lower().endswith(SUFFIXES)]
        if not images:
            raise ValueError(f"{where}: dataset.json names no {', '.join(SUFFIXES)} file")
        self.names = [name for name, _ in images]
        labels = torch.tensor([label for _, label in images], dtype=torch.float32)
        self.labels = torch.cat([labels, camera.mirror(labels)]) if mirror else labels
        first = None
        for name in self.names:
            with self.files.image(name, whole=False) as image:
                size = image.size
            first = first or size
            if size != (first[0], first[0]):
                raise ValueError(
                    f"{where}: images must be square and of one size, {self.names[0]} has {first[0]} x "
                    f"{first[1]} pixels, {name} {size[0]} x {size[1]}"
                )
        self.resolution = first[0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] in [-1, 1] and label [25]."""
        return in_range(torch.from_numpy(self._pixels(index))), self.labels[index]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n poses [n, 25], drawn from the labels."""
        return self.labels[torch.randint(len(self), (n,), generator=generator)]

    def batch(
        self, n: int, generator: torch.Generator | None = None, rows: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of n images drawn at random the rows: bytes [n, H, W, 3], and their poses [n, 25]."""
        picks = torch.randint(len(self), (n,), generator=generator)[rows]
        return np.stack([self._pixels(i) for i in picks.tolist()]), self.labels[picks].numpy()

    def _pixels(self, index: int) -> np.ndarray:
        """Bytes [H, W, 3]."""
        mirrored, index = divmod(index, len(self.names))
        with self.files.image(self.names[index]) as image:
            pixels = np.array(image.convert("RGB"))
        return pixels[:, ::-1].copy() if mirrored else pixels


def in_range(pixels: Tensor) -> Tensor:
    """Bytes [..., H, W, 3] as images [..., 3, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def read_ahead(items, indices: Iterable[int], workers: int) -> Iterator:
    """items[i] for every index in turn, made by worker processes (0: by this one)."""
    loader = DataLoader(
        items,
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_signals if workers else None,
        collate_fn=_as_it_is,
        # Of its own, as workers' seeds would otherwise be drawn from the run's.
        generator=torch.Generator(),
    )
    return iter(loader)


def _leave_signals(_: int):
    """Ctrl-C and SIGTERM may be sent to the whole group; they are for the trainer, who ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item):
    return item


def write_zip(path: str | Path, items: Iterable[tuple[np.ndarray, list[float]]]) -> Path:
    """Write images, bytes [H, W, 3], and their labels, 25 numbers, as a data set: 00000/img00000000.png and
    so on, a thousand in a folder. The same items make the same bytes; it is written whole or not at all.
    """
    from PIL import Image

    path, labels = pictures.prepare(path, ".zip"), []

    def entry(name: str) -> zipfile.ZipInfo:
        # Without the time of writing; and readable where it is unpacked.
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o644 << 16
        return info

    # Not compressed, as PNG is.
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for i, (pixels, label) in enumerate(items):
            name, png = f"{i // 1000:05d}/img{i:08d}.png", io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            archive.writestr(entry(name), png.getvalue())
            labels.append([name, label])
        archive.writestr(entry("dataset.json"), json.dumps({"labels": labels}))
    return path
