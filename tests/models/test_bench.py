"""`fastgen bench`, on a tiny generator: what is measured, what a row says, what is not timed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgen import bench, presets
from fastgen.__main__ import main
from fastgen._timing import peaks
from fastgen.bench import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def preset(small_config, monkeypatch):
    made = presets.Preset(small_config, presets.get("toy").camera)
    monkeypatch.setitem(presets.PRESETS, "shapenetcars128", made)
    monkeypatch.setattr(bench, "TOGETHER", 0)
    monkeypatch.setattr(bench, "peaks", lambda device: dict.fromkeys(("bytes", *bench.DTYPES), 1e9))
    # What holds for the process would hold for all tests.
    monkeypatch.setattr("fastgen.keep_memory", lambda: True)


def without_compile(batches, device):
    return [case for case in bench_cases(batches, device) if case.route != "compile"]


bench_cases = bench.cases


def test_cases():
    pytest.importorskip("onnxruntime")
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
    *_, rows = bench.run("shapenetcars128", (1, 2), ("teacher", "teacher-cached", "student-tiny"), rounds=3)
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
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["floor_pct"] > 0 and row["machine"]


def test_baseline_that_does_not_fit(monkeypatch):
    """It is the one of the largest batch that does; and what does not fit has no row."""
    monkeypatch.setattr(bench, "cases", without_compile)
    real, state = bench.on_plain_operations, {}
    monkeypatch.setattr(
        bench, "on_plain_operations", lambda plain: (state.update(plain=plain), real(plain))[1]
    )
    monkeypatch.setattr(bench, "peak_bytes", lambda call, device: (call(), 100 if state["plain"] else 10)[1])
    monkeypatch.setattr(bench, "free_bytes", lambda device: 300)
    *_, rows = bench.run("shapenetcars128", (1, 2, 4), ("teacher",), rounds=3)
    by = {(row["route"], row["dtype"], row["batch"]): row for row in rows}
    assert ("plain", "float32", 4) not in by and ("warm", "float32", 4) not in by
    row, base = by["fastgen", "float32", 4], by["plain", "float32", 2]
    assert row["speedup_vs_plain"] == pytest.approx(base["ms"] / row["ms"])


def test_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "cases", without_compile)
    call = bench.Generators.call

    def wrong(self, case, *at):
        made = call(self, case, *at)
        return (lambda: made() + 1) if case.route == "fastgen" else made

    monkeypatch.setattr(bench.Generators, "call", wrong)
    done = bench.run("shapenetcars128", only=("teacher",), rounds=3)
    assert {row["route"] for row in next(done)} == {"plain", "returned"}
    with pytest.raises(FloatingPointError, match="route='fastgen'.*not timed"):
        next(done)


@pytest.mark.parametrize("batch, at, value", [(4, 2, torch.nan), (4, 3, 9.0), (2, 1, 9.0)])
def test_all_images_are_looked_at(batch, at, value):
    generators = bench.Generators("shapenetcars128", CPU, 4)
    case = Case("student-tiny", "fastgen", "float32", batch)
    images, exact = generators.call(case)().clone(), generators.exact(case.case, (2, 4))[0]
    bench.require_right(case, images, exact)
    images[at, 0] = value
    with pytest.raises(FloatingPointError, match="not timed"):
        bench.require_right(case, images, exact)


def test_plain_is_plain(small_config):
    """Counts of the plain route see the decoder's products; a cached teacher makes no planes."""
    generators = bench.Generators("shapenetcars128", CPU, 2)
    gmac = {name: generators.exact(name)[1] for name in ("teacher", "teacher-cached")}
    samples = 12 * small_config["neural_rendering_resolution"] ** 2
    hidden, features = small_config["decoder_hidden"], small_config["plane_channels"]
    assert gmac["teacher-cached"] > samples * hidden * (features + 33) / 1e9
    model, z, c = generators.model("teacher", "float32"), generators.z[:1], generators.c[:1]
    with torch.no_grad(), bench.on_plain_operations(), FlopCounterMode(display=False) as planes:
        model.backbone_planes(model.mapping(z, c))
    assert gmac["teacher"] - gmac["teacher-cached"] == pytest.approx(planes.get_total_flops() / 2e9)
    with bench.on_plain_operations():
        assert not bench.SynthesisBlock.channels_last
    assert bench.SynthesisBlock.channels_last
    assert bench.Generators("toy", CPU, 1).exact("teacher-cached")[1] == pytest.approx(0.64, abs=1e-3)


def test_compiled_in_stages(monkeypatch):
    """A teacher; a student is one graph. Both are whole images all the same."""
    compiled = []

    def compile(part, dynamic):
        compiled.append(part.__name__)
        return part

    monkeypatch.setattr(torch, "compile", compile)
    generators = bench.Generators("shapenetcars128", CPU, 1)
    for name in ("teacher", "student-compact"):
        case = Case(name, "compile", "float32", 1)
        with torch.no_grad():
            images = generators.call(case)()
            whole = generators.model(name, "float32")(generators.z, generators.c)["image"]
        bench.require_right(case, images, {0: whole})
    assert compiled == ["mapping", "backbone_planes", "render", "super_resolve", "<lambda>"]


def test_peaks():
    """In a process of its own, with this one's threads."""
    found = peaks(CPU)
    assert found.keys() == {"bytes", *bench.DTYPES} and min(found.values()) > 1e8


@pytest.mark.gpu
def test_on_a_gpu():
    *_, rows = bench.run("shapenetcars128", (1, 2), rounds=3, device=torch.device("cuda"))
    done = {(row["route"], row["dtype"]) for row in rows}
    assert {("graph", "bfloat16"), ("plain", bench.MIXED), ("compile", bench.MIXED)} <= done
    assert all(row["speedup_vs_plain"] and row["speedup_vs_compile"] for row in rows)


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
