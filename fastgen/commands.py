"""The commands of `fastgen`: their options, and what each calls."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import fastgen
from fastgen import presets
from fastgen._text import table
from fastgen.train.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    import torch

    from .camera import CameraDistribution

# So that --help shows what a value looks like.
Png = Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")]
Mp4 = Annotated[Path | None, tyro.conf.arg(metavar="FILE.mp4")]


@dataclass(frozen=True)
class Info:
    """Show versions, this machine, and which backend serves each op and why."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print everything as one JSON object."""

    def run(self):
        from . import info

        found = info.collect()
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for part in ("versions", "machine"):
            rows = [[key.replace("_", " "), _shown(value)] for key, value in found[part].items()]
            print(table([part, ""], rows), end="\n\n")
        rows = [[name, "yes" if b["usable"] else "no", b["why"]] for name, b in found["backends"].items()]
        print(table(["backend", "usable", "where, or why not"], rows), end="\n\n")
        rows = []
        for op, devices in found["ops"].items():
            why = []
            for device, by in devices.items():
                unusable = by["why"] == found["backends"][device]["why"]
                if by["backend"] == "reference":
                    why.append(f"{device}: {'library not usable, see above' if unusable else by['why']}")
            # A library can be there and have no device to run on.
            names = [
                by["backend"] + (" (unusable)" if by["why"] and by["backend"] != "reference" else "")
                for by in devices.values()
            ]
            rows.append([op, *names, "; ".join(why)])
        print(table(["op", *(f"on {device}" for device in devices), "why the reference"], rows))


@dataclass(frozen=True)
class Convert:
    """Turn an original EG3D checkpoint (.pkl) into a .safetensors file, without running any code from it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.pkl")]
    """The original pickle."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.safetensors")]
    """The .safetensors file to write."""

    def run(self):
        from . import checkpoint, pictures

        pictures.prepare(self.out, ".safetensors")
        header = checkpoint.convert(self.source, self.out)
        teacher, discriminator = fastgen.load_teacher(self.out), fastgen.load_discriminator(self.out)
        without = header.get("discriminator_note") or "none in the file"
        rows = [
            ["generator", _size(teacher)],
            ["discriminator", _size(discriminator) if discriminator else without],
            [
                "image",
                f"{teacher.img_resolution} x {teacher.img_resolution}, {teacher.config['superresolution']}",
            ],
            [
                "volume rendering",
                f"{teacher.neural_rendering_resolution} x {teacher.neural_rendering_resolution}",
            ],
            ["plane axes", header["plane_axes"]],
            ["source SHA-256", header["source_sha256"] or "unknown"],
        ]
        print(table([header["kind"], str(self.out)], rows))


@dataclass(frozen=True)
class Render:
    """Render latents of a teacher or a student: a labelled grid, a film of an orbit, or plain images."""

    model: str
    """'toy' (shipped), or a teacher's or student's .safetensors, or an original .pkl."""
    seeds: str = "0-3"
    """Latents, such as 0-3,7. A seed is the same latent everywhere."""
    grid: Png = None
    """Write this .png: one row for each seed, from several poses."""
    orbit: Mp4 = None
    """Write this .mp4: all seeds side by side, from a closed tour of poses."""
    image: Png = None
    """Write this .png: the front view of a seed, without labels. Of several seeds, NAME-SEED.png each."""
    truncation: float = 1.0
    """Truncation psi: 1 is the full variety, 0 the average image."""
    poses: int = 5
    """Poses in the grid, from one side to the other."""
    frames: int = 120
    """Frames of the film."""
    fps: int = 30
    """Frames per second of the film."""
    camera: str = "auto"
    """Where to look from: 'auto' (what the file says), or the name of a preset, such as ffhq512."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the convolutions: 'auto' is float32, and float16 on a GPU where the checkpoint says so."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""

    def __post_init__(self):
        parse_seeds(self.seeds)
        for name, most in (("poses", 1000), ("frames", 100_000), ("fps", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")
        if not abs(self.truncation) <= 2:
            raise ValueError(f"truncation must be in [-2, 2], got {self.truncation}")
        if not (self.grid or self.orbit or self.image):
            raise ValueError("nothing to write: give --grid, --orbit or --image")

    def run(self):
        import torch

        from . import info, pictures

        device = info.find_device(self.device)
        model = load_model(self.model, None if self.dtype == "auto" else getattr(torch, self.dtype)).to(
            device
        )
        cameras = find_cameras(model, self.camera)
        for path, suffix in ((self.grid, ".png"), (self.image, ".png"), (self.orbit, ".mp4")):
            if path:
                pictures.prepare(path, suffix)
        seeds = parse_seeds(self.seeds)
        with torch.inference_mode():
            # The mapping sees the front pose throughout, so that the identity doesn't turn with the camera.
            z, front = pictures.latents(seeds, model.z_dim).to(device), cameras.front().to(device)
            ws = [model.mapping(latent, front, truncation_psi=self.truncation) for latent in z.split(1)]
            if self.image:
                for seed, w in zip(seeds, ws, strict=True):
                    stem = self.image.stem if len(seeds) == 1 else f"{self.image.stem}-{seed}"
                    path = self.image.with_stem(stem)
                    pictures.save_png(path, next(pictures.views(model, w, front)))
                    print(path)
            if self.grid:
                c, columns = pictures.sweep(cameras, self.poses)
                rows = [list(pictures.views(model, w, c.to(device))) for w in ws]
                names = [f"seed {seed}" for seed in seeds]
                pictures.save_png(self.grid, pictures.sheet(rows, names, [columns], self._title()))
                print(self.grid)
            if self.orbit:
                film = self._film(model, ws, seeds, cameras.orbit(self.frames).to(device))
                pictures.save_mp4(self.orbit, film, self.fps)
                print(self.orbit)

    def _film(self, model, ws: list[torch.Tensor], seeds: list[int], c: torch.Tensor):
        from . import pictures

        def in_rows(items) -> list:
            return [items[i : i + 4] for i in range(0, len(items), 4)]

        captions = in_rows([f"seed {seed}" for seed in seeds])
        tracks = [pictures.views(model, w, c) for w in ws]
        for views in pictures.progress(zip(*tracks, strict=True), len(c), "orbit"):
            yield pictures.sheet(in_rows(views), captions=captions, title=self._title())

    def _title(self) -> str:
        psi = f", truncation {self.truncation:g}" if self.truncation != 1 else ""
        return f"{Path(self.model).stem}{psi}"


@dataclass(frozen=True)
class Export:
    """Write a student as two ONNX files of standard operators: OUT.onnx makes images of styles and poses,
    OUT.mapping.onnx styles of latents."""

    student: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDENT.safetensors")]
    """The student, such as the demo's student.safetensors."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.onnx")]
    """The .onnx file to write; the mapping is written beside it."""
    fp16: tyro.conf.FlagCreatePairsOff[bool] = False
    """Convolutions in float16. What goes in and comes out stays float32."""
    opset: int = 17
    """The version of ONNX's operators, from 13 on."""
    noise: tyro.conf.FlagCreatePairsOff[bool] = False
    """Noise is an input of each layer, instead of the student's constant one."""

    def run(self):
        try:
            from . import export
        except ModuleNotFoundError as error:
            if error.name != "onnx":
                raise
            raise ValueError("export needs onnx: pip install onnx") from None

        for path in export.export(self.student, self.out, self.fp16, self.opset, self.noise):
            print(path)


@dataclass(frozen=True)
class Demo:
    """Distil the toy teacher into a student, both stages, in minutes; measure, film and report."""

    out: Path = Path("out/demo")
    """Folder for report.md, side_by_side.png, orbit.mp4, curves.png, metrics.json, student.safetensors; what
    an earlier demo left there is replaced."""
    teacher: str = "toy"
    """'toy' (shipped), or any small teacher's .safetensors or .pkl."""
    minutes: float = 8.0
    """Time budget. On a machine too slow for the full length, both stages are shortened to keep it; on one
    that becomes slower meanwhile, stage 1."""
    length: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Training length as a share of the full one, whatever time it takes; None: 1, or less to keep to the
    budget."""
    images: int = 128
    """Held-out images to measure on, rounded up to eights."""
    frames: int = 120
    """Frames of the film."""
    perceptual_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pth")] = None
    """torchvision's vgg16 weights on disk, to report LPIPS; without, random VGG16 features, and so named."""
    seed: int = 0
    """Fixes everything drawn at random; together with --length, it fixes the student."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""

    def __post_init__(self):
        for name in ("images", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("minutes", "length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise ValueError(f"{name} must be above 0 and below 1000, got {value}")

    def run(self):
        from .train import demo

        demo.run(**_values(self, Demo))


@dataclass(frozen=True)
class Evaluate:
    """Measure a student beside its teacher: how alike they are, and how good and how consistent both."""

    student: Annotated[Path, tyro.conf.arg(metavar="FILE.safetensors")]
    """The student."""
    teacher: str
    """What it was distilled from: 'toy' (shipped), or a teacher's .safetensors or .pkl."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DATASET")] = None
    """A .zip or a folder in EG3D's layout: the poses, and with --features the images that FID and KID compare
    with; without, the teacher's own poses, and its images at other latents."""
    images: int = 128
    """Images to measure on, two of each latent, rounded up to eights."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The network of FID and KID, which are left out without: TorchScript or an exported program that maps
    bytes [N, 3, H, W] to features [N, D], or torchvision's inception_v3 weights."""
    identity: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The network whose embeddings tell one head from another, likewise; without, pooled VGG16 features."""
    perceptual_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pth")] = None
    """torchvision's vgg16 weights on disk, to report LPIPS; without, random VGG16 features, and so named."""
    pose: str = "auto"
    """What tells poses from images: 'toy' (shipped), 'none', or a file of python -m fastgen.train.pose;
    'auto': 'toy' where that is the teacher."""
    camera: str = "auto"
    """Where to look from: 'auto' (what the data set or the teacher's file says), or the name of a preset."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where to write all numbers, the options, the machine and the versions; without, beside the student:
    student.evaluation.json."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""

    def __post_init__(self):
        if not 1 <= self.images <= 10_000_000:
            raise ValueError(f"images must be from 1 to 10000000, got {self.images}")

    def run(self):
        from .train import evaluate

        evaluate.run(**_values(self, Evaluate))


@dataclass(frozen=True)
class Bench:
    """Time what makes an image, from latent and camera to pixels: teacher and students by fastgen, beside
    plain PyTorch operations, torch.compile and ONNX Runtime."""

    preset: Literal[tuple(presets.PRESETS)] = "ffhq512"
    """Whose networks, with random weights, but for the toy's teacher."""
    batch: tuple[int, ...] = (1,)
    """Images at a time, one number or several."""
    only: tuple[str, ...] = ()
    """These generators alone, such as teacher student-compact; without, all. Speed-ups need teacher."""
    student: Annotated[Path | None, tyro.conf.arg(metavar="FILE.safetensors")] = None
    """A student to measure, too, of a teacher like the preset's."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write all rows to this file."""
    rounds: int = 5
    """Times that each case is measured, in turn with all others; it has their median."""
    limit: float = 20.0
    """Seconds after which a case is not measured again, once it has been three times."""
    device: str = "auto"
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."""

    def __post_init__(self):
        if not self.batch or not all(1 <= n <= 4096 for n in self.batch):
            raise ValueError(f"batch must be numbers from 1 to 4096, got {self.batch}")
        if not 1 <= self.rounds <= 10_000:
            raise ValueError(f"rounds must be from 1 to 10000, got {self.rounds}")
        if not self.limit >= 0:
            raise ValueError(f"limit must be at least 0, got {self.limit}")

    def run(self):
        from . import bench, info, pictures

        if self.json is not None:
            pictures.prepare(self.json, ".json")
        batches = tuple(sorted(set(self.batch)))
        device = info.find_device(self.device)
        rows = []
        for rows in bench.run(self.preset, batches, self.only, self.student, self.rounds, self.limit, device):
            if self.json is not None:
                self.json.write_text(json.dumps(rows, indent=2) + "\n")
        print(bench.shown(rows))


@dataclass(frozen=True)
class Train(TrainConfig):
    """Distil a teacher into a student: the full trainer. Ctrl-C saves; --resume goes on."""

    preset: Literal[("auto", "paper", *PRESETS)] = "auto"
    """Where the other options' defaults come from, --help shows them; 'auto': 'toy' for the toy teacher, else
    'paper'. With --resume they come from the run itself instead."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved options, the networks' sizes, and what a step takes here, and train nothing."""
    watch: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Show how the run in this folder is going, on one screen, and train nothing."""

    def run(self):
        from .train.loop import distil
        from .train.watch import dry_run, watch

        if self.watch is not None:
            return watch(self.watch)
        if self.teacher != "toy" and not Path(self.teacher).is_file():
            raise FileNotFoundError(f"{self.teacher}: no such checkpoint file")
        if self.dry_run:
            if text := dry_run(TrainConfig(**_values(self, TrainConfig))):
                print(text)
            return
        run = distil(TrainConfig(**_values(self, TrainConfig)))
        if run.is_first:
            print(f"{run.out / 'student.safetensors'}: step {run.step} of {self.steps}")
        if run.interrupted:
            if run.is_first:
                print("stopped early; --resume goes on from here", file=sys.stderr)
            sys.exit(130)


@dataclass(frozen=True)
class Patch:
    """List the StyleGAN and EG3D ops that a repository carries, with the lines that put fastgen's in their
    place; edits nothing. --run SCRIPT ARG... runs a script of it with these in place."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The repository."""
    run_script: Annotated[Path | None, tyro.conf.arg(name="run", metavar="SCRIPT ARG...")] = None
    """Run this Python file, from the current folder or from DIR, with all arguments that follow it. Its exit
    code is that of the command."""
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self):
        from .compat import scan

        found = scan.scan(self.folder)
        if self.run_script is not None:
            scripts = [path for path in (self.run_script, self.folder / self.run_script) if path.is_file()]
            if not scripts:
                raise FileNotFoundError(f"{self.run_script}: no such file, here or in {self.folder}")
            sys.exit(scan.run(found, scripts[0], self.arguments))
        if not found:
            print(f"{self.folder}: none of the ops that fastgen replaces")
            return
        print(table(["dialect", "imported as", "files"], [_row(f) for f in found]))
        print("\nBefore the first import of these:\n\n    import fastgen.compat")
        for line in dict.fromkeys(f.line for f in found):
            print(f"    {line}")


def _row(found) -> list[str]:
    return [found.dialect, found.package, ", ".join(map(str, found.files))]


def parse_seeds(text: str) -> list[int]:
    """Numbers and ranges such as '0-3,7', each at most once; no more than 10,000."""
    seeds = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < 2**32:
            raise ValueError(f"seeds must look like 0-3,7, got {text!r}")
        if len(seeds) + last - first >= 10_000:
            raise ValueError(f"seeds must be at most 10,000, got {text!r}")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def load_model(path: str, dtype: torch.dtype | None) -> torch.nn.Module:
    """The teacher or the student of a file, its convolutions in this dtype."""
    from . import checkpoint

    student = checkpoint.read(path)[0]["kind"] == "student"
    return (fastgen.load_student if student else fastgen.load_teacher)(path, dtype)


def find_cameras(model: torch.nn.Module, name: str) -> CameraDistribution:
    """Where to look at a model from."""

    if name != "auto" and name not in presets.PRESETS:
        raise ValueError(f"camera must be one of auto, {', '.join(presets.PRESETS)}, got {name!r}")
    if name != "auto":
        return presets.get(name).camera
    if model.camera is None:
        raise ValueError(f"the file names no poses; give --camera, one of {', '.join(presets.PRESETS)}")
    return model.camera


def _shown(value) -> str:
    if isinstance(value, list):
        value = ", ".join(value)
    return str(value or "none")


def _size(module: torch.nn.Module) -> str:
    return f"{type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters"


def _values(options, cls: type) -> dict:
    return {field.name: getattr(options, field.name) for field in fields(cls)}
