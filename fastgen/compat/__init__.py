"""Other people's import paths on fastgen's ops.

    import fastgen.compat
    fastgen.compat.install("nvidia")    # before the repository's own code is imported

From then on `torch_utils.ops.upfirdn2d` and its like are fastgen's, whether or not the repository has its own
on the path, and so is every package whose name ends so, such as `stylegan_human.torch_utils.ops`. Only the
modules that a dialect lists are replaced; whatever else is in their package stays. Nothing is patched at
import, and `uninstall` takes everything back.

    dialect      packages                          modules
    nvidia       torch_utils.ops                   upfirdn2d, bias_act, filtered_lrelu, conv2d_resample,
                                                   conv2d_gradfix, grid_sample_gradfix, fma
    rosinality   op                                fused_act, upfirdn2d, conv2d_gradfix
    basicsr      basicsr.ops, face_model.op        fused_act, upfirdn2d
    mmcv         mmcv.ops                          upfirdn2d, bias_act, filtered_lrelu, fused_bias_leakyrelu,
                                                   conv2d_gradfix
    eg3d         training.volumetric_rendering     renderer, ray_marcher

A dialect's file says what is in each module (MODULES), what its package exports (EXPORTS), and the packages'
usual names (PREFIXES). With adapt(module, names) the repository's own module runs first.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DIALECTS = ("nvidia", "rosinality", "basicsr", "mmcv", "eg3d")
_MISSING = object()


def install(dialect: str, prefix: str | None = None) -> None:
    """Have imports of a dialect's modules find fastgen's ops.

    dialect: one of DIALECTS.
    prefix:  the package that holds the modules, where it is not called as usual: "my_gan.custom_ops". None:
             the usual name, alone or at the end of another one.
    Modules that were imported before get fastgen's functions too; but a function that other code has taken
    from them by `from ... import` stays the old one: so install first. A second install changes nothing.
    Raises: ValueError on an unknown dialect, or a prefix that is no dotted name.
    """
    _check_dialect("install", dialect)
    if prefix is not None and not all(part.isidentifier() for part in str(prefix).split(".")):
        raise ValueError(f"install: prefix must be a dotted name such as 'models.op', got {prefix!r}")
    if (dialect, prefix) in installed():
        return
    shim = _Shim(dialect, prefix)
    # A name that was given goes before an ending.
    _finder.shims.insert(0 if prefix else len(_finder.shims), shim)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for name, module in list(sys.modules.items()):
        shim.patch(name, module)


def uninstall(dialect: str | None = None) -> None:
    """Take back what `install` did, for one dialect or for all: the next import finds what it found before.

    Raises: ValueError on an unknown dialect.
    """
    if dialect is not None:
        _check_dialect("uninstall", dialect)
    gone = [shim for shim in _finder.shims if dialect in (None, shim.dialect)]
    _finder.shims = [shim for shim in _finder.shims if shim not in gone]
    for shim in gone:
        shim.remove()
    if not _finder.shims and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def installed() -> list[tuple[str, str | None]]:
    """Dialect and prefix of each install in force."""
    return [(shim.dialect, shim.prefix) for shim in _finder.shims]


def _check_dialect(function: str, dialect: str) -> None:
    if dialect not in DIALECTS:
        raise ValueError(f"{function}: dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")


class _Shim:
    """One install: which names it serves, and what it changed."""

    def __init__(self, dialect: str, prefix: str | None):
        self.dialect, self.prefix = dialect, prefix
        self.served = importlib.import_module(f".{dialect}", __name__)
        self.made: list[str] = []  # modules
        self.before: list[tuple[ModuleType, str, object]] = []  # what modules of others had

    def place(self, name: str) -> str | None:
        """Of a full name: the dialect's module, "" for the package that holds them, else None."""
        parts = name.split(".")
        if self._is_package(parts):
            return ""
        inside = parts[-2:-1] == parts[-1:]  # basicsr.ops.upfirdn2d.upfirdn2d
        known = parts[-1] in self.served.MODULES
        return parts[-1] if known and any(map(self._is_package, (parts[:-1], parts[: -1 - inside]))) else None

    def _is_package(self, parts: list[str]) -> bool:
        if self.prefix is not None:
            return ".".join(parts) == self.prefix
        return any(parts[-len(p.split(".")) :] == p.split(".") for p in self.served.PREFIXES)

    def is_above(self, name: str) -> bool:
        """Does a package that holds the modules lie in this one?"""
        return any(p.startswith(f"{name}.") for p in ([self.prefix] if self.prefix else self.served.PREFIXES))

    def is_sound(self, name: str) -> bool:
        """Can others' package of this name be imported?"""
        return getattr(self.served, "is_sound", lambda name: True)(name)

    def names(self, place: str) -> dict[str, object]:
        return self.served.MODULES[place] if place else self.served.EXPORTS

    def patch(self, name: str, module: ModuleType) -> None:
        """Change a module of others that is there already."""
        place = self.place(name)
        if place is None or not isinstance(module, ModuleType):
            return
        for key, value in self.names(place).items():
            old = vars(module).get(key, _MISSING)
            # A package may have a module where its like exports the module's function.
            if old is not value and not isinstance(old, ModuleType) and (place or old is not _MISSING):
                self.before.append((module, key, old))
                setattr(module, key, value)

    def remove(self) -> None:
        for module, key, old in reversed(self.before):
            if old is _MISSING:
                delattr(module, key)
            else:
                setattr(module, key, old)
        served = [value for place in ("", *self.served.MODULES) for value in self.names(place).values()]
        ours = {id(value) for value in served if callable(value)}
        for name, module in list(sys.modules.items()):
            # Packages of others that took our functions are to be imported anew.
            if name in self.made or (self.place(name) == "" and ours & set(map(id, vars(module).values()))):
                del sys.modules[name]
                package, _, last = name.rpartition(".")
                if package in sys.modules and vars(sys.modules[package]).get(last) is module:
                    delattr(sys.modules[package], last)


class _Finder(MetaPathFinder):
    """Stands before all other finders, and asks them what there is without it."""

    def __init__(self):
        self.shims: list[_Shim] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target=None) -> ModuleSpec | None:
        for shim in self.shims:
            place = shim.place(name)
            if place is None and not shim.is_above(name):
                continue
            own = self._find_elsewhere(name, path)
            if own is not None and place and hasattr(shim.served, "adapt"):
                spec = ModuleSpec(name, _Loader(shim, place, own), origin=own.origin)
                spec.has_location = True
                return spec
            inside = own.submodule_search_locations if own is not None else None
            # A package's own code runs, and finds our modules; a folder without code has nothing to export.
            if inside is not None and own.loader is not None and shim.is_sound(name):
                return None
            spec = ModuleSpec(name, _Loader(shim, place), origin="fastgen.compat", is_package=True)
            spec.submodule_search_locations += inside or []
            return spec
        return None

    def _find_elsewhere(self, name: str, path: Sequence[str] | None) -> ModuleSpec | None:
        specs = (finder.find_spec(name, path) for finder in sys.meta_path if finder is not self)
        return next((spec for spec in specs if spec is not None), None)


class _Loader(Loader):
    def __init__(self, shim: _Shim, place: str | None, own: ModuleSpec | None = None):
        self.shim, self.place, self.own = shim, place, own

    def exec_module(self, module: ModuleType) -> None:
        self.shim.made.append(module.__name__)
        names = {} if self.place is None else self.shim.names(self.place)
        if self.own is not None:
            self.own.loader.exec_module(module)
            names = self.shim.served.adapt(module, names)
        if self.place == "" and names:
            # First, for each of them will be an attribute of the package, and may have a function's name.
            for inner in self.shim.served.MODULES:
                importlib.import_module(f"{module.__name__}.{inner}")
        vars(module).update(names)


_finder = _Finder()
