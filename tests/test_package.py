"""The package as it installs and imports: what it holds, what loads, what happens where parts are missing."""

import ast
import importlib
import os
import platform
import re
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _backends
from fastgen.kernels import sass
from fastgen.ops import _dispatch

ROOT = Path(__file__).parents[1]
COMPILED = (
    *("upfirdn2d", "bias_act", "bias_act_bwd", "bias_act_bwd2"),
    *("render_triplane", "render_triplane_bwd"),
    *("sample_triplane", "sample_triplane_bwd", "sample_triplane_bwd2"),
    *("filtered_lrelu", "filtered_lrelu_bwd", "filtered_bias_act", "filtered_bias_act_bwd"),
    *("modulated_weight", "channels_last", "conv3x3", "conv3x3_dw"),
)


def run(code: str, cwd: Path | None = None, **environment) -> str:
    """What a fresh interpreter prints when it runs `code` in the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cpu_library_serves_its_ops():
    usable, where = _backends.status()["cpu"]
    assert usable, where
    for op in COMPILED:
        assert _dispatch.served(op)["cpu"] == ("cpu", "")
    assert _dispatch.served("grid_sample")["cpu"][0] == "reference"
    assert _dispatch.served("modulated_conv2d")["cpu"][0] == "composed"


def test_status_gives_a_reason_for_what_is_missing():
    found = _backends.status()
    assert set(found) == {"cpu", "cuda", "cuda-host", "triton", "reference"}
    assert found["reference"] == (True, "")
    for usable, reason in found.values():
        assert usable or reason


@pytest.mark.parametrize(
    "archs, serves, refuses",
    [
        ("8.0_9.0", [(8, 0), (8, 6), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("8.6_9.0+PTX", [(8, 6), (8, 9), (9, 0), (10, 3), (12, 0)], [(8, 0)]),
        ("9.0a+PTX_10.0f", [(9, 0), (10, 0), (10, 3)], [(9, 1), (11, 0), (12, 0)]),
        ("12.0+PTX", [(12, 0), (12, 1), (13, 0)], [(9, 0), (10, 0)]),
        ("Hopper", [(9, 0), (7, 5)], []),  # cannot be told: the launch will
        ("", [(9, 0), (7, 5)], []),
    ],
)
def test_cuda_status_is_exact_and_never_raises(archs, serves, refuses, monkeypatch):
    library = types.SimpleNamespace(__file__="there", build=f"torch 2.11.0, CUDA 13000, sm {archs}, 13.1.0")
    monkeypatch.setitem(_backends._libraries, "cuda", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    visible = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: visible[i])
    for device in serves:
        visible[:] = [device]
        assert _backends.status()["cuda"] == (True, f"there ({library.build})"), device
    for device in refuses:
        visible[:] = [device]
        assert _backends.status()["cuda"] == (
            False,
            f"built for compute capability {archs.replace('_', ', ')}; visible: {device[0]}.{device[1]}",
        )
    visible[:] = [*serves, *refuses]  # one that is not served is enough
    assert _backends.status()["cuda"][0] == (not refuses)

    def broken(index):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert _backends.status()["cuda"] == (False, "CUDA does not start: out of memory")


def test_library_of_another_cuda_is_refused(monkeypatch):
    library = types.SimpleNamespace(build="torch 2.11.0, CUDA 12080, sm 9.0, 13.1.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library)
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = f"built for CUDA 12, but torch {torch.__version__} is for CUDA 13.0"
    with pytest.raises(ImportError, match=f"^{re.escape(text)}$"):
        _backends._load_library("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert _backends._load_library("cuda") is library


@pytest.mark.parametrize(
    "cuda, capability, bias_act, sample_triplane, styled_conv2d",
    [
        (True, (9, 0), ("cuda", ""), ("cuda", ""), ("triton", "")),
        (False, (9, 0), ("triton", "not built"), ("triton", "not built"), ("triton", "")),
        (True, (7, 5), *[("reference", "old; needs compute capability 8.0; visible: 7.5")] * 2,
         ("reference", "needs compute capability 8.0; visible: 7.5")),
    ],
)  # fmt: skip
def test_what_serves_cuda_tensors(cuda, capability, bias_act, sample_triplane, styled_conv2d, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(_backends, "_library_status", lambda name: (name != "cuda" or cuda, "not built"))
    monkeypatch.setattr(_backends, "_device_problem", lambda: "old" if capability < (8, 0) else "")
    plan = _dispatch.cuda_plan()
    assert plan["bias_act"] == bias_act
    assert plan["sample_triplane"] == sample_triplane
    assert plan["styled_conv2d"] == styled_conv2d
    assert plan["grid_sample"] == ("reference", "no kernel for this op")


def test_library_that_needs_another_cuda_is_named(monkeypatch):
    # Where that CUDA's runtime is not there at all, the loader complains first.
    def load(name):
        raise ImportError("libcudart.so.12: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(_backends.importlib, "import_module", load)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match=r"built for CUDA 12, but torch .* is for CUDA 13.0"):
        _backends._load_library("cuda")


def test_triton_without_a_compiler_is_not_usable(monkeypatch):
    monkeypatch.setattr(_backends, "_capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(_backends, "is_interpreted", lambda: False)
    monkeypatch.setattr(_backends.shutil, "which", lambda name: None)
    assert _backends._triton_status() == (False, "triton needs a C compiler, in CC or on PATH")


@pytest.mark.parametrize("taps, up, down, triton", [(1, 1, 1, False), (12, 2, 2, False), (12, 2, 1, True)])
def test_what_serves_filtered_lrelu(taps, up, down, triton):
    f = torch.ones(taps) if taps > 1 else None
    assert _dispatch._suits_triton(torch.ones(1, 1, 4, 4), f, f, None, up, down) == triton


def test_first_call_says_why_and_is_served(monkeypatch):
    monkeypatch.setattr(_dispatch, "_settled", {"bias_act": ("reference", "not built: install with nvcc")})
    call = _dispatch._first_cuda_call("bias_act")
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(
        RuntimeWarning, match="no CUDA C.. kernels: not built: install with nvcc. Reference serves"
    ):
        out = call(x, None, 1, "relu", 0.0, 1.0, -1.0)
    assert torch.equal(out, x.relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        call(x, None, 1, "relu", 0.0, 1.0, -1.0)


def test_cuda_kernels_register_by_the_table():
    code = (
        "import re, torch, fastgen\n"
        "from fastgen import _backends\n"
        "from fastgen.ops import _dispatch\n"
        "def found(op):\n"
        "    dump = torch._C._dispatch_dump(f'fastgen::{op}')\n"
        "    at = re.search(r'^CUDA: registered at (\\S+)', dump, re.M)[1]\n"
        "    return at.rpartition('/')[2].split(':')[0]\n"
        "before = {op: found(op) for op in _dispatch._defaults}\n"
        "if _backends.compiled('cuda'):\n"
        "    _backends.register_cuda()\n"
        "    for op in _dispatch._defaults:\n"
        "        assert (found(op) == 'module.cpp') == (op in _dispatch.CUDA), op\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1\n"
        "torch.cuda.get_device_capability = lambda i: (9, 0)\n"
        "plan = _dispatch.settle_cuda()\n"
        "for op, (by, why) in plan.items():\n"
        "    both = by == 'cuda' and _dispatch.CUDA[op] is not None\n"
        "    assert (found(op) == 'module.cpp') == (by == 'cuda' and not both), (op, found(op))\n"
        "assert {by for by, _ in plan.values()} >= {'triton', 'reference'}\n"
        "with fastgen.backend('triton'):\n"
        "    assert found('bias_act') != 'module.cpp'\n"
        "assert (found('bias_act') == 'module.cpp') == _backends.compiled('cuda')\n"
        "print('as planned')\n"
    )
    assert run(code) == "as planned"


def test_binaries_of_cuda_kernels():
    """Of what was built here, which TORCH_CUDA_ARCH_LIST may limit."""
    if _backends.compiled("cuda"):
        table = sass.inspect(sass.find_library())
        assert not [fault for instance in table for fault in instance.faults()]
        kernels = [instance.kernel for instance in table]
        for op in _dispatch.CUDA:
            assert any(kernel.startswith(op.partition("_bwd")[0]) for kernel in kernels), op


def test_raw_bias_act_refuses_what_it_would_read_out_of_bounds():
    assert _backends.status()["cpu"][0]
    x, rest = torch.randn(2, 3, 5, 5), (1, "swish", 0.0, 1.0, -1.0)
    raw = torch.ops.fastgen
    for wrong in (x.bfloat16(), x[:1], x[..., :4], x[0]):
        with pytest.raises(RuntimeError, match="dy must have x's shape, dtype and device"):
            raw.bias_act_bwd(wrong, x, None, *rest)
        with pytest.raises(RuntimeError, match="ddx must have x's shape, dtype and device"):
            raw.bias_act_bwd2(wrong, x, x, None, *rest)
    with pytest.raises(RuntimeError, match=r"b must have x.shape\[dim\] elements"):
        raw.bias_act(x, torch.randn(2), *rest)
    with pytest.raises(RuntimeError, match="b must have x's dtype"):
        raw.bias_act(x, torch.randn(3).double(), *rest)
    with pytest.raises(RuntimeError, match="dim must be a dimension of x, got 4"):
        raw.bias_act(x, torch.randn(3), 4, *rest[1:])


def test_raw_render_triplane_refuses_what_it_would_read_out_of_bounds():
    n, r, samples, f, d, c = 1, 4, 5, 3, 6, 2
    shapes = [(n, 3, f, 4, 4), (d, f), (d,), (1 + c, d), (1 + c,), (n, r, 3), (n, r, 3), (n, r, samples)]
    args = [torch.randn(shape) for shape in shapes]
    raw, rest = torch.ops.fastgen, ([0.5] * 18, False)
    raw.render_triplane(*args, torch.rand(n, r, 4), *rest)
    for i, wrong, message in (
        (0, torch.randn(n, 2, f, 4, 4), "planes must be"),
        (1, torch.randn(d, f + 1), "decoder must be"),
        (4, torch.randn(c), "decoder must be"),
        (5, torch.randn(n, r - 1, 3), "rays must be"),
        (6, torch.randn(n, r, 3).double(), "must have one dtype"),
        (7, torch.randn(n, r, 0), "depths must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.render_triplane(*args[:i], wrong, *args[i + 1 :], None, *rest)
    with pytest.raises(RuntimeError, match="at least 4 samples"):
        raw.render_triplane(*args[:7], args[7][..., :2], torch.rand(n, r, 3), *rest)
    with pytest.raises(RuntimeError, match="u_fine must be"):
        raw.render_triplane(*args, torch.rand(n, r - 1, 4), *rest)
    with pytest.raises(RuntimeError, match="18 numbers"):
        raw.render_triplane(*args, None, [0.5] * 6, False)
    one, df = torch.randn(n, r, 1), torch.randn(n, r, c)
    raw.render_triplane_bwd(df, one, one, *args, *rest)
    for wrong in ((df[:, 1:], one, one), (df.bfloat16(), one, one), (df, one[:, 1:], one), (df, one, df)):
        with pytest.raises(RuntimeError, match="must be .*, with the dtype of"):
            raw.render_triplane_bwd(*wrong, *args, *rest)


BLOCK = "import sys\nsys.modules.update(dict.fromkeys({names}))\n"  # none of these can be imported then


def test_without_compiled_libraries_the_reference_serves():
    code = BLOCK.format(names=("fastgen._cpu", "fastgen._cuda")) + (
        "import torch, fastgen\n"
        "from fastgen import _backends, ops\n"
        "from fastgen.ops import _dispatch\n"
        "x = torch.arange(8.).reshape(1, 2, 2, 2)\n"
        "print(_backends.status()['cpu'][0], _dispatch.served('bias_act')['cpu'][0])\n"
        "print(ops.bias_act(x, torch.ones(2), act='relu', gain=1).sum().item())\n"
        "print(ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1])).shape[-1])\n"
    )
    assert run(code).split() == ["False", "reference", "36.0", "4"]


def test_broken_library_is_reported_with_its_reason(tmp_path):
    # A library of the right name that the loader refuses.
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    code = (
        "import sys, importlib.util, importlib.machinery as m\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fastgen._cpu':\n"
        f"            file = {str(tmp_path / '_cpu.abi3.so')!r}\n"
        "            loader = m.ExtensionFileLoader(name, file)\n"
        "            return importlib.util.spec_from_file_location(name, file, loader=loader)\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from fastgen import _backends\n"
        "usable, reason = _backends.status()['cpu']\n"
        "print(usable, 'file too short' in reason or 'invalid ELF' in reason, torch_version in reason)\n"
    ).replace("torch_version", repr(torch.__version__))
    assert run(code) == "False True True"


def test_import_needs_no_compiler_and_no_triton():
    blocked = ("triton", "torch.utils.cpp_extension", "setuptools", "ninja")
    code = BLOCK.format(names=blocked) + (
        "from fastgen import _backends, ops\nprint(_backends.status()['triton'])\n"
    )
    assert "False" in run(code, PATH="/nowhere")


# Ops, twice differentiated, without a word.
USE = (
    "import warnings\nwarnings.simplefilter('error')\nimport torch\nfrom fastgen import ops\n"
    "x = torch.randn(1, 4, 8, 8, requires_grad=True)\n"
    "f = ops.setup_filter([1, 3, 3, 1])\n"
    "y = ops.filtered_lrelu(ops.upsample2d(ops.bias_act(x, act='lrelu'), f), f, f, padding=3)\n"
    "y = ops.modulated_conv2d(y, torch.randn(4, 4, 3, 3), torch.randn(1, 4), padding=1)\n"
    "(dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)\n"
    "dx.square().sum().backward()\nprint(list(x.grad.shape), __import__('fastgen').__file__)\n"
)


def test_nothing_is_written_where_it_runs(tmp_path):
    """No cache in the home folder, no lock file, no compiler at first call: all of it may be read-only."""
    home = tmp_path / "home"
    home.mkdir()
    folders = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TMPDIR")}
    home.chmod(0o555)
    assert run(USE, PATH="/nowhere", **folders).startswith("[1, 4, 8, 8]")
    assert not list(home.iterdir())


def test_several_processes_begin_at_once():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", USE], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert all(line.startswith("[1, 4, 8, 8]") for line in said)


def test_in_a_folder_whose_name_has_spaces(tmp_path):
    folder = tmp_path / "a folder, größer"
    folder.mkdir()
    (folder / "fastgen").symlink_to(ROOT / "fastgen")
    code = USE + "from fastgen import _backends\nprint(_backends.status()['cpu'])\n"
    shape, status = run(code, folder, PYTHONPATH=str(folder)).splitlines()
    assert shape == f"[1, 4, 8, 8] {folder / 'fastgen/__init__.py'}"
    usable, where = ast.literal_eval(status)
    assert usable == _backends.status()["cpu"][0] and (not usable or where.startswith(str(folder)))


def test_import_is_light():
    heavy = "torchvision lpips tyro matplotlib torchmetrics imageio tensorboard fastgen.train fastgen.models"
    code = (
        "import torch, sys\nbefore = set(sys.modules)\nimport fastgen\n"
        f"print([name for name in {heavy.split()!r} if name in set(sys.modules) - before])\n"
    )
    assert run(code) == "[]"


def test_found_from_the_folder_that_holds_the_clone(tmp_path):
    """There a folder named fastgen without an __init__.py lies in the way of an editable install."""
    (tmp_path / "fastgen").symlink_to(ROOT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import fastgen, fastgen.train.toy, fastgen.kernels; print(fastgen.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == fastgen.__version__, done.stderr


def test_package_map_has_every_package():
    """Every folder with Python code in it is in the wheel, below `fastgen` and nothing else."""
    code = (
        "import sys, setuptools\n"
        "setuptools.setup = lambda **given: print(given['packages'], given['package_dir'], sep='|')\n"
        "sys.argv = ['setup.py']\nimport runpy\nrunpy.run_path('setup.py')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    packages, folders = (ast.literal_eval(part) for part in done.stdout.strip().splitlines()[-1].split("|"))
    assert {name.split(".")[0] for name in packages} == {"fastgen"}
    files = {
        path.parent.relative_to(ROOT)
        for folder in ("fastgen", "kernels", "train")
        for path in (ROOT / folder).rglob("*.py")
    }
    mapped = {Path(folders[name]) if name in folders else Path(*name.split(".")) for name in packages}
    assert mapped == files


def test_source_distribution_holds_what_the_build_needs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    folders = ["csrc", "fastgen", "kernels", "train", "tests", "benchmarks"]
    files = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".so", ".pyc")}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", ".clang-format"}
    assert {"train/toy.py", "fastgen/assets/toy_teacher.safetensors", "tests/conftest.py"} <= wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "__pycache__" in name]


def test_keep_memory_reuses_pages():
    # 40 MiB is above what glibc keeps on its own. The heap needs some rounds to settle: the last ones count.
    code = (
        "import resource, torch, fastgen\n"
        "works = {keep} and fastgen.keep_memory()\n"
        "for i in range(20):\n"
        "    if i == 16: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.empty(10 << 20).fill_(1)\n"
        "print(works, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    works, kept = run(code.format(keep=True)).split()
    fresh = run(code.format(keep=False)).split()[1]
    assert works == str(platform.libc_ver()[0] == "glibc")
    if works == "True":
        assert int(kept) < int(fresh) / 4
