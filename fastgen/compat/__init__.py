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

Names of such a module that are not in the list come from the repository's own file, if it has one; that runs
when the first of them is asked for, and not before.

A dialect's file says what is in each module (MODULES), what its package exports (EXPORTS), and the packages'
usual names (PREFIXES); NESTED: each op is a package that has the module. With adapt(module, names) the
repository's own module runs first.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

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
    _finder.shims.append(shim)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (place := shim.place(name)) is not None:
            shim.patch(module, place)


def uninstall(dialect: str | None = None) -> None:
    """Take back what `install` did, for one dialect or for all: the next import finds what it found before.

    Raises: ValueError on an unknown dialect.
    """
    if dialect is not None:
        _check_dialect("uninstall", dialect)
    gone = [shim for shim in _finder.shims if dialect in (None, shim.dialect)]
    _finder.shims = [shim for shim in _finder.shims if shim not in gone]
    for shim in reversed(gone):
        shim.remove()
    if not _finder.shims and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def installed() -> list[tuple[str, str | None]]:
    """Dialect and prefix of each install in force."""
    return [(shim.dialect, shim.prefix) for shim in _finder.shims]


def _check_dialect(function: str, dialect: str) -> None:
    if dialect not in DIALECTS:
        raise ValueError(f"{function}: dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")


class _Place(NamedTuple):
    package: str  # that holds the modules
    module: str | None  # of the dialect's; None: the package itself
    inside: bool  # basicsr.ops.upfirdn2d.upfirdn2d
    rank: int  # of several dialects that have a place for a name the highest serves it


class _Shim:
    """One install: which names it serves, and what it changed."""

    def __init__(self, dialect: str, prefix: str | None):
        self.dialect, self.prefix = dialect, prefix
        self.served = importlib.import_module(f".{dialect}", __name__)
        self.made: list[str] = []  # modules
        self.before: list[tuple[ModuleType, str, object]] = []  # what modules of others had

    def place(self, name: str) -> _Place | None:
        parts = name.split(".")
        known = parts[-1] in self.served.MODULES
        ends = [(parts, None, False)] + [(parts[:-1], parts[-1], False)] * known
        if known and getattr(self.served, "NESTED", False) and parts[-2:-1] == parts[-1:]:
            ends.append((parts[:-2], parts[-1], True))
        for package, module, inside in ends:
            if rank := self._rank(".".join(package)):
                return _Place(".".join(package), module, inside, rank)
        return None

    def _rank(self, package: str) -> int:
        """0 of a package without the modules; given names go before endings, longer ones before shorter."""
        if self.prefix is not None:
            return 1000 * (package == self.prefix)
        return max(len(p.split(".")) * f".{package}".endswith(f".{p}") for p in self.served.PREFIXES)

    def is_made(self, name: str) -> bool:
        """Is it a package to be there even if the repository has none: a usual one, or one above it?"""
        return any(
            f"{p}.".startswith(f"{name}.") for p in ([self.prefix] if self.prefix else self.served.PREFIXES)
        )

    def names(self, place: _Place) -> dict[str, object]:
        if place.module is not None:
            return self.served.MODULES[place.module]
        return getattr(self.served, "exports", lambda package: self.served.EXPORTS)(place.package)

    def is_sound(self, name: str) -> bool:
        """Can others' package of this name be imported?"""
        return getattr(self.served, "is_sound", lambda name: True)(name)

    def patch(self, module: ModuleType, place: _Place) -> None:
        """Change a module of others that is there already."""
        names = self.names(place)
        if place.module is None:
            # What its package took from it; it may have a module where its like exports a function.
            names = {
                k: v for k, v in names.items() if not isinstance(vars(module).get(k, module), ModuleType)
            }
        elif hasattr(self.served, "adapt"):
            names = self.served.adapt(module, names)
        for key, value in names.items():
            if (old := vars(module).get(key, _MISSING)) is not value:
                self.before.append((module, key, old))
                setattr(module, key, value)

    def remove(self) -> None:
        for module, key, old in reversed(self.before):
            if old is _MISSING:
                delattr(module, key)
            else:
                setattr(module, key, old)
        served = [self.served.EXPORTS, *self.served.MODULES.values()]
        ours = {id(value) for names in served for value in names.values() if callable(value)}
        for name, module in list(sys.modules.items()):
            place = self.place(name)
            # Packages of others that took our functions are to be imported anew.
            took = place is not None and place.module is None and ours & set(map(id, vars(module).values()))
            if name in self.made or took:
                del sys.modules[name]
                package, _, last = name.rpartition(".")
                if package in sys.modules and vars(sys.modules[package]).get(last) is module:
                    delattr(sys.modules[package], last)


class _Finder(MetaPathFinder):
    """Stands before all other finders, and asks them what there is without it."""

    def __init__(self):
        self.shims: list[_Shim] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target=None) -> ModuleSpec | None:
        places = [(shim, place) for shim in self.shims if (place := shim.place(name)) is not None]
        if places:
            shim, place = max(places, key=lambda found: found[1].rank)
            if place.module is not None:
                return self._find_op(name, path, shim, place)
        for shim in self.shims:
            if shim.is_made(name):
                own = _find_elsewhere(name, path)
                if own is None or not shim.is_sound(name):
                    spec = ModuleSpec(
                        name, _Loader(shim, shim.place(name)), origin="fastgen", is_package=True
                    )
                    spec.submodule_search_locations += getattr(own, "submodule_search_locations", None) or []
                    return spec
        return None

    def _find_op(
        self, name: str, path: Sequence[str] | None, shim: _Shim, place: _Place
    ) -> ModuleSpec | None:
        own = _find_elsewhere(name, path)
        nested = getattr(shim.served, "NESTED", False) and not place.inside
        if own is not None and nested and own.submodule_search_locations is not None:
            inner = f"{name}.{place.module}"
            if _find_elsewhere(inner, own.submodule_search_locations) is not None:
                return None  # the module in it is the op
        if own is not None and hasattr(shim.served, "adapt"):
            spec = ModuleSpec(name, _Loader(shim, place, own), origin=own.origin)
            spec.has_location = True
            return spec
        loader = _Loader(shim, place, own)
        return ModuleSpec(name, loader, origin="fastgen", is_package=nested and own is None)


def _find_elsewhere(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    finders = (finder for finder in sys.meta_path if finder is not _finder and hasattr(finder, "find_spec"))
    return next((spec for finder in finders if (spec := finder.find_spec(name, path)) is not None), None)


class _Loader(Loader):
    def __init__(self, shim: _Shim, place: _Place | None, own: ModuleSpec | None = None):
        self.shim, self.place, self.own = shim, place, own

    def exec_module(self, module: ModuleType) -> None:
        self.shim.made.append(module.__name__)
        if self.place is None:
            return
        names = self.shim.names(self.place)
        if self.own is not None and hasattr(self.shim.served, "adapt"):
            self.own.loader.exec_module(module)
            names = self.shim.served.adapt(module, names)
        elif self.own is not None:
            module.__getattr__ = self._rest_of(self.own)
        if module.__spec__.submodule_search_locations is not None:
            # First, for each of them will be an attribute, and may have a function's name.
            for inner in (
                [self.place.module] if self.place.module else self.shim.served.MODULES if names else []
            ):
                importlib.import_module(f"{module.__name__}.{inner}")
        vars(module).update(names)

    def _rest_of(self, own: ModuleSpec):
        """What a module has besides, out of the repository's own file."""
        loaded: list[ModuleType] = []

        def find(name: str):
            if name.startswith("__") or own.loader is None:
                raise AttributeError(f"module {own.name!r}, served by fastgen, has no attribute {name!r}")
            if not loaded:
                loaded.append(importlib.util.module_from_spec(own))
                own.loader.exec_module(loaded[0])
            return getattr(loaded[0], name)

        return find


_finder = _Finder()
