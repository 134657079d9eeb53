"""How time and memory of an image grow with its resolution, rays, samples and batch: a CSV and a plot.

    python benchmarks/curves.py [--out DIR] [--name MACHINE]

One quantity at a time is changed of an EG3D generator with random weights, 64 x 64 rays of 48 + 48 samples
and 512 x 512 pixels, and of students of it, by fastgen in float32; with the image's side, too, the side that
EG3D's super-resolution of that name begins with. The exponent p of cost ~ quantity^p is fitted by least
squares of logarithms, and R2 says how well: what does not depend on the quantity is in the cost too. Memory
is what a call needs beyond its weights, measured before freed memory is kept; time, the least of ROUNDS
through all points in turn, after.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from images import figure_of, signed

import fastgen
from fastgen import info, presets
from fastgen._timing import peak_bytes, seconds
from fastgen.models.layers import compute_in
from fastgen.models.student import Student
from fastgen.models.superresolution import SHAPES
from fastgen.models.teacher import Teacher

ROUNDS = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = ("teacher", "student-full", "student-compact")
NAMES = {128: "SuperresolutionHybrid2X", 256: "SuperresolutionHybrid4X", 512: "SuperresolutionHybrid8XDC"}
# A student's costs do not depend on samples.
SWEEPS = {
    "image side": tuple(NAMES),
    "rays": (32**2, 64**2, 128**2),
    "samples": (24, 48, 96, 192),
    "batch": (1, 2, 4),
}


BASE = {"side": 512, "rays": 64**2, "samples": 96, "batch": 1}


def call(model: str, **options: int) -> Callable[[], dict]:
    """A function of nothing that makes images; what is not among the options is BASE's."""
    side, rays, samples, batch = (BASE | options).values()
    torch.manual_seed(0)
    name = NAMES[side]
    kwargs = presets.get("ffhq512").teacher | {
        "img_resolution": SHAPES[name].output,
        "superresolution": name,
        "superresolution_kwargs": {"channels": (256, 128)},
        "neural_rendering_resolution": round(rays**0.5),
    }
    each = {"depth_resolution": samples // 2, "depth_resolution_importance": samples // 2}
    generator = Teacher(**kwargs | {"rendering_kwargs": kwargs["rendering_kwargs"] | each})
    if model != "teacher":
        generator = Student.from_teacher(generator, model.removeprefix("student-"))
    compute_in(generator, torch.float32)
    generator = generator.to(DEVICE).eval().requires_grad_(False)
    z = torch.randn(batch, 512, device=DEVICE)
    c = presets.get("ffhq512").camera.front().expand(batch, -1).contiguous().to(DEVICE)
    return lambda: generator(z, c)


def points() -> Iterator[tuple[str, str, int, dict]]:
    """Model, quantity, its value, and what `call` takes for it."""
    for quantity, values in SWEEPS.items():
        for model in MODELS:
            if quantity != "samples" or model == "teacher":
                key = quantity.removeprefix("image ")
                yield from ((model, quantity, value, {key: value}) for value in values)


@torch.no_grad()
def measured() -> list[dict]:
    # A point of several sweeps is measured once.
    calls, peak, ms = {}, {}, {}
    for model, *_, options in points():
        key = model, *(BASE | options).values()
        if key in calls:
            continue
        calls[key] = call(model, **options)
        image = calls[key]()["image"]
        if not image.isfinite().all():
            raise FloatingPointError(f"{model}, {options}: not finite, not timed")
        peak[key] = peak_bytes(calls[key], DEVICE)
    fastgen.keep_memory()
    for turn in range(ROUNDS + 1):  # the first of them to warm up
        for key, made in calls.items():
            taken = seconds(made)
            ms[key] = 1e3 * taken if turn < 2 else min(ms[key], 1e3 * taken)
    rows = []
    for model, quantity, value, options in points():
        key = model, *(BASE | options).values()
        row = {"model": model, "quantity": quantity, "value": value}
        rows.append(row | {"peak_mb": peak[key] and peak[key] / 2**20, "ms": ms[key]})
    return rows


def exponent(rows: list[dict], cost: str) -> tuple[float, float]:
    """And R2 of the fit."""
    x, y = (np.log([row[key] for row in rows]) for key in ("value", cost))
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1] ** 2)


def said(rows: list[dict], cost: str) -> str:
    return "^{:.2f}, R2 {:.2f}".format(*exponent(rows, cost))


def plot(rows: list[dict], machine: str, path: Path):
    costs = {"ms": "ms", "peak_mb": "MB beyond weights"}
    figure, axes = figure_of(len(costs), len(SWEEPS), (3.6, 3))
    for ax, (cost, quantity) in zip(axes, [(c, q) for c in costs for q in SWEEPS], strict=True):
        for model in MODELS:
            line = [row for row in rows if (row["model"], row["quantity"]) == (model, quantity) and row[cost]]
            if line:
                x, y = ([row[key] for row in line] for key in ("value", cost))
                ax.plot(x, y, "o-", markersize=4, label=f"{model}, {said(line, cost)}")
        ax.set(xscale="log", yscale="log", xlabel=quantity, ylabel=costs[cost])
        ax.set_xticks(SWEEPS[quantity], map(str, SWEEPS[quantity]))
        ax.set_xticks([], minor=True)
        # One scale for all quantities.
        every = [row[cost] for row in rows if row[cost]]
        if every:
            ax.set_ylim(min(every) / 1.5, max(every) * 4)
            ax.legend(fontsize=7, loc="upper left")
    signed(figure, machine).savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the files; default: the machine's")
    args = parser.parse_args()
    rows, machine = measured(), info.summary(DEVICE)
    name = args.name or re.sub(r"\W+", "-", machine.split(",")[0]).strip("-").lower()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"curves-{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"machine": machine} for row in rows)
    plot(rows, machine, args.out / f"curves-{name}.png")
    for quantity in SWEEPS:
        for model in MODELS:
            line = [row for row in rows if (row["model"], row["quantity"]) == (model, quantity)]
            if line:
                fits = [f"{cost} {said(line, cost)}" for cost in ("ms", "peak_mb") if line[0][cost]]
                print(f"{model} by {quantity}: {'; '.join(fits)}")


if __name__ == "__main__":
    main()
