"""The experiments: what they run, what they find in numbers, and the page. Results: docs/experiments.md."""

import csv
import dataclasses
import json

import pytest

from fastgen.train import experiments
from fastgen.train.config import TrainConfig


def row(**changes) -> dict:
    same = dict.fromkeys((*experiments.COLUMNS, *experiments.REFERENCE), 1.0)
    return same | {"steps": 1, "other_latent_db": 12.0, "other_pose_db": 15.0, "machine": "m"} | changes


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_run_is_a_configuration(name):
    for changes in experiments.EXPERIMENTS[name].runs.values():
        config = dataclasses.replace(experiments.BASE, **changes)
        assert isinstance(config, TrainConfig) and config.steps > 0
    # And what a claim compares is there.
    rows = {label: row() for label in experiments.EXPERIMENTS[name].runs}
    assert experiments.EXPERIMENTS[name].finding(rows).endswith(".")


def test_findings():
    learnt = experiments.EXPERIMENTS["reconstruction"].finding
    assert learnt({"reconstruction only": row(psnr_db=20.0)}).startswith("Shown: 20.00 dB")
    assert learnt({"reconstruction only": row(psnr_db=17.0)}).startswith("Not shown: 17.00 dB")
    compare = experiments.EXPERIMENTS["two-stage"].finding
    numbers = ("sharpness", "reprojection_psnr_student_db", "identity_student", "pose_degrees_student")
    worse = row(**dict(zip(numbers, (0.8, 20.0, 0.5, 3.0), strict=True)))
    better = row(**dict(zip(numbers, (0.7, 25.0, 0.9, 2.0), strict=True)))
    assert compare({"single stage": worse, "two stages": better}).startswith("Shown.")
    assert compare({"single stage": better, "two stages": worse}).startswith("Not shown.")
    mixed = compare({"single stage": worse | {"pose_degrees_student": 1.0}, "two stages": better})
    assert mixed.startswith("In part (sharper, reprojection, identity).")
    assert compare({"single stage": better, "two stages": better}).startswith("Not shown.")
    said = experiments.EXPERIMENTS["ablation"].finding(
        {
            "all terms": row(psnr_db=20.0, sharpness=0.8),
            "without adv": row(psnr_db=19.95, sharpness=0.7),
            "without hr pixel": row(psnr_db=19.95, sharpness=0.8, pose_degrees_student=0.5),
        }
    )
    assert said == (
        "without adv: the whole is better by sharpness; "
        "without hr pixel: the whole is better by nothing, worse by pose error, degrees."
    )
    said = experiments.EXPERIMENTS["sizes"].finding({"full": row(), "full, one rate": row(), "tiny": row()})
    assert said.startswith("Against full: tiny +0.00 dB of PSNR") and "Against full, one rate: tiny" in said


def test_page(tmp_path, monkeypatch):
    """Two runs of two experiments, one of them the same in both, of a few steps."""
    monkeypatch.setattr(experiments, "MARGINS", dict(experiments.MARGINS))
    tiny = {"growth": (), "stage1_steps": 1, "stage2_steps": 0, "replay": 0, "replay_reuse": 1.0}
    monkeypatch.setattr(experiments, "BASE", dataclasses.replace(experiments.BASE, **tiny))
    monkeypatch.setattr(experiments, "IMAGES", 8)
    monkeypatch.setattr(experiments, "CONTROLS", 4)
    known = {
        name: dataclasses.replace(experiments.EXPERIMENTS["style"], runs=runs)
        for name, runs in (("one", {"whole": {}}), ("two", {"whole": {}, "half": {"style_share": 0.5}}))
    }
    monkeypatch.setattr(experiments, "EXPERIMENTS", known | {"three": experiments.EXPERIMENTS["style"]})
    out, docs = tmp_path / "out", tmp_path / "docs"
    experiments.run(["two"], out, workers=2)
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/row.json")}
    assert len(done) == 2
    experiments.run(["one", "two"], out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/row.json")} == done
    # What goes wrong in one run is told here.
    wrong = dataclasses.replace(known["one"], runs={"wrong": {"teacher": str(out / "none.safetensors")}})
    monkeypatch.setitem(experiments.EXPERIMENTS, "wrong", wrong)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        experiments.run(["wrong"], out, workers=2)
    del experiments.EXPERIMENTS["wrong"]

    experiments.page(out, docs)
    text = (docs / "experiments.md").read_text()
    assert text.count("| whole |") == 2 and text.count("| half |") == 1
    assert text.count("| the teacher itself |") == 2 and text.count("Not run yet") == 1
    assert "By" not in text and "PSNR, dB: " in text
    for name in ("one", "two"):
        assert f"(experiments/{name}.png)" in text
        assert (docs / "experiments" / f"{name}.png").stat().st_size > 10_000
    with open(docs / "experiments.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["experiment"], r["run"]) for r in rows] == [
        ("one", "whole"),
        ("two", "whole"),
        ("two", "half"),
    ]
    assert rows[0]["psnr_db"] == rows[1]["psnr_db"] != rows[2]["psnr_db"]


def test_margins_are_what_seeds_change(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "MARGINS", dict(experiments.MARGINS))
    monkeypatch.setattr(experiments, "_picture", lambda *args: None)
    for label, changes in experiments.EXPERIMENTS["seeds"].runs.items():
        folder = tmp_path / experiments._key(changes)
        folder.mkdir()
        (folder / "row.json").write_text(json.dumps(row(psnr_db=20 + 0.25 * int(label[-1]), sharpness=0.5)))
    experiments.page(tmp_path, tmp_path / "docs")
    assert experiments.MARGINS["psnr_db"] == 0.5 and experiments.MARGINS["sharpness"] == 0
    assert "Largest less smallest: PSNR, dB 0.5, " in (tmp_path / "docs" / "experiments.md").read_text()


def test_names(capsys):
    with pytest.raises(SystemExit, match="names must be among all, page, reconstruction, .*, got nothing$"):
        experiments.main(["nothing"])
    with pytest.raises(SystemExit, match="workers must be at least 1, got 0"):
        experiments.main(["style", "--workers", "0"])
