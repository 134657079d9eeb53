"""Several processes of one run against one process with the same batches, and what happens when one dies."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import checkpoint
from fastgen.train.distributed import World, _from_environment
from fastgen.train.loop import distil

ROOT = Path(__file__).parents[2]
RUN = (
    "import sys\n"
    "from fastgen.train.config import TrainConfig\n"
    "from fastgen.train.distributed import LostProcess\n"
    "from fastgen.train.loop import distil\n"
    "try:\n    distil(TrainConfig.load(sys.argv[1]), progress=False)\n"
    "except LostProcess as error:\n    sys.exit(str(error))\n"
)


def start(config, size, folder, script=RUN, stdout=None) -> list[subprocess.Popen]:
    """Processes of a run, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = folder / f"{Path(config.out).name}.json"
    config.save(path)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    same = {**os.environ, **world, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            env=same | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, timeout=120) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def stats(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]


@pytest.fixture
def config(config, teacher, tmp_path):
    """Both stages, growth, a stock of targets, several poses of a latent, R1."""
    checkpoint.save(
        tmp_path / "teacher.safetensors", "teacher", {"G": teacher}, {"camera": teacher.camera.as_dict()}
    )
    return dataclasses.replace(
        config,
        teacher=str(tmp_path / "teacher.safetensors"),
        batch_size=8,
        poses_per_latent=2,
        growth=((4, 3, 8),),
        stage1_steps=12,
        stage2_steps=8,
        replay=16,
        replay_reuse=2.0,
        lambda_consistency=0.1,
    )


def assert_same_losses(got, want):
    assert [line["step"] for line in got] == [line["step"] for line in want]
    losses = ("loss", "consistency", "lr_pixel", "hr_pixel", "adv", "discriminator", "r1")
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in losses:
            if name in a:
                assert abs(a[name] - b[name]) <= 1e-5, (a["step"], name)
        # Of any size.
        for name in ("gradient", "raw_psnr_db"):
            assert abs(a[name] - b[name]) <= 1e-4 * b[name], (a["step"], name)


def test_two_processes_do_as_one(config, tmp_path):
    one = dataclasses.replace(config, out=str(tmp_path / "one"))
    two = dataclasses.replace(config, out=str(tmp_path / "two"))
    assert finish(start(two, 2, tmp_path)) == [(0, ""), (0, "")]
    distil(one, progress=False)
    assert_same_losses(stats(two.out), stats(one.out))
    parts = dataclasses.replace(config, out=str(tmp_path / "parts"), accumulate=2)
    distil(parts, progress=False)
    assert_same_losses(stats(parts.out), stats(one.out))


def test_another_number_of_processes_goes_on(config, tmp_path):
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    distil(whole, progress=False)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"), stage2_steps=3)
    assert finish(start(cut, 2, tmp_path)) == [(0, ""), (0, "")]
    distil(dataclasses.replace(cut, stage2_steps=8, resume=True), progress=False)
    assert_same_losses(stats(cut.out), stats(whole.out))


def test_a_process_that_is_killed_ends_the_run(config, tmp_path):
    config = dataclasses.replace(config, out=str(tmp_path / "killed"), stage1_steps=10_000, timeout=20.0)
    first, second = processes = start(config, 2, tmp_path)
    try:
        stop = time.monotonic() + 60
        while not (Path(config.out) / "stats.jsonl").exists() or len(stats(config.out)) < 2:
            assert time.monotonic() < stop
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        (code, said), _ = finish(processes, 60)
        assert code == 1 and said.startswith("rank 0 of 2 has lost the others: "), said
    finally:
        for process in processes:
            process.kill()


def test_the_first_of_two_says_what_a_dry_run_found(config, tmp_path):
    config = dataclasses.replace(config, growth=(), stage1_steps=1, stage2_steps=1)
    script = (
        "import sys\n"
        "from fastgen.train.config import TrainConfig\n"
        "from fastgen.train.watch import dry_run\n"
        "print(dry_run(TrainConfig.load(sys.argv[1])))\n"
    )
    processes = start(config, 2, tmp_path, script, stdout=subprocess.PIPE)
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "most memory" in said[0][0] and said[1][0].strip() == ""


def test_batches_that_do_not_divide(config, teacher):
    with pytest.raises(
        ValueError, match=r"batch_size: 8 images \(4 latents\) must divide into 1 processes x 3"
    ):
        distil(dataclasses.replace(config, accumulate=3), teacher, progress=False)
    with pytest.raises(
        ValueError, match=r"growth: 6 images \(3 latents\) must .*change --batch-size, the imag"
    ):
        distil(dataclasses.replace(config, growth=((4, 3, 6),), accumulate=4), teacher, progress=False)
    assert not Path(config.out).exists()


def test_shares_smaller_than_the_discriminators_groups(config, teacher):
    config = dataclasses.replace(config, accumulate=4, growth=(), stage1_steps=1, stage2_steps=0)
    adversarial = dataclasses.replace(config, curriculum="single-stage")
    with pytest.raises(
        ValueError, match="compares 4 of 8 images .* and only 2 of the 2 .* a multiple of 4, by"
    ):
        distil(adversarial, teacher, progress=False)
    assert not Path(config.out).exists()
    distil(config, teacher, progress=False)


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"}, (3, 4, 1)),
        # A shell within an allocation is no run of several.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_environment(environment, found, monkeypatch):
    assert from_environment(environment, monkeypatch) == found


def from_environment(environment, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return _from_environment()


def test_slurms_tasks_that_cannot_meet(monkeypatch):
    tasks = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(ValueError, match="SLURM has started 4 tasks, but MASTER_ADDR is not set"):
        from_environment(tasks, monkeypatch)
    assert from_environment({**tasks, "MASTER_ADDR": "a"}, monkeypatch) == (3, 4, 1)
    assert from_environment({**tasks, "WORLD_SIZE": "1"}, monkeypatch) == (0, 1, 0)
    assert from_environment({**tasks, "SLURM_STEP_NUM_TASKS": "1"}, monkeypatch) == (0, 1, 0)


def test_shares_are_the_whole():
    x = torch.arange(12).view(6, 2)
    shares = [World(rank, 3).share(x) for rank in range(3)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), x)


def test_killed_at_any_moment_it_resumes_bit_for_bit(config, tmp_path):
    """FASTGEN_KILLS=20: as often; `make fuzz` does.

    All of it in processes of their own: one with another number of threads adds up in another order.
    """
    config = dataclasses.replace(config, checkpoint_every=1, stage1_steps=25, stage2_steps=15)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), checkpoint_every=0)
    assert finish(start(whole, 1, tmp_path)) == [(0, "")]
    config = dataclasses.replace(config, out=str(tmp_path / "killed"))
    random = torch.Generator().manual_seed(0)
    for _ in range(int(os.environ.get("FASTGEN_KILLS", 2))):
        process = start(config, 1, tmp_path)[0]
        before = time.monotonic()
        lines = Path(config.out) / "stats.jsonl"
        seen = lines.read_text() if lines.exists() else ""
        while process.poll() is None and (not lines.exists() or lines.read_text() == seen):
            assert time.monotonic() < before + 60
            time.sleep(0.02)
        time.sleep(0.5 * torch.rand((), generator=random).item())
        process.kill()
        process.communicate()
        if (Path(config.out) / "resume.pt").exists():
            torch.load(Path(config.out) / "resume.pt", weights_only=True)
            fastgen.load_student(Path(config.out) / "student.safetensors")
            config = dataclasses.replace(config, resume=True)
    assert finish(start(config, 1, tmp_path)) == [(0, "")]
    got, want = (torch.load(Path(c.out) / "resume.pt", weights_only=True) for c in (config, whole))
    for part in ("student", "average", "discriminator", "student_optimiser", "discriminator_optimiser"):
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=0)
