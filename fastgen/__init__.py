"""Fast 3D-aware and 2D image generation: ops, models, and distillation of NeRF-GANs."""

from importlib import import_module
from pathlib import Path

from . import _backends

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "backend",
    "camera",
    "compat",
    "empty_workspace",
    "graphed",
    "keep_memory",
    "load_discriminator",
    "load_student",
    "load_teacher",
    "ops",
]

# In a bare checkout fastgen.kernels and fastgen.train are the folders beside this one.
if (Path(__file__).parents[1] / "setup.py").exists():
    __path__.append(str(Path(__file__).parents[1]))

_backends.load()
keep_memory = _backends.keep_memory

_FROM = {
    "ops": ".ops",
    "camera": ".camera",
    "compat": ".compat",
    "backend": ".ops._dispatch",
    "empty_workspace": ".ops._define",
    "graphed": ".models.graphs",
    "load_teacher": ".checkpoint",
    "load_student": ".checkpoint",
    "load_discriminator": ".checkpoint",
}


def __getattr__(name: str):
    # Loaded on first use, so that importing fastgen stays quick.
    if name not in _FROM:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    module = import_module(_FROM[name], __name__)
    value = module if _FROM[name] == f".{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
