"""What every command prints and writes."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import __main__ as cli
from fastgen import _backends, checkpoint, pictures
from fastgen.__main__ import main
from fastgen.camera import CameraDistribution, angles
from fastgen.commands import parse_seeds
from fastgen.train import demo, toy
from fastgen.train.config import PRESETS
from fastgen.train.data import generator_for
from fastgen.train.dataset import ImageDataset, write_zip

ROOT = Path(__file__).parents[2]


def picture(path: Path) -> np.ndarray:
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.std() > 3, f"{path} shows nothing"
    return image


def film(path: Path) -> np.ndarray:
    import imageio.v3

    return imageio.v3.imread(path)


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastgen", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr
    for command in ("info", "convert", "render", "export", "train", "demo"):
        assert command in done.stdout


def test_start_imports_no_heavy_package():
    code = (
        "import sys, fastgen.__main__\n"
        "heavy = {'lpips', 'torchvision', 'matplotlib', 'tensorboard', 'torchmetrics', 'imageio', 'PIL'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command, named",
    [
        ("info", ["--json", "backend"]),
        ("convert", ["IN.pkl", "OUT.safetensors", "without running any code"]),
        ("render", ["--model", "--seeds", "--grid FILE.png", "--orbit FILE.mp4", "--truncation", "--device"]),
        (
            "train",
            ["--teacher", "--out", "--preset", "--resume", "--stage1-steps", "Discriminator's learning"],
        ),
        ("export", ["STUDENT.safetensors", "OUT.onnx", "--fp16", "--opset", "--noise"]),
        ("data", ["check", "toy"]),
        ("data check", ["FILE", "--deep", "--workers", "--preset"]),
        ("data toy", ["OUT.zip", "N", "--resolution", "--seed"]),
        ("evaluate", ["--student FILE", "--teacher", "--data", "--features", "--pose", "--json FILE.json"]),
        ("demo", ["--out", "--minutes", "--length", "side_by_side.png"]),
    ],
)
def test_help(command, named, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and not said.err
    for words in named:
        assert words in said.out, words


def test_help_of_train_shows_the_defaults_of_the_preset(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = []
    for arguments in (["--teacher", "toy"], ["--preset", "afhqcats512"]):
        with pytest.raises(SystemExit):
            main(["train", *arguments, "--help"])
        shown.append(capsys.readouterr().out)
    assert "(default: afhqcats512)" in shown[1] and "(default: afhqcats512)" not in shown[0]
    assert shown[0].count("(default: toy)") >= 2  # teacher and student


def test_info(capsys):
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["fastgen"] == fastgen.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"]["usable"]
    assert {"upfirdn2d", "bias_act"} <= set(found["ops"])
    for op, devices in found["ops"].items():
        assert op in table
        served = {by["backend"] for by in devices.values()}
        assert served <= {"cpu", "cuda", "triton", "composed", "reference"}
        usable, reason = found["backends"]["cpu"].values()
        if devices["cpu"]["backend"] == "cpu":
            assert usable
        else:
            assert devices["cpu"]["why"] or devices["cpu"]["backend"] == "composed"
    assert "unusable" not in next(line for line in table.splitlines() if line.startswith("modulated_conv2d"))
    if not usable:
        assert reason in table


def test_info_follows_the_choice_of_backend(capsys, monkeypatch):
    with fastgen.backend("reference"):
        assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {by["backend"] for op in found["ops"].values() for by in op.values()} == {"reference"}
    # What can't be had is told in a line, and only that.
    for error in (
        _backends.BackendError("backend 'cuda' is not available: not built"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ):
        monkeypatch.setattr(cli.Info, "run", lambda self, error=error: (_ for _ in ()).throw(error))
        assert main(["info"]) == 2
        assert capsys.readouterr().err == f"fastgen info: {error}\n"
    monkeypatch.setattr(cli.Info, "run", lambda self: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_convert(files, tmp_path, capsys):
    out = tmp_path / "new" / "cars.safetensors"
    assert main(["convert", str(files["cars.pkl"]), str(out)]) == 0
    said = capsys.readouterr().out
    header, _ = checkpoint.read(out)
    for words in ("teacher", "128 x 128", "1,552,352 parameters", "Discriminator", header["source_sha256"]):
        assert words in said
    assert fastgen.load_teacher(out).img_resolution == 128


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_render(kind, files, tmp_path, capsys):
    model = str(files[f"{kind}.safetensors"])
    grid, orbit, one = tmp_path / "new" / "grid.png", tmp_path / "orbit.mp4", tmp_path / "one.png"
    arguments = [
        "--seeds",
        "0-1,5",
        "--poses",
        "4",
        "--frames",
        "5",
        "--device",
        "cpu",
        "--truncation",
        "0.9",
    ]
    outputs = ["--grid", str(grid), "--orbit", str(orbit), "--image", str(one)]
    assert main(["render", "--model", model, *arguments, *outputs]) == 0
    written = [grid, orbit, *(tmp_path / f"one-{seed}.png" for seed in (0, 1, 5))]
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, written))

    table = picture(grid)
    assert table.shape[0] > 3 * 128 and table.shape[1] > 4 * 128
    # The paper on the left holds labels: some of it is ink.
    assert (table[:, :40].min(axis=-1) < 100).any()
    assert film(orbit).shape[0] == 5
    images = [picture(path) for path in written[2:]]
    assert all(image.shape == (128, 128, 3) for image in images)
    assert not np.array_equal(images[0], images[1])

    # A seed is the same latent whatever else is rendered, and one seed alone gets the plain name.
    assert main(["render", "--model", model, "--seeds", "5", "--truncation", "0.9", "--image", str(one)]) == 0
    assert np.abs(picture(one).astype(int) - images[2]).max() <= 1


def test_render_takes_the_poses_of_a_preset(files, tmp_path):
    paths = [tmp_path / "own.png", tmp_path / "cars.png"]
    for path, camera in zip(paths, ("auto", "shapenetcars128"), strict=True):
        arguments = ["--model", str(files["teacher.safetensors"]), "--seeds", "1", "--camera", camera]
        assert main(["render", *arguments, "--image", str(path)]) == 0
    assert not np.array_equal(picture(paths[0]), np.asarray(Image.open(paths[1])))


def test_render_in_bfloat16(files, tmp_path):
    paths = [tmp_path / "float32.png", tmp_path / "bfloat16.png"]
    for path in paths:
        arguments = ["--model", str(files["student.safetensors"]), "--seeds", "1", "--dtype", path.stem]
        assert main(["render", *arguments, "--image", str(path)]) == 0
    full, short = (picture(path).astype(int) for path in paths)
    assert 0 < abs(full - short).max() < 32


def test_seeds():
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    assert parse_seeds("5, 2-2,5") == [5, 2]
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1-", "1.5", "99999999999"):
        with pytest.raises(ValueError, match="seeds must look like"):
            parse_seeds(wrong)
    assert len(parse_seeds("1-10000")) == 10_000
    for wrong in ("0-10000", "0-4294967295", "0-6000,7000-12000"):
        with pytest.raises(ValueError, match="seeds must be at most 10,000"):
            parse_seeds(wrong)
    z = pictures.latents([3, 4], 8)
    assert torch.equal(z[1:], pictures.latents([4], 8)) and abs(z.mean()) < 1


def test_train_resumes(files, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (
        f"train --teacher {files['teacher.safetensors']} --out {out} --student toy --perceptual none"
        " --batch-size 2 --stage1-steps 2 --stage2-steps 1 --discriminator-channels 128 --grid-images 2"
        " --no-tensorboard --device cpu"
    ).split()
    assert main(arguments) == 0
    assert "student.safetensors: step 3 of 3" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["stage1_steps"] == 2
    assert fastgen.load_student(out / "student.safetensors").camera is not None
    picture(next((out / "grids").glob("*.png")))

    assert main(arguments) == 2
    assert "resume" in capsys.readouterr().err
    # The run's own options are the defaults; one that would change it is refused, more steps are not.
    again = ["train", "--out", str(out), "--resume"]
    assert main(again) == 0
    capsys.readouterr()
    assert main([*again, "--batch-size", "4"]) == 2
    assert "resume: batch_size was 2" in capsys.readouterr().err
    assert main([*again, "--stage2-steps", "2"]) == 0
    assert "step 4 of 4" in capsys.readouterr().out
    # The checkpoint has them, too.
    config = (out / "config.json").read_text()
    for broken in ('{"batch_size": ', None):
        (out / "config.json").unlink() if broken is None else (out / "config.json").write_text(broken)
        assert main(again) == 0
        assert (out / "config.json").read_text() == config
    (out / "config.json").write_text('{"batch_size": ')
    (out / "resume.pt").write_text("hello")
    capsys.readouterr()
    assert main(again) == 2
    assert "config.json: not JSON" in capsys.readouterr().err


def test_evaluate(files, tmp_path, capsys):
    data, out = tmp_path / "a.zip", tmp_path / "new" / "a.json"
    pair = ["--student", str(files["student.safetensors"]), "--teacher", str(files["teacher.safetensors"])]
    pair += ["--identity", str(files["network"])]
    c = CameraDistribution().sample(3).tolist()
    write_zip(data, [(np.random.randint(0, 256, (128, 128, 3), dtype=np.uint8), label) for label in c])
    arguments = f"--features {files['network']} --data {data} --pose toy --json {out}".split()
    assert main(["evaluate", *pair, "--images", "5", "--device", "cpu", *arguments]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in said.splitlines()}
    assert rows["8 images"] == ["teacher", "student"] and found["images"] == 8
    assert rows["PSNR to the teacher, dB"] == [f"{found['psnr_db']:.2f}"]
    assert rows["FID by network.pt"] == [f"{found[f'fid_{who}']:.4g}" for who in ("teacher", "student")]
    assert rows["KID by network.pt"] == [f"{found[f'kid_{who}']:.4g}" for who in ("teacher", "student")]
    turned = [f"{found[f'pose_degrees_{who}']:.2f}" for who in ("teacher", "student")]
    cosines = [f"{found[f'identity_{who}']:.3f}" for who in ("teacher", "student")]
    assert rows["Identity at two poses, cosine of network.pt"] == cosines
    assert rows["Pose, mean error in degrees"] == turned
    assert "4 images, one of each latent, against 3 of the data set, by 12 features; so few" in said
    assert found["options"]["data"] == str(data) and found["machine"] and found["versions"]["fastgen"]

    # Without --features the data set has the poses; without --json the numbers are beside the student.
    assert main(["evaluate", *pair, "--images", "1", "--data", str(data)]) == 0
    said, warned = capsys.readouterr()
    assert warned == "data: gives the poses alone; FID and KID, which compare with it, need --features\n"
    beside = files["student.safetensors"].with_suffix(".evaluation.json")
    assert f"All numbers: {beside}" in said and json.loads(beside.read_text())["fid_student"] is None
    assert "FID and KID: not measured" in said and "Pose: not measured" in said and "FID by" not in said
    write_zip(data, [(np.zeros((16, 16, 3), dtype=np.uint8), c[0])])
    assert main(["evaluate", *pair, *arguments]) == 2
    assert "data: " in (said := capsys.readouterr().err) and "of 16 pixels, the teacher makes 128" in said


def test_data_sets_of_the_toy_are_repeatable(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.zip", "new/b.zip", "c.zip")]
    for path, arguments in zip(paths, ("2", "2", "1 --seed 1"), strict=True):
        assert main(["data", "toy", str(path), *arguments.split(), "--resolution", "16"]) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    a, b = ImageDataset(paths[0]), ImageDataset(paths[2])
    assert len(a) == 2 and a.resolution == 16 and not torch.equal(a.labels[0], b.labels[0])
    # An image is the same however many follow, and is what the toy's head looks like from its label.
    assert main(["data", "toy", str(paths[2]), "1", "--resolution", "16"]) == 0
    again = ImageDataset(paths[2])
    assert torch.equal(again[0][0], a[0][0]) and torch.equal(again.labels[0], a.labels[0])
    random = generator_for(0, "toy data set", 1)
    z, c = torch.randn(1, 16, generator=random), toy.poses(1, random)
    torch.testing.assert_close(a[1][0], toy.picture(z, c, 16)[0][0], rtol=0, atol=1 / 127.5)
    assert torch.equal(a.labels[1:], c)


def test_data_check(tmp_path, capsys):
    path = tmp_path / "a.zip"
    assert main(["data", "toy", str(path), "3", "--resolution", "16"]) == 0
    assert main(["data", "check", str(path), "--deep", "--workers", "1"]) == 0
    said = capsys.readouterr()
    lines = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in said.out.splitlines()}
    assert lines["images"] == ["3"] and lines["resolution"] == ["16 x 16"] and not said.err
    azimuth = angles(ImageDataset(path).labels)[0] - math.pi / 2
    yaw = [f"{x:.4f}" for x in (azimuth.mean(), azimuth.std(unbiased=False), azimuth.min(), azimuth.max())]
    assert lines["yaw, radians (azimuth - pi/2)"] == yaw
    assert lines["radius"] == ["2.7000", "0.0000", "2.7000", "2.7000"]
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(path), "--preset", "toy", "--workers", "0"])
    said = capsys.readouterr()
    assert end.value.code == 2 and "toy: mean" in said.out
    assert said.err == f"fastgen data check: {path} has images of 16 x 16 pixels, toy of 128 x 128\n"
    # Twenty faults line by line, then a number.
    content = {"labels": [[f"{i}\x1b.png", [0]] for i in range(23)]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(tmp_path), "--workers", "0"])
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 21
    assert errors[0] == f"fastgen data check: {tmp_path}: the label of 0.png must have 25 numbers"
    assert errors[20] == f"fastgen data check: {tmp_path}: and 3 more"


def test_train_on_a_data_set(tmp_path, capsys):
    """Both stages of the toy teacher's student, on a zip's images and their mirror images."""
    reals, out = tmp_path / "toy.zip", tmp_path / "run"
    assert main(["data", "toy", str(reals), "2"]) == 0
    arguments = (
        f"train --teacher toy --out {out} --reals {reals} --mirror --workers 2 --batch-size 2 --growth"
        " --replay 0 --replay-reuse 1 --poses-per-latent 1 --lambda-consistency 0 --stage1-steps 3"
        " --stage2-steps 3 --log-every 1 --neural-rendering-resolution 16 --discriminator-channels 128"
        " --discriminator-channel-max 8"
        " --grid-every 0 --no-tensorboard --device cpu"
    )
    assert main(arguments.split()) == 0
    assert "step 6 of 6" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert ["discriminator" in line for line in lines] == [False] * 3 + [True] * 3


def test_demo(files, tmp_path, capsys):
    out = tmp_path / "demo"
    # What an earlier demo left is replaced, not gone on from.
    (out / "run" / "grids").mkdir(parents=True)
    old = [out / "run" / "resume.pt", out / "run" / "grids" / "step_000999.png", out / "report.md"]
    for path in old:
        path.write_text("old")
    arguments = f"--out {out} --length 0.002 --images 4 --frames 3 --device cpu".split()
    assert main(["demo", "--teacher", str(files["teacher.safetensors"]), *arguments]) == 0
    said = capsys.readouterr().out
    assert not old[1].exists()
    for path in out.glob("*.*"):
        assert path.stat().st_size > 500, path

    metrics = json.loads((out / "metrics.json").read_text())
    for key in (
        "psnr_db",
        "ssim",
        "perceptual",
        "reprojection_psnr_teacher_db",
        "reprojection_psnr_student_db",
    ):
        assert isinstance(metrics[key], float), key
    for key in ("teacher_ms", "student_ms", "speedup", "teacher_ms_batch8", "student_ms_batch8", "wall_s"):
        assert metrics[key] > 0, key
    assert metrics["speedup"] == metrics["teacher_ms"] / metrics["student_ms"]
    assert metrics["perceptual_name"] == "random VGG16 features"
    assert metrics["steps_done"] == metrics["stage1_steps"] + metrics["stage2_steps"]

    report = (out / "report.md").read_text()
    for words in (
        f"{metrics['psnr_db']:.2f}",
        "random VGG16 features",
        torch.__version__,
        "side_by_side.png",
        "perceptual\nloss: none",
        "and in the second part the adversarial loss",
    ):
        assert words in report, words
    assert "adversarial" not in demo._report(metrics | {"steps_done": metrics["stage1_steps"]})
    unseen = metrics | {"reprojection_psnr_teacher_db": None, "reprojection_psnr_student_db": None}
    assert "PSNR in dB | - | - |" in demo._table(unseen)
    assert f"{metrics['psnr_db']:.2f}" in said
    assert picture(out / "side_by_side.png").shape[1] > 8 * 128
    assert picture(out / "curves.png").shape[0] > 300
    frames = film(out / "orbit.mp4")
    assert frames.shape[0] == 3 and frames.std() > 3
    student = fastgen.load_student(out / "student.safetensors")
    assert student.img_resolution == 128


def test_demo_keeps_to_its_budget(files):
    """On a machine that is too slow, both stages are shortened, and never to nothing."""
    teacher = fastgen.load_teacher(files["teacher.safetensors"])
    config = replace(
        PRESETS["toy"],
        growth=((8, 10, 2),),
        batch_size=2,
        poses_per_latent=2,
        discriminator_channels=128,
        discriminator_channel_max=8,
        device="cpu",
        tensorboard=False,
    )
    now = time.monotonic()
    share, stage2 = demo._affordable(config, teacher, now + 1e6)
    assert share == 1 and 0 < stage2 < 1e4
    assert demo._affordable(config, teacher, now - 10) == (0.05, 0.0)


def test_train_dry_run_and_watch(files, tmp_path, capsys):
    out = tmp_path / "run"
    small = [
        "train",
        "--teacher",
        str(files["teacher.safetensors"]),
        "--perceptual",
        "none",
        "--student",
        "toy",
    ]
    small += ["--batch-size", "2", "--stage1-steps", "3", "--stage2-steps", "2", "--log-every", "1"]
    small += ["--grid-every", "0", "--no-tensorboard", "--discriminator-channels", "128", "--out", str(out)]
    assert main([*small, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert '"batch_size": 2,' in said and not out.exists()
    for words in (
        "student: ",
        "teacher: ",
        "discriminator: ",
        " s the first step, ",
        "stage 1: ",
        "stage 2: ",
        " s a step of 2 images",
        "the teacher's targets: ",
        "most memory",
    ):
        assert words in said, words
    assert "trained: 0 " not in said
    assert main(["train", "--watch", str(out)]) == 2
    assert capsys.readouterr().err == f"fastgen train: watch: {out} holds no run\n"
    assert main(small) == 0
    capsys.readouterr()
    with (out / "stats.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as a reader may find it
    assert main(["train", "--watch", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step 5 of 5 (100 %), reconstruction + adversarial; " in " ".join(said.split())
    assert "raw psnr db" in said and "discriminator" in said and "checkpoint: 0 min" in said
    # Grids only, so far.
    (out / "stats.jsonl").write_text('{"step": 1, "heldout_psnr_db": 9.0}\n')
    assert main(["train", "--watch", str(out)]) == 0
    assert "no step logged yet, of 5" in " ".join(capsys.readouterr().out.split())
