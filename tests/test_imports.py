"""Who may import whom, read from the source."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bids_dgmseg

PACKAGE = Path(bids_dgmseg.__file__).parent

LAYERS = (
    {"errors", "arguments"},
    {"resources", "config", "console"},
    {"io"},
    {"image"},
    {"networks"},
    {"models"},
    {"stats", "registration"},
    {"segmentation", "measurement"},
    {"qsm"},
    {"phantom", "methods_text"},
    {"bids"},
    {"api"},
    {"study"},
    {"report"},
    {"interfaces"},
    {"workflows"},
    {"lab", "run"},
    {"cli"},
    {"__main__"},
)
"""A package imports itself and the packages above it in this list."""
OWNERS = {
    "nipype": {"interfaces", "workflows", "run"},
    "bids": {"bids"},
    "nnunetv2": {"segmentation/engines.py", "lab/train/nnunet_trainer"},
    "torch": {"image/grids.py", "networks", "models", "registration", "segmentation", "lab", "qsm"},
    "matplotlib": {"report", "lab"},
    "nilearn": {"report", "io/nifti.py", "registration"},
}
"""Third-party package → rooms or files that alone may import it."""
HEAVY = {
    "torch",
    "nipype",
    "bids",
    "pandas",
    "matplotlib",
    "nnunetv2",
    "nilearn",
    "skimage",
    "scipy",
    "nibabel",
    "numpy",
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "weights" not in path.parts)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("bids_dgmseg.")} - {"__version__"}


def layer(room: str) -> int:
    levels = [level for level, rooms in enumerate(LAYERS) if room in rooms]
    assert levels, f"{room} has no place in LAYERS; give it one"
    return levels[0]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        assert own_rooms(path) <= {"api"}
        return
    for imported in own_rooms(path) - {room}:
        allowed = layer(imported) < layer(room)
        assert allowed, f"{relative(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_packages_stay_in_their_rooms(path):
    for package in {name.split(".")[0] for name in imports(path)} & set(OWNERS):
        assert {room_of(path), relative(path), path.parent.relative_to(PACKAGE).as_posix()} & OWNERS[package], (
            f"{relative(path)} imports {package}"
        )


def module_name(path: Path) -> str:
    return ".".join(("bids_dgmseg", *path.relative_to(PACKAGE).with_suffix("").parts))


def test_modules_do_not_import_each_other_in_circles():
    # imports inside functions and for type checking count, too
    names = {module_name(path): path for path in MODULES if path.name != "__init__.py"}
    graph = {
        name: {part for full in imports(path) for part in (full, full.rpartition(".")[0]) if part in names}
        for name, path in names.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("program", ["bids_app", "main"])
def test_help_loads_nothing_heavy(program):
    code = f"import sys; from bids_dgmseg.cli.{program} import build_parser; build_parser().format_help()"
    command = [sys.executable, "-c", f"{code}; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & HEAVY
