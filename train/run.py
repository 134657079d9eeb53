"""What a training run keeps besides its numbers: files, random state, and manners towards signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgen import pictures
from fastgen._files import replacing, write_text
from fastgen.camera import CameraDistribution

from .config import TrainConfig
from .data import Poses, generator_for, render_targets
from .metrics import psnr

# Fields that may differ between a run and its continuation: they change no number of it, or are what a run
# that has diverged needs to go on.
_FREE_ON_RESUME = (
    *("lr", "lr_adversarial", "lr_discriminator", "betas", "betas_adversarial"),
    "out",
    "resume",
    "log_every",
    "grid_every",
    "grid_images",
    "orbit_every",
    "checkpoint_every",
    "tensorboard",
    "timeout",
    "accumulate",
    "workers",
    "compile",
)


class StopSignals:
    """Within its context the first Ctrl-C or SIGTERM only sets `requested`; a second one acts as usual."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self):
        # Only the main thread may install handlers; elsewhere the program keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop(self, *_):
        self.requested = True
        self.__exit__()


class Log:
    """stats.jsonl and TensorBoard events. A resumed run first drops the lines past its checkpoint."""

    def __init__(self, out: Path, config: TrainConfig, step: int):
        path = out / "stats.jsonl"
        lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        self._file = path.open("a")
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]):
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray):  # [H, W, 3] bytes
        if self._board is not None:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        if self._board is not None:
            self._board.close()


class Samples:
    """Teacher and student at latents and poses unseen in training: grids/*.png, the teacher's images above
    the student's, and orbits/*.mp4, films of the first of these latents."""

    def __init__(self, config: TrainConfig, teacher: nn.Module, poses: Poses, device: torch.device):
        generator = generator_for(config.seed, "grid")
        z = torch.randn(config.grid_images, teacher.z_dim, generator=generator).to(device)
        c = poses.sample(config.grid_images, generator).to(device)
        with torch.no_grad():
            ws = teacher.mapping(z, c)
        # One by one: a full-size teacher's volume rendering is the largest thing in memory.
        rows = [
            render_targets(teacher, ws[i : i + 1], c[i : i + 1], config.neural_rendering_resolution)
            for i in range(config.grid_images)
        ]
        self.target = {key: torch.cat([row[key] for row in rows]) for key in ("ws", "c", "image")}
        self.out, self.teacher = Path(config.out), teacher
        # A film's poses are a distribution's; labels are none.
        known = isinstance(poses, CameraDistribution)
        self.camera = poses if known else getattr(teacher, "camera", None)

    @torch.no_grad()
    def grid(self, step: int, student: nn.Module) -> tuple[np.ndarray, float]:
        """Write step_NNNNNN.png; returns it, and the student's mean PSNR to the teacher on it, in dB."""
        image = student.synthesis(self.target["ws"], self.target["c"])["image"]
        rows = [pictures.pixels(self.target["image"]), pictures.pixels(image)]
        sheet = pictures.sheet(rows, ["teacher", "student"], title=f"step {step}")
        pictures.save_png(self.out / "grids" / f"step_{step:06d}.png", sheet)
        return sheet, psnr(image, self.target["image"]).mean().item()

    def orbit(self, step: int, student: nn.Module):
        """Write step_NNNNNN.mp4, where the teacher's cameras are known."""
        if self.camera is not None:
            models = {"teacher": self.teacher, "student": student}
            path = self.out / "orbits" / f"step_{step:06d}.mp4"
            poses = self.camera.orbit(60).to(self.target["c"].device)
            pictures.save_orbit(path, models, {f"step {step}": self.target["ws"][:1]}, poses)


def read_config(out: Path) -> TrainConfig | None:
    """The configuration of the run in a folder; its checkpoint's where config.json is missing or damaged, and
    None where there is neither.

    Raises: ValueError, of config.json, where both are damaged.
    """
    damaged = None
    try:
        return TrainConfig.load(out / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:
        damaged = error
    # Whatever is wrong with the checkpoint, read_checkpoint says it.
    with contextlib.suppress(Exception):
        return TrainConfig(**torch.load(out / "resume.pt", map_location="cpu", weights_only=True)["config"])
    if damaged is not None:
        raise damaged
    return None


def read_checkpoint(path: Path, config: TrainConfig) -> dict | None:
    """The state to go on from, or None for a new run.

    Raises: ValueError where `out` holds a run that config does not resume, or resumes with other numbers, or
      the file is damaged;
      FileNotFoundError where there is nothing to resume.
    """
    if not config.resume:
        if path.exists():
            raise ValueError(f"out: {path.parent} holds a run; resume it, or choose another folder")
        return None
    if not path.is_file():
        raise FileNotFoundError(f"resume: no checkpoint to continue from: {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(saved["config"])
        missing = {"step", "images", "random", "student", "average", "student_optimiser"} - saved.keys()
    except PermissionError:
        raise
    # Whatever else reading runs into, from the zip's end to the tensors' types, is the file's content.
    except Exception as error:
        raise ValueError(f"resume: {path} is damaged, or not a run's checkpoint") from error
    if missing:
        raise ValueError(f"resume: {path} is not a run's checkpoint: it lacks {', '.join(sorted(missing))}")
    now = dataclasses.asdict(config)
    for name in sorted(before - now.keys()):
        raise ValueError(f"resume: {path} is another version's, with an option {name}")
    for name in now:
        was = before.get(name, getattr(TrainConfig, name))
        # A run that had no second stage has no discriminator.
        longer = name == "stage2_steps" and 0 < was <= now[name]
        if name not in _FREE_ON_RESUME and was != now[name] and not longer:
            raise ValueError(f"resume: {name} was {was!r} in {path.parent}, now it is {now[name]!r}")
    return saved


def write_checkpoint(path: Path, state: dict, config: TrainConfig):
    """Write the state and the random generators' whole or not at all: a crash must not cost the last one."""
    with replacing(path) as partial:
        torch.save({**state, "random": random_state(), "config": dataclasses.asdict(config)}, partial)


class LastGood:
    """A copy of a run's state at a step that had finite losses, to go back to: a step's losses show what the
    update before it has done."""

    def __init__(self, parts: dict[str, nn.Module | torch.optim.Optimizer]):
        self._parts = parts.values()
        self._copies: dict[Tensor, Tensor] = {}
        self.step: int | None = None
        self._images, self._random = 0, {}

    def _tensors(self) -> Iterator[Tensor]:
        for part in self._parts:
            if isinstance(part, nn.Module):
                yield from (*part.parameters(), *part.buffers())
            else:
                yield from (x for state in part.state.values() for x in state.values())

    @torch.no_grad()
    def keep(self, step: int, images: int, random: dict):
        """Copy the state, which is that of `step` done; random is that of its generators."""
        self.step, self._images, self._random = step, images, random
        tensors = list(self._tensors())
        if len(tensors) != len(self._copies):  # optimisers make theirs when they first step
            self._copies = {x: x.clone() for x in tensors}
        elif tensors:
            torch._foreach_copy_(list(self._copies.values()), tensors)

    @torch.no_grad()
    def restore(self) -> tuple[int, int]:
        """Put everything back. Returns: steps and images done."""
        for part in self._parts:
            if isinstance(part, torch.optim.Optimizer):
                new = [p for p, state in part.state.items() if state["exp_avg"] not in self._copies]
                for p in new:
                    del part.state[p]
        for x, copy in self._copies.items():
            x.copy_(copy)
        set_random_state(self._random)
        return self.step, self._images


def random_state() -> dict:
    """The state of every global generator."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict):
    """Put every global generator where random_state found it."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
