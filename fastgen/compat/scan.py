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

_SKIPPED = {"site-packages", "node_modules", "__pycache__", "build", "dist"}


@dataclass(frozen=True)
class Found:
    """A package of ops."""

    dialect: str
    package: str  # as the repository's code imports it
    files: tuple[Path, ...]  # those that hold the ops; where there are none, those that import them

    @property
    def prefix(self) -> str | None:
        """What `install` has to be told."""
        usual = import_module(f".{self.dialect}", __package__).PREFIXES
        return None if any(f".{self.package}".endswith(f".{prefix}") for prefix in usual) else self.package

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
    for file, tree in trees.items():
        if (dialect := _dialect(file, tree)) is not None:
            folder = file.parent.relative_to(root)
            # In basicsr each op is a package.
            home = folder.parent if folder.name == file.stem else folder
            homes.setdefault((dialect, home), []).append(file.relative_to(root))
    found = [
        Found(dialect, package, tuple(sorted(files)))
        for (dialect, home), files in homes.items()
        for package in _names(home, imported)
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


def _dialect(file: Path, tree: ast.Module) -> str | None:
    """Whose op a file is, by its name and what its functions take."""
    takes = _arguments(tree)
    if file.stem == "fused_act" and "FusedLeakyReLU" in takes:
        return "basicsr" if takes["FusedLeakyReLU"][1:2] == ["negative_slope"] else "rosinality"
    if file.stem == "upfirdn2d" and "kernel" in takes.get("upfirdn2d", ()):
        # Beside, or in a package beside, is the activation that tells one from the other.
        for other in (file.parent / "fused_act.py", file.parent.parent / "fused_act/fused_act.py"):
            if other.is_file() and (found := _dialect(other, ast.parse(other.read_bytes()))) is not None:
                return found
        return "rosinality"
    if "impl" in takes.get(file.stem, ()) and file.stem in ("upfirdn2d", "bias_act", "filtered_lrelu"):
        return "nvidia"
    return "eg3d" if file.stem == "renderer" and "ImportanceRenderer" in takes else None


def _names(home: Path, imported: set[str]) -> list[str]:
    """What a folder of the repository is called where it is imported."""
    parts = home.parts
    endings = [".".join(parts[i:]) for i in range(len(parts))]
    used = [e for e in endings if any(f"{name}.".startswith(f"{e}.") for name in imported)]
    return used or endings[:1]


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
            yield Found(dialect, package, users)


def run(found: Sequence[Found], script: Path, arguments: Sequence[str]) -> int:
    """Run a script in a process of its own, in which, and in whose children, what was found is installed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            "import sys\n"
            f"sys.path.remove({folder!r})\n"
            # One that was there already is to run too.
            "del sys.modules['sitecustomize']\n"
            "try:\n    import sitecustomize\nexcept ImportError:\n    pass\n"
            f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
            "import fastgen.compat\n" + "\n".join(dict.fromkeys(f.line for f in found)) + "\n"
        )
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        return subprocess.call([sys.executable, script, *arguments], env=os.environ | {"PYTHONPATH": path})
