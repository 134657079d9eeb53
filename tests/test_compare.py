"""The comparison of two commits' benchmarks: its rule on drawn times, and all of it on a tiny repository."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import compare  # noqa: E402


def drawn(generator, ratio=1.0, cases=1, rounds=6, calls=7, noise=0.03, drift=0.0):
    """Reports of both sides: calls vary by noise, runs by drift."""

    def run(factor):
        times = generator.normal(0, drift, (cases, 1)) + generator.normal(0, noise, (cases, calls))
        return dict(enumerate(zip(*compare.summary(factor * np.exp(times)), strict=True)))

    return [run(1) for _ in range(rounds)], [run(ratio) for _ in range(rounds)]


def verdicts(reports, minimum=0.03):
    return [row["verdict"] for row in compare.compare(*reports, minimum)[0]]


@pytest.mark.parametrize("noise, most", [(1e-3, 0.08), (0.03, 0.05)])
def test_equal_times_are_the_same(noise, most):
    """Where any effect counts, 5 % of all tables have a false verdict, and fewer if calls scatter as runs do;
    where only 3 % count, hardly one has."""
    generator = np.random.default_rng(0)
    reports = [drawn(generator, cases=20, noise=noise, drift=0.02) for _ in range(400)]
    false = np.mean([set(verdicts(pair, minimum=0)) != {"unclear"} for pair in reports])
    assert 0 < false < most and (noise > 0.01 or false > 0.02)
    assert sum(bool({"slower", "faster"} & set(verdicts(pair))) for pair in reports) <= 1


@pytest.mark.parametrize(
    "ratio, noise, expected",
    [(1.1, 0.03, "slower"), (1 / 1.1, 0.03, "faster"), (1.02, 1e-3, "same"), (1.02, 0.1, "unclear")],
)
def test_changes_count_from_the_minimum_on(ratio, noise, expected):
    generator = np.random.default_rng(0)
    found = [verdicts(drawn(generator, ratio, noise=noise))[0] for _ in range(100)]
    assert found.count(expected) >= 99
    assert verdicts(drawn(generator, ratio, noise=1e-3), minimum=0.01) not in (["same"], ["unclear"])


def test_spread_is_at_least_that_of_the_calls():
    """Runs that agree by chance do not make calls that scatter certain."""
    for times, expected in ((np.ones(7), "slower"), (np.linspace(0.5, 1.5, 7), "unclear")):
        reports = [[{"case": compare.summary(times * factor)}] * 4 for factor in (1, 1.1)]
        assert verdicts(reports) == [expected]
    draws = np.random.default_rng(0).normal(1, 0.01, (4000, 101))
    assert compare.summary(draws)[1].mean() == pytest.approx(np.median(draws, axis=1).std(), rel=0.05)


def test_cases_that_a_run_lacks_are_not_compared():
    both, more, less = {"a": (1.0, 0.0), "b": (1.0, 0.0)}, {"c": (1.0, 0.0)}, {"a": (1.0, 0.0)}
    rows, others = compare.compare([both, both], [less | more, both | more], 0.03)
    assert [row["case"] for row in rows] == ["a"]
    assert others == {"b": "not in every run", "c": "only here"}
    assert compare.compare([more], [less], 0.03) == ([], {"a": "only here", "c": "only in the base"})


BENCHMARK = """
import fastgen, pytest

@pytest.mark.parametrize("case", fastgen.COST)
def test_case(benchmark, case):
    assert case != "wrong", "not timed"
    benchmark.pedantic(fastgen.work, (case,), rounds=5)
"""
# Its library is a file that says how long a case takes, on a clock of its own.
SETUP = "from pathlib import Path; Path('fastgen/_cpu.so').write_text('{}')"
PACKAGE = """from pathlib import Path
COST = {{"one": float(Path(__file__).with_name("_cpu.so").read_text()), {}}}
now = 0

def work(case):
    global now
    now += COST[case]

def clock():
    return now
"""


def test_tiny_repository(tmp_path, monkeypatch, capsys):
    """The base's library is built, cases are told apart by file, and what fails is named."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    # A benchmark measures nothing where it runs as one of several processes (pytest-xdist).
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def call(*arguments):
        options = ["--rounds=2", f"--out={tmp_path}/out", f"--csv={tmp_path}/found.csv", "--base", *arguments]
        monkeypatch.setattr(sys, "argv", ["compare.py", *options, "--benchmark-timer=fastgen.clock"])
        try:
            return compare.main(), *capsys.readouterr()
        except SystemExit as stopped:
            return stopped.code, *capsys.readouterr()

    def write(seconds, more):
        (tmp_path / "setup.py").write_text(SETUP.format(seconds))
        (tmp_path / "fastgen/__init__.py").write_text(PACKAGE.format(more))

    (tmp_path / "fastgen").mkdir()
    write(0.005, "'wrong': 0")
    (tmp_path / ".gitignore").write_text("*.so\nout/\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "base"]):
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=n@example", *arguments], cwd=tmp_path, check=True
        )
    # None of this is committed.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/test_it.py").write_text(BENCHMARK)
    write(0.03, "'new': 1")
    assert call("HEAD^7") == (2, "", "compare.py: --base HEAD^7 names no commit\n")
    assert "build it first" in call("HEAD")[2]
    subprocess.run([sys.executable, "setup.py"], cwd=tmp_path, check=True)

    code, out, error = call("HEAD", "-k", "not wrong")
    assert code == 1, out + error
    runs = [line.split()[-1] for line in error.splitlines()]
    assert runs == ["base", "base", "here", "here", "base"]  # the first is built
    assert "Not compared (only here): test_it.py::test_case[new]\n1 slower, 0 faster, 0 same" in out
    (row,) = csv.DictReader((tmp_path / "found.csv").open())
    assert row["case"] == "test_it.py::test_case[one]" and float(row["ratio"]) == pytest.approx(6)

    (tmp_path / "benchmarks/test_other.py").write_text("import fastgen.new")
    (tree,) = (tmp_path / "out").iterdir()
    cases, failed = compare.measure(tree, ["-k", "wrong"])
    assert not cases and failed.pop("test_it.py::test_case[wrong]") == "AssertionError: not timed"
    assert list(failed) == ["test_other.py"] and "fastgen.new" in failed["test_other.py"]
    monkeypatch.setattr(compare, "measure", lambda *_: ({"a": (1.0, 0.0)}, {"b": "wrong"}))
    code, out, _ = call("HEAD")
    assert code == 2 and "Failed (here): b: wrong" in out and "0 slower, 0 faster, 1 same" in out
    monkeypatch.setattr(compare, "measure", lambda tree, _: ({tree.name: (1.0, 0.0)}, {}))
    code, out, error = call("HEAD")
    assert code == 2 and "0 unclear, 2 not compared" in out and "round 2" not in error
