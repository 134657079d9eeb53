"""How each wrong input to the command line is refused: in one line."""

import re

import pytest

from fastgen.__main__ import main

WRONG = {
    "no command": ("", "Expected one of"),
    "unknown command": ("paint", "paint.*info, convert, render, export, train, demo"),
    "unknown option": ("render --model toy --sedes 3", "--sedes"),
    "unknown option of train": ("train --stage1-step 3", "--stage1-step.*perhaps you meant --stage1-steps"),
    "option without value": ("train --preset", "--preset"),
    "missing option": ("render", "missing --model"),
    "missing arguments": ("convert", "missing IN.pkl, OUT.safetensors"),
    "too many arguments": ("convert a b c", "c"),
    "not a number": ("demo --minutes soon", "--minutes.*'soon'"),
    "not a choice": ("train --curriculum none", "--curriculum.*two-stage"),
    "unknown preset": ("train --preset cats", "'cats'.*--preset"),
    "impossible value": ("train --batch-size 0", "batch_size must be at least 1, got 0"),
    "impossible weight": ("train --lambda-adv=-1", "lambda_adv must be at least 0, got -1"),
    "no frames": (
        "render --model toy --frames 0 --orbit {tmp}/a.mp4",
        "frames must be from 1 to 100000, got 0",
    ),
    "no budget": ("demo --minutes 0 --out {tmp}/d", "minutes must be above 0 and below 1000, got 0"),
    "truncation is no number": ("render --model toy --truncation nan --grid {tmp}/a.png", "truncation"),
    "wrong seeds": (
        "render --model toy --seeds 4-2 --grid {tmp}/a.png",
        "seeds must look like 0-3,7, got '4-2'",
    ),
    "nothing to write": ("render --model {teacher}", "--grid, --orbit or --image"),
    "missing model": ("render --model {tmp}/no.safetensors --grid {tmp}/a.png", "no.safetensors: no such"),
    "missing source": ("convert {tmp}/no.pkl {tmp}/o.safetensors", "no.pkl: no such"),
    "missing teacher": ("train --teacher {tmp}/no.pkl --out {tmp}/t", "no.pkl: no such"),
    "missing teacher of demo": ("demo --teacher {tmp}/no.pkl --out {tmp}/d", "no.pkl: no such"),
    "missing weights": ("demo --perceptual-weights {tmp}/vgg.pth --out {tmp}/d", "vgg.pth"),
    "a text": ("render --model {text} --grid {tmp}/a.png", "refused: .*b'nothing"),
    "a text to convert": ("convert {text} {tmp}/o.safetensors", "refused: .*b'nothing"),
    "student as teacher": (
        "train --teacher {student} --out {tmp}/t --perceptual none",
        "student, expected a teacher",
    ),
    "teacher to export": ("export {teacher} {tmp}/a.onnx", "is a teacher; only students can be exported"),
    "missing student": ("export {tmp}/no.safetensors {tmp}/a.onnx", "no.safetensors: no such"),
    "old opset": ("export {student} {tmp}/a/a.onnx --opset 12", "opset must be from 13 to .*, got 12"),
    "wrong ending of export": ("export {student} {tmp}/a.pt", "must end in .onnx"),
    "wrong ending": ("render --model {teacher} --grid {tmp}/a.jpg", "must end in .png"),
    "wrong ending of film": ("render --model {teacher} --orbit {tmp}/a.gif", "must end in .mp4"),
    "a file as folder": (
        "render --model {teacher} --grid {text}/a.png",
        "is a file, not a folder|can't write",
    ),
    "a folder as file": ("render --model {teacher} --grid {folder}", "is a folder"),
    "a file as output folder": ("demo --teacher {teacher} --out {text}", "is a file, not a folder"),
    "a file as run": (
        "train --teacher {teacher} --perceptual none --out {text}",
        "is a file, not a folder",
    ),
    "unknown device": ("render --model {teacher} --device tpu --grid {tmp}/a.png", "device must be .*'tpu'"),
    "missing device": ("render --model {teacher} --device cuda:99 --grid {tmp}/a.png", "cuda:99"),
    "unknown camera": (
        "render --model {teacher} --camera dogs --grid {tmp}/a/a.png",
        "camera must be one of auto, .*'dogs'",
    ),
    "unknown camera of train": ("train --camera moon --out {tmp}/t", "camera must be one of auto, .*'moon'"),
    "damaged run": ("train {small} --resume --out {run}", "resume: .*resume.pt is damaged"),
    "no run": ("train {small} --resume --out {tmp}/t", "resume: no checkpoint"),
    "device without data": ("train {small} --out {tmp}/t --device meta", "device must be .*'meta'"),
    "device of others": ("train {small} --out {tmp}/t --device mps", "device must be .*'mps'"),
    "device of the demo": ("demo --teacher {teacher} --out {tmp}/d --device mps", "device must be .*'mps'"),
    "huge seed": ("train {small} --out {tmp}/t --seed 9223372036854775808", "seed must be below 2\\^63"),
    "huge seed of the demo": (
        "demo --teacher {teacher} --out {tmp}/d --seed 9223372036854775808",
        "seed must be below 2\\^63",
    ),
    "list as labels": ("train {small} --out {tmp}/t --reals {list}", "reals: .* has no labels"),
    "null as label": ("train {small} --out {tmp}/t --reals {null}", "reals: .*a.png must have 25 numbers"),
    "words as label": ("train {small} --out {tmp}/t --reals {words}", "reals: .*a.png must have 25 numbers"),
    "damaged zip": ("train {small} --out {tmp}/t --reals {zip}", "reals: .*damaged.zip is damaged"),
    "mirrored teacher": (
        "train {small} --out {tmp}/t --mirror",
        "mirror must be False when reals is 'teacher'",
    ),
    "no action on data": ("data", "^fastgen data: Expected one of .check, toy"),
    "no data set": ("data check", "^fastgen data check: missing FILE"),
    "missing data set": ("data check {tmp}/no.zip", "^fastgen data check: .*no.zip: no such data set"),
    "text as data set": ("data check {text}", "a.txt is neither a folder nor a zip file"),
    "damaged data set": ("data check {zip}", "damaged.zip is damaged"),
    "folder without labels": ("data check {run}", "run has no dataset.json"),
    "negative workers": ("data check {zip} --workers -1", "check: workers must be from 0 to 256, got -1"),
    "no images": ("data toy {tmp}/a.zip 0", "^fastgen data toy: images must be from 1 to 1000000, got 0"),
    "number of images in words": ("data toy {tmp}/a.zip few", "N: .*'few'"),
    "wrong ending of a data set": ("data toy {tmp}/a/a.tar 1", "a.tar: the file name must end in .zip"),
    "no VGG16": (
        "train --teacher {teacher} --out {tmp}/t",
        "--perceptual lpips-vgg needs --perceptual-weights",
    ),
    "small VGG16": (
        "train --teacher {teacher} --out {tmp}/t --perceptual-weights {vgg}",
        "perceptual_weights: .*features.0.weight has shape .1,., not .64, 3, 3, 3.",
    ),
    "VGG16 without bias": (
        "train --teacher {teacher} --out {tmp}/t --perceptual-weights {biasless}",
        "perceptual_weights: .* no features.28.bias",
    ),
    "no student": ("evaluate --teacher toy", "^fastgen evaluate: missing --student"),
    "missing student to evaluate": ("evaluate --student {tmp}/no.pt --teacher toy", "no.pt: no such"),
    "student of another teacher": (
        "evaluate --student {student} --teacher toy",
        "student: .*student.safetensors was distilled from another teacher than toy",
    ),
    "nothing to evaluate on": ("evaluate {pair} --images 0", "images must be from 1 to 10000000, got 0"),
    "missing features": ("evaluate {pair} --features {tmp}/no.pt", "features: no such file: .*no.pt"),
    "text as features": ("evaluate {pair} --features {text}", "features: .*a.txt is none of TorchScript, "),
    "VGG16 as features": ("evaluate {pair} --features {vgg}", "features: .*vgg.pth is none of TorchScript"),
    "text as identity": ("evaluate {pair} --identity {text}", "identity: .*a.txt is none of TorchScript, "),
    "damaged data": ("evaluate {pair} --features {network} --data {zip}", "data: .*damaged.zip is damaged"),
    "missing pose network": ("evaluate {pair} --pose {tmp}/no.safetensors", "pose: no such file"),
    "text as pose network": ("evaluate {pair} --pose {text}", "pose: .*a.txt is not a file of python -m"),
    "student as pose network": ("evaluate {pair} --pose {student}", "pose: .*is not a file of python -m"),
    "unknown camera of evaluate": ("evaluate {pair} --camera moon", "camera must be one of auto, .*'moon'"),
    "missing weights of evaluate": ("evaluate {pair} --perceptual-weights {tmp}/v.pth", "perceptual_weights"),
    "wrong ending of json": ("evaluate {pair} --json {tmp}/a.txt", "a.txt: the file name must end in .json"),
    "unprintable": ("render --model {teacher} --camera \x1b[2J\x07 --grid {tmp}/a.png", "camera must be"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, files, tmp_path, capsys):
    """Neither a traceback nor a box: a line that names what is wrong."""
    (tmp_path / "folder.png").mkdir()
    places = {name: path for name, path in files.items() if "." not in name} | {
        "tmp": tmp_path,
        "teacher": files["teacher.safetensors"],
        "student": files["student.safetensors"],
        "pair": f"--student {files['student.safetensors']} --teacher {files['teacher.safetensors']}",
        "small": f"--teacher {files['teacher.safetensors']} --perceptual none",
    }
    arguments = arguments.format(text=files["a.txt"], folder=tmp_path / "folder.png", **places).split()
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("fastgen") and said.err.count("\n") == 1, said.err
    assert re.search(message, said.err), said.err
    assert said.err[:-1].isprintable()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder.png"], "something was written"


def test_debug_shows_the_traceback(files, monkeypatch):
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["convert", "no.pkl", str(files["a.txt"].with_suffix(".safetensors"))])
