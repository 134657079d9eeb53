"""Turn the JSON of pytest-benchmark into a CSV (kept in benchmarks/results) and a Markdown table.

python benchmarks/report.py out/bench.json [--out DIR] [--name MACHINE]
"""

import argparse
import csv
import json
import platform
import re
from pathlib import Path

import torch

from fastgen import info


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def rows(report: dict) -> list[dict]:
    """One row a case: milliseconds (median, 10th and 90th percentile), GB/s and GFLOP/s at the median."""
    cpu = report["machine_info"]["cpu"].get("brand_raw", platform.machine())
    found = []
    for case in report["benchmarks"]:
        about, times = case["extra_info"], case["stats"]["data"]
        seconds = quantile(times, 0.5)
        found.append(
            {name: about[name] for name in ("op", "shape", "dtype", "layout", "route", "threads")}
            | {
                "ms": f"{seconds * 1e3:.3f}",
                "ms_p10": f"{quantile(times, 0.1) * 1e3:.3f}",
                "ms_p90": f"{quantile(times, 0.9) * 1e3:.3f}",
                "gbps": f"{about['bytes'] / seconds / 1e9:.1f}",
                "gflops": f"{about['flop'] / seconds / 1e9:.1f}",
                "machine": cpu if about["device"] == "cpu" else about["device"],
                "torch": torch.__version__,
                "commit": info.commit() or "",
            }
        )
    return found


def table(found: list[dict]) -> str:
    """Milliseconds by route and GB/s of fastgen, one line a case."""
    cases, routes = {}, []
    for row in found:
        cases.setdefault((row["op"], row["shape"], row["dtype"], row["layout"]), {})[row["route"]] = row
        if row["route"] not in routes:
            routes.append(row["route"])
    lines = [
        f"| op | shape | dtype | layout | {' | '.join(f'{route}, ms' for route in routes)} | fastgen, GB/s |",
        "| --- " * (5 + len(routes)) + "|",
    ]
    for case, by_route in cases.items():
        times = [by_route[route]["ms"] if route in by_route else "-" for route in routes]
        rate = by_route["fastgen"]["gbps"] if "fastgen" in by_route else "-"
        lines.append("| " + " | ".join([*case, *times, rate]) + " |")
    first = found[0]
    where = f"{first['machine']}, {first['threads']} threads; torch {first['torch']}"
    return "\n".join([*lines, "", f"{where}; commit {first['commit']}; median."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the files; default: the machine's")
    args = parser.parse_args()

    found = rows(json.loads(args.json.read_text()))
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
