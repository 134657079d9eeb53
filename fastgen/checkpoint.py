"""Checkpoints: fastgen's safetensors files, and safe reading of EG3D's original pickles.

A fastgen file holds tensors named 'G.<state name>' (and 'D.<state name>' with a discriminator) and, in the
safetensors metadata under 'fastgen', a JSON header: kind ('teacher' or 'student'), G and D ({class, config} or null),
plane_axes, source_sha256, camera (a CameraDistribution's fields, or null).

The originals are pickles that carry Python source and run it when loaded. Here nothing from the file runs:
find_class knows a short list of constructors, all of them fastgen's own; classes of networks become records
that only hold what they are given; and anything else is refused by name. A pickle can only call what find_class
returns, so this list is the whole attack surface. Nested torch files go through torch.load(weights_only=True).
"""

import hashlib
import io
import json
import os
import pickle
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .camera import CameraDistribution
from .presets import PRESETS

# The networks that a file may hold, and their modules.
CLASSES = {"Teacher": "teacher", "Student": "student", "DualDiscriminator": "discriminator"}
TOY = Path(__file__).parent / "assets" / "toy_teacher.safetensors"


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one that is wanted here."""


# The restricted unpickler.


class Record:
    """What stands for an object of a pickle: its class's name, and whatever the file gave it. It never acts.

    __setstate__ on every class that the unpickler hands out also keeps a file from changing the class itself.
    """

    name = ""

    def __new__(cls, *args):
        record = object.__new__(cls)
        record.args, record.state, record.items = args, {}, {}
        return record

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items[key] = value


class Constructor:
    """One of fastgen's own functions, as the pickle sees it."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise CheckpointError("the file tries to change a constructor")


class Network(Record):
    """A network of the original code: class_name, and state, its `__dict__`."""


def _network(meta) -> Network:
    meta = _entries(meta)
    if meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise CheckpointError(f"a persistent object of type {meta.get('type')!r}, expected 'class' with its state")
    record = Network()
    record.name, record.state = str(meta.get("class_name")), meta["state"]
    return record


def _storage(data: bytes):
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {found[1]}" if found else str(error).splitlines()[0]
        raise CheckpointError(f"a nested torch file that torch.load(weights_only=True) refuses: {what}") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CheckpointError(f"a nested torch file that holds a {type(storage).__name__}, expected a storage")
    return storage


def _tensor(storage, offset, size, stride, *_) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CheckpointError(f"a tensor built on a {type(storage).__name__}, expected a storage")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    # as_strided checks the bounds, and the copy keeps just what the tensor shows.
    return flat.as_strided(tuple(size), tuple(stride), offset).clone(memory_format=torch.contiguous_format)


def _scalar(dtype, data: bytes):
    code = str(dtype.args[0]) if isinstance(dtype, Record) and dtype.args else ""
    if code and isinstance(dtype.state, tuple) and dtype.state[1] == ">":
        code = ">" + code
    if not re.fullmatch(r">?[fiub][1248]", code) or not isinstance(data, bytes):
        raise CheckpointError(f"a numpy scalar of type {code!r}")
    return np.frombuffer(data, dtype=code, count=1)[0].item()


CONSTRUCTORS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _network,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
}
RECORDS = re.compile(
    r"collections\.OrderedDict|dnnlib\.util\.EasyDict|numpy\.dtype|torch\.nn\.modules\.[a-z]+\.[A-Za-z0-9]+"
    r"|training\.[a-z_0-9.]+\.[A-Za-z0-9]+"
)


class SafeUnpickler(pickle.Unpickler):
    """Reads an original checkpoint into dicts, lists, tensors, numbers, texts and Records."""

    def find_class(self, module: str, name: str):
        if (module, name) in CONSTRUCTORS:
            return Constructor(CONSTRUCTORS[module, name])
        if RECORDS.fullmatch(f"{module}.{name}"):
            return type("Record", (Record,), {"name": name})
        raise CheckpointError(f"it names {module}.{name}, which no checkpoint needs")


def unpickle(data: bytes):
    """The contents of an original pickle; CheckpointError with the reason when it is anything else."""
    try:
        return SafeUnpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"truncated or not a pickle ({type(error).__name__}: {error})") from error


# From original records to fastgen's networks.


def _entries(value) -> dict:
    if isinstance(value, Record):
        return value.items
    return value if isinstance(value, dict) else {}


def _plain(value):
    """As JSON values; what has no such form becomes None."""
    if isinstance(value, Record):
        value = value.items
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else None


def _state_dict(record, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise CheckpointError(f"{prefix or 'the network'} is a {type(record).__name__}, expected a network")
    own = _entries(record.state.get("_parameters")) | _entries(record.state.get("_buffers"))
    names = {prefix + str(k): v for k, v in own.items() if v is not None}
    strange = [k for k, v in names.items() if not isinstance(v, Tensor)]
    if strange:
        raise CheckpointError(f"{strange[0]} is a {type(names[strange[0]]).__name__}, expected a tensor")
    for name, child in _entries(record.state.get("_modules")).items():
        if child is not None:
            names |= _state_dict(child, f"{prefix}{name}.")
    return names


def _arguments(record: Network, positional: tuple[str, ...]) -> dict:
    given = dict(zip(positional, record.state.get("_init_args") or (), strict=False))
    return _plain(given | _entries(record.state.get("_init_kwargs")))


def _plane_axes(record: Network) -> str:
    axes = _entries(record.state.get("_modules")).get("renderer")
    axes = axes.state.get("plane_axes") if isinstance(axes, Record) else None
    if axes is None:
        return "eg3d"
    # Rows are a plane's axes, and points are projected by the inverse: the third plane tells the two apart.
    known = {"eg3d": [[0, 0, 1], [1, 0, 0], [0, 1, 0]], "fixed": [[0, 0, 1], [0, 1, 0], [1, 0, 0]]}
    for name, third in known.items():
        if torch.equal(axes, torch.tensor([torch.eye(3).tolist(), [[1, 0, 0], [0, 0, 1], [0, 1, 0]], third])):
            return name
    raise CheckpointError(f"plane axes {axes.tolist()}, expected those of 'eg3d' or 'fixed'")


def _teacher_config(record: Network, state: dict[str, Tensor]) -> dict:
    given = _arguments(record, ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"))
    rendering = given.get("rendering_kwargs") or {}
    sr = str(rendering.get("superresolution_module", "")).rpartition(".")[2]
    hidden, features = state["decoder.net.0.weight"].shape
    resolutions = [int(m[1]) for m in (re.match(r"backbone\.synthesis\.b(\d+)\.", k) for k in state) if m]
    dropped = ("superresolution_module", "image_resolution")
    return {
        "z_dim": given["z_dim"],
        "c_dim": given["c_dim"],
        "w_dim": given["w_dim"],
        "img_resolution": given["img_resolution"],
        "plane_resolution": max(resolutions),
        "plane_channels": features,
        "feature_channels": state["decoder.net.2.weight"].shape[0] - 1,
        "channel_base": given.get("channel_base", 32768),
        "channel_max": given.get("channel_max", 512),
        "mapping_layers": (given.get("mapping_kwargs") or {}).get("num_layers", 8),
        "conv_clamp": given.get("conv_clamp"),
        "num_fp16_res": given.get("num_fp16_res", 0),
        "decoder_hidden": hidden,
        "superresolution": sr,
        "superresolution_kwargs": {"num_fp16_res": given.get("sr_num_fp16_res", 0)},
        "rendering_kwargs": {k: v for k, v in rendering.items() if k not in dropped},
        # Training raises it step by step, and keeps it on the module.
        "neural_rendering_resolution": record.state.get("neural_rendering_resolution", 64),
        "plane_axes": _plane_axes(record),
    }


def _discriminator_config(record: Network) -> dict:
    given = _arguments(record, ("c_dim", "img_resolution", "img_channels"))
    config = {k: given[k] for k in ("c_dim", "img_resolution", "img_channels")}
    config |= {k: given[k] for k in ("channel_base", "channel_max", "num_fp16_res", "conv_clamp") if k in given}
    config["mapping_layers"] = (given.get("mapping_kwargs") or {}).get("num_layers", 8)
    config["mbstd_group_size"] = (given.get("epilogue_kwargs") or {}).get("mbstd_group_size", 4)
    return config


def _camera(rendering: dict) -> dict:
    """The file says where its cameras look, not how they are spread: that comes from the preset at this radius."""
    radius = rendering.get("avg_camera_radius", 2.7)
    preset = PRESETS["shapenetcars128" if radius < 2.2 else "ffhq512"].camera.as_dict()
    return preset | {"radius": radius, "pivot": rendering.get("avg_camera_pivot", preset["pivot"])}


def _from_pickle(data: bytes) -> tuple[dict, dict[str, Tensor]]:
    content = unpickle(data)
    g = _entries(content).get("G_ema")
    if g is None:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"it has no G_ema; it holds {found}")
    if not isinstance(g, Network) or g.name != "TriPlaneGenerator":
        raise CheckpointError(f"G_ema is a {getattr(g, 'name', type(g).__name__)}, expected a TriPlaneGenerator")
    try:
        state = _state_dict(g)
        config = _teacher_config(g, state)
        d = content.get("D")
        d = d if isinstance(d, Network) and d.name == "DualDiscriminator" else None
        tensors = {f"G.{k}": v for k, v in state.items()}
        if d is not None:
            tensors |= {f"D.{k}": v for k, v in _state_dict(d).items()}
        header = {
            "kind": "teacher",
            "G": {"class": "Teacher", "config": config},
            "D": None if d is None else {"class": "DualDiscriminator", "config": _discriminator_config(d)},
            "plane_axes": config["plane_axes"],
            "source_sha256": hashlib.sha256(data).hexdigest(),
            "camera": _camera(config["rendering_kwargs"]),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its networks lack {error}") from error
    return header, tensors


# fastgen's own files.


def _write(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"fastgen": json.dumps(header)})
    os.replace(partial, path)


def save(path: str | Path, kind: str, modules: dict[str, nn.Module | None], extra: dict | None = None) -> None:
    """Write networks to a fastgen file, whole or not at all.

    modules: 'G', and 'D' or not; each has `config`, the keywords of its constructor as plain values.
    extra: further entries of the header (camera, source_sha256, ...), plain values.
    """
    header = {"kind": kind, "G": None, "D": None, "source_sha256": None, "camera": None}
    tensors = {}
    for name, module in modules.items():
        if module is None:
            continue
        header[name] = {"class": type(module).__name__, "config": module.config}
        tensors |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    header["plane_axes"] = modules["G"].config.get("plane_axes", "eg3d")
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
            header, tensors = _from_pickle(path.read_bytes())
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
        raise CheckpointError(f"{path}: refused: {name} is a {entry.get('class')}, expected {', '.join(CLASSES)}")
    cls = getattr(import_module(f".models.{CLASSES[entry['class']]}", __package__), entry["class"])
    try:
        # A load must not move the global random state, or it would change what a seeded run draws next.
        with torch.random.fork_rng(devices=[]):
            module = cls(**entry["config"])
        state = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
        # A constant that only some of the original super-resolutions keep.
        result = module.load_state_dict(state, strict=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: refused: {name} does not fit {entry['class']}: {error}") from error
    wrong = {*result.missing_keys, *result.unexpected_keys} - {"superresolution.resample_filter"}
    if wrong:
        raise CheckpointError(f"{path}: refused: {name} has missing or unknown tensors: {sorted(wrong)[:5]}")
    module.camera = CameraDistribution(**header["camera"]) if header.get("camera") else None
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
