"""What an image costs from latent and camera to pixels, beside what users run instead: `fastgen bench`.

A case is a generator on a route, in a dtype, at a batch size. Generators: `teacher`; `teacher-cached`, a new
pose of planes that are there already; `student-SIZE` of fastgen.models.student.SIZES. Routes:

plain        PyTorch operations on contiguous images: the stand-in for the original code as a user gets it
warm         the same after fastgen.keep_memory(); a GPU's allocator keeps memory anyway
compile      the same under torch.compile
returned     fastgen without keep_memory()
fastgen      fastgen, as the command line and the trainer run it
graph        the same in a CUDA graph
onnxruntime  a student as `fastgen export` writes it

Weights are random, but for the toy's teacher: speed does not depend on them. A result that is wrong is not
timed. Rounds go through all cases in turn, so that what slows the machine down slows all; medians of them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen

from . import info, presets
from ._text import table
from .models.layers import SynthesisBlock, compute_in
from .models.student import SIZES, Student
from .models.teacher import Teacher
from .pictures import progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# On a GPU, what EG3D's own teacher is: float16 at its highest resolutions.
MIXED = "mixed"
PLAIN = ("plain", "warm", "compile")
# Before keep_memory(), on a CPU; the others come after it.
RETURNED = ("plain", "returned")
STUDENTS = tuple(f"student-{size}" for size in SIZES if size != "toy")
# Those that run on all routes; of the others fastgen's is enough.
COMPARED = ("teacher", "student-full", "student-compact")
# Rounds that every case has, whatever it takes; after them it has `seconds` in all.
LEAST = 3
# Seconds of calls that are timed together, where one is shorter.
TOGETHER = 0.05


@dataclass(frozen=True)
class Case:
    case: str
    route: str
    dtype: str
    batch: int


def cases(batches: tuple[int, ...], device: torch.device) -> list[Case]:
    """All that can be measured here, the baselines of a batch first."""
    routes = ["plain", "fastgen", "compile"]
    if device.type == "cpu":
        routes += ["returned", "warm"]
        routes += ["onnxruntime"] * all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
    else:
        routes += ["graph"]

    def is_sensible(name: str, route: str, dtype: str) -> bool:
        if route == "onnxruntime":
            return name in STUDENTS and dtype == "float32"
        if dtype == MIXED and not (name == "teacher" and route in PLAIN):
            return False
        if route == "compile" and name == "teacher":
            return dtype == _baseline(device)  # it takes minutes to compile
        own = ("fastgen", "returned") if name == "teacher-cached" else ("fastgen", "returned", "graph")
        return name in COMPARED or route in own

    names, dtypes = ("teacher", "teacher-cached", *STUDENTS), (*DTYPES, *[MIXED] * (device.type == "cuda"))
    every = [Case(n, r, d, b) for b in batches for n in names for r in routes for d in dtypes]
    return [case for case in every if is_sensible(case.case, case.route, case.dtype)]


def _baseline(device: torch.device) -> str:
    return MIXED if device.type == "cuda" else "float32"


class Generators:
    """The generators of a preset, and what makes an image of them.

    student: of the toy teacher or another, a file; it is measured as `student`.
    """

    def __init__(self, preset: str, device: torch.device, batch: int, student: Path | None = None):
        torch.manual_seed(0)
        self.device = device
        kwargs = presets.get(preset).teacher
        self.teacher = fastgen.load_teacher("toy") if preset == "toy" else Teacher(**kwargs)
        self.scale = min(1.0, self.teacher.config["channel_max"] / 512)
        self.file = student
        self.z = torch.randn(batch, self.teacher.z_dim, device=device)
        self.c = presets.get(preset).camera.front().expand(batch, -1).contiguous().to(device)
        self._made: dict[tuple[str, str], nn.Module] = {}

    def model(self, name: str, dtype: str) -> nn.Module:
        """A generator of its own for each dtype."""
        name = name.removesuffix("-cached")
        if (name, dtype) not in self._made:
            torch.manual_seed(0)
            if name == "teacher":
                model = type(self.teacher)(**self.teacher.config)
                model.load_state_dict(self.teacher.state_dict())
            elif name == "student":
                model = fastgen.load_student(self.file)
            else:
                model = Student.from_teacher(self.teacher, name.removeprefix("student-"), scale=self.scale)
                for part, weight in model.named_parameters():
                    if part.endswith("torgb.weight"):  # zero to begin with, and then no layer has a say
                        nn.init.normal_(weight)
            compute_in(model, DTYPES.get(dtype))
            self._made[name, dtype] = model.to(self.device).eval().requires_grad_(False)
        return self._made[name, dtype]

    def call(self, case: Case) -> Callable[[], Tensor]:
        """A function of nothing that makes the images [batch, 3, H, W] of a case."""
        model, z, c = self.model(case.case, case.dtype), self.z[: case.batch], self.c[: case.batch]
        if case.route == "onnxruntime":
            return _exported(model, z, c)
        if case.route == "graph":
            graph = fastgen.graphed(model, case.batch)
            return lambda: graph(z, c)["image"]
        if case.case == "teacher-cached":
            ws = model.mapping(z, c)
            planes = model.backbone_planes(ws)

            def image() -> Tensor:
                return model.super_resolve(model.render(planes, c)["feature_image"], ws)
        else:

            def image() -> Tensor:
                return model(z, c)["image"]

        inner = torch.compile(image, dynamic=False) if case.route == "compile" else image

        def run() -> Tensor:
            with on_plain_operations(case.route in PLAIN):
                return inner()

        return run

    def bytes(self, name: str, dtype: str) -> int:
        """Of the weights."""
        size = DTYPES.get(dtype, torch.float32).itemsize
        return size * sum(p.numel() for p in self.model(name, dtype).parameters())

    @functools.cache  # noqa: B019
    def gmac(self, name: str) -> float:
        """10^9 multiply-adds of an image, counted on plain operations, where all products are in sight."""
        with FlopCounterMode(display=False) as counter:
            self.call(Case(name, "plain", "float32", 1))()
        return counter.get_total_flops() / 2e9


@contextmanager
def on_plain_operations(plain: bool = True) -> Iterator[None]:
    """Within, the models are PyTorch operations on contiguous images, as in the original code."""
    before = SynthesisBlock.channels_last
    SynthesisBlock.channels_last = before and not plain
    try:
        with fastgen.backend("reference" if plain else "auto"):
            yield
    finally:
        SynthesisBlock.channels_last = before


def _exported(student: Student, z: Tensor, c: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    from .export import mapping_model, synthesis_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    mapping, synthesis = (
        onnxruntime.InferenceSession(make(student).SerializeToString(), options)
        for make in (mapping_model, synthesis_model)
    )
    latents = {"z": z.numpy(), "c": c.numpy(), "truncation_psi": torch.ones(1).numpy()}
    latents = {key.name: latents[key.name] for key in mapping.get_inputs()}

    def run() -> Tensor:
        (ws,) = mapping.run(None, latents)
        return torch.from_numpy(synthesis.run(["image"], {"ws": ws, "c": latents["c"]})[0])

    return run


def synchronise():
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeat: int = 1) -> float:
    """Wall time of a call, of so many that are timed together."""
    synchronise()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronise()
    return (time.perf_counter() - start) / repeat


def peaks(device: torch.device) -> dict[str, float]:
    """bytes/s of a copy between warm buffers, FLOP/s of a bare channels-last convolution in each dtype."""

    def best(call: Callable[[], object]) -> float:
        return min([seconds(call) for _ in range(6)][1:])

    x = torch.randn(128, 512, 512, device=device)
    y = torch.empty_like(x)
    found = {"bytes": 2 * x.nbytes / best(lambda: y.copy_(x))}
    for name, dtype in DTYPES.items():
        image = torch.randn(1, 128, 256, 256, device=device, dtype=dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        taken = best(lambda i=image, w=weight: torch.nn.functional.conv2d(i, w, padding=1))
        found[name] = 2 * 9 * 128 * image.numel() / taken
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call needs beyond what it is given, its result included; None where that cannot be told. On a
    CPU only before keep_memory()."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    fastgen.empty_workspace()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (AttributeError, OSError):
        return None
    before = _status("self/status", "VmRSS")
    call()
    return _status("self/status", "VmHWM") - before


def _status(file: str, key: str) -> int:
    lines = (Path("/proc") / file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _status("meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return float("inf")


@torch.no_grad()
def run(
    preset: str,
    batches: tuple[int, ...] = (1,),
    only: tuple[str, ...] = (),
    student: Path | None = None,
    rounds: int = 5,
    limit: float = 20.0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> list[dict]:
    """Measure the cases of a preset; keeps memory from the middle on, and for good.

    only: names of generators, none for all. limit: seconds that a case has, LEAST rounds it has anyway.
    Returns: a row for each case, as README explains them. Cases that do not fit into memory have none.
    """
    every = cases(batches, device)
    if student is not None:
        every += [Case("student", c.route, c.dtype, c.batch) for c in every if c.case == "student-compact"]
    unknown = sorted(set(only) - {case.case for case in every})
    if unknown:
        known = ", ".join(dict.fromkeys(case.case for case in every))
        raise ValueError(f"only must be among {known}, got {', '.join(unknown)}")
    every = [case for case in every if not only or case.case in only]
    generators = Generators(preset, device, max(batches), student)
    exact, gmac, plain_peak, memory = {}, {}, {}, {}
    for name in dict.fromkeys(case.case for case in every):
        first = generators.call(Case(name, "plain", "float32", 1))
        made = functools.partial(lambda name, first: exact.update({name: first()}), name, first)
        plain_peak[name] = peak_bytes(made, device) or 0
        gmac[name] = generators.gmac(name)

    times: dict[Case, list[float]] = {}
    stages = [
        [case for case in every if case.route in RETURNED],
        [case for case in every if case.route not in (*RETURNED, "compile")],
        *([case] for case in every if case.route == "compile"),
    ]
    if device.type == "cuda":
        stages[:2] = [stages[0] + stages[1]]
    for number, stage in enumerate(stages):
        if number == 1:
            fastgen.keep_memory()
        calls = {}
        for case in progress(stage, len(stage), "warm-up"):
            if case.route in PLAIN and plain_peak[case.case] * case.batch > 0.7 * _free_bytes(device):
                continue
            try:
                call = generators.call(case)
                made = call()[:1]
                if case.route in RETURNED or device.type == "cuda":
                    memory[case] = peak_bytes(call, device)
            except torch.OutOfMemoryError:
                continue
            require_right(case, made, exact[case.case])
            taken = seconds(call)
            calls[case] = call, max(1, round(TOGETHER / taken))
            times[case] = []
        for turn in progress(range(rounds), rounds, "rounds"):
            for case, (call, repeat) in calls.items():
                if turn < LEAST or sum(times[case]) < limit:
                    times[case].append(seconds(call, repeat))
        if stage and stage[0].route == "compile":
            torch.compiler.reset()

    found = {case: statistics.median(taken) for case, taken in times.items()}
    about = {"machine": info.summary()}
    # What keeps memory needs as much of it at once as what returns it.
    twins = {"warm": "plain", "fastgen": "returned"} if device.type == "cpu" else {}
    limits = peaks(device)
    limits[MIXED] = limits["bfloat16"]
    rows = []
    for case, taken in found.items():
        bytes_moved = generators.bytes(case.case, case.dtype) + exact[case.case].nbytes * case.batch
        floor = max(bytes_moved / limits["bytes"], 2e9 * gmac[case.case] * case.batch / limits[case.dtype])
        peak = memory.get(replace(case, route=twins.get(case.route, case.route)))
        numbers = {
            "ms": taken * 1e3 / case.batch,
            "images_per_s": case.batch / taken,
            "peak_mb": None if peak is None else peak / 2**20,
            "gmac": gmac[case.case],
            "floor_pct": 100 * floor / taken,
        }
        base = _baseline(device)
        ratios = {f"speedup_vs_{route}": _speedup(found, case, route, base) for route in PLAIN}
        rows.append({"preset": preset} | asdict(case) | numbers | ratios | about)
    return rows


def require_right(case: Case, image: Tensor, exact: Tensor):
    """Raise unless an image is that of plain operations in float32, within its dtype."""
    error = ((image.double() - exact).square().mean().sqrt() / exact.double().std()).item()
    if not error < (1e-3 if case.dtype == "float32" else 3e-2):
        raise ArithmeticError(f"{case}: wrong by {error:.3g} of the images' deviation, not timed")


def _speedup(found: dict[Case, float], case: Case, route: str, dtype: str) -> float | None:
    """How many times as many images a second as the teacher's on a route, at the same batch or, where that
    does not fit into memory, at the largest below it that does."""
    there = [c for c in found if (c.case, c.route, c.dtype) == ("teacher", route, dtype)]
    there = [c for c in there if c.batch <= case.batch]
    if not there:
        return None
    base = max(there, key=lambda c: c.batch)
    return found[base] / base.batch / (found[case] / case.batch)


SHOWN = {
    "case": ("generator", ""),
    "route": ("route", ""),
    "dtype": ("dtype", ""),
    "batch": ("batch", "d"),
    "ms": ("ms an image", ".1f"),
    "images_per_s": ("images/s", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "gmac": ("GMAC", ".1f"),
    "floor_pct": ("% of floor", ".0f"),
    "speedup_vs_plain": ("x plain", ".1f"),
    "speedup_vs_warm": ("x warm", ".1f"),
    "speedup_vs_compile": ("x compile", ".1f"),
}
MEANING = (
    "x plain, warm, compile: images a second over those of the teacher on that route (in float32; on a GPU "
    "in EG3D's own mixture), at the same batch, or at the largest below it that fits into memory. Peak: "
    "beyond weights and inputs. % of floor: the time of the GMAC, or of the bytes of weights and image, at "
    "this machine's measured peaks, over the time taken; above 100 where Winograd's convolutions need fewer "
    "products."
)


def cells(row: dict) -> list[str]:
    """A row as text, in SHOWN's order."""
    return ["-" if row[key] is None else format(row[key], how) for key, (_, how) in SHOWN.items()]


def shown(rows: list[dict]) -> str:
    """The rows as a table, and what it says."""
    head = [name for name, _ in SHOWN.values()]
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"{table(head, [cells(row) for row in rows])}\n\n{MEANING}\n{machines}"
