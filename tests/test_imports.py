"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bids_dgmseg

PACKAGE = Path(bids_dgmseg.__file__).parent

LAYERS = (
    {"errors"},
    {"resources", "config", "console"},
    {"io"},
    {"image"},
    {"networks"},
    {"models"},
    {"stats"},
    {"segmentation", "qsm", "measurement"},
    {"api"},
    {"simulate"},
    {"bids"},
    {"study"},
    {"report"},
    {"train"},
    {"evaluate"},
    {"workflow"},
    {"cli"},
    {"__main__"},
)
"""A package imports itself and the packages above it in this list."""
OWNERS = {
    "nipype": {"workflow"},
    "bids": {"bids"},
    "nnunetv2": {"segmentation/nnunet.py", "train/nnunet"},
    "torch": {"image/resample.py", "networks", "models", "segmentation", "train", "simulate", "qsm"},
    "matplotlib": {"report"},
    "nilearn": {"report", "api.py"},
}
"""Third-party package → rooms or files that alone may import it."""
LIGHT = ("errors", "config", "models/structures", "models/registry", "cli/bids_app", "cli/main", "__init__")
"""Modules behind ``--help``."""
HEAVY = {"torch", "nipype", "bids", "pandas", "matplotlib", "nnunetv2", "nilearn", "skimage", "scipy", "nibabel"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "weights" not in path.parts)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _run_on_import(tree) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside functions and outside ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_on_import(child)


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


@pytest.mark.parametrize("name", LIGHT)
def test_what_help_needs_imports_nothing_heavy(name):
    path = PACKAGE / f"{name}.py"
    if not path.exists():
        pytest.skip(f"there is no {path.name}")
    assert not {module.split(".")[0] for module in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.skipif(not (PACKAGE / "cli").exists(), reason="there is no command line yet")
@pytest.mark.parametrize("module", ["bids_dgmseg.cli.bids_app", "bids_dgmseg.cli.main"])
def test_the_command_lines_load_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & HEAVY


def test_every_file_is_short_enough_to_read():
    lines = {relative(path): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert not {name: count for name, count in lines.items() if count > 460}
