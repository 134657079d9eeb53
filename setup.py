"""Package map and the two compiled libraries: fastgen._cpu, and fastgen._cuda where nvcc is found.

Metadata is in pyproject.toml. The build needs no GPU and downloads nothing. Environment:
    FASTGEN_CUDA          auto (default): build the CUDA library, or say why not; 1: or fail; 0: skip it;
                          host: only a library of the CUDA kernels for the CPU (make test-cuda-host)
    CUDA_HOME             the toolkit to use; else the one that the nvcc on PATH names, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  such as "8.0;9.0+PTX"            MAX_JOBS  parallel compilations
    FASTGEN_SANITIZE      1: what runs on the CPU stops at bad addresses and undefined behaviour (make
                          sanitize); thread: at races
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

STABLE_TORCH = "0x020b000000000000"  # the oldest torch whose stable ABI is used: 2.11


def find_cuda_home():
    """The toolkit's folder, or None. nvcc on PATH may be a link or a script, so nvcc itself is asked."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if nvcc := shutil.which("nvcc"):
        shown = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE):
            return os.path.realpath(top[1].strip())
    return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None


CUDA_HOME = find_cuda_home()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # before the import below, which looks for the toolkit on its own

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
    sys.exit(f"fastgen needs torch >= 2.11 to build, found {torch.__version__}")

CUDA = os.environ.get("FASTGEN_CUDA", "auto")
if CUDA not in ("auto", "0", "1", "host"):
    sys.exit(f"FASTGEN_CUDA must be auto, 0, 1 or host, got {CUDA!r}")

FLAGS = ["-O3", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas", "-g0"]
SANITIZERS = {"0": "", "1": "address,undefined,float-cast-overflow", "thread": "thread"}
SANITIZER = os.environ.get("FASTGEN_SANITIZE") or "0"
if SANITIZER not in SANITIZERS:
    sys.exit(f"FASTGEN_SANITIZE must be 0, 1 or thread, got {SANITIZER!r}")
SANITIZE = [f"-fsanitize={SANITIZERS[SANITIZER]}"] if SANITIZERS[SANITIZER] else []
if SANITIZE:
    FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-DFASTGEN_NO_CLONES"]
NVCC_FLAGS = ["-O3", "-lineinfo"]


def say(text):
    print(f"fastgen: {text}", file=sys.stderr, flush=True)


def cuda_version():
    """The toolkit's (major, minor). Raises RuntimeError where no CUDA library can be built."""
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not nvcc.exists():
        raise RuntimeError(f"there is no {nvcc}" if CUDA_HOME else "no nvcc is found (set CUDA_HOME)")
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", shown)
    if not release:
        raise RuntimeError(f"{nvcc} does not say its version")
    if release[1] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc is CUDA {release[1]}.{release[2]}, torch was built for {torch.version.cuda}"
        )
    return int(release[1]), int(release[2])


def for_the_host(path):
    """A C++ file that includes a CUDA file, which a compiler would take for nvcc's."""
    wrapper = Path("build", "cuda-host", path.stem + ".cpp")
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    text = f'#include "cuda/{path.name}"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
    return wrapper


def extension(kind, name, folder, macros=(), wrap=lambda path: path):
    files = [wrap(path) for path in sorted(Path("csrc", folder).glob("*.c[pu]*"))]
    sources = ["csrc/module.cpp", *map(str, files)]
    return kind(
        name,
        sources,
        depends=[str(path) for path in sorted(Path("csrc").rglob("*.[hc]*"))],
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_TORCH), *macros],
        extra_compile_args={"cxx": [*FLAGS, *SANITIZE], "nvcc": NVCC_FLAGS},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )


if CUDA == "host":
    macros = [("FASTGEN_CUDA_HOST", None)]
    extensions = [extension(CppExtension, "fastgen._cuda_host", "cuda", macros, for_the_host)]
else:
    extensions = [extension(CppExtension, "fastgen._cpu", "cpu")]
if CUDA in ("auto", "1"):
    try:
        release = cuda_version()
        newest = "8.0;9.0+PTX"  # what 8.6 and 8.9 run, too
        if release >= (12, 8):
            newest = "8.0;9.0;10.0;12.0+PTX"
            NVCC_FLAGS.append("--compress-mode=size")
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or newest
        macros = [("USE_CUDA", None), ("FASTGEN_ARCHS", re.sub(r"[;,\s]+", "_", archs.strip()))]
        extensions.append(extension(CUDAExtension, "fastgen._cuda", "cuda", macros))
    except RuntimeError as error:
        if CUDA == "1":
            sys.exit(f"fastgen: FASTGEN_CUDA=1, but {error}")
        say(f"building without the CUDA library: {error}")


def editable_mode():
    """A path, where the default is an import hook: to a hook Python prefers any folder named fastgen in the
    working directory, such as the clone, seen from the folder that it was cloned to."""
    from setuptools.command import editable_wheel

    # It is called transitional: a setuptools without it falls back to the hook.
    known = hasattr(getattr(editable_wheel, "_EditableMode", None), "COMPAT")
    return {"mode": "compat"} if known else {}


class Build(BuildExtension):
    def run(self):
        super().run()
        # An earlier build's CUDA library would be loaded, or packed.
        if CUDA != "host" and len(self.extensions) == 1:
            for folder in (Path(self.build_lib, "fastgen"), *([Path("fastgen")] if self.inplace else [])):
                for old in folder.glob("_cuda.*so"):
                    say(f"removing {old}, which an earlier build left")
                    old.unlink()

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:
            if CUDA == "1" or len(self.extensions) == 1:
                raise
            say(f"the build failed ({error}); trying again without the CUDA library")
            self.extensions = self.extensions[:1]
            super().build_extensions()

    def build_extension(self, ext):
        # One folder of objects a library: both compile module.cpp.
        temp, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        super().build_extension(ext)
        self.build_temp = temp


setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), "fastgen.kernels", "fastgen.train"],
    package_dir={"fastgen": "fastgen", "fastgen.kernels": "kernels", "fastgen.train": "train"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "editable_wheel": editable_mode()},
)
