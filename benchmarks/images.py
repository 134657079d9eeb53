"""Turn the JSON of `fastgen bench` into a CSV and tables (in benchmarks/results and README) and two plots.

python benchmarks/images.py out/ffhq512.json out/toy.json [--out DIR] [--name MACHINE] [--readme FILE]

What an earlier call wrote for this machine stays, but for the cases that are in a file now, of which the last
one counts.
"""

import argparse
import csv
import json
import re
from pathlib import Path

from fastgen.bench import MEANING, SHOWN, cells

ROOT = Path(__file__).parents[1]
KEY = ("preset", "case", "route", "dtype", "batch")
TEXT = ("preset", "case", "route", "dtype", "machine")
# README's columns: a route and dtype each.
COLUMNS = {
    "plain PyTorch": ("plain", "float32"),
    "the same, memory kept": ("warm", "float32"),
    "torch.compile": ("compile", "float32"),
    "torch.compile, bfloat16": ("compile", "bfloat16"),
    "ONNX Runtime": ("onnxruntime", "float32"),
    "fastgen": ("fastgen", "float32"),
    "fastgen, bfloat16": ("fastgen", "bfloat16"),
}
MARKS = "<!-- images -->", "<!-- /images -->"


def read(path: Path) -> list[dict]:
    """The rows of a file, numbers as numbers."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    number = {"batch": int}
    return [
        {k: v if k in TEXT else number.get(k, float)(v) if v else None for k, v in row.items()}
        for row in rows
    ]


def markdown(lines: list[list[str]], texts: int) -> str:
    """A table; the first so many columns are text."""
    rule = ["---"] * texts + ["---:"] * (len(lines[0]) - texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def page(found: list[dict]) -> str:
    """Everything, a section for each preset."""
    text = ["# Images, end to end", f"`fastgen bench`; written by benchmarks/images.py. {MEANING}"]
    for preset in dict.fromkeys(row["preset"] for row in found):
        rows = [row for row in found if row["preset"] == preset]
        lines = [[name for name, _ in SHOWN.values()], *map(cells, rows)]
        text += [f"## {preset}", markdown(lines, 3)]
        text += list(dict.fromkeys(row["machine"] for row in rows))
    return "\n\n".join(text) + "\n"


def summary(found: list[dict]) -> str:
    """README's: a line for each generator at batch 1, milliseconds an image on each route."""
    rows = [row for row in found if row["preset"] == "ffhq512" and row["batch"] == 1]
    head = ["", "GMAC", *COLUMNS, "peak MB, plain", "peak MB", "x plain", "x kept", "x compile"]
    lines = [head]
    for case in dict.fromkeys(row["case"] for row in rows):
        by = {(row["route"], row["dtype"]): row for row in rows if row["case"] == case}
        best, plain = by.get(("fastgen", "bfloat16")), by.get(("plain", "float32"), {})
        if best is None:
            continue
        ratios = [best[f"speedup_vs_{route}"] for route in ("plain", "warm", "compile")]
        lines.append(
            [case.replace("-", ", "), f"{best['gmac']:.1f}"]
            + [f"{by[c]['ms']:.0f}" if c in by else "" for c in COLUMNS.values()]
            + [f"{peak:.0f}" if peak else "" for peak in (plain.get("peak_mb"), best["peak_mb"])]
            + ["" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        )
    return f"{markdown(lines, 1)}\n\n{machines(rows)}."


def bars(found: list[dict], path: Path):
    """How many times as many images a second as the plain float32 teacher."""
    found = [row for row in found if row["speedup_vs_plain"] and row["route"] not in ("returned", "graph")]
    if not found:
        return
    groups = list(dict.fromkeys((row["preset"], row["batch"]) for row in found))
    most = max([(row["preset"], row["batch"]) for row in found].count(group) for group in groups)
    wide = min(3, len(groups))
    figure, axes = figure_of(-(-len(groups) // wide), wide, (6.5, 0.6 + 0.19 * most))
    for ax in axes[len(groups) :]:
        ax.axis("off")
    for ax, (preset, batch) in zip(axes, groups, strict=False):
        rows = [row for row in found if (row["preset"], row["batch"]) == (preset, batch)]
        rows.sort(key=lambda row: row["speedup_vs_plain"])
        names = [f"{row['case']}, {row['route']}, {row['dtype']}" for row in rows]
        colours = ["C0" if row["route"] == "fastgen" else "C7" for row in rows]
        drawn = ax.barh(names, [row["speedup_vs_plain"] for row in rows], color=colours)
        ax.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
        ax.set(xscale="log", xlabel="times the plain float32 teacher's images/s")
        ax.set_title(f"{preset}, batch {batch}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.margins(x=0.12, y=0.01)
        ax.xaxis.set_minor_formatter("")
    signed(figure, machines(found)).savefig(path, dpi=120)


def quality(found: list[dict], experiments: Path, path: Path):
    """What a student of the toy teacher is worth, against what its image costs."""
    with experiments.open(newline="") as file:
        trained = {f"student-{r['run']}": r for r in csv.DictReader(file) if r["experiment"] == "sizes"}
    rows = [
        row
        for row in found
        if (row["preset"], row["route"], row["dtype"]) == ("toy", "fastgen", "float32")
        and row["case"] in trained
        and row["batch"] == max(r["batch"] for r in found if r["preset"] == "toy")
    ]
    if not rows:
        return
    costs = {"ms": f"ms an image, float32, batch {rows[0]['batch']}", "gmac": "GMAC an image"}
    goods = {
        "psnr_db": "PSNR to the teacher, dB",
        "perceptual": "perceptual distance",
        "reprojection_psnr_student_db": "reprojection consistency, dB",
    }
    figure, axes = figure_of(len(costs), len(goods), (4, 3.2))
    for ax, (cost, good) in zip(axes, [(c, g) for c in costs for g in goods], strict=True):
        points = sorted((row[cost], float(trained[row["case"]][good]), row["case"]) for row in rows)
        ax.plot(*zip(*[point[:2] for point in points], strict=True), "o", markersize=4)
        for x, y, name in points:
            label = name.removeprefix("student-")
            ax.annotate(label, (x, y), (4, 4), textcoords="offset points", fontsize=8)
        ax.set(xlabel=costs[cost], ylabel=goods[good], xscale="log")
        ax.set_xticks([x for x, *_ in points], [f"{x:.2g}" for x, *_ in points])
        ax.set_xticks([], minor=True)
        ax.margins(0.15)
    signed(figure, machines(rows)).savefig(path, dpi=120)


def machines(rows: list[dict]) -> str:
    return "; ".join(dict.fromkeys(row["machine"] for row in rows))


def signed(figure, text: str):
    """The figure, with what it was measured on at its foot."""
    figure.supxlabel(text, x=0.99, ha="right", fontsize=6, color="grey")
    return figure


def figure_of(height: int, width: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figsize = (size[0] * width, size[1] * height)
    figure, axes = pyplot.subplots(height, width, figsize=figsize, layout="constrained", squeeze=False)
    return figure, axes.flat


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--name", help="name of the files; default: the machine's")
    parser.add_argument("--readme", type=Path, help="whose table is to be replaced")
    args = parser.parse_args()

    # A run that was killed leaves an empty file, or none.
    files = [path for path in args.files if path.exists() and path.stat().st_size]
    if not files:
        parser.error(f"nothing was measured: {', '.join(map(str, args.files))} are empty or not there")
    every = [row for path in files for row in read(path)]
    name = args.name or re.sub(r"\W+", "-", every[0]["machine"].split(",")[0]).strip("-").lower()
    earlier = args.out / f"images-{name}.csv"
    every = (read(earlier) if earlier.exists() else []) + every
    columns = list(dict.fromkeys(key for row in reversed(every) for key in row))
    every = [dict.fromkeys(columns) | row for row in every]
    found = list({tuple(row[name] for name in KEY): row for row in every}.values())
    found.sort(key=lambda row: (row["preset"], row["batch"]))
    args.out.mkdir(parents=True, exist_ok=True)
    with earlier.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    (args.out / f"images-{name}.md").write_text(page(found))
    bars(found, args.out / f"images-{name}.png")
    experiments = ROOT / "docs/experiments.csv"
    if experiments.exists():
        quality(found, experiments, args.out / f"quality-{name}.png")
    if args.readme:
        text = args.readme.read_text()
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        args.readme.write_text(f"{before}{MARKS[0]}\n{summary(found)}\n{MARKS[1]}{after}")
    print(page(found))


if __name__ == "__main__":
    main()
