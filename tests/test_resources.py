"""CPUs and memory of this process."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from bids_dgmseg import resources


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """Function that writes the control groups of a machine with 16 CPUs and 50 GB of free memory."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=50_000_000_000))
    monkeypatch.setattr(resources, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_PROC_CGROUP", tmp_path / "proc")

    def write(group: str, files: Mapping[str, str]) -> None:
        (tmp_path / "proc").write_text(group)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return write


@pytest.fixture
def container(monkeypatch, tmp_path) -> Callable[..., None]:
    """Function that sets the variables and mounts of a container."""
    monkeypatch.setattr(resources, "_CONTAINER_MARKS", (tmp_path / "mark",))
    monkeypatch.setattr(resources, "_MOUNTS", tmp_path / "mountinfo")

    def enter(*mounts: str, **variables: str) -> None:
        for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "BIDS_DGMSEG_IMAGE", "BIDS_DGMSEG_IMAGE_URI"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        lines = ("0:52 / /", *mounts)
        (tmp_path / "mountinfo").write_text("".join(f"1 2 {line} rw - ext4 /dev/sda1 rw\n" for line in lines))

    return enter


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {}),
        ({"BIDS_DGMSEG_IMAGE": "a:1", "container": "podman"}, {"Type": "podman", "Tag": "a:1"}),
        (
            {"BIDS_DGMSEG_IMAGE": "a:1", "BIDS_DGMSEG_IMAGE_URI": "docker://lab/a@sha256:12"},
            {"Type": "docker", "Tag": "a:1", "URI": "docker://lab/a@sha256:12"},
        ),
        (
            {"BIDS_DGMSEG_IMAGE": "a:1", "APPTAINER_CONTAINER": "/my images/a.sif"},
            {"Type": "apptainer", "Tag": "a:1", "URI": "file:///my%20images/a.sif"},
        ),
        ({"APPTAINER_CONTAINER": "/other.sif"}, {}),  # another image
    ],
)
def test_container_is_described(container, monkeypatch, variables, expected):
    monkeypatch.delenv("container", raising=False)
    container(**variables)
    assert resources.describe_container() == expected


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        pytest.param(["8:1 /home/a/my\\040study /data", "8:1 /home/a/results/x /out"], "../../my study", id="one disk"),
        pytest.param(["8:1 /home/a/study /data", "8:2 /a /out"], None, id="two disks"),
        pytest.param(["8:1 /old /data", "8:1 /home/study /data", "8:1 /home/x /out"], "../study", id="mounted twice"),
        pytest.param([], "../data", id="both in the container"),
    ],
)
def test_links_are_those_outside_the_container(container, mounts, expected):
    container(*mounts, BIDS_DGMSEG_IMAGE="a:1")
    assert resources.relative_outside(Path("/data"), Path("/out")) == expected


CPU_1 = {"cpu.cfs_quota_us": "350000", "cpu.cfs_period_us": "100000"}
MEMORY_1 = {"memory.limit_in_bytes": "4000000000", "memory.usage_in_bytes": "1500000000"}
MEMORY_2 = {"memory.max": "4000000000", "memory.current": "1500000000"}
V1, DOCKER_V1 = "9:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:{0}\n", "/docker/4f1c"


def inside(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    ("group", "files", "cpus", "memory_gb"),
    [
        pytest.param("", {}, 16, 50, id="no control groups"),
        pytest.param("0::/\n", {"cpu.max": "350000 100000", **MEMORY_2}, 3, 2.5, id="version 2, container"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000", **inside("a", MEMORY_2)},
            4,
            2.5,
            id="version 2, limits of the parent",
        ),
        pytest.param(
            V1.format(DOCKER_V1),
            {**inside("cpu,cpuacct", CPU_1), **inside("memory", MEMORY_1)},
            3,
            2.5,
            id="version 1, own group is the root",
        ),
    ],
)
def test_limits_of_containers_and_jobs_count(machine, group, files, cpus, memory_gb):
    machine(group, files)
    assert resources.count_cpus() == cpus
    assert resources.available_memory_gb() == pytest.approx(memory_gb)


def test_environment_variables_are_set_and_restored(monkeypatch):
    monkeypatch.setenv("DGMSEG_SET", "before")
    monkeypatch.setenv("DGMSEG_REMOVED", "before")
    monkeypatch.delenv("DGMSEG_NEW", raising=False)
    with resources.environment_variables({"DGMSEG_SET": "within", "DGMSEG_REMOVED": None, "DGMSEG_NEW": "within"}):
        assert (os.environ["DGMSEG_SET"], os.environ["DGMSEG_NEW"]) == ("within", "within")
        assert "DGMSEG_REMOVED" not in os.environ
    assert (os.environ["DGMSEG_SET"], os.environ["DGMSEG_REMOVED"]) == ("before", "before")
    assert "DGMSEG_NEW" not in os.environ
