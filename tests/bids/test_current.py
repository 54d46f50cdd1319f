"""The rule of what is up to date, on files alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bids_dgmseg.bids.current import InputFile, MadeFrom, Verdict, judge, judge_stored, write_record
from bids_dgmseg.bids.dataset import dataset_roots
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256

URI = "bids:raw:sub-01/anat/sub-01_Chimap.nii"


class Result:
    """A result of one scan with a mask, and the run that would make it again."""

    def __init__(self, folder: Path) -> None:
        self.dataset, self.output, self.mask = folder / "ds", folder / "out", folder / "mask.nii"
        self.chi = self.dataset / "sub-01" / "anat" / "sub-01_Chimap.nii"
        self.dseg = self.output / "sub-01" / "anat" / "sub-01_dseg.nii.gz"
        self.record = self.dseg.with_name("sub-01_qc.json")
        for path in (self.chi, self.mask, self.dseg, self.dataset / "dataset_description.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(path.name.encode())
        (self.dataset / "dataset_description.json").write_text("{}")
        (self.dataset / "Chimap.json").write_text(json.dumps({"Units": "ppm"}))
        self.options, self.weights = {"bilateral": False}, {"weights": "abc"}
        self.save()

    @property
    def inputs(self) -> dict[str, InputFile]:
        return {"map": InputFile(self.chi, URI, self.dataset), "reference mask": InputFile(self.mask)}

    @property
    def made_from(self) -> MadeFrom:
        return MadeFrom(inputs=self.inputs, options=self.options, weights=self.weights)

    def save(self) -> None:
        checksums = {"sub-01/anat/sub-01_dseg.nii.gz": sha256(self.dseg)}
        write_record(self.record, {"rating": "green"}, self.made_from.describe(), checksums, self.output)

    def judge(self) -> Verdict:
        """Judge it as the participant level does."""
        now = self.made_from
        return judge(self.output, self.record, lambda use, file: now.inputs.get(use), now)

    def judge_stored(self) -> Verdict:
        """Judge it as the group level does."""
        return judge_stored(self.output, self.record, dataset_roots(self.output, self.dataset))


@pytest.fixture
def result(tmp_path: Path) -> Result:
    return Result(tmp_path)


def test_unchanged_result_is_current(result):
    assert result.judge() == result.judge_stored() == Verdict(matches=True)


def change_metadata(result: Result) -> None:
    (result.dataset / "Chimap.json").write_text(json.dumps({"Units": "ppb"}))


def change_old_map(result: Result) -> None:
    result.chi.write_bytes(b"other")
    os.utime(result.chi, (0, 0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_old_map, "sub-01_Chimap.nii (map) has changed"),
        (change_metadata, "the metadata of sub-01_Chimap.nii (map) has changed"),
        (lambda result: result.mask.write_bytes(b"other"), "mask.nii (reference mask) has changed"),
        (lambda result: result.dseg.write_bytes(b"edited"), "sub-01_dseg.nii.gz: edited since the run"),
        (
            lambda result: result.record.write_text(result.record.read_text().replace("green", "red")),
            "sub-01_qc.json: edited since the run",
        ),
    ],
)
def test_both_levels_notice_changed_files(result, change, reason):
    change(result)
    assert result.judge().reason == result.judge_stored().reason == reason


def test_link_that_points_elsewhere_is_noticed(result, tmp_path):
    other = tmp_path / "other"
    result.dataset.rename(tmp_path / "first")
    result.dataset.symlink_to(tmp_path / "first")
    assert not result.judge_stored().reason
    shutil.copytree(tmp_path / "first", other)
    (other / "sub-01" / "anat" / "sub-01_Chimap.nii").write_bytes(b"other")
    result.dataset.unlink()
    result.dataset.symlink_to(other)
    assert result.judge_stored().reason == "sub-01_Chimap.nii (map) has changed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda result: result.options.update(bilateral=True), "`bilateral` was False, now True"),
        (lambda result: result.weights.update(weights="x"), "the weights or the definition of the model have changed"),
        (lambda result: result.dseg.unlink(), "sub-01_dseg.nii.gz is missing"),
        (lambda result: result.record.unlink(), "there is no record of what it was made from"),
        (lambda result: result.record.write_text('{"made_from": 3}'), "there is no record of what it was made from"),
    ],
)
def test_only_participant_level_compares_settings(result, change, reason):
    change(result)
    assert result.judge().reason == reason
    assert not result.judge_stored().reason


def test_inputs_that_are_not_there_are_not_checked(result, tmp_path):
    shutil.copytree(result.output, tmp_path / "elsewhere" / "out")
    shutil.rmtree(result.dataset)
    result.output = tmp_path / "elsewhere" / "out"
    assert (result.judge_stored().reason, result.judge_stored().is_unchecked) == ("", True)
    result.chi.parent.mkdir(parents=True)
    result.chi.symlink_to("annex")  # its content is not fetched
    assert (result.judge_stored().reason, result.judge_stored().is_unchecked) == ("", True)
    result.chi.unlink()
    result.chi.write_text("/annex/objects/MD5E-s9--0123456789abcdef.nii\n")
    assert (result.judge_stored().reason, result.judge_stored().is_unchecked) == ("", True)


def test_added_and_removed_inputs_are_noticed(result):
    now = MadeFrom(inputs={"map": result.inputs["map"]}, options=result.options, weights=result.weights)
    verdict = judge(result.output, result.record, lambda use, file: now.inputs.get(use), now)
    assert verdict.reason == "reference mask is not used any more"


def test_unchanged_files_are_not_hashed_again(result, monkeypatch):
    hashed = []

    def note(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr("bids_dgmseg.bids.current.sha256", note)
    assert not result.judge().reason
    assert hashed == [result.dseg]
    result.chi.touch()
    assert not result.judge().reason
    assert hashed == [result.dseg, result.dseg, result.chi]


def test_input_that_changes_during_a_run_is_an_error(result):
    described = result.made_from.describe()
    result.chi.write_bytes(b"other")
    with pytest.raises(InputError, match=r"sub-01_Chimap.nii: changed while the scan was processed; run the same"):
        write_record(result.record, {}, described, {}, result.output)
