"""Packaging, documentation and metadata agree with the program."""

import argparse
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from generate_pages import describe_app, describe_names, describe_options
from packaging.requirements import Requirement
from packaging.version import Version

from bids_dgmseg import __version__
from bids_dgmseg.cli import add_options
from bids_dgmseg.cli.bids_app import build_parser
from bids_dgmseg.cli.main import VERBS
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ACTIONS = {
    next((word for word in action.option_strings if word.startswith("--")), action.dest): action
    for action in build_parser()._actions
    if action.dest not in ("help", "version")
}
"""By long option or, for arguments, by name."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def boutiques() -> Any:
    return json.loads(read("boutiques.json"))


def test_ci_runs_the_two_lines_of_the_readme():
    lines = read("README.md").split("```")[1].splitlines()[1:]
    printed = subprocess.run([ROOT / ".ci" / "run", "--print"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == lines
    assert [line.split(" && ")[0] for line in lines] == ["python3 -m venv .venv"] * 2


def test_ci_and_workflows_are_valid_shell():
    scripts = (*(ROOT / ".ci" / name for name in ("run", "docs", "lock", "workflows")), *ROOT.glob("workflows/*.sh"))
    for script in (*scripts, ROOT / "tests" / "container" / "run.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        assert script.stat().st_mode & 0o111, f"{script.name} is not executable"
        assert "set -euo pipefail" in script.read_text(encoding="utf-8")


def test_boutiques_descriptor_is_that_of_the_parser(boutiques):
    assert boutiques == describe_app(), "run python docs/generate_pages.py"
    flags = {item.get("command-line-flag", item["id"]) for item in boutiques["inputs"]}
    assert flags == {*ACTIONS, "output_dir_name"}
    types = {item["id"]: item["type"] for item in boutiques["inputs"]}
    expected = {"output_dir": "File", "force": "Flag", "nprocs": "Number", "model": "String", "work_dir": "String"}
    assert types | expected == types


def test_version_is_the_same_everywhere(boutiques):
    assert boutiques["tool-version"] == __version__
    assert boutiques["container-image"]["image"] == f"bids_dgmseg:{__version__}"
    assert f"\nversion: {__version__}\n" in read("CITATION.cff")
    assert f"\n## {__version__}\n" in read("CHANGELOG.md")
    assert f"from=bids_dgmseg:{__version__}\n" in read("Apptainer.def")
    for page in (*PAGES, ROOT / "Dockerfile", ROOT / "Apptainer.def"):
        versions = set(re.findall(r"bids_dgmseg:(\d[\w.]*)", page.read_text(encoding="utf-8")))
        assert versions <= {__version__}, page.name


def test_licences_are_the_same_everywhere():
    licence = tomllib.loads(read("pyproject.toml"))["project"]["license"]
    assert f'licenses="{licence}"' in read("Dockerfile")
    assert all(re.search(rf"\b{name}\b", read("CITATION.cff")) for name in licence.split(" AND "))
    assert re.findall(r"- license: (\S+)", read("workflows/neurodesk/build.yaml")) == licence.split(" AND ")


def test_options_page_is_that_of_the_parsers():
    expected = describe_options()
    assert read("docs/options.md") == expected, "run python docs/generate_pages.py"


def test_frozen_names_are_kept():
    expected = describe_names(read("docs/outputs.md"))
    assert read("docs/names.md") == expected, "rename only in a major version; for new names run docs/generate_pages.py"


def test_every_option_is_documented():
    page = read("docs/options.md")
    for name, action in ACTIONS.items():
        for word in action.option_strings or [name]:
            assert re.search(rf"`{re.escape(word)}[ `]", page), word
    app = page.partition("## dgmseg\n")[0]
    words = {word for action in ACTIONS.values() for word in action.option_strings}
    assert list_options(app) == words | {"-h", "--help", "--version"}


def list_options(section: str) -> set[str]:
    """Options in the first column of tables."""
    names = re.findall(r"^\| (`-.*?) \| ", section, flags=re.MULTILINE)
    return {word for name in names for word in re.findall(r"`(-[a-z0-9-]+)", name)}


def test_readme_names_only_existing_options():
    named = set(re.findall(r"(--[a-z][a-z-]+)", read("README.md")))
    named -= {
        "--index-url",
        "--no-deps",
        "--build-arg",
        "--rm",
        "--network",
        "--read-only",
        "--tmpfs",
    }  # pip, Docker, Apptainer
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for verb in VERBS.values():
        add_options(parser, verb.options)
    words = {word for action in parser._actions for word in action.option_strings}
    assert named
    assert named <= {*ACTIONS, "--help"} | words


def test_every_column_is_documented():
    page = read("docs/outputs.md")
    assert [column for column in STATS_COLUMNS if f"`{column}`" not in page] == []


def test_every_nucleus_is_documented():
    page = read("docs/index.md")
    assert [s.abbreviation for s in STRUCTURES if f"{s.index} `{s.abbreviation}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_are_valid(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Anchors that MkDocs makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_page_is_in_mkdocs():
    listed = re.findall(r"([\w/-]+\.md)$", read("mkdocs.yml"), flags=re.MULTILINE)
    assert sorted(listed) == [
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")
    ]


def test_docker_image_contains_the_package():
    allowed = re.findall(r"^!(.+)$", read(".dockerignore"), flags=re.MULTILINE)
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert {"pyproject.toml", "requirements*.lock", "bids_dgmseg", project["readme"], *project["license-files"]} <= set(
        allowed
    )


def test_image_installs_locked_versions_with_hashes():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["container"]]
    for torch in ("cpu", "cuda"):
        locked = read("requirements.lock") + read(f"requirements-{torch}.lock")
        entries = re.findall(r"^([\w.-]+)==(\S+).*\\\n    --hash=sha256:[0-9a-f]{64}", locked, flags=re.MULTILINE)
        assert len(entries) == len(re.findall(r"^\w", locked, flags=re.MULTILINE)), "an entry has no hash"
        versions = {name: Version(version) for name, version in entries}
        for requirement in map(Requirement, declared):
            assert versions[requirement.name.lower()] in requirement.specifier
