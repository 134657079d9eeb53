"""What benchmarks/images.py and benchmarks/curves.py make of measurements."""

import importlib
import json
import sys
from pathlib import Path

import pytest


def row(case, route, dtype, ms, preset="ffhq512"):
    numbers = {"batch": 1, "ms": ms, "images_per_s": 1000 / ms, "peak_mb": None, "gmac": 2.0}
    ratios = {"floor_pct": 50.0, "speedup_vs_plain": 100 / ms, "speedup_vs_warm": 50 / ms}
    return {"preset": preset, "case": case, "route": route, "dtype": dtype} | numbers | ratios | {
        "speedup_vs_compile": None if preset == "toy" else 40 / ms, "machine": "a machine, 2 cores"
    }  # fmt: skip


@pytest.fixture
def images(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("images")


def test_report(images, tmp_path, monkeypatch):
    rows = [row("teacher", "plain", "float32", 100.0), row("teacher", "fastgen", "bfloat16", 10.0)]
    rows += [
        row("student-compact", "fastgen", "bfloat16", 2.0),
        row("teacher", "plain", "float32", 9.0, "toy"),
    ]
    first, second, readme = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "README.md"
    first.write_text(json.dumps([row("student-compact", "fastgen", "bfloat16", 7.0)]))
    second.write_text(json.dumps(rows[2:]))
    readme.write_text(f"before\n{images.MARKS[0]}\nold\n{images.MARKS[1]}\nafter\n")
    command = ["images.py", "--out", str(tmp_path), "--readme", str(readme), str(first)]
    monkeypatch.setattr(sys, "argv", command)
    images.main()
    # What is there stays, but for a case that is measured anew, and may have fewer columns.
    more = tmp_path / "c.json"
    more.write_text(json.dumps([line | {"ms_min": 1.0} for line in rows[:2]]))
    monkeypatch.setattr(sys, "argv", [*command[:-1], str(more), str(second)])
    images.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| student, compact | 2.0 |  |  |  |  |  |  | 2 |  |  | 50.0 | 25.0 | 20.0 |" in text
    kept = images.read(tmp_path / "images-a-machine.csv")
    assert len(kept) == len(rows) and sum(line.pop("ms_min") is None for line in kept) == 2
    assert all(line in kept for line in rows)
    assert (tmp_path / "images-a-machine.png").stat().st_size > 5000
    assert "## toy" in (tmp_path / "images-a-machine.md").read_text()


def test_nothing_to_compare(images, tmp_path, monkeypatch):
    """Rows without a baseline make no bars and no line of README's."""
    rows = [row("student-tiny", "fastgen", "float32", 2.0) | {"speedup_vs_plain": None}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["images.py", str(tmp_path / "a.json"), "--out", str(tmp_path)])
    images.main()
    assert not (tmp_path / "images-a-machine.png").exists() and "tiny" not in images.summary(rows)


def test_quality(images, tmp_path):
    rows = [
        row(f"student-{size}", "fastgen", "float32", ms, "toy") for size, ms in (("full", 9.0), ("tiny", 2.0))
    ]
    made = [f"sizes,{size},{db},0.1,30" for size, db in (("full", 25), ("tiny", 22))]
    head = "experiment,run,psnr_db,perceptual,reprojection_psnr_student_db"
    (tmp_path / "experiments.csv").write_text("\n".join([head, *made]))
    images.quality(rows, tmp_path / "experiments.csv", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_curves(images, monkeypatch, tmp_path):
    curves = importlib.import_module("curves")
    rows = [
        {"model": "teacher", "quantity": "rays", "value": x, "ms": 3 * x**1.5, "peak_mb": x}
        for x in (1, 2, 8)
    ]
    assert curves.exponent(rows, "ms") == (pytest.approx(1.5), pytest.approx(1))
    assert curves.said(rows, "ms") == "^1.50, R2 1.00"
    points = list(curves.points())
    assert {model for model, quantity, *_ in points if quantity == "samples"} == {"teacher"}
    curves.plot(rows, "a machine", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
