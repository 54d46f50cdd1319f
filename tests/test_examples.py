"""The notebooks of `examples` run from beginning to end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def read_cells(name: str) -> list[dict[str, object]]:
    cells: list[dict[str, object]] = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    return cells


def test_notebooks_are_named_in_the_readme():
    assert NOTEBOOKS == ["one_scan.ipynb", "study.ipynb", "voxelwise.ipynb"]
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"](examples/{name})" in readme for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_outputs(name):
    code = [cell for cell in read_cells(name) if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder in which all notebooks run."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_twice_in_an_environment_that_is_not_activated(name, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    for _ in range(2):
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()  # raises the error of a cell
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text] == []
