"""`fastgen bench`, on a tiny generator: what is measured, what a row says, what is not timed."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from fastgen import bench, presets
from fastgen.__main__ import main
from fastgen.bench import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def preset(small_config, monkeypatch):
    made = presets.Preset(small_config, presets.get("toy").camera)
    monkeypatch.setitem(presets.PRESETS, "shapenetcars128", made)
    monkeypatch.setattr(bench, "TOGETHER", 0)
    # What holds for the process would hold for all tests.
    monkeypatch.setattr("fastgen.keep_memory", lambda: True)


def without_compile(batches, device):
    return [case for case in bench_cases(batches, device) if case.route != "compile"]


bench_cases = bench.cases


def test_cases():
    found = bench.cases((1, 8), CPU)
    assert len(found) == len(set(found))
    assert Case("student-compact", "onnxruntime", "float32", 8) in found
    for route in ("plain", "warm", "compile"):
        assert (
            Case("teacher", route, "float32", 1) in found
            and Case("student-full", route, "bfloat16", 8) in found
        )
    assert {case.case for case in found} == {"teacher", "teacher-cached", *bench.STUDENTS}
    on_gpu = bench.cases((1,), torch.device("cuda"))
    assert Case("student-tiny", "graph", "bfloat16", 1) in on_gpu
    assert not {"warm", "returned", "onnxruntime"} & {case.route for case in on_gpu}


def test_rows(monkeypatch):
    monkeypatch.setattr(bench, "cases", without_compile)
    rows = bench.run("shapenetcars128", (1, 2), ("teacher", "teacher-cached", "student-tiny"), rounds=3)
    by = {(row["case"], row["route"], row["dtype"], row["batch"]): row for row in rows}
    assert (
        len(by)
        == len(rows)
        == len(
            [
                c
                for c in without_compile((1, 2), CPU)
                if c.case in ("teacher", "teacher-cached", "student-tiny")
            ]
        )
    )
    base, row = by["teacher", "plain", "float32", 2], by["student-tiny", "fastgen", "bfloat16", 2]
    assert base["speedup_vs_plain"] == 1 and row["speedup_vs_compile"] is None
    assert row["speedup_vs_plain"] == pytest.approx(base["ms"] / row["ms"])
    assert row["images_per_s"] == pytest.approx(1000 / row["ms"])
    assert row["peak_mb"] == by["student-tiny", "returned", "bfloat16", 2]["peak_mb"]
    assert 0 < by["teacher-cached", "fastgen", "float32", 1]["gmac"] < base["gmac"]
    for row in rows:
        assert row["ms"] > 0 and 0 < row["floor_pct"] < 1000 and row["machine"]


def test_baseline_that_does_not_fit(monkeypatch):
    """It is the one of the largest batch that does; and what does not fit has no row."""
    monkeypatch.setattr(bench, "cases", without_compile)
    monkeypatch.setattr(bench, "peak_bytes", lambda call, device: (call(), 100)[1])
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 300)
    rows = bench.run("shapenetcars128", (1, 2, 4), ("teacher",), rounds=3)
    by = {(row["route"], row["dtype"], row["batch"]): row for row in rows}
    assert ("plain", "float32", 4) not in by and ("warm", "float32", 4) not in by
    row, base = by["fastgen", "float32", 4], by["plain", "float32", 2]
    assert row["speedup_vs_plain"] == pytest.approx(base["ms"] / row["ms"])


def test_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "cases", without_compile)
    call = bench.Generators.call

    def wrong(self, case):
        made = call(self, case)
        return (lambda: made() + 1) if case.route == "fastgen" else made

    monkeypatch.setattr(bench.Generators, "call", wrong)
    with pytest.raises(ArithmeticError, match="route='fastgen'.*not timed"):
        bench.run("shapenetcars128", only=("teacher",), rounds=3)


def test_plain_is_plain():
    """Counts of the plain route see all products; a cached teacher makes no planes."""
    generators = bench.Generators("shapenetcars128", CPU, 1)
    assert generators.gmac("teacher") > generators.gmac("teacher-cached") > 0
    with bench.on_plain_operations():
        assert not bench.SynthesisBlock.channels_last
    assert bench.SynthesisBlock.channels_last


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "cases", without_compile)
    path = tmp_path / "rows.json"
    arguments = [
        "bench",
        "--preset",
        "shapenetcars128",
        "--only",
        "teacher",
        "student-compact",
        "--rounds",
        "3",
    ]
    assert main([*arguments, "--batch", "1", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    wanted = "case route dtype batch ms images_per_s peak_mb gmac floor_pct speedup_vs_plain speedup_vs_warm"
    assert {*wanted.split(), "speedup_vs_compile"} <= set(rows[0])
    assert {row["batch"] for row in rows} == {1, 2} and {row["dtype"] for row in rows} == set(bench.DTYPES)
    said = capsys.readouterr().out
    assert "x plain" in said and "student-compact" in said and rows[0]["machine"] in said
    for wrong, message in {
        "--batch 0": "batch must be numbers from 1 to 4096",
        "--only teacher-x": "only must be among teacher, teacher-cached, student-full",
        "--json rows.txt": "must end in .json",
        "--preset lsun": "ffhq512",
        "--student nothing.safetensors": "nothing.safetensors",
    }.items():
        code = 2
        try:
            code = main(["bench", "--preset", "shapenetcars128", *wrong.split()])
        except SystemExit as end:
            code = end.code
        assert code == 2 and message in capsys.readouterr().err


@pytest.fixture
def images():
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("images", folder / "images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report(images, tmp_path, monkeypatch):
    def row(case, route, dtype, ms, preset="ffhq512"):
        numbers = {"batch": 1, "ms": ms, "images_per_s": 1000 / ms, "peak_mb": None, "gmac": 2.0}
        ratios = {"floor_pct": 50.0, "speedup_vs_plain": 100 / ms, "speedup_vs_warm": 50 / ms}
        return {"preset": preset, "case": case, "route": route, "dtype": dtype} | numbers | ratios | {
            "speedup_vs_compile": None if preset == "toy" else 40 / ms, "machine": "a machine, 2 cores"
        }  # fmt: skip

    rows = [row("teacher", "plain", "float32", 100.0), row("teacher", "fastgen", "bfloat16", 10.0)]
    rows += [
        row("student-compact", "fastgen", "bfloat16", 2.0),
        row("teacher", "plain", "float32", 9.0, "toy"),
    ]
    first, second, readme = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "README.md"
    first.write_text(json.dumps([*rows[:2], row("student-compact", "fastgen", "bfloat16", 7.0)]))
    second.write_text(json.dumps(rows[2:]))
    readme.write_text(f"before\n{images.MARKS[0]}\nold\n{images.MARKS[1]}\nafter\n")
    command = ["images.py", str(first), str(second), "--out", str(tmp_path), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", command)
    images.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| student, compact | 2.0 |  |  |  |  |  | 2 |  |  | 50 | 25 | 20 |" in text
    kept = images.read(tmp_path / "images-a-machine.csv")
    assert sorted(map(str, kept)) == sorted(map(str, rows))  # the last of a case, numbers as they were
    assert (tmp_path / "images-a-machine.png").stat().st_size > 5000
    assert "## toy" in (tmp_path / "images-a-machine.md").read_text()


def test_exponent(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "images", images)
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("curves", folder / "curves.py")
    curves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curves)
    rows = [{"value": x, "ms": 3 * x**1.5} for x in (1, 2, 4, 8)]
    assert math.isclose(curves.exponent(rows, "ms"), 1.5)
    points = list(curves.points())
    assert {model for model, quantity, *_ in points if quantity == "samples"} == {"teacher"}
    assert {quantity for _, quantity, *_ in points} == set(curves.SWEEPS)
