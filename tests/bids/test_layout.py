"""What pybids finds and selects, in memory and in a database."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError

MAPS = [f"sub-0{number}/anat/sub-0{number}_Chimap.nii.gz" for number in (1, 2, 3)]


def names_of(root: Path, database: Path | None = None, **selection) -> list[str]:
    inputs = open_inputs(root, Selection(bids_database_dir=database, **selection))
    return [scan.name for scan in find_scans(inputs, echoes=True)]


def add(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "db"


def test_database_is_created_and_used_again(dataset, database):
    root = dataset("ds", *MAPS)
    dataset("ds/derivatives/qsmxt", "sub-03/anat/sub-03_acq-x_Chimap.nii", kind="derivative")
    expected = ["sub-01", "sub-02", "sub-03", "sub-03_acq-x"]
    assert names_of(root, database) == expected
    assert sorted(path.name for path in database.iterdir()) == ["qsmxt", "raw"]
    index = database / "raw" / "layout_index.sqlite"
    content, written_ns = index.read_bytes(), index.stat().st_mtime_ns
    assert names_of(root, database) == expected
    assert names_of(root, database, participants=("02",)) == ["sub-02"]
    assert (index.read_bytes(), index.stat().st_mtime_ns) == (content, written_ns)


def test_database_of_a_selection_contains_everyone(dataset, database):
    root = dataset("ds", *MAPS)
    assert names_of(root, database, participants=("02",)) == ["sub-02"]
    with sqlite3.connect(database / "raw" / "layout_index.sqlite") as connection:
        paths = {Path(path).name for (path,) in connection.execute("SELECT path FROM files")}
    assert paths == {Path(name).name for name in MAPS}


def test_old_database_hides_no_file(dataset, database):
    root = dataset("ds", *MAPS)
    names_of(root, database)
    add(root, "sub-01/anat/sub-01_acq-new_Chimap.nii")  # in a folder that the database knows
    add(root, "sub-02/ses-1/anat/sub-02_ses-1_Chimap.nii")
    add(root, "sub-04/anat/sub-04_Chimap.nii")
    (root / MAPS[2]).unlink()
    assert names_of(root, database) == ["sub-01", "sub-01_acq-new", "sub-02", "sub-02_ses-1", "sub-04"]


def test_files_with_old_times_are_not_hidden(dataset, database):
    root = dataset("ds", *MAPS)
    names_of(root, database)
    folder = root / "sub-01" / "anat"
    add(root, "sub-01/anat/sub-01_acq-new_Chimap.nii")
    os.utime(folder, (0, 0))  # as rsync -a leaves it
    assert "sub-01_acq-new" in names_of(root, database)


def test_exchanged_link_to_a_participant_is_noticed(dataset, database, tmp_path):
    root = dataset("ds", *MAPS[:1])
    for name in ("a", "b"):
        add(tmp_path / name, f"anat/sub-02_acq-{name}_Chimap.nii")
    (root / "sub-02").symlink_to(tmp_path / "a")
    assert names_of(root, database) == ["sub-01", "sub-02_acq-a"]
    (root / "sub-02").unlink()
    (root / "sub-02").symlink_to(tmp_path / "b")  # a folder that is older than the database
    assert names_of(root, database) == ["sub-01", "sub-02_acq-b"]


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(4096)])
def test_damaged_database_is_rejected(dataset, database, content):
    root = dataset("ds", *MAPS)
    names_of(root, database)
    (database / "raw" / "layout_index.sqlite").write_bytes(content)
    with pytest.raises(InputError, match=r"^`bids_database_dir` .*/db/raw: not a usable database of pybids \(.+\)"):
        names_of(root, database)


def test_database_of_another_dataset_is_rejected(dataset, database):
    names_of(dataset("other", *MAPS), database)
    with pytest.raises(InputError, match=r"^`bids_database_dir` .*/db/raw: belongs to another dataset \(.*/other\)"):
        names_of(dataset("ds", *MAPS[:1]), database)


def test_folder_of_the_database_must_be_a_folder(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^`bids_database_dir` .*/file/raw: not a usable database of pybids \("):
        names_of(dataset("ds", *MAPS), tmp_path / "file")


def test_interrupted_indexing_leaves_no_database(dataset, database, monkeypatch):
    root = dataset("ds", *MAPS)

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("bids.layout.index.BIDSLayoutIndexer._index_file", stop)
        with pytest.raises(KeyboardInterrupt):
            names_of(root, database)
    assert list(database.iterdir()) == []
    assert names_of(root, database) == ["sub-01", "sub-02", "sub-03"]


@pytest.mark.parametrize(
    "folder", ["sub-99/ses-9", "x_acq-b/anat", "garden-x_res-1", "a b#c%20d", "x::y", "[1](2)", "désc-ß"]
)
def test_names_above_the_dataset_do_not_matter(dataset, filter_file, folder):
    root = dataset(f"{folder}/ds", "sub-01/anat/sub-01_acq-a_Chimap.nii", "sub-01/anat/sub-01_acq-b_Chimap.nii")
    wanted = {"subject": "01", "session": None, "acquisition": "a", "res": None, "den": None, "desc": None}
    filter_file.write_text(json.dumps({"chimap": wanted}))
    assert names_of(root, filter_file=filter_file) == ["sub-01_acq-a"]


@pytest.mark.parametrize("relative", ["ds", "./ds", "ds/../ds"])
def test_dataset_may_be_relative(dataset, database, monkeypatch, relative):
    monkeypatch.chdir(dataset("ds", *MAPS).parent)
    for folder in (None, database, database):
        inputs = open_inputs(Path(relative), Selection(bids_database_dir=folder))
        assert [scan.chi for scan in find_scans(inputs)] == [Path(relative) / name for name in MAPS]


def test_links_to_folders_are_followed(dataset, tmp_path):
    root = dataset("ds", *MAPS[:1])
    add(tmp_path / "elsewhere", "anat/sub-02_Chimap.nii")
    (root / "sub-02").symlink_to(tmp_path / "elsewhere")
    (root / "sub-01" / "anat" / "loop").symlink_to("..")
    assert names_of(root) == ["sub-01", "sub-02"]


def test_name_in_another_encoding_is_named(dataset):
    root = dataset("ds", *MAPS)
    add(root, os.fsdecode(b"sub-02/anat/f\xfcr"))
    with pytest.raises(InputError) as raised:
        names_of(root)
    assert str(raised.value) == rf"{root}/sub-02/anat/f\udcfcr: the name is not valid UTF-8; rename the file or folder"


def test_only_images_of_scans_are_indexed(dataset, database):
    others = [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_Chimap.json",
        "sub-01/func/sub-01_task-x_bold.nii.gz",
    ]
    names_of(dataset("ds", *MAPS, *others), database)
    with sqlite3.connect(database / "raw" / "layout_index.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM files").fetchone() == (3,)


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"acquisition": ["a", None]}, ["sub-01", "sub-01_acq-a_run-01"]),
        ({"acquisition": "[ab]", "regex_search": True}, ["sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
        ({"run": [1, 2]}, ["sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
        ({"suffix": "Chimap", "extension": "nii.gz"}, ["sub-01"]),
        ({"scope": "QSMxT"}, ["sub-01", "sub-01_acq-a_run-01", "sub-01_acq-b_run-2"]),
    ],
)
def test_filters_have_the_semantics_of_pybids(dataset, filter_file, block, names):
    maps = ["sub-01_Chimap.nii.gz", "sub-01_acq-a_run-01_Chimap.nii", "sub-01_acq-b_run-2_Chimap.nii"]
    root = dataset("maps", *(f"sub-01/anat/{name}" for name in maps), kind="derivative")
    (root / "dataset_description.json").write_text(
        '{"DatasetType": "derivative", "GeneratedBy": [{"Name": "QSMxT"}, {"Name": "other"}]}'
    )
    filter_file.write_text(json.dumps({"chimap": block}))
    assert names_of(root, filter_file=filter_file) == names


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"acquisition": {"a": 1}},
            r"filter.json: acquisition is \{'a': 1\}, expected a text, a number, null",
        ),
        ({"acquisition": [["a"]]}, r"filter.json: acquisition is \[\['a'\]\], expected a text"),
        ({"acquisition": "(", "regex_search": True}, r"filter.json: the filter cannot be applied \(.*\); correct its"),
    ],
)
def test_impossible_filter_is_rejected(dataset, filter_file, block, message):
    filter_file.write_text(json.dumps({"chimap": block}))
    with pytest.raises(InputError, match=f"^{message}"):
        names_of(dataset("ds", "sub-01/anat/sub-01_acq-a_Chimap.nii"), filter_file=filter_file)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            '{"DatasetType": "derivative", "GeneratedBy": null}',
            r"other: pybids cannot index it \(.+\); check",
        ),
        ("[1]", r"dataset_description.json: contains a list, expected a JSON object"),
        ("broken", r"dataset_description.json: invalid JSON \(line 1, column 1\)"),
    ],
)
def test_malformed_description_matters_only_with_maps(dataset, description, message):
    root = dataset("ds", *MAPS)
    other = dataset("ds/derivatives/other", "sub-01/anat/sub-01_dseg.nii", kind="derivative")
    (other / "dataset_description.json").write_text(description)
    assert names_of(root) == ["sub-01", "sub-02", "sub-03"]
    add(other, "sub-01/anat/sub-01_acq-x_Chimap.nii")
    with pytest.raises(InputError, match=f"^{message}"):
        names_of(root)
