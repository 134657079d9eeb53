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

from . import ops
from ._files import replacing
from .camera import CameraDistribution
from .eg3d_pickle import CheckpointError, from_pickle
from .models.layers import FILTER, compute_in

# The classes that a kind of file may have as its G, or as its D, and their modules.
CLASSES = {
    "teacher": {"Teacher": "models.teacher", "Siren": "train.siren"},
    "student": {"Student": "models.student"},
    "D": {"DualDiscriminator": "models.discriminator"},
}
TOY = Path(__file__).parent / "assets" / "toy_teacher.safetensors"


def _write(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"fastgen": json.dumps(header)})
        # save_file makes it its owner's alone; let it be as any new file.
        umask = os.umask(0o022)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)


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
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
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
        for key in ("plane_axes", "source_sha256"):
            if not isinstance(header.get(key), str | None) or not (header.get(key) or "").isprintable():
                raise CheckpointError(f"a header whose {key} is not a text")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}") from error.__cause__
    return header, tensors


def convert(source: str | Path, target: str | Path) -> dict:
    """Rewrite an original pickle as a fastgen file, and return its header. The generator is G_ema.

    Nothing is written unless the networks are whole. The header has a discriminator_note where a D of a class
    unknown here was left out.
    """
    header, tensors = _read_kind(source, "teacher")
    for name in ("G", "D") if header.get("D") else ("G",):
        _build(source, header, tensors, name)
    _write(Path(target), header, tensors)
    return header


def _read_kind(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    header, tensors = read(path)
    if header["kind"] != kind:
        raise CheckpointError(f"{path}: refused: it holds a {header['kind']}, expected a {kind}")
    return header, tensors


def _require_sizes(config: dict, state: dict[str, Tensor]) -> None:
    """Refuse a network that could not be this state's and would take long to build even without memory."""
    for key, value in config.items():
        limit = len(state) if key.endswith("_layers") else 2**20
        if isinstance(value, int) and value > limit:
            raise ValueError(f"{key} must be at most {limit}, got one of {value.bit_length()} bits")


def _fit(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state as the module's types, or ValueError."""
    expected, state = module.state_dict(), dict(state)
    # A constant that only some of the original super-resolutions keep.
    constant = "superresolution.resample_filter"
    if constant in state and constant not in expected:
        del state[constant]
    if constant in expected:
        state.setdefault(constant, ops.setup_filter(list(FILTER)))
    for name in sorted(state.keys() & expected.keys()):
        if state[name].shape != expected[name].shape:
            found, wanted = list(state[name].shape), list(expected[name].shape)
            raise ValueError(f"{name} has shape {found}, expected {wanted}")
    wrong = state.keys() ^ expected.keys()
    if wrong:
        raise ValueError(f"missing or unknown tensors: {sorted(wrong)[:5]}")
    return {name: value.to(expected[name].dtype) for name, value in state.items()}


def _build(path, header: dict, tensors: dict[str, Tensor], name: str) -> nn.Module:
    """The network `name` of a file, in evaluation mode and frozen."""
    known = CLASSES["D" if name == "D" else header["kind"]]
    entry = header.get(name)
    found = entry.get("class") if isinstance(entry, dict) else type(entry).__name__
    found = found if isinstance(found, str) else type(found).__name__
    if found not in known:
        raise CheckpointError(f"{path}: refused: {name} is a {found!r}, expected {' or '.join(known)}")
    cls = getattr(import_module(f".{known[found]}", __package__), found)
    try:
        state = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
        _require_sizes(entry["config"], state)
        # Without memory: what the file says about sizes is believed only once its tensors agree.
        with torch.device("meta"):
            module = cls(**entry["config"])
        module.load_state_dict(_fit(module, state), assign=True)
        module.camera = CameraDistribution(**header["camera"]) if header.get("camera") else None
    except Exception as error:
        raise CheckpointError(f"{path}: refused: {name} does not fit {found}: {error}") from error
    return module.eval().requires_grad_(False)


def _load(path: str | Path, kind: str, dtype: torch.dtype | None) -> nn.Module:
    header, tensors = _read_kind(path, kind)
    module = _build(path, header, tensors, "G")
    compute_in(module, dtype)
    return module


def load_teacher(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The Teacher of a fastgen file, of an original EG3D pickle, or the embedded 'toy'; frozen, on the CPU.
    A file of fastgen.train.siren holds a Siren.

    dtype: of the convolutions' activations, such as torch.bfloat16 to be fast on a CPU that has it; weights,
    styles and volume rendering stay float32. None: float32; float16 on a GPU where the checkpoint says so.
    `.camera` is the CameraDistribution of its data set, or None.
    """
    return _load(path, "teacher", dtype)


def load_student(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The Student of a fastgen file; frozen, on the CPU. dtype and `.camera` as with load_teacher."""
    return _load(path, "student", dtype)


def load_discriminator(path: str | Path) -> nn.Module | None:
    """The DualDiscriminator of a fastgen file or of an original pickle; None when it has none."""
    header, tensors = read(path)
    return _build(path, header, tensors, "D") if header.get("D") else None
