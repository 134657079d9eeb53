"""Compare the benchmarks of this checkout, uncommitted changes included, with another commit.

python benchmarks/compare.py --base REV [--rounds N] [--csv FILE] [pytest arguments, such as -k bias_act]

The commit is checked out under out/compare, where it stays, with a library of its own where csrc or setup.py
differ. Both sides run the benchmark files of this checkout, each time in a new process: base, here, here,
base and so on, so that a steady drift cancels.

The rule: each round gives a case the ratio here / base of two medians. The mean of the logarithms has
Student's paired t interval with Bonferroni's correction: all intervals of a table hold at once with 95 %.
Their spread is at least what a median has by the 10th and 90th percentiles of its calls. A case is slower, or
faster, if its whole interval lies beyond the minimum effect, the "same" if it lies within; otherwise it is
"unclear", and more rounds or fewer cases may tell.

Exit status: 1 where a case is slower; 2 where one failed, or nothing could be compared; otherwise 0.
"""

import argparse
import csv
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import NormalDist
from subprocess import PIPE, STDOUT
from subprocess import run as start
from typing import NoReturn

import numpy as np
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("case", "base_ms", "here_ms", "ratio", "low", "high", "verdict")


def stop(text: str) -> NoReturn:
    print(f"compare.py: {text}", file=sys.stderr)
    raise SystemExit(2)


def run(command: list, tree: Path, complaint: str = "", accepted: tuple = (0,), **environment: str) -> str:
    """What a command writes in a tree whose package it uses. A status that is not accepted stops all."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = start(command, cwd=tree, env=environment, stdout=PIPE, stderr=STDOUT, text=True)
    if done.returncode not in accepted:
        stop(f"{complaint}\n{done.stdout[-3000:]}".strip())
    return done.stdout.strip()


def sources(tree: Path) -> dict[Path, bytes]:
    """What the library of a tree is made of."""
    paths = [tree / "setup.py", *(tree / "csrc").rglob("*")]
    return {path.relative_to(tree): path.read_bytes() for path in paths if path.is_file()}


def check_out(commit: str, out: Path) -> Path:
    """The tree of a commit, with the libraries that this checkout has."""
    tree, own, built = out / commit, sources(ROOT), list((ROOT / "fastgen").glob("*.so"))
    age = max((path.stat().st_mtime for path in built if path.name.startswith("_cpu")), default=0)
    for path in own:
        if age < (ROOT / path).stat().st_mtime:
            stop(f"the checkout's library is older than {path}, or not there: build it first (make install)")
    if not (tree / ".git").exists():
        run(["git", "worktree", "add", "--force", "--detach", tree, commit], ROOT)
    if run(["git", "status", "--porcelain", "--untracked-files=no"], tree):
        stop(f"{tree} is not as its commit: git worktree remove --force {tree}")
    if own and not list((tree / "fastgen").glob("_cpu*.so")):
        if sources(tree) == own:
            for path in built:
                (tree / "fastgen" / path.name).write_bytes(path.read_bytes())
        else:
            print("building the base", file=sys.stderr)
            cuda = "auto" if any(path.name.startswith("_cuda.") for path in built) else "0"
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            run(command, tree, "the base cannot be built", FASTGEN_CUDA=cuda)
    return tree


def summary(calls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of a run's calls [..., calls], and its relative standard error, were they normal."""
    low, median, high = np.quantile(calls, (0.1, 0.5, 0.9), axis=-1)
    deviation = (high - low) / 2 / NormalDist().inv_cdf(0.9)
    return median, deviation / median * np.sqrt(np.pi / 2 / np.shape(calls)[-1])


def measure(tree: Path, arguments: list[str]) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """One run of the benchmarks: a summary of each case, in milliseconds, and why others failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", ROOT / "benchmarks", "--rootdir", ROOT, *arguments, "-rfE"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", f"--benchmark-json={report}"]
        side = "this checkout" if tree == ROOT else "the base"
        # Status 0: all passed; 1: some failed; 5: there were none. pytest cuts its lines to COLUMNS.
        text = run(command, tree, f"the benchmarks do not run with {side}", (0, 1, 5), COLUMNS="500")
        found = json.loads(report.read_text()) if report.exists() and report.stat().st_size else {}
    cases = {}
    for case in found.get("benchmarks", []):
        calls = 1e3 * np.array(case["stats"]["data"]) / case["extra_info"].get("repeat", 1)
        cases[case["fullname"].removeprefix("benchmarks/")] = summary(calls)
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) \S*benchmarks/(.+?)(?: - (.*))?$", text)
    # Of a file that cannot be imported the reason stands further up.
    imports = re.findall(r"(?ms)ERROR collecting \S*benchmarks/(\S+) .*?^E +(.*?)$", text)
    return cases, dict(failed) | dict(imports)


def intervals(logs: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio, lower and upper bound of each case, from its log ratios [cases, rounds] and their errors."""
    cases, rounds = logs.shape
    spread = np.maximum(logs.std(1, ddof=1), np.sqrt(np.square(errors).mean(1)))
    reach = t.ppf(1 - 0.05 / 2 / cases, rounds - 1) * spread / np.sqrt(rounds)
    return np.exp(logs.mean(1)), np.exp(logs.mean(1) - reach), np.exp(logs.mean(1) + reach)


def compare(base: list[dict], here: list[dict], minimum: float) -> tuple[list[dict], dict[str, str]]:
    """A row of each case that all runs have; and of each other one, where it is."""
    rows, others = [], {}
    names = list(dict.fromkeys(name for found in (*here, *base) for name in found))
    for name in names:
        old, new = (sum(name in found for found in side) for side in (base, here))
        if old + new < len(base) + len(here):
            others[name] = "not in every run" if old and new else "only in the base" if old else "only here"
    names = [name for name in names if name not in others]
    if names:
        values = np.array([[[found[name] for found in side] for name in names] for side in (base, here)])
        logs, errors = np.log(values[..., 0]), np.hypot(*values[..., 1])
        numbers = (*np.exp(logs.mean(2)), *intervals(logs[1] - logs[0], errors))
        for name, row in zip(names, np.transpose(numbers).tolist(), strict=True):
            low, high = row[3:]
            least, most = 1 / (1 + minimum), 1 + minimum
            verdict = "slower" if low > most else "faster" if high < least else "unclear"
            verdict = "same" if least <= low and high <= most else verdict
            rows.append(dict(zip(COLUMNS, (name, *row, verdict), strict=True)))
    return rows, others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--base", metavar="REV", required=True, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=6, help="runs of each side, at least 2; best even")
    parser.add_argument("--minimum", type=float, default=3, metavar="PERCENT", help="the effect that counts")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compare")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args, arguments = parser.parse_known_args()
    if args.rounds < 2:
        stop("--rounds must be at least 2")
    command = ["git", "rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}"]
    commit = run(command, ROOT, f"--base {args.base} names no commit")
    trees = {"base": check_out(commit, args.out.resolve()), "here": ROOT}
    for tree in trees.values():
        find = "import importlib.util; print(importlib.util.find_spec('fastgen').origin)"
        origin = run([sys.executable, "-c", find], tree)
        if origin != str(tree / "fastgen" / "__init__.py"):
            stop(f"in {tree} Python would measure {origin}")

    reports, failed = {"base": [], "here": []}, {}
    for number in range(args.rounds):
        if number and not reports["base"][0].keys() & reports["here"][0].keys():
            break  # nothing to compare
        for side in ("here", "base") if number % 2 else ("base", "here"):
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
            cases, wrong = measure(trees[side], arguments)
            reports[side].append(cases)
            failed |= {(side, name): reason for name, reason in wrong.items()}
    rows, others = compare(reports["base"], reports["here"], args.minimum / 100)
    # A file that cannot be imported stands for all its cases.
    known = {name for _, name in failed}
    others = {name: where for name, where in others.items() if not known & {name, name.split("::")[0]}}

    print("| case | base, ms | here, ms | here / base | interval | verdict |\n" + "| --- " * 6 + "|")
    line = "| {case} | {base_ms:.3f} | {here_ms:.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {verdict} |"
    print(*(line.format(**row) for row in rows), "", sep="\n")
    for (side, name), reason in failed.items():
        print(f"Failed ({side}): {name}: {reason}")
    for name, where in others.items():
        print(f"Not compared ({where}): {name}")
    count = Counter(row["verdict"] for row in rows)
    verdicts = ", ".join(f"{count[word]} {word}" for word in ("slower", "faster", "same", "unclear"))
    print(f"{verdicts}, {len(others)} not compared, {len(failed)} failed; base {commit[:7]}.")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 2 if failed or not rows else int(count["slower"] > 0)


if __name__ == "__main__":
    sys.exit(main())
