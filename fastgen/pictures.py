"""What to look at, from where, and how it is shown: labelled sheets as PNG, films as MP4."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .camera import CameraDistribution

INK, PAPER = (30, 30, 30), (255, 255, 255)


def latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """Latents [N, z_dim] of seeds."""
    # The stream of numpy's old generator is frozen: a seed is the same latent everywhere, for good.
    return torch.from_numpy(np.stack([np.random.RandomState(s).randn(z_dim) for s in seeds])).float()


def sweep(cameras: CameraDistribution, n: int) -> tuple[Tensor, list[str]]:
    """n labels [n, 25] from one side to the other at the mean height, and their names in degrees."""
    spread = cameras.azimuth_spread
    if spread >= 3:
        offsets = torch.arange(n) / n * 2 * math.pi
    else:
        reach = (1.5 if cameras.kind == "gaussian" else 0.9) * spread
        offsets = torch.linspace(-reach, reach, n) if n > 1 else torch.zeros(1)
    names = [f"{round(math.degrees(x)):+d}°" if abs(x) > 1e-6 else "0°" for x in offsets.tolist()]
    return cameras.at(cameras.azimuth_mean + offsets, cameras.polar_mean), names


def views(
    model: nn.Module,  # a teacher or a student
    ws: Tensor,  # [1, num_ws, w_dim]
    c: Tensor,  # [K, 25]
) -> Iterator[Tensor]:
    """The images [1, 3, H, W] of one latent from K poses, one by one; a teacher's planes are made once."""
    planes = model.backbone_planes(ws) if hasattr(model, "backbone_planes") else None
    for pose in c.split(1):
        if planes is None:
            yield model.synthesis(ws, pose)["image"]
        else:
            yield model.super_resolve(model.render(planes, pose)["feature_image"], ws)


def pixels(images: Tensor) -> np.ndarray:  # [..., 3, H, W] in [-1, 1]
    """Images as bytes [..., H, W, 3]."""
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().movedim(-3, -1).cpu().numpy()


def sheet(
    rows: Sequence[Sequence[Tensor | np.ndarray]],  # [3, H, W] or [1, 3, H, W], or bytes [H, W, 3]
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    scale: int = 1,
) -> np.ndarray:
    """Lay images out in a table: labels on the left of each row, captions above its images, a title on top.

    captions: those of the first row, the second, ...; rows beyond have none. scale: enlarges the images.
    Returns: bytes [H, W, 3], both sizes even.
    """
    from PIL import Image, ImageDraw

    rows = [[_bytes(image) for image in row] for row in rows]
    height, width = (scale * n for n in rows[0][0].shape[:2])
    gap, pad = 4, 8
    font, heading = _font(min(max(height // 9, 12), 24)), _font(min(max(height // 7, 14), 30))
    line = int(font.size * 1.6)
    left = max((_width(font, text) + 2 * pad for text in labels), default=gap)
    tops, y = [], int(heading.size * 1.7) if title else 0
    for i in range(len(rows)):
        y += line if i < len(captions) else gap
        tops.append(y)
        y += height
    across = left + max(len(row) for row in rows) * (width + gap)
    # H.264 halves the colour's resolution, so sizes are even.
    size = (max(across, _width(heading, title) + 2 * pad), y + gap)
    paper = Image.new("RGB", tuple(n + n % 2 for n in size), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((pad, pad // 2), title, INK, heading)
    for i, row in enumerate(rows):
        if labels:
            draw.text((left - pad, tops[i] + height // 2), labels[i], INK, font, anchor="rm")
        for j, image in enumerate(row):
            x = left + j * (width + gap)
            if i < len(captions):
                draw.text((x + width // 2, tops[i] - line // 2), captions[i][j], INK, font, anchor="mm")
            picture = Image.fromarray(image)
            picture = picture if scale == 1 else picture.resize((width, height), Image.Resampling.BICUBIC)
            paper.paste(picture, (x, tops[i]))
    return np.asarray(paper)


def progress(items: Iterable, total: int, name: str) -> Iterable:
    """Pass items on, with a bar that shows the time left (on a terminal; nothing elsewhere)."""
    from rich.progress import track

    return track(items, name, total, transient=True, disable=not sys.stdout.isatty())


def save_png(path: str | Path, picture: Tensor | np.ndarray):
    """Write an image, [3, H, W] or [1, 3, H, W] in [-1, 1], or a sheet's bytes."""
    from PIL import Image

    Image.fromarray(_bytes(picture)).save(prepare(path, ".png"))


def save_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: int = 30):  # [H, W, 3] bytes, even sizes
    """Write a film (H.264), frame by frame as they come."""
    import imageio

    options = {"fps": fps, "codec": "libx264", "quality": 8, "macro_block_size": 2}
    with imageio.get_writer(prepare(path, ".mp4"), **options) as film:
        for frame in frames:
            film.append_data(frame)


@torch.inference_mode()
def save_orbit(
    path: str | Path,
    models: dict[str, nn.Module],  # by caption, from left to right
    styles: dict[str, Tensor],  # ws [1, num_ws, w_dim] by label, from top to bottom
    c: Tensor,  # [K, 25]  a pose a frame
):
    """Write a film of what models make of the same styles from the same poses."""
    tracks = [views(model, w, c) for w in styles.values() for model in models.values()]

    def draw():
        for frame in progress(zip(*tracks, strict=True), len(c), "film"):
            rows = [frame[i : i + len(models)] for i in range(0, len(frame), len(models))]
            yield sheet(rows, list(styles), [list(models)], scale=2)

    save_mp4(path, draw())


def prepare(path: str | Path, suffix: str) -> Path:
    """Make the folder of a file that is to be written. Raises ValueError or OSError if it can't be."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: the file name must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    prepare_folder(path.parent)
    return path


def prepare_folder(path: str | Path) -> Path:
    """Make a folder. Raises OSError if it can't be made or written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permissions don't tell all (read-only disks, /proc), a file does.
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise NotADirectoryError(f"{error.filename} is a file, not a folder") from None
    except OSError as error:
        raise type(error)(f"can't write to the folder {path}: {error.strerror}") from None
    return path


def _bytes(image: Tensor | np.ndarray) -> np.ndarray:
    return pixels(image.reshape(image.shape[-3:])) if isinstance(image, Tensor) else image


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(font, text: str) -> int:
    return int(font.getlength(text)) + 1
