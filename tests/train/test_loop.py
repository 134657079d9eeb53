"""The loop: both stages, exact continuation, averaging, signals, and what a run leaves on disk."""

import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from torch import nn

import fastgen
from fastgen.camera import mirror
from fastgen.models.student import Student
from fastgen.train import loop
from fastgen.train.config import TrainConfig
from fastgen.train.data import TargetStream
from fastgen.train.dataset import write_zip
from fastgen.train.loop import distil


def stats(out) -> list[dict]:
    lines = [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds_per_step", None)
    return lines


def interrupt_at(monkeypatch, call: int):
    """Press Ctrl-C while that call of reconstruction_terms runs."""
    original, calls = loop.reconstruction_terms, []

    def terms(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(loop, "reconstruction_terms", terms)


def test_two_stages(teacher, config, tmp_path):
    config = dataclasses.replace(config, grid_every=3, grid_images=2, orbit_every=4, tensorboard=True)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    run = distil(config, teacher, progress=False)
    assert run.step == 6 and not run.interrupted
    lines = [line for line in stats(config.out) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["adversarial_weight"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert ["adv" in line and "discriminator" in line for line in lines] == [False] * 3 + [True] * 3
    # Lazily, at even steps: the fifth one is step 4 counted from 0.
    assert ["r1" in line for line in lines] == [False, False, False, False, True, False]
    assert [line["learning_rate"] for line in lines] == [config.lr] * 3 + [config.lr_adversarial] * 3
    total = lines[4]["lr_pixel"] + lines[4]["hr_pixel"] + config.lambda_adv * lines[4]["adv"]
    assert lines[4]["loss"] == pytest.approx(total, rel=1e-5)
    out = Path(config.out)
    assert sorted(path.name for path in (out / "grids").iterdir()) == ["step_000003.png", "step_000006.png"]
    assert [line["step"] for line in stats(out) if "heldout_psnr_db" in line] == [3, 6]
    assert TrainConfig.load(out / "config.json") == config
    assert [path.name for path in (out / "orbits").iterdir()] == ["step_000004.mp4"]
    events = event_accumulator.EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert not list(out.glob("*.part*"))
    # The teacher is frozen; the student moved, its copy of the mapping did not.
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert torch.equal(run.student.teacher_mapping.fc0.weight, teacher.backbone.mapping.fc0.weight)
    loaded = fastgen.load_student(out / "student.safetensors")
    assert loaded.camera == teacher.camera
    z, c = torch.randn(2, teacher.z_dim), loaded.camera.sample(2)
    assert torch.equal(loaded(z, c)["image"], run.student(z, c)["image"])


def test_reconstruction_improves(teacher, config):
    config = dataclasses.replace(
        config,
        curriculum="reconstruction-only",
        stage1_steps=30,
        growth=((4, 10, 8),),
        replay=16,
        replay_reuse=4.0,
    )
    distil(config, teacher, progress=False)
    lines = [line for line in stats(config.out) if "hr_pixel" in line]
    assert not any("discriminator" in line for line in stats(config.out))
    assert sum(line["loss"] for line in lines[-4:]) < 0.7 * sum(line["loss"] for line in lines[:4])


def test_precision_and_compile(teacher, config, tmp_path, monkeypatch):
    """bfloat16 to its accuracy, compiled to rounding; Inductor itself takes minutes, so its graphs alone."""
    config = dataclasses.replace(config, stage1_steps=2, stage2_steps=2, growth=((4, 1, 2),))
    losses = {}
    monkeypatch.setattr(loop.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for name, changes in {
        "as ever": {},
        "compiled": {"compile": True},
        "bfloat16": {"precision": "bfloat16"},
    }.items():
        run = dataclasses.replace(config, out=str(tmp_path / name), **changes)
        distil(run, teacher, progress=False)
        assert "render" not in vars(teacher)
        losses[name] = torch.tensor([line["loss"] for line in stats(run.out)])
    torch.testing.assert_close(losses["compiled"], losses["as ever"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["bfloat16"], losses["as ever"], rtol=0.03, atol=0)
    assert not torch.equal(losses["bfloat16"], losses["as ever"])


@pytest.mark.gpu
def test_targets_rendered_ahead_are_the_same(teacher, config, tmp_path, monkeypatch):
    losses = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(TargetStream, "prefetch", lambda self, step: None)
        run = dataclasses.replace(
            config, out=str(tmp_path / str(ahead)), device="cuda", replay=8, replay_reuse=2.0
        )
        distil(run, copy.deepcopy(teacher), progress=False)
        losses.append([line["loss"] for line in stats(run.out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_consistency_falls_where_it_is_asked_for(teacher, config, tmp_path):
    last = {}
    for weight in (1e-6, 100.0):
        run = dataclasses.replace(
            config,
            out=str(tmp_path / str(weight)),
            lambda_consistency=weight,
            batch_size=4,
            poses_per_latent=2,
            stage1_steps=25,
            stage2_steps=0,
        )
        distil(run, teacher, progress=False)
        last[weight] = stats(run.out)[-1]["consistency"]
    assert 0 < last[100.0] < 0.5 * last[1e-6]


def test_growth_and_rare_final_images(teacher, config):
    config = dataclasses.replace(config, growth=((4, 2, 4), (8, 1, 2)), stage1_steps=6, hr_interval=2)
    distil(config, teacher, progress=False)
    lines = stats(config.out)
    assert [line["images"] for line in lines] == [4, 8, 10, 12, 14, 16, 18, 20, 22]
    assert ["hr_pixel" in line for line in lines] == [False] * 4 + [True, False] + [True] * 3


# In the first growth phase, in the second, and after them.
@pytest.mark.parametrize("late, growth", [(1, ((4, 1, 4),)), (3, ((4, 2, 4), (8, 1, 2))), (5, None)])
def test_stage_1_that_runs_late_makes_way_for_stage_2(teacher, config, tmp_path, monkeypatch, late, growth):
    config = dataclasses.replace(
        config, growth=((4, 2, 4), (8, 2, 2)), stage1_steps=9, stage2_steps=3, replay=8, replay_reuse=2.0
    )
    clock = SimpleNamespace(monotonic=lambda: len(stats(config.out)), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    run = distil(config, teacher, progress=False, stage2_by=late - 0.5)
    lines = stats(config.out)
    assert [line["adversarial_weight"] for line in lines] == [0] * late + [1] * 3
    assert not run.interrupted and run.step == late + 3
    assert run.config == TrainConfig.load(run.out / "config.json")
    assert (run.config.stage1_steps, run.config.growth) == (late, config.growth if growth is None else growth)
    # The same as a run of that configuration.
    monkeypatch.undo()
    planned = dataclasses.replace(run.config, out=str(tmp_path / "planned"))
    distil(planned, teacher, progress=False)
    assert stats(planned.out) == lines
    resumed = dataclasses.replace(run.config, resume=True, stage2_steps=4)
    assert distil(resumed, teacher, progress=False).step == late + 4


@pytest.mark.parametrize("curriculum", ["single-stage", "ramp"])
def test_other_curricula(teacher, config, curriculum):
    config = dataclasses.replace(config, curriculum=curriculum, stage1_steps=1, stage2_steps=2, ramp_steps=4)
    distil(config, teacher, progress=False)
    weights = [line["adversarial_weight"] for line in stats(config.out)]
    assert weights == ([1, 1, 1] if curriculum == "single-stage" else [0, 0.25, 0.5])
    assert stats(config.out)[1]["loss"] == pytest.approx(
        sum(stats(config.out)[1][name] for name in ("lr_pixel", "hr_pixel"))
        + weights[1] * config.lambda_adv * stats(config.out)[1]["adv"],
        rel=1e-5,
    )


def assert_equal(a, b, where=""):
    """Every tensor and number of nested dictionaries and lists is the same, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


# Within a phase, at the end of growth, at the end of stage 1, and within stage 2.
@pytest.mark.parametrize("call", [2, 3, 5, 7])
def test_resumed_run_equals_uninterrupted_one(teacher, config, tmp_path, monkeypatch, call):
    config = dataclasses.replace(
        config, stage1_steps=5, stage2_steps=5, growth=((8, 3, 4),), replay=8, replay_reuse=2.0, r1_interval=3
    )
    whole = distil(config, teacher, progress=False)
    config = dataclasses.replace(config, out=str(tmp_path / "interrupted"))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        run = distil(config, teacher, progress=False)
    # Ctrl-C ends the step it falls into, saves, and leaves the handlers as they were.
    assert run.interrupted and run.step == call
    assert signal.getsignal(signal.SIGINT) is before
    # What was drawn meanwhile must not matter, nor lines of a crash after the checkpoint.
    torch.randn(7)
    with (Path(config.out) / "stats.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0}\n{"step": 10, "lo')
    resumed = distil(dataclasses.replace(config, resume=True), teacher, progress=False)
    assert resumed.step == 10 and not resumed.interrupted
    assert stats(config.out) == stats(whole.out)
    for name, p in whole.student.state_dict().items():
        assert torch.equal(p, resumed.student.state_dict()[name]), name
    a, b = (torch.load(Path(out) / "resume.pt", weights_only=True) for out in (whole.out, config.out))
    assert {"average", "student_optimiser", "discriminator_optimiser", "images"} <= a.keys()
    for state in (a, b):
        del state["config"]
    assert_equal(a, b)


def test_real_images_and_their_poses(teacher, config, tmp_path, monkeypatch):
    labels = []
    for i, c in enumerate(teacher.camera.sample(4).tolist()):
        Image.new("RGB", (128, 128), (0, 80 * i, 255)).save(tmp_path / f"{i}.png")
        labels.append([f"{i}.png", c])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    seen = []
    penalty = loop.r1_penalty
    monkeypatch.setattr(
        loop, "r1_penalty", lambda d, real, c: (seen.append((real, c)), penalty(d, real, c))[1]
    )
    config = dataclasses.replace(config, reals=str(tmp_path), stage1_steps=0, stage2_steps=1)
    run = distil(config, teacher, progress=False)
    # Poses come from the labels, in targets and in what the discriminator sees; the file keeps the teacher's.
    known = torch.tensor([label for _, label in labels])
    assert all((c == known).all(dim=1).any() for c in [*seen[0][1], *run.poses.sample(8)])
    assert seen[0][0]["image"].shape[-1] == 128 and seen[0][0]["image_raw"].shape[-1] == 16
    assert (seen[0][0]["image"][:, 2] == 1).all()
    assert fastgen.load_student(run.out / "student.safetensors").camera == teacher.camera
    for path in tmp_path.glob("*.png"):
        Image.open(path).resize((64, 64)).save(path)
    with pytest.raises(ValueError, match="has images of 64 pixels, the teacher makes 128"):
        distil(dataclasses.replace(config, out=str(tmp_path / "other")), teacher)


def test_mirrored_reals_by_workers_resume_as_if_read_by_one(teacher, config, tmp_path, monkeypatch):
    pixels = torch.randint(256, (4, 128, 128, 3), dtype=torch.uint8).numpy()
    path = write_zip(tmp_path / "reals.zip", zip(pixels, teacher.camera.sample(4).tolist(), strict=True))
    config = dataclasses.replace(config, reals=str(path), mirror=True, stage1_steps=1, stage2_steps=5)
    whole = distil(config, teacher, progress=False)
    config = dataclasses.replace(config, out=str(tmp_path / "interrupted"), workers=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert distil(config, teacher, progress=False).step == 4
    assert not multiprocessing.active_children()
    resumed = distil(dataclasses.replace(config, resume=True, workers=1), teacher, progress=False)
    assert stats(config.out) == stats(whole.out)
    for name, p in whole.student.state_dict().items():
        assert torch.equal(p, resumed.student.state_dict()[name]), name
    # Render poses come from the mirrored labels, too.
    assert torch.equal(resumed.poses.labels[4:], mirror(resumed.poses.labels[:4]))
    with pytest.raises(ValueError, match="resume: mirror was True"):
        distil(dataclasses.replace(config, resume=True, mirror=False), teacher)


def test_resume_refuses(teacher, config):
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint to continue from"):
        distil(dataclasses.replace(config, resume=True), teacher)
    assert not Path(config.out).exists()
    distil(config, teacher, progress=False)
    longer = distil(dataclasses.replace(config, resume=True, stage2_steps=4), teacher, progress=False)
    assert longer.step == 7
    config = dataclasses.replace(config, stage2_steps=4)
    with pytest.raises(ValueError, match="out: .* holds a run"):
        distil(config, teacher)
    with pytest.raises(ValueError, match="resume: lambda_adv was 0.02 in .*, now it is 1.0"):
        distil(dataclasses.replace(config, resume=True, lambda_adv=1.0), teacher)


def test_damaged_checkpoint_is_refused(teacher, config):
    distil(dataclasses.replace(config, stage1_steps=1, stage2_steps=1), teacher, progress=False)
    config = dataclasses.replace(config, stage1_steps=1, stage2_steps=1, resume=True)
    path = Path(config.out) / "resume.pt"
    whole = torch.load(path, weights_only=True)
    weight = next(iter(whole["student"]))
    foreign = {**whole, "student": {**whole["student"], weight: torch.zeros(3, 1, 4)}}
    without = {name: part for name, part in whole.items() if name != "discriminator"}
    for content in (foreign, without, {"state_dict": {}}, [1], path.read_bytes()[:5000], b"hello", b""):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=r"resume: .*resume\.pt is damaged"):
            distil(config, teacher, progress=False)


def test_average():
    student, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    student.register_buffer("seen", torch.tensor(3.0))
    average.register_buffer("seen", torch.tensor(0.0))
    with torch.no_grad():
        student.weight.fill_(1)
        average.weight.fill_(0)
    config = TrainConfig(ema_half_life=100, ema_rampup=0.5)
    # Long after the start a batch of 100 images is one half-life; early on, half of the images seen is.
    loop._update_average(average, student, config, 10_000, 100)
    assert average.weight.item() == pytest.approx(0.5) and average.seen.item() == 3
    loop._update_average(average, student, config, 40, 40)
    assert average.weight.item() == pytest.approx(1 - 0.5 * 0.25)
    loop._update_average(average, student, dataclasses.replace(config, ema_half_life=0), 50, 10)
    assert average.weight.item() == 1


def test_loss_that_is_not_finite_is_named(teacher, config, monkeypatch):
    original, calls = loop.generator_loss, []

    def poisoned(logits):
        calls.append(1)
        return original(logits) * (float("inf") if len(calls) == 2 else 1)

    monkeypatch.setattr(loop, "generator_loss", poisoned)
    monkeypatch.setattr(loop, "KEEP_EVERY", 3)
    with pytest.raises(FloatingPointError, match="step 4: the loss term adv is inf"):
        distil(config, teacher, progress=False)
    # What was saved is the state at a good step: going on from it is what the run would have done.
    monkeypatch.setattr(loop, "generator_loss", original)
    assert torch.load(Path(config.out) / "resume.pt", weights_only=True)["step"] == 3
    again = distil(dataclasses.replace(config, resume=True), teacher, progress=False)
    whole = distil(dataclasses.replace(config, out=config.out + "2"), teacher, progress=False)
    assert again.step == whole.step == config.steps
    for a, b in zip(again.student.state_dict().values(), whole.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# The first update of all, and the first of stage 2, the student's and the discriminator's; with a checkpoint
# of what has diverged already, with an older one, and without any.
@pytest.mark.parametrize(
    "rate, saves, good, bad",
    [
        ("lr", 1, 0, 1),
        ("lr_adversarial", 1, 3, 4),
        ("lr_discriminator", 2, 2, 4),
        ("lr_adversarial", 0, 0, 4),
    ],
)
def test_diverged_run_goes_on_at_a_lower_rate(teacher, config, rate, saves, good, bad):
    config = dataclasses.replace(config, checkpoint_every=saves)
    with pytest.raises(
        FloatingPointError, match=f"step {bad}: .*--resume goes on from step {good}, which was"
    ):
        distil(dataclasses.replace(config, **{rate: 1e25}), teacher, progress=False)
    out = Path(config.out)
    assert torch.load(out / "resume.pt", weights_only=True)["step"] == good
    student = fastgen.load_student(out / "student.safetensors")
    assert all(x.abs().max() < 1e6 for x in student.state_dict().values())
    # As if it had never been tried.
    again = distil(dataclasses.replace(config, resume=True), teacher, progress=False)
    whole = distil(dataclasses.replace(config, out=config.out + "2"), teacher, progress=False)
    assert stats(again.out) == stats(whole.out)
    for a, b in zip(again.student.state_dict().values(), whole.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_run_that_is_never_finite_saves_nothing(teacher, config, monkeypatch):
    monkeypatch.setattr(
        loop, "reconstruction_terms", lambda fake, *_: {"lr_pixel": fake["image_raw"].sum() * torch.nan}
    )
    with pytest.raises(FloatingPointError, match="step 0: .* nothing was saved, no"):
        distil(config, teacher, progress=False)
    assert not (Path(config.out) / "resume.pt").exists()


@pytest.mark.parametrize("poisoned", ["generator_loss", "discriminator_loss"])
def test_gradient_that_is_not_finite_reaches_no_weight(teacher, config, monkeypatch, poisoned):
    original = getattr(loop, poisoned)
    # 0 sqrt(0) has the value 0 and no gradient.
    monkeypatch.setattr(
        loop, poisoned, lambda *logits: original(*logits) + (logits[-1] * 0).sum().abs().sqrt()
    )
    name = {"generator_loss": "gradient", "discriminator_loss": "discriminator_gradient"}[poisoned]
    with pytest.raises(FloatingPointError, match=f"step 3: the loss term {name} is nan"):
        distil(config, teacher, progress=False)
    saved = torch.load(Path(config.out) / "resume.pt", weights_only=True)
    for part in ("student", "discriminator"):
        assert all(x.isfinite().all() for x in saved[part].values())


@pytest.mark.parametrize("changed", [{"pose_input": "rays"}, {"style_share": 0.5}])
def test_variants_of_the_student_train_and_load(teacher, config, changed):
    config = dataclasses.replace(config, **changed)
    run = distil(config, teacher, progress=False)
    student = fastgen.load_student(run.out / "student.safetensors")
    assert student.config["pose_input"] == config.pose_input
    ws, c = torch.randn(2, student.num_ws, student.w_dim), teacher.camera.sample(2)
    with torch.no_grad():
        image = student.synthesis(ws, c)["feature_image"]
        assert torch.equal(image, run.student.synthesis(ws, c)["feature_image"])
        unseen = torch.cat(
            [ws[..., : student.w_dim // 2], torch.randn_like(ws[..., student.w_dim // 2 :])], -1
        )
        same = torch.equal(student.synthesis(unseen, c)["feature_image"], image)
        assert same == ("style_share" in changed)
    if config.pose_input == "rays":
        assert all(weight.abs().sum() > 0 for weight in student.ray_maps.parameters())


def test_sizes(teacher, config, tmp_path):
    """A super-resolution that starts as the teacher's learns at its own rate, another at the renderer's."""
    rates = {}
    for size in ("full", "tiny"):
        changes = {"student": size, "student_scale": 1 / 32, "style_lr_multiplier": 0.5, "stage2_steps": 0}
        changes |= {"lr_superresolution": 0.0, "stage1_steps": 2, "out": str(tmp_path / size)}
        student = distil(dataclasses.replace(config, **changes), teacher, progress=False).student
        assert student.config["channel_max"] == {"full": 16, "tiny": 4}[size]
        assert student.config["style_lr_multiplier"] == 0.5
        begun = teacher if size == "full" else Student.from_teacher(teacher, size, scale=1 / 32)
        weights = [x.superresolution.block1.torgb.bias for x in (student, begun)]
        rates[size] = (weights[0] - weights[1]).abs().max().item()
    assert rates["full"] == 0 < rates["tiny"]


def test_discriminator_starts_from_the_checkpoint(original, config):
    teacher = fastgen.load_teacher(original)
    theirs = fastgen.load_discriminator(original).state_dict()
    config = dataclasses.replace(config, teacher=str(original))
    mine = loop._make_discriminator(config, teacher, from_file=True).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    fresh = loop._make_discriminator(config, teacher, from_file=False)
    assert fresh.config["channel_base"] == config.discriminator_channels
    assert not any(getattr(module, "use_fp16", False) for module in fresh.modules())


def test_configuration_that_cannot_run(teacher, config, tmp_path):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        distil(dataclasses.replace(config, device="gpu"), teacher)
    with pytest.raises(ValueError, match="needs --perceptual-weights"):
        distil(dataclasses.replace(config, perceptual="lpips-vgg"), teacher)
    with pytest.raises(ValueError, match="growth: sides must be at most the feature map's, 16, got 32"):
        distil(dataclasses.replace(config, growth=((32, 1, 2),)), teacher)
    with pytest.raises(ValueError, match="camera must be one of auto, ffhq512"):
        distil(dataclasses.replace(config, camera="moon"), teacher)
    with pytest.raises(FileNotFoundError, match="nothing.pkl"):
        distil(dataclasses.replace(config, teacher=str(tmp_path / "nothing.pkl")))
    assert not Path(config.out).exists()


def test_deadline(teacher, config):
    run = distil(config, teacher, progress=False, deadline=time.monotonic())
    assert run.interrupted and run.step == 0 and (run.out / "resume.pt").exists()


def test_sigterm_saves(config, original, tmp_path):
    out = tmp_path / "killed"
    options = {
        "teacher": original,
        "out": out,
        "student": "toy",
        "perceptual": "none",
        "batch-size": 1,
        "neural-rendering-resolution": 8,
        "stage1-steps": 10_000,
        "log-every": 1,
        "grid-every": 0,
        "device": "cpu",
    }
    command = [sys.executable, "-m", "fastgen.train"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(1200):
            if process.poll() is not None or (
                (out / "stats.jsonl").exists() and (out / "stats.jsonl").read_text()
            ):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    step = torch.load(out / "resume.pt", weights_only=True)["step"]
    assert step == stats(out)[-1]["step"] > 0
    assert fastgen.load_student(out / "student.safetensors").img_resolution == 128
