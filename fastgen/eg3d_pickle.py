"""Safe reading of EG3D's original checkpoints.

They are pickles that carry Python source and run it when loaded. Here nothing from the file runs: find_class
knows a short list of constructors, all of them fastgen's own; classes of networks become records that only
hold what they are given; and anything else is refused by name. A pickle can only call what find_class
returns, or set the state of what that made, so this list is the whole attack surface; and tensors are only
handed out wrapped. Nested torch files go through torch.load(weights_only=True).
"""

import hashlib
import io
import math
import pickle
import re
import zipfile

import numpy as np
import torch
from torch import Tensor

from .presets import PRESETS


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one that is wanted here.

    The message is one line of printable text, for it may quote names from the file to a terminal.
    """

    def __init__(self, message: str):
        line = " ".join(part.strip() for part in message.splitlines())[:1000]
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class Budget:
    """What a file may still grow to: naming one part many times must not make a giant of a small file."""

    def __init__(self, left: int):
        self.left = left

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise CheckpointError("it repeats its parts until they are far larger than the file")


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


class Held(Record):
    """A tensor or a storage of the file. A bare one would obey __setstate__, even past its storage's end."""

    def __new__(cls, tensor: Tensor):
        held = super().__new__(cls)
        held.tensor = tensor
        return held

    def __setstate__(self, state):
        raise CheckpointError("the file tries to change a tensor")


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
    kind, name, state = meta.get("type"), meta.get("class_name"), meta.get("state")
    if kind != "class" or not isinstance(name, str) or not isinstance(state, dict):
        kind = kind if isinstance(kind, str) else type(kind).__name__
        raise CheckpointError(f"a persistent object of type {kind!r}, expected 'class' with its state")
    record = Network()
    record.name, record.state = name, state
    return record


def _storage(data: bytes) -> Held:  # all of it, flat
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise CheckpointError("a nested torch file that is compressed, which torch never does")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {found[1]}" if found else f"it begins with {data[:8]!r}"
        raise CheckpointError(
            f"a nested torch file that torch.load(weights_only=True) refuses: {what}"
        ) from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CheckpointError(
            f"a nested torch file that holds a {type(storage).__name__}, expected a storage"
        )
    return Held(torch.empty(0, dtype=storage.dtype).set_(storage))


def _tensor(storage, offset, size, stride, *_) -> Held:
    if not isinstance(storage, Held):
        raise CheckpointError(f"a tensor built on a {type(storage).__name__}, expected a storage")
    flat = storage.tensor
    if len(size) > 8:
        raise CheckpointError(f"a tensor of {len(size)} dimensions")
    if math.prod(size) > flat.numel():
        raise CheckpointError(f"a tensor of {math.prod(size)} elements in a storage of {flat.numel()}")
    return Held(flat.as_strided(size, stride, offset))  # checks the bounds


def _scalar(dtype, data: bytes):
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else ""
    if isinstance(code, str) and isinstance(dtype.state, tuple) and dtype.state[1] == ">":
        code = ">" + code
    if not isinstance(code, str):
        raise CheckpointError(f"a numpy scalar whose type is a {type(code).__name__}")
    if not re.fullmatch(r">?[fiub][1248]", code) or not isinstance(data, bytes):
        raise CheckpointError(f"a numpy scalar of type {code!r}")
    return np.frombuffer(data, dtype=code, count=1)[0].item()


def _set(items=()) -> set:
    if not isinstance(items, list | tuple) or len(items) > 100:
        raise CheckpointError("a set that no network has")
    _require_keys(items)
    return set(items)


def _require_keys(keys) -> None:
    # The hash of a tuple of tuples of ... takes time without end.
    strange = [k for k in keys if not isinstance(k, str | int | float | None)]
    if strange:
        raise CheckpointError(f"a key that is a {type(strange[0]).__name__}, expected a text or a number")


CONSTRUCTORS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _network,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("builtins", "set"): _set,
    ("torch", "Size"): lambda sizes=(): sizes,
}
RECORDS = re.compile(
    r"collections\.OrderedDict|dnnlib\.util\.EasyDict|numpy\.dtype|torch\.nn\.modules\.[a-z]+\.[A-Za-z0-9]+"
    r"|training\.[a-z_0-9.]+\.[A-Za-z0-9]+"
)


def _with_keys(opcode: bytes, keys: slice):
    load = pickle._Unpickler.dispatch[opcode[0]]

    def checked(self):
        _require_keys(self.stack[keys])
        load(self)

    return checked


class SafeUnpickler(pickle._Unpickler):
    """Reads an original checkpoint into dicts, lists, Held tensors, numbers, texts and Records.

    The one in Python: in C, a memo index of a few bytes takes memory for all that come before it.
    """

    # What hashes keys, and where on the stack they are.
    dispatch = pickle._Unpickler.dispatch | {
        opcode[0]: _with_keys(opcode, keys)
        for opcode, keys in (
            (pickle.SETITEM, slice(-2, -1)),
            (pickle.SETITEMS, slice(0, None, 2)),
            (pickle.DICT, slice(0, None, 2)),
            (pickle.ADDITEMS, slice(None)),
            (pickle.FROZENSET, slice(None)),
        )
    }
    del dispatch[pickle.BYTEARRAY8[0]]  # takes memory before it reads; no network has one

    def __init__(self, data: bytes, budget: Budget):
        super().__init__(io.BytesIO(data))
        self.budget = budget

    def _storage(self, data: bytes) -> Held:
        self.budget.spend(len(data))
        return _storage(data)

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return Constructor(self._storage)
        if (module, name) in CONSTRUCTORS:
            return Constructor(CONSTRUCTORS[module, name])
        if RECORDS.fullmatch(f"{module}.{name}"):
            return type("Record", (Record,), {"name": name})
        raise CheckpointError(f"it names {module}.{name}, which no checkpoint needs")


def _budget(data: bytes) -> Budget:
    return Budget(4 * len(data) + 1_000_000)


def unpickle(data: bytes):
    """The contents of an original pickle; CheckpointError with the reason when it is anything else."""
    try:
        return SafeUnpickler(data, _budget(data)).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"truncated or not a pickle ({type(error).__name__}: {error})") from error


# From original records to fastgen's networks.


def _entries(value) -> dict:
    if isinstance(value, Record):
        return value.items
    return value if isinstance(value, dict) else {}


def _plain(value, budget: Budget):
    """As JSON values; what has no such form becomes None."""
    budget.spend(1 + len(value) if isinstance(value, str) else 1)
    if isinstance(value, Record):
        value = value.items
    if isinstance(value, dict):
        return {_plain(str(k), budget): _plain(v, budget) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, budget) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else None


def _state_dict(record, budget: Budget, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise CheckpointError(f"{prefix or 'the network'} is a {type(record).__name__}, expected a network")
    own = _entries(record.state.get("_parameters")) | _entries(record.state.get("_buffers"))
    unsaved = record.state.get("_non_persistent_buffers_set")
    unsaved = unsaved if isinstance(unsaved, set) else ()
    names = {}
    for k, v in own.items():
        name = f"{prefix}{k}"
        budget.spend(1 + len(name))
        if v is None or k in unsaved:
            continue
        if not isinstance(v, Held):
            raise CheckpointError(f"{name} is a {type(v).__name__}, expected a tensor")
        budget.spend(v.tensor.nbytes)
        # The copy keeps just what the tensor shows of its storage.
        names[name] = v.tensor.clone(memory_format=torch.contiguous_format)
    for k, child in _entries(record.state.get("_modules")).items():
        budget.spend(1 + len(prefix))
        if child is not None:
            names |= _state_dict(child, budget, f"{prefix}{k}.")
    return names


def _arguments(record: Network, positional: tuple[str, ...], budget: Budget) -> dict:
    given = dict(zip(positional, record.state.get("_init_args") or (), strict=False))
    return _plain(given | _entries(record.state.get("_init_kwargs")), budget)


def _plane_axes(record: Network) -> str:
    axes = _entries(record.state.get("_modules")).get("renderer")
    axes = axes.state.get("plane_axes") if isinstance(axes, Record) else None
    if axes is None:
        return "eg3d"
    axes = axes.tensor
    # Rows are a plane's axes, and points are projected by the inverse: the third plane tells the two apart.
    known = {"eg3d": [[0, 0, 1], [1, 0, 0], [0, 1, 0]], "fixed": [[0, 0, 1], [0, 1, 0], [1, 0, 0]]}
    for name, third in known.items():
        if torch.equal(axes, torch.tensor([torch.eye(3).tolist(), [[1, 0, 0], [0, 0, 1], [0, 1, 0]], third])):
            return name
    raise CheckpointError(f"plane axes {axes.flatten()[:27].tolist()}, expected those of 'eg3d' or 'fixed'")


def _teacher_config(record: Network, state: dict[str, Tensor], budget: Budget) -> dict:
    given = _arguments(record, ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"), budget)
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
        "neural_rendering_resolution": _plain(record.state.get("neural_rendering_resolution", 64), budget),
        "plane_axes": _plane_axes(record),
    }


def _discriminator_config(record: Network, budget: Budget) -> dict:
    given = _arguments(record, ("c_dim", "img_resolution", "img_channels"), budget)
    config = {k: given[k] for k in ("c_dim", "img_resolution", "img_channels")}
    config |= {
        k: given[k] for k in ("channel_base", "channel_max", "num_fp16_res", "conv_clamp") if k in given
    }
    config["mapping_layers"] = (given.get("mapping_kwargs") or {}).get("num_layers", 8)
    config["mbstd_group_size"] = (given.get("epilogue_kwargs") or {}).get("mbstd_group_size", 4)
    return config


def _camera(rendering: dict) -> dict:
    """A file says where its cameras look, not how they are spread: the preset of this radius does."""
    radius = rendering.get("avg_camera_radius", 2.7)
    preset = PRESETS["shapenetcars128" if radius < 2.2 else "ffhq512"].camera.as_dict()
    return preset | {"radius": radius, "pivot": rendering.get("avg_camera_pivot", preset["pivot"])}


def from_pickle(data: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors, as checkpoint.py writes them, of an original checkpoint; the generator is G_ema.

    A D that fastgen has no class for is left out, and the header's discriminator_note says so.
    """
    content = unpickle(data)
    g = _entries(content).get("G_ema")
    if g is None:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"it has no G_ema; it holds {found}")
    if not isinstance(g, Network) or g.name != "TriPlaneGenerator":
        raise CheckpointError(
            f"G_ema is a {getattr(g, 'name', type(g).__name__)}, expected a TriPlaneGenerator"
        )
    budget = _budget(data)
    try:
        state = _state_dict(g, budget)
        config = _teacher_config(g, state, budget)
        d, note = _entries(content).get("D"), None
        if d is not None and (not isinstance(d, Network) or d.name != "DualDiscriminator"):
            found = getattr(d, "name", type(d).__name__)
            d, note = None, f"D is a {found!r}, not a 'DualDiscriminator', and was left out"
        tensors = {f"G.{k}": v for k, v in state.items()}
        if d is not None:
            tensors |= {f"D.{k}": v for k, v in _state_dict(d, budget).items()}
            d = {"class": "DualDiscriminator", "config": _discriminator_config(d, budget)}
        header = {
            "kind": "teacher",
            "G": {"class": "Teacher", "config": config},
            "D": d,
            "plane_axes": config["plane_axes"],
            "source_sha256": hashlib.sha256(data).hexdigest(),
            "camera": _camera(config["rendering_kwargs"]),
        }
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"its networks are incomplete ({type(error).__name__}: {error})") from error
    return header | ({"discriminator_note": note} if note else {}), tensors
