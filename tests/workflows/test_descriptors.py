"""Files that other systems read (GitHub workflows, Neurodesk, XNAT and BABS configurations) and their version."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bids_dgmseg import __version__
from bids_dgmseg.cli.bids_app import read_config
from bids_dgmseg.cli.main import build_parser
from bids_dgmseg.models.registry import MODELS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GITHUB = sorted(ROOT.glob(".github/workflows/*.yml"))
XNAT = json.loads((ROOT / "workflows/xnat/command.json").read_text(encoding="utf-8"))
XNAT_INPUTS = {item["name"]: item for item in XNAT["inputs"]}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(line: str) -> None:
    """Parse a command line with the program that it calls; exits if an option is unknown."""
    program, *arguments = shlex.split(line)
    if program == "bids_dgmseg":
        read_config(arguments)
    else:
        assert program == "dgmseg"
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_actions_are_pinned_and_have_few_permissions(path):
    workflow = load(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"], name
        for used in [job["uses"]] if "uses" in job else [step["uses"] for step in job["steps"] if "uses" in step]:
            assert used.startswith("./.github/workflows/") or re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", used), used


def test_tests_run_on_every_supported_python():
    versions = load(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert versions == [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_one_command_changes_the_version_everywhere(tmp_path):
    for folder in (".ci", "docs", "workflows"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in (*ROOT.glob("*.*"), ROOT / "Dockerfile", ROOT / "bids_dgmseg/__init__.py"):
        if path.is_file():
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / ".ci/version", *arguments], capture_output=True, text=True, check=False)

    assert run().stdout == f"{__version__}\n"
    assert run("9.8.7rc1").stdout == "9.8.7rc1\n"
    assert "\n## 9.8.7rc1\n" in (tmp_path / "CHANGELOG.md").read_text()
    assert yaml.safe_load((tmp_path / "CITATION.cff").read_text())["version"] == "9.8.7rc1"
    assert __version__ not in (tmp_path / "docs/how-to/run.md").read_text()
    assert "is marked as not yet released; remove that" in run("--tag", "v9.8.7rc1").stderr
    assert "the version is 9.8.7rc1; tag v9.8.7rc1" in run("--tag", "v1.0.0").stderr
    (tmp_path / "CITATION.cff").write_text("\nversion: 1.0.0\n")
    assert run().stderr == "CITATION.cff: version 1.0.0, expected 9.8.7rc1; run .ci/version 9.8.7rc1\n"


def test_neurodesk_recipe_installs_both_commands():
    recipe = load(ROOT / "workflows/neurodesk/build.yaml")
    assert recipe["version"] == __version__
    assert "_" not in recipe["name"]  # refused there
    assert recipe["deploy"]["bins"] == list(PROJECT["scripts"])
    (commands,) = (directive["run"] for directive in recipe["build"]["directives"] if "run" in directive)
    assert any(command.endswith(f"{PROJECT['name']}=={{{{ context.version }}}}") for command in commands)


def test_neurodesk_commands_fit_the_parser():
    recipe = load(ROOT / "workflows/neurodesk/build.yaml")
    scripts = [recipe["structured_readme"]["example"], *(test["script"] for test in recipe["tests"])]
    for line in filter(None, "\n".join(scripts).splitlines()):
        if not line.endswith((" --version", " --help")):
            parse(line)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"no_masks": "--no-masks", "no_viewer": "--no-viewer", "options": "--reference csf --force"},
        {"nprocs": "8", "mem_gb": "16.5", "model": "--model dgm16"},
    ],
    ids=["defaults", "flags", "values"],
)
def test_xnat_command_fits_the_parser(changed):
    line = XNAT["command-line"]
    for name, item in XNAT_INPUTS.items():
        assert item["replacement-key"] in line
        default = item.get(f"{item['default-value']}-value", item["default-value"])
        flag = f"{item['command-line-flag']} " if default and "command-line-flag" in item else ""
        line = line.replace(item["replacement-key"], changed.get(name, flag + default))
    assert "#" not in line
    parse(line)


def test_xnat_references_are_valid():
    assert set(XNAT_INPUTS["model"]["select-values"]) == {name for name, model in MODELS.items() if model.weights}
    mounts = {mount["name"]: mount for mount in XNAT["mounts"]}
    assert {mounts[output["mount"]]["path"] for output in XNAT["outputs"]} == {"/output"}
    for wrapper in XNAT["xnat"]:
        (source,), (handler,) = wrapper["external-inputs"], wrapper["output-handlers"]
        assert mounts[source["provides-files-for-command-mount"]]["path"] == "/input"
        assert handler["as-a-child-of"] == source["name"]
        assert handler["accepts-command-output"] in [output["name"] for output in XNAT["outputs"]]


def test_babs_configuration_fits_the_parser():
    page = (ROOT / "docs/how-to/run.md").read_text(encoding="utf-8").partition("## DataLad and BABS")[2]
    config = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    options = config["bids_app_args"]
    flag = options.pop("$SUBJECT_SELECTION_FLAG")
    # the order of babs 0.5.4's script: positional arguments, options as written, participant
    parts = [part for pair in options.items() for part in pair if part]
    read = read_config(
        [f"/ds/{config['input_datasets']['qsm']['path_in_babs']}/qsm", "/out", "participant", *parts, flag, "sub-01"]
    )
    assert read.selection.participants == ("01",)
    (folder,) = config["zip_foldernames"]
    assert f" results/{folder} group\n" in page  # what is unzipped
    assert re.search(r"--container_name [A-Za-z0-9-]+ ", page)  # datalad containers-add refuses other characters
