"""`fastgen patch`: what it finds in repositories, and scripts that it runs."""

import os
import subprocess
import sys
from pathlib import Path

from repositories import BROKEN, OTHER_UPFIRDN2D, UPFIRDN2D, fused_act

import fastgen
from fastgen.compat import scan

ALL = {
    "torch_utils/ops/upfirdn2d.py": UPFIRDN2D,
    "human/torch_utils/ops/bias_act.py": "def bias_act(x, b=None, impl='cuda'): ...\n",
    "models/stylegan2/op/fused_act.py": fused_act("bias=True, negative_slope=0.2"),
    "models/stylegan2/op/upfirdn2d.py": OTHER_UPFIRDN2D,
    "gpen/face_model/op/fused_act.py": fused_act("negative_slope=0.2"),
    "gpen/face_model/op/upfirdn2d.py": OTHER_UPFIRDN2D,
    "src/gan_ops/fused_act.py": fused_act("bias=True, negative_slope=0.2"),
    "basicsr/ops/fused_act/fused_act.py": fused_act("negative_slope=0.2"),
    "basicsr/ops/upfirdn2d/upfirdn2d.py": OTHER_UPFIRDN2D,
    "training/volumetric_rendering/renderer.py": "class ImportanceRenderer:\n    pass\n",
    "train.py": "from gan_ops.fused_act import FusedLeakyReLU\nfrom mmcv.ops import bias_act\n",
    "old.py": "print 'Python 2'\n",
    ".venv/op/fused_act.py": fused_act("bias=True"),
    "env/pyvenv.cfg": "",
    "env/op/fused_act.py": fused_act("bias=True"),
}


def test_scan(repository):
    root = repository(ALL)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    found = {(f.dialect, f.package): f for f in scan.scan(root)}
    assert set(found) == {
        ("basicsr", "basicsr.ops"),
        ("basicsr", "gpen.face_model.op"),
        ("eg3d", "training.volumetric_rendering"),
        ("mmcv", "mmcv.ops"),
        ("nvidia", "human.torch_utils.ops"),
        ("nvidia", "torch_utils.ops"),
        ("rosinality", "gan_ops"),
        ("rosinality", "models.stylegan2.op"),
    }
    assert found["rosinality", "gan_ops"].line == 'fastgen.compat.install("rosinality", prefix="gan_ops")'
    assert found["nvidia", "human.torch_utils.ops"].line == 'fastgen.compat.install("nvidia")'
    assert [str(f) for f in found["basicsr", "basicsr.ops"].files] == sorted(
        k for k in ALL if k.startswith("basicsr")
    )
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastgen", "patch", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(fastgen.__file__).parents[1])},
    )


def test_patch_lists_and_runs(repository, tmp_path):
    root = repository(
        {
            f"op/{name}.py": BROKEN + text
            for name, text in (("fused_act", fused_act("bias=True")), ("upfirdn2d", OTHER_UPFIRDN2D))
        }
        | {
            "op/__init__.py": "from .fused_act import FusedLeakyReLU\nfrom .upfirdn2d import upfirdn2d\n",
            "train.py": (
                "import multiprocessing, sys\nimport torch\nfrom op import FusedLeakyReLU\n"
                "def work(n):\n    return FusedLeakyReLU(n)(torch.ones(1, n)).sum().item()\n"
                "if __name__ == '__main__':\n"
                # A process that is spawned imports everything anew.
                "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
                "        print(sys.argv[1:], round(pool.map(work, [4])[0], 3))\n"
                "    sys.exit(7)\n"
            ),
        }
    )
    listed = command(root)
    assert listed.returncode == 0 and 'fastgen.compat.install("rosinality")' in listed.stdout, listed.stderr
    assert "op/fused_act.py, op/upfirdn2d.py" in listed.stdout
    done = command(root, "--run", "train.py", "--outdir=x", "--run", cwd=tmp_path)
    assert not done.stderr
    assert (done.returncode, done.stdout) == (7, "['--outdir=x', '--run'] 5.657\n"), done.stderr
    for arguments, message in (
        ((tmp_path / "none",), f"fastgen patch: {tmp_path / 'none'}: no such folder"),
        ((root, "--run", "none.py"), f"fastgen patch: none.py: no such file, here or in {root}"),
    ):
        wrong = command(*arguments)
        assert (wrong.returncode, wrong.stderr.strip()) == (2, message)
    (tmp_path / "empty").mkdir()
    assert (
        command(tmp_path / "empty").stdout == f"{tmp_path / 'empty'}: none of the ops that fastgen replaces\n"
    )


def test_scan_of_odd_repositories(repository):
    act, other = fused_act("bias=True, negative_slope=0.2"), OTHER_UPFIRDN2D
    root = repository(
        {
            "third-party/my_gan/custom_ops/fused_act.py": act,  # a name cannot have a hyphen
            "src/models/__init__.py": "",
            "src/models/net.py": "from .gan_ops import FusedLeakyReLU\n",
            "src/models/gan_ops/upfirdn2d.py": other,
            "src/models/gan_ops/fused_act.py": "print 'broken'\n",
            "loose/gan_ops/upfirdn2d.py": other,
            "face_model/op/fused_act.py": act,  # where the usual dialect is another
        }
    )
    lines = {f.package: f.line for f in scan.scan(root)}
    assert lines == {
        "my_gan.custom_ops": 'fastgen.compat.install("rosinality", prefix="my_gan.custom_ops")',
        "models.gan_ops": 'fastgen.compat.install("rosinality", prefix="models.gan_ops")',
        "loose.gan_ops": 'fastgen.compat.install("rosinality", prefix="loose.gan_ops")',
        "face_model.op": 'fastgen.compat.install("rosinality", prefix="face_model.op")',
    }
    assert [f.package for f in scan.scan(root / "loose" / "gan_ops")] == ["gan_ops"]


def test_run_finds_ops_from_the_scripts_folder(repository):
    root = repository(
        {
            "src/lib/gan_ops/upfirdn2d.py": BROKEN + OTHER_UPFIRDN2D,
            "src/lib/net.py": "from .gan_ops.upfirdn2d import upfirdn2d\n",
            "src/run.py": "from lib.net import upfirdn2d\nprint(upfirdn2d.__module__)\n",
        }
    )
    done = command(root, "--run", "src/run.py")
    assert (done.stdout, done.stderr) == ("fastgen.compat.rosinality\n", "")
