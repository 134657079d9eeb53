"""Checkpoints: fastgen's safetensors files, and safe reading of EG3D's original pickles.

A fastgen file holds tensors named 'G.<state name>' (and 'D.<state name>' with a discriminator) and, in the
safetensors metadata under 'fastgen', a JSON header: kind ('teacher' or 'student'), G and D ({class, config}
or null), plane_axes, source_sha256, camera (a CameraDistribution's fields, or null).

Original EG3D pickles are read too, without running what they hold: see eg3d_pickle.py.
"""

import json
import os
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .camera import CameraDistribution
from .eg3d_pickle import CheckpointError, from_pickle

# The networks that a file may hold, and their modules.
CLASSES = {"Teacher": "teacher", "Student": "student", "DualDiscriminator": "discriminator"}
TOY = Path(__file__).parent / "assets" / "toy_teacher.safetensors"


def _write(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"fastgen": json.dumps(header)})
    os.replace(partial, path)


def save(
    path: str | Path,
    kind: str,
    modules: dict[str, nn.Module | None],
    extra: dict | None = None,
) -> None:
    """Write networks to a fastgen file, whole or not at all.

    modules: 'G', and 'D' or not; each has `config`, the keywords of its constructor as plain values.
    extra: further entries of the header, plain values; camera is G.camera's unless it is among them.
    """
    header = {"kind": kind, "G": None, "D": None, "source_sha256": None, "camera": None}
    tensors = {}
    for name, module in modules.items():
        if module is None:
            continue
        header[name] = {"class": type(module).__name__, "config": module.config}
        tensors |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    header["plane_axes"] = modules["G"].config.get("plane_axes", "eg3d")
    if getattr(modules["G"], "camera", None) is not None:
        header["camera"] = modules["G"].camera.as_dict()
    _write(Path(path), header | (extra or {}), tensors)


def _read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("fastgen")
            if header is None:
                raise CheckpointError("a safetensors file without fastgen's header")
            return json.loads(header), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"a damaged safetensors file ({error})") from error


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of a fastgen file, or of an original pickle, converted on the fly.

    'toy' is the embedded teacher.
    Raises: FileNotFoundError; CheckpointError, naming the file and what was found in it.
    """
    path = TOY if str(path) == "toy" else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        head = file.read(16)
    try:
        # A safetensors file begins with its header's length, 8 bytes, and the header, a JSON object.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            header, tensors = _read_safetensors(path)
        elif head[:1] == b"\x80":
            header, tensors = from_pickle(path.read_bytes())
        else:
            raise CheckpointError(f"neither a fastgen file nor an original pickle; it begins with {head!r}")
        if not isinstance(header, dict) or header.get("kind") not in ("teacher", "student"):
            raise CheckpointError("a header of unknown kind")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}") from error.__cause__
    return header, tensors


def convert(source: str | Path, target: str | Path) -> dict:
    """Rewrite an original pickle as a fastgen file, and return its header. The generator is G_ema."""
    header, tensors = read(source)
    _build(source, header, tensors, "G")
    _write(Path(target), header, tensors)
    return header


def _build(path, header: dict, tensors: dict[str, Tensor], name: str) -> nn.Module:
    """The network `name` of a file, in evaluation mode and frozen."""
    entry = header.get(name) or {}
    if entry.get("class") not in CLASSES:
        raise CheckpointError(
            f"{path}: refused: {name} is a {entry.get('class')}, expected {', '.join(CLASSES)}"
        )
    cls = getattr(import_module(f".models.{CLASSES[entry['class']]}", __package__), entry["class"])
    try:
        # A load must not move the global random state, or it would change what a seeded run draws next.
        with torch.random.fork_rng(devices=[]):
            module = cls(**entry["config"])
        state = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
        result = module.load_state_dict(state, strict=False)
        module.camera = CameraDistribution(**header["camera"]) if header.get("camera") else None
    except Exception as error:
        raise CheckpointError(f"{path}: refused: {name} does not fit {entry['class']}: {error}") from error
    # A constant that only some of the original super-resolutions keep.
    wrong = {*result.missing_keys, *result.unexpected_keys} - {"superresolution.resample_filter"}
    if wrong:
        raise CheckpointError(f"{path}: refused: {name} has missing or unknown tensors: {sorted(wrong)[:5]}")
    return module.eval().requires_grad_(False)


def _load(path: str | Path, kind: str) -> nn.Module:
    header, tensors = read(path)
    if header["kind"] != kind:
        raise CheckpointError(f"{path}: refused: it holds a {header['kind']}, expected a {kind}")
    return _build(path, header, tensors, "G")


def load_teacher(path: str | Path) -> nn.Module:
    """The Teacher of a fastgen file, of an original EG3D pickle, or the embedded 'toy'; frozen, on the CPU.

    `.camera` is the CameraDistribution of its data set, or None.
    """
    return _load(path, "teacher")


def load_student(path: str | Path) -> nn.Module:
    """The Student of a fastgen file; frozen, on the CPU. `.camera` as with load_teacher."""
    return _load(path, "student")


def load_discriminator(path: str | Path) -> nn.Module | None:
    """The DualDiscriminator of a fastgen file or of an original pickle; None when it has none."""
    header, tensors = read(path)
    return _build(path, header, tensors, "D") if header.get("D") else None
