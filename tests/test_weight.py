"""The weight of the project: what comes in has to be paid for with a deletion."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from bids_dgmseg.cli.bids_app import list_options

ROOT = Path(__file__).parents[1]
MODULES = [path for path in sorted((ROOT / "bids_dgmseg").rglob("*.py")) if "weights" not in path.parts]

LIMITS = {
    "lines of code in the package": 26_350,
    "lines of code in the longest module": 420,
    "modules": 150,
    "lines of code in the tests": 19_000,
    "words of the docs": 30_800,
    "names of several modules": 0,
    "inputs of an interface": 20,
    "parameters of a function": 12,
    "options of bids_dgmseg": 44,  # apart from --help and --version
    "modules that mention bilateral": 12,
    "modules that mention corrections": 12,
}


def count_code(path: Path) -> int:
    """Count the lines with code, which comments and docstrings are not."""
    text = path.read_text(encoding="utf-8")
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    code, docs = {number for number, line in lines if line and not line.startswith("#")}, set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno != node.lineno:
            code |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # also its blank lines
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code - docs)


def count_mentions(pattern: str) -> int:
    return sum(bool(re.search(pattern, path.read_text(encoding="utf-8"))) for path in MODULES)


@pytest.fixture(scope="module")
def weights():
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    specs = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("InputSpec")]
    functions = [node.args for node in nodes if isinstance(node, ast.FunctionDef)]
    names = Counter(path.name for path in MODULES if not path.name.startswith("__"))
    lines, pages = [count_code(path) for path in MODULES], [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return {
        "lines of code in the package": sum(lines),
        "lines of code in the longest module": max(lines),
        "modules": len(MODULES),
        "lines of code in the tests": sum(map(count_code, (ROOT / "tests").rglob("*.py"))),
        "words of the docs": sum(len(page.read_text(encoding="utf-8").split()) for page in pages),
        "names of several modules": sum(count > 1 for count in names.values()),
        "inputs of an interface": max(sum(isinstance(line, ast.Assign) for line in spec.body) for spec in specs),
        "parameters of a function": max(len(args.posonlyargs + args.args + args.kwonlyargs) for args in functions),
        "options of bids_dgmseg": len(list_options()),
        "modules that mention bilateral": count_mentions("bilateral"),
        "modules that mention corrections": count_mentions(r"corrected|corrections?\b"),
    }


@pytest.mark.parametrize("name", LIMITS)
def test_weight_is_below_its_limit(weights, name):
    assert weights[name] <= LIMITS[name], "delete something first"
