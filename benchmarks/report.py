"""Turn the JSON of pytest-benchmark into a CSV (kept in benchmarks/results), a table and a plot.

python benchmarks/report.py out/kept.json out/returned.json [--out DIR] [--name MACHINE]

Where the first file is such a CSV, its rows stay, each with its commit, unless the JSON has them anew.
"""

import argparse
import csv
import json
import platform
import re
from pathlib import Path

import torch


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def rows(report: dict) -> list[dict]:
    """One row a case: milliseconds (median, 10th and 90th percentile), rates at the median, and the share of
    them that the floor is: the time of the bytes, or of the FLOP, at this machine's peaks."""
    cpu = report["machine_info"]["cpu"].get("brand_raw", platform.machine())
    commit = report["commit_info"].get("id", "")[:7] + ("+" if report["commit_info"].get("dirty") else "")
    found = []
    for case in report["benchmarks"]:
        about = case["extra_info"]
        times = [seconds / about.get("repeat", 1) for seconds in case["stats"]["data"]]
        seconds = quantile(times, 0.5)
        names = ("op", "shape", "dtype", "layout", "route", "memory", "threads")
        found.append(
            {name: about[name] for name in names}
            | {
                "ms": f"{seconds * 1e3:.3f}",
                "ms_p10": f"{quantile(times, 0.1) * 1e3:.3f}",
                "ms_p90": f"{quantile(times, 0.9) * 1e3:.3f}",
                "gbps": f"{about['bytes'] / seconds / 1e9:.1f}",
                "gflops": f"{about['flop'] / seconds / 1e9:.1f}",
                "floor_percent": f"{about['floor'] / seconds * 100:.0f}",
                "peak_mb": "" if about["peak"] is None else f"{about['peak'] / 2**20:.0f}",
                "machine": cpu if about["device"] == "cpu" else about["device"],
                "torch": torch.__version__,
                "commit": commit,
            }
        )
    return found


def read(path: Path) -> list[dict]:
    """The rows of a report, or of a CSV."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return rows(json.loads(path.read_text()))


def table(found: list[dict]) -> str:
    """Milliseconds of each route, beside fastgen's share of the floor and the memory that each needs."""
    cases, routes = {}, []
    for row in found:
        route = row["route"] + (", memory returned" if row["memory"] == "returned" else "")
        cases.setdefault((row["op"], row["shape"], row["dtype"], row["layout"]), {})[route] = row
        if route not in routes:
            routes.append(route)
    lines = [
        "| op | shape | dtype | layout | "
        + " | ".join(f"{route}, ms" for route in routes)
        + " | fastgen: GB/s | GFLOP/s | of the floor's speed | peak memory, MB | plain's |",
        "| --- " * (9 + len(routes)) + "|",
    ]
    for case, by_route in cases.items():
        times = [by_route[route]["ms"] if route in by_route else "-" for route in routes]
        own = by_route.get("fastgen", {})
        peaks = [
            next((r["peak_mb"] for r in by_route.values() if r["route"] == route and r["peak_mb"]), "-")
            for route in ("fastgen", "pytorch")
        ]
        rates = [own.get("gbps", "-"), own.get("gflops", "-"), f"{own.get('floor_percent', '-')} %", *peaks]
        lines.append("| " + " | ".join([*case, *times, *rates]) + " |")
    return "\n".join([*lines, "", f"{about(found)}; median."])


def about(found: list[dict]) -> str:
    """Where the rows are from."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    return "{machine}, {threads} threads; torch {torch}; ".format(**found[0]) + f"commits {commits}"


def plot(found: list[dict], path: Path) -> None:
    """How many times as fast as plain PyTorch each other route is; memory kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[str, dict[str, float]] = {}
    for row in found:
        if row["memory"] == "kept":
            layout = f", {row['layout']}" if row["layout"] != "contiguous" else ""
            name = f"{row['op']} {row['shape']}, {row['dtype']}{layout}"
            cases.setdefault(name, {})[row["route"]] = float(row["ms"])
    cases = {name: ms for name, ms in cases.items() if "pytorch" in ms and len(ms) > 1}
    routes = list(dict.fromkeys(route for ms in cases.values() for route in ms if route != "pytorch"))
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.16 * len(cases) * (len(routes) + 1)))
    for k, route in enumerate(routes):
        at = [i + 0.8 * (k + 0.5) / len(routes) for i, ms in enumerate(cases.values()) if route in ms]
        speed_up = [ms["pytorch"] / ms[route] for ms in cases.values() if route in ms]
        bars = axes.barh(at, speed_up, 0.8 / len(routes), label=route)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast as plain PyTorch", title=about(found))
    axes.set_yticks([i + 0.4 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the files; default: the machine's")
    args = parser.parse_args()

    # Of a case that is in several files, the last one counts.
    names = ("op", "shape", "dtype", "layout", "route", "memory")
    # A run that was killed leaves an empty file, or none.
    files = [path for path in args.files if path.exists() and path.stat().st_size]
    if not files:
        parser.error(f"nothing was measured: {', '.join(map(str, args.files))} are empty or not there")
    every = [row for path in files for row in read(path)]
    found = list({tuple(row[name] for name in names): row for row in every}.values())
    name = args.name or re.sub(r"\W+", "-", found[0]["machine"]).strip("-").lower()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (args.out / f"{name}.md").write_text(table(found) + "\n")
    plot(found, args.out / f"{name}.png")
    print(table(found))


if __name__ == "__main__":
    main()
