"""The configuration: what it refuses, the curriculum, and its file."""

import dataclasses

import pytest

from fastgen.train.config import PRESETS, TrainConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lambda_hr_pixel", -1.0),
        ("gpc_reg_prob", 1.5),
        ("curriculum", "three-stage"),
        ("perceptual", "vgg"),
        ("student", "huge"),
        ("betas", (0.9, 1.0)),
        ("poses_per_latent", 3),
        ("replay", 3),
        ("replay_reuse", 2.0),
        ("neural_rendering_resolution", 2),
        ("neural_rendering_resolution", 48),
        ("growth", ((32, 10, 8), (16, 10, 8))),
        ("growth", ((12, 10, 8),)),
        ("stage1_steps", -1),
        ("seed", 2**63),
        ("camera", "moon"),
        ("workers", -1),
        ("mirror", True),
        ("lambda_consistency", 0.1),
        ("precision", "float16"),
        ("orbit_every", -1),
        ("student_scale", 1.5),
        ("style_lr_multiplier", 0.0),
        ("style_lr_multiplier", float("inf")),
    ],
)
def test_impossible_values_name_their_field(name, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must be .*got"):
        TrainConfig(**{name: value})


def test_growth_must_fit_stage_1():
    with pytest.raises(ValueError, match="stage1_steps must be at least .* growth \\(20; none with"):
        TrainConfig(stage1_steps=10, growth=((8, 20, 16),))


def weights(**fields):
    config = TrainConfig(stage1_steps=4, stage2_steps=4, ramp_steps=4, **fields)
    return [config.adversarial_weight(step) for step in range(8)], config.has_discriminator


def test_curricula():
    assert weights(curriculum="two-stage") == ([0, 0, 0, 0, 1, 1, 1, 1], True)
    assert weights(curriculum="single-stage") == ([1] * 8, True)
    assert weights(curriculum="ramp") == ([0, 0, 0, 0, 0.25, 0.5, 0.75, 1], True)
    assert weights(curriculum="reconstruction-only") == ([0] * 8, False)
    assert weights(lambda_adv=0.0) == ([0] * 8, False)


def test_learning_rate():
    config = TrainConfig(stage1_steps=10, stage2_steps=10, lr=1.0, lr_adversarial=0.5, warmup_steps=2)
    assert [config.learning_rate(s) for s in (0, 1, 9, 10, 19)] == [0.5, 1.0, 1.0, 0.5, 0.5]
    cooled = dataclasses.replace(config, cooldown="cosine", warmup_steps=0)
    assert cooled.learning_rate(0) == 1.0 and cooled.learning_rate(10) == 0.5
    assert 0.1 < cooled.learning_rate(9) < 0.2 and 0.05 < cooled.learning_rate(19) < 0.1


def test_phases():
    config = TrainConfig(stage1_steps=10, stage2_steps=2, batch_size=4, growth=((8, 3, 16), (16, 4, 8)))
    assert [config.phase(s) for s in (0, 2, 3, 6, 7, 11)] == [
        (0, 8, 16),
        (0, 8, 16),
        (3, 16, 8),
        (3, 16, 8),
        (7, None, 4),
        (7, None, 4),
    ]
    half = config.scaled(0.5)
    assert half.growth == ((8, 2, 16), (16, 2, 8)) and (half.stage1_steps, half.stage2_steps) == (6, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_file(name, tmp_path):
    config = dataclasses.replace(PRESETS[name], out=str(tmp_path))
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_unknown_field_in_file(tmp_path):
    (tmp_path / "config.json").write_text('{"lambda_x": 1}')
    with pytest.raises(ValueError, match="no such TrainConfig field: lambda_x"):
        TrainConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("field", ['"device": 3', '"batch_size": 1.5', '"seed": true', '"lr": "fast"'])
def test_field_of_another_type_in_file(tmp_path, field):
    (tmp_path / "config.json").write_text("{" + field + "}")
    with pytest.raises(ValueError, match=f"{field.split(chr(34))[1]} must be of type"):
        TrainConfig.load(tmp_path / "config.json")
