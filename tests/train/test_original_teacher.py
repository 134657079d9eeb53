"""The main job on real input: an original EG3D pickle, both stages, a student that loads and renders."""

import torch

import fastgen
from fastgen.__main__ import main
from fastgen.train.loop import Run  # noqa: F401  (imported here, so that the test's time is the run's)


def test_original_checkpoint_to_student(original, tmp_path, capsys):
    out = tmp_path / "run"
    options = f"--teacher {original} --out {out} --student toy --perceptual none --device cpu --batch-size 2"
    options += " --neural-rendering-resolution 16 --stage1-steps 2 --stage2-steps 2"
    options += " --grid-every 2 --grid-images 1 --log-every 1"
    code = main(["train", *options.split()])
    assert code == 0, capsys.readouterr().err
    student = fastgen.load_student(out / "student.safetensors")
    teacher = fastgen.load_teacher(original)
    assert student.camera == teacher.camera and student.num_ws == teacher.num_ws
    z, c = torch.randn(2, student.z_dim), student.camera.sample(2)
    assert torch.equal(student.mapping(z, c, 0.7), teacher.mapping(z, c, 0.7))
    with torch.no_grad():
        images = student(z, c)
    assert images["image"].shape == (2, 3, 128, 128) and images["feature_image"].shape == (2, 32, 16, 16)
    assert all(image.isfinite().all() for image in images.values())
    assert images["image"].std() > 0
    assert sorted(path.name for path in (out / "grids").iterdir()) == ["step_000002.png", "step_000004.png"]
    assert "discriminator" in (out / "stats.jsonl").read_text()
    picture = tmp_path / "picture.png"
    options = f"--model {out / 'student.safetensors'} --seeds 3 --image {picture}"
    assert main(["render", *options.split()]) == 0
    assert picture.stat().st_size > 0
