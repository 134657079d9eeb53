"""Which ops of others a repository carries or imports, told from its syntax: nothing of it runs."""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from . import DIALECTS

_SKIPPED = {"site-packages", "node_modules", "__pycache__", "build", "dist"}


@dataclass(frozen=True)
class Found:
    """A package of ops."""

    dialect: str
    package: str  # as the repository's code imports it
    files: tuple[Path, ...]  # those that hold the ops; where there are none, those that import them
    home: Path  # the folder that they are in

    @property
    def prefix(self) -> str | None:
        """What `install` has to be told: nothing where no other dialect's usual name fits better."""
        fits = {d: max(map(self._fit, import_module(f".{d}", __package__).PREFIXES)) for d in DIALECTS}
        return None if fits[self.dialect] == max(fits.values()) > 0 else self.package

    def _fit(self, prefix: str) -> int:
        return len(prefix) if f".{self.package}".endswith(f".{prefix}") else 0

    @property
    def line(self) -> str:
        more = f', prefix="{self.prefix}"' if self.prefix else ""
        return f'fastgen.compat.install("{self.dialect}"{more})'


def scan(root: Path) -> list[Found]:
    """Every package of ops below a folder.

    Raises: NotADirectoryError where it is no folder.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: no such folder")
    trees = dict(_parsed(root))
    imported = {name for tree in trees.values() for name in _imports(tree)}
    homes: dict[tuple[str, Path], list[Path]] = {}
    for file in trees:
        if (dialect := _dialect(file, trees)) is not None:
            folder = file.parent.relative_to(root)
            # In basicsr each op is a package.
            home = folder.parent if folder.name == file.stem else folder
            homes.setdefault((dialect, home), []).append(file.relative_to(root))
    found = [
        Found(dialect, package, tuple(sorted(files)), (root / home).resolve())
        for (dialect, home), files in homes.items()
        for package in _names(root, home, imported)
    ]
    return sorted([*found, *_foreign(root, trees, found)], key=lambda f: (f.dialect, f.package))


def _parsed(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f not in _SKIPPED and not Path(folder, f, "pyvenv.cfg").exists()
        )
        for file in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            try:
                yield file, ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, OSError, RecursionError):
                continue  # Python 2, or a broken file: nothing that could be imported


def _imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what is imported absolutely."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _arguments(tree: ast.Module) -> dict[str, list[str]]:
    """Of every function and class at the top of a file, what it takes."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            found[node.name] = [a.arg for n in inits for a in n.args.args[1:]]
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = [a.arg for a in node.args.args]
    return found


def _dialect(file: Path, trees: dict[Path, ast.Module]) -> str | None:
    """Whose op a file is, by its name and what its functions take."""
    takes = _arguments(trees[file])
    if file.stem == "fused_act" and "FusedLeakyReLU" in takes:
        return "basicsr" if takes["FusedLeakyReLU"][1:2] == ["negative_slope"] else "rosinality"
    if file.stem == "upfirdn2d" and "kernel" in takes.get("upfirdn2d", ()):
        # Beside, or in a package beside, is the activation that tells one from the other.
        for other in (file.parent / "fused_act.py", file.parent.parent / "fused_act/fused_act.py"):
            if other in trees and (found := _dialect(other, trees)) is not None:
                return found
        return "rosinality"
    if "impl" in takes.get(file.stem, ()) and file.stem in ("upfirdn2d", "bias_act", "filtered_lrelu"):
        return "nvidia"
    return "eg3d" if file.stem == "renderer" and "ImportanceRenderer" in takes else None


def _names(root: Path, home: Path, imported: set[str]) -> list[str]:
    """What a folder of the repository is called where it is imported."""
    parts = home.parts or (root.resolve().name,)
    # What cannot be a name is not part of one.
    first = max((i + 1 for i, part in enumerate(parts) if not part.isidentifier()), default=0)
    endings = [".".join(parts[i:]) for i in range(first, len(parts))]
    if used := [e for e in endings if any(f"{name}.".startswith(f"{e}.") for name in imported)]:
        return used
    # Imported relatively: the outermost package that it is in begins the name.
    packages = [
        (root.joinpath(*parts[: i + 1]) / "__init__.py").exists() for i in range(first, len(parts) - 1)
    ]
    inner = next((i for i in range(len(packages)) if all(packages[i:])), 0)
    return endings[inner : inner + 1]


def _foreign(root: Path, trees: dict[Path, ast.Module], found: Sequence[Found]) -> Iterator[Found]:
    """Installed packages whose ops the repository imports."""
    for dialect, package in (("mmcv", "mmcv.ops"), ("basicsr", "basicsr.ops")):
        if any(f.package == package for f in found):
            continue
        served = import_module(f".{dialect}", __package__)
        names = {f"{package}.{name}" for name in (*served.MODULES, *served.EXPORTS)}
        users = tuple(
            file.relative_to(root)
            for file, tree in trees.items()
            if any(f"{i}.".startswith(f"{name}.") for i in _imports(tree) for name in names)
        )
        if users:
            yield Found(dialect, package, users, root.resolve())


def run(found: Sequence[Found], script: Path, arguments: Sequence[str]) -> int:
    """Run a script in a process of its own, in which, and in whose children, what was found is installed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import importlib.util, os, sys, traceback\n"
            "from importlib.machinery import PathFinder\n"
            f"sys.path.remove({folder!r})\n"
            # One that was there already is to run too.
            "if (spec := PathFinder.find_spec('sitecustomize', sys.path)) is not None:\n"
            "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
            f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
            "try:\n"
            "    import fastgen.compat\n"
            + "".join(f"    {line}\n" for line in dict.fromkeys(_lines(found, script)))
            # An exception here Python would only report.
            + "except Exception:\n    traceback.print_exc()\n    sys.stderr.flush()\n    os._exit(1)\n"
        )
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        return subprocess.call([sys.executable, script, *arguments], env=os.environ | {"PYTHONPATH": path})


def _lines(found: Sequence[Found], script: Path) -> Iterator[str]:
    for each in found:
        yield each.line
        # A script's folder is where names begin.
        if each.prefix is not None and each.home.is_relative_to(script.resolve().parent):
            parts = each.home.relative_to(script.resolve().parent).parts
            if parts and all(part.isidentifier() for part in parts):
                yield Found(each.dialect, ".".join(parts), each.files, each.home).line
