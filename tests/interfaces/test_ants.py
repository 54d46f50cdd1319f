"""SyN of ANTs, which is not installed here: the command line, and what is made of its fields."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.interfaces import NormalizeToMNI, ants
from bids_dgmseg.normalization.register import Channels
from bids_dgmseg.normalization.transform import write_field
from bids_dgmseg.resources import find_ants

GRID = world_grid(Box((-20, -20, -20), (20, 20, 20)), (4.0, 4.0, 4.0))


@pytest.fixture
def paths(tmp_path) -> dict[str, Path]:
    files = {name: tmp_path / f"{name}.nii" for name in ("a", "b", "c", "d", "mask")}
    for path in files.values():
        path.touch()
    return files


def test_command_line_has_all_channels(paths):
    fixed, moving = [paths["a"], paths["b"]], [paths["c"], paths["d"]]
    line = ants.syn(fixed, moving, paths["mask"], weights=[1.0, 0.2]).cmdline
    assert line.startswith("antsRegistration ")
    for part in (
        "--dimensionality 3",
        "--random-seed 1",
        "--transform SyN[ 0.2, 3.0, 0.5 ]",
        f"--metric MeanSquares[ {paths['a']}, {paths['c']}, 1, 0, None, 1 ]",
        f"--metric MeanSquares[ {paths['b']}, {paths['d']}, 0.2, 0, None, 1 ]",
        "--convergence [ 100x70x30, 1e-06, 10 ]",
        "--smoothing-sigmas 2.0x1.0x0.0vox",
        "--shrink-factors 4x2x1",
        f"--masks [ {paths['mask']}, NULL ]",
        "--output syn_",
    ):
        assert part in line, (part, line)
    assert line.count("--transform") == 1


def channels() -> Channels:
    image = np.zeros((2, *GRID.shape), np.float32)
    return Channels(image, image, np.ones(GRID.shape, np.float32), np.array([1.0, 0.2]))


def test_missing_program_is_one_line(monkeypatch, paths, tmp_path):
    step = NormalizeToMNI(in_chi=str(paths["a"]), in_dseg=str(paths["b"]), method="ants")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"^`output_space_warp` ants: antsRegistration not found; install ANTs"):
        step.run()


def test_fields_become_a_warp(monkeypatch, tmp_path):
    # a program that writes a shift of 2 mm to the right, as ITK does, and its inverse
    shift = np.broadcast_to([2.0, 0.0, 0.0], (*GRID.shape, 3))
    write_field(shift, GRID, tmp_path / "forward.nii.gz")
    write_field(-shift, GRID, tmp_path / "backward.nii.gz")
    program = tmp_path / "bin" / "antsRegistration"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f"test \"$1\" = --version && echo 'ANTs Version: 2.5.4.post0' && exit\n"
        f"cp {tmp_path}/forward.nii.gz syn_0Warp.nii.gz; cp {tmp_path}/backward.nii.gz syn_0InverseWarp.nii.gz\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    work = tmp_path / "work"
    work.mkdir()
    warp = ants.find_warp(channels(), GRID, work)
    np.testing.assert_allclose(warp(np.array([[1.0, 2.0, 3.0]])), [[3, 2, 3]])
    np.testing.assert_allclose(warp.inverse(warp(np.array([[1.0, 2.0, 3.0]]))), [[1, 2, 3]])
    assert warp.jacobian == pytest.approx(1)
    assert find_ants() == "2.5.4"
