"""Turn the JSON of pytest-benchmark into a CSV (kept in benchmarks/results) and a Markdown table.

python benchmarks/report.py out/kept.json out/returned.json [--out DIR] [--name MACHINE]
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
        about, times = case["extra_info"], case["stats"]["data"]
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
    first = found[0]
    where = f"{first['machine']}, {first['threads']} threads; torch {first['torch']}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found))
    return "\n".join([*lines, "", f"{where}; commits {commits}; median."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the files; default: the machine's")
    args = parser.parse_args()

    # Of a case that is in several files, the last one counts.
    names = ("op", "shape", "dtype", "layout", "route", "memory")
    every = [row for path in args.json for row in rows(json.loads(path.read_text()))]
    found = list({tuple(row[name] for name in names): row for row in every}.values())
    name = args.name or re.sub(r"\W+", "-", found[0]["machine"]).strip("-").lower()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (args.out / f"{name}.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
