"""What an image costs from latent and camera to pixels, beside what users run instead: `fastgen bench`.

A case is a generator on a route, in a dtype, at a batch size. Generators: `teacher`; `teacher-cached`, a new
pose of planes that are there already; `student-SIZE` of fastgen.models.student.SIZES. Routes:

plain        PyTorch operations on contiguous images: the stand-in for the original code as a user gets it
warm         the same after fastgen.keep_memory(); a GPU's allocator keeps memory anyway
compile      the same under torch.compile; of a teacher planes, rendering and super-resolution apart, for as
             one graph they are slower than not compiled
returned     fastgen without keep_memory()
fastgen      fastgen, as the command line and the trainer run it
graph        the same in a CUDA graph
onnxruntime  a student as `fastgen export` writes it

Weights are random, but for the toy's teacher: speed does not depend on them. A result that is not finite, or
is wrong in its first image or its last, is not timed. On a CPU all that returns memory is measured first,
then what keeps it; within each, rounds go through all cases in turn, and medians of them count. ALONE comes
last, one by one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import statistics
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
from ._timing import DTYPES, free_bytes, peak_bytes, peaks, seconds
from .models.layers import SynthesisBlock, compute_in
from .models.student import SIZES, Student
from .models.teacher import Teacher
from .pictures import progress

# On a GPU, what EG3D's own teacher is: float16 at its highest resolutions.
MIXED = "mixed"
PLAIN = ("plain", "warm", "compile")
# Before keep_memory(), on a CPU; the others come after it.
RETURNED = ("plain", "returned")
# What is measured alone, in this order: it holds memory of its own, or threads that go on spinning between
# calls and take the cores from all others. Compilation takes longest.
ALONE = ("graph", "onnxruntime", "compile")
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
        self.student = None if student is None else fastgen.load_student(student)
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
                model = copy.deepcopy(self.student)
            else:
                model = Student.from_teacher(self.teacher, name.removeprefix("student-"), scale=self.scale)
                for part, weight in model.named_parameters():
                    if part.endswith("torgb.weight"):  # zero to begin with, and then no layer has a say
                        nn.init.normal_(weight)
            compute_in(model, DTYPES.get(dtype))
            self._made[name, dtype] = model.to(self.device).eval().requires_grad_(False)
        return self._made[name, dtype]

    def call(self, case: Case, first: int = 0) -> Callable[[], Tensor]:
        """A function of nothing that makes the images [batch, 3, H, W] of a case, from the first one on."""
        model, z, c = self.model(case.case, case.dtype), self.z[first:][: case.batch], self.c[: case.batch]
        if case.route == "onnxruntime":
            return _exported(model, z, c)
        if case.route == "graph":
            graph = fastgen.graphed(model, case.batch)
            return lambda: graph(z, c)["image"]

        def made(part: Callable) -> Callable:
            return torch.compile(part, dynamic=False) if case.route == "compile" else part

        plain = functools.partial(on_plain_operations, case.route in PLAIN)
        if case.case.startswith("teacher"):
            mapping, planes_of = made(model.mapping), made(model.backbone_planes)
            render, super_resolve = made(model.render), made(model.super_resolve)

            def planes() -> tuple[Tensor, Tensor]:
                ws = mapping(z, c)
                return ws, planes_of(ws)

            if case.case == "teacher-cached":
                with plain():
                    planes = functools.partial(tuple, planes())

            def image() -> Tensor:
                ws, there = planes()
                return super_resolve(render(there, c)["feature_image"], ws)
        else:
            image = made(lambda: model(z, c)["image"])

        def run() -> Tensor:
            with plain():
                return image()

        return run

    def bytes(self, name: str, dtype: str) -> int:
        """Of the weights that make an image, or of planes where these are there."""
        model, size = self.model(name, dtype), DTYPES.get(dtype, torch.float32).itemsize
        numbers = sum(p.numel() for p in model.parameters())
        if name == "teacher-cached":
            planes = 3 * model.plane_channels * model.config["plane_resolution"] ** 2
            numbers += planes - sum(p.numel() for p in model.backbone.parameters())
        return size * numbers

    @torch.no_grad()
    def exact(self, name: str, batches: tuple[int, ...] = (1,)) -> tuple[dict[int, Tensor], float]:
        """By plain operations in float32, by number, the first image and the last of each batch; and an
        image's 10^9 multiply-adds, all in sight there."""
        with torch.backends.cudnn.flags(allow_tf32=False):
            ends = sorted({0, *(batch - 1 for batch in batches)})
            calls = {at: self.call(Case(name, "plain", "float32", 1), at) for at in ends}
            with FlopCounterMode(display=False) as counter:
                images = {at: call() for at, call in calls.items()}
        return images, counter.get_total_flops() / 2e9 / len(images)


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


@torch.no_grad()
def run(
    preset: str,
    batches: tuple[int, ...] = (1,),
    only: tuple[str, ...] = (),
    student: Path | None = None,
    rounds: int = 5,
    limit: float = 20.0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Iterator[list[dict]]:
    """Measure the cases of a preset. Keeps memory from the middle on, and for good: once in a process.

    only: names of generators, none for all. limit: seconds that a case has, LEAST rounds it has anyway.
    Yields: a row for each case that is done, as SHOWN and MEANING explain them, more of them each time. Cases
            that do not fit into memory have none.
    Raises: ValueError on unknown names, FloatingPointError on a wrong image.
    """
    every = cases(batches, device)
    if student is not None:
        every += [replace(c, case="student") for c in every if c.case == "student-compact"]
    unknown = sorted(set(only) - {case.case for case in every})
    if unknown:
        known = ", ".join(dict.fromkeys(case.case for case in every))
        raise ValueError(f"only must be among {known}, got {', '.join(unknown)}")
    every = [case for case in every if not only or case.case in only]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    about = {"machine": info.summary(device)}
    generators = Generators(preset, device, max(batches), student)
    limits, done, exact = peaks(device), _Done({}, {}, {}), {}
    own = "fastgen" if device.type == "cuda" else "returned"

    def first(name: str):
        exact[name] = generators.exact(name, batches)

    for name in dict.fromkeys(case.case for case in every):
        done.memory[Case(name, "plain", "float32", 1)] = peak_bytes(functools.partial(first, name), device)
        case = Case(name, own, "float32", 1)
        done.memory[case] = peak_bytes(generators.call(case), device)
    together = [case for case in every if case.route not in ALONE]
    first = RETURNED if device.type == "cpu" else (*RETURNED, "fastgen")
    stages = [[case for case in together if case.route in first]]
    stages += [[case for case in together if case.route not in first and case.batch == n] for n in batches]
    stages += [[case] for route in ALONE for case in every if case.route == route]
    for number, stage in enumerate(stages):
        if number == 1:
            fastgen.keep_memory()
        _measure(
            stage, generators, {name: images for name, (images, _) in exact.items()}, done, rounds, limit
        )
        if stage and stage[0].route == "compile":
            torch.compiler.reset()
        yield [
            {"preset": preset}
            | asdict(case)
            | _numbers(case, done, exact[case.case], generators.bytes(case.case, case.dtype), limits, device)
            | about
            for case in every
            if case in done.seconds
        ]


@dataclass
class _Done:
    seconds: dict[Case, float]
    bounds: dict[Case, tuple[float, float]]
    memory: dict[Case, int | None]


def _measure(
    stage: list[Case],
    generators: Generators,
    exact: dict[str, dict[int, Tensor]],
    done: _Done,
    rounds: int,
    limit: float,
):
    calls, times, device = {}, {}, generators.device
    for case in progress(stage, len(stage), "warm-up"):
        # As much as one image needs, so many times; of what keeps memory, as what returns it.
        plain = "plain" if case.route in PLAIN else "fastgen" if device.type == "cuda" else "returned"
        one = done.memory.get(Case(case.case, plain, "float32", 1)) or 0
        if one * case.batch > 0.7 * free_bytes(device) and not _fitted(case, done):
            continue
        try:
            call = generators.call(case)
            images = call()
            if device.type == "cuda" and case.route != "graph" or case.route in RETURNED:
                done.memory[case] = peak_bytes(call, device)
        except RuntimeError as error:
            if not info.is_out_of_memory(error):
                raise
            continue
        require_right(case, images, exact[case.case])
        calls[case] = call, max(1, round(TOGETHER / seconds(call)))
        times[case] = []
    for turn in progress(range(rounds), rounds, "rounds"):
        for case, (call, repeat) in calls.items():
            if turn < LEAST or sum(times[case]) < limit:
                times[case].append(seconds(call, repeat))
    done.seconds |= {case: statistics.median(taken) for case, taken in times.items()}
    done.bounds |= {case: (min(taken), max(taken)) for case, taken in times.items()}


def _fitted(case: Case, done: _Done) -> bool:
    """Whether the same has run already: memory that is kept is not free, and there all the same."""
    route = "plain" if case.route in PLAIN else "returned"
    return replace(case, route=route) in done.seconds


def _numbers(
    case: Case,
    done: _Done,
    exact: tuple[dict[int, Tensor], float],
    weights: int,
    limits: dict[str, float],
    device: torch.device,
) -> dict[str, float | None]:
    taken, (images, gmac) = done.seconds[case], exact
    flop_per_s = limits["bfloat16" if case.dtype == MIXED else case.dtype]
    floor = max(
        (weights + images[0].nbytes * case.batch) / limits["bytes"], 2e9 * gmac * case.batch / flop_per_s
    )
    twins = {"warm": "plain", "fastgen": "returned"} if device.type == "cpu" else {}
    peak = done.memory.get(replace(case, route=twins.get(case.route, case.route)))
    # A GPU's allocator keeps memory.
    bases = {route: "plain" if (route, device.type) == ("warm", "cuda") else route for route in PLAIN}
    return {
        "ms": taken * 1e3 / case.batch,
        "ms_min": done.bounds[case][0] * 1e3 / case.batch,
        "ms_max": done.bounds[case][1] * 1e3 / case.batch,
        "images_per_s": case.batch / taken,
        "peak_mb": None if peak is None else peak / 2**20,
        "gmac": gmac,
        "floor_pct": 100 * floor / taken,
        **{f"speedup_vs_{route}": _speedup(done, case, base, device) for route, base in bases.items()},
        "machine_gflops": flop_per_s / 1e9,
        "machine_gb_per_s": limits["bytes"] / 1e9,
    }


def _speedup(done: _Done, case: Case, route: str, device: torch.device) -> float | None:
    """How many times as many images a second as the teacher's on a route, at the same batch or, where that
    does not fit into memory, at the largest below it that does."""
    base = [Case("teacher", route, _baseline(device), n) for n in range(case.batch, 0, -1)]
    found = next((c for c in base if c in done.seconds), None)
    if found is None:
        return None
    return done.seconds[found] / found.batch / (done.seconds[case] / case.batch)


def require_right(case: Case, images: Tensor, exact: dict[int, Tensor]):
    """FloatingPointError unless all images are finite, and those that `exact` has by number are those of
    plain operations in float32, within the case's dtype."""
    exactly = case.dtype == "float32"
    allowed = 1e-3 if exactly else 2e-2
    if case.route in PLAIN and (images.is_cuda or not exactly):
        # PyTorch's own rounding: TF32 in convolutions on a GPU, and oftener than fastgen in 16 bits.
        allowed = 5e-3 if exactly else 3e-2
    if len(images) != case.batch or not images.isfinite().all():
        raise FloatingPointError(f"{case}: images that are missing or not finite, not timed")
    for at, image in exact.items():
        if at < len(images):
            error = ((images[at].double() - image[0]).square().mean().sqrt() / image.double().std()).item()
            if not error < allowed:
                text = f"{case}: image {at} wrong by {error:.3g} of the images' deviation, not timed"
                raise FloatingPointError(text)


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
    "beyond weights and inputs; of what keeps memory, as of what returns it. % of floor: the time of the "
    "GMAC, or of the bytes of weights and image, at this machine's measured peaks, over the time taken; "
    "above 100 where Winograd's convolutions need fewer products, or are faster than the one that peaks are "
    "measured by. torch.compile: of a teacher, planes, rendering and super-resolution apart."
)


def cells(row: dict) -> list[str]:
    """A row as text, in SHOWN's order."""
    return ["-" if row[key] is None else format(row[key], how) for key, (_, how) in SHOWN.items()]


def shown(rows: list[dict]) -> str:
    """The rows as a table, and what it says."""
    head = [name for name, _ in SHOWN.values()]
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return f"{table(head, [cells(row) for row in rows])}\n\n{MEANING}\n{machines}"
