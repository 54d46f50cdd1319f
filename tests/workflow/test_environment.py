from __future__ import annotations

import json
import logging
import os
import signal
import warnings

import pytest

from bids_dgmseg.config import RunConfig, RunControl
from bids_dgmseg.errors import InputError
from bids_dgmseg.workflow.environment import LOG_NAME, check_folders, log_to, make_run_folder, terminate_as_interrupt


def test_logs_and_warnings_go_only_to_the_file(tmp_path, capfd):
    with log_to(tmp_path):
        logging.getLogger("nipype.workflow").warning("a node is slow")
        logging.getLogger("nibabel.global").warning("sizeof_hdr should be 348")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("mean of empty slice", RuntimeWarning, stacklevel=1)
    text = (tmp_path / LOG_NAME).read_text()
    assert "nipype.workflow WARNING: a node is slow" in text
    assert "nibabel.global WARNING: sizeof_hdr should be 348" in text
    assert "RuntimeWarning: mean of empty slice" in text
    assert capfd.readouterr() == ("", "")


def test_no_messages_write_no_file(tmp_path):
    with log_to(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_verbose_run_prints_the_log(tmp_path, capsys):
    with log_to(tmp_path, verbose=True):
        logging.getLogger("nipype.workflow").warning("a node is slow")
    assert "a node is slow" in capsys.readouterr().err


def test_sigterm_interrupts_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"^$"), terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "ds").mkdir()
    return tmp_path / "ds"


def check(raw, out="../out", work="../work"):
    """Check an output and a working directory, relative to the dataset."""
    control = RunControl(work_dir=(raw / work).resolve())
    check_folders(RunConfig(raw, (raw / out).resolve(), control=control))


@pytest.fixture
def out(raw):
    (raw.parent / "out").mkdir()
    return raw.parent / "out"


@pytest.mark.parametrize("place", ["derivatives/dgmseg", "../out"])
def test_output_beside_dataset_or_in_derivatives_is_accepted(raw, place):
    check(raw, place)


@pytest.mark.parametrize("place", [".", "out", "sub-01", "sub-01/anat/out", "sourcedata/out"])
def test_output_in_the_raw_data_is_rejected(raw, place):
    with pytest.raises(InputError, match="input"):
        check(raw, place)


def test_work_dir_in_the_raw_data_is_rejected(raw):
    message = r"^work: --work-dir inside the input's raw data \(ds\); choose a folder outside it or below ds/deriv"
    with pytest.raises(InputError, match=message):
        check(raw, work="work")


@pytest.mark.parametrize("place", ["out", "out/work"])
def test_work_dir_in_the_output_is_rejected(raw, place):
    name = place.rpartition("/")[2]
    with pytest.raises(InputError, match=rf"^{name}: --work-dir inside the output directory, which would"):
        check(raw, work=f"../{place}")


def test_invalid_dataset_description_is_reported(raw, out):
    (out / "dataset_description.json").write_text('"broken"')
    with pytest.raises(InputError, match=r"^out/dataset_description.json: contains a str, expected a JSON object"):
        check(raw)


@pytest.mark.parametrize(
    ("description", "maker"),
    [
        ({"GeneratedBy": [{"Name": "QSMxT"}]}, "QSMxT"),
        ({"Name": "a raw dataset"}, "another program"),
    ],
)
def test_dataset_of_another_program_is_rejected(raw, out, description, maker):
    (out / "dataset_description.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=f"^out: contains a dataset of {maker}; choose another output directory"):
        check(raw)


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda path: path.symlink_to(".git/annex/objects/nowhere"), id="link"),
        pytest.param(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), id="pointer"),
    ],
)
def test_unfetched_dataset_description_is_rejected(raw, out, leave):
    leave(out / "dataset_description.json")
    with pytest.raises(InputError, match=r"^out: dataset_description\.json: content not fetched.*; fetch it first"):
        check(raw)


def test_own_output_is_accepted_again(raw, out):
    (out / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "bids_dgmseg"}]}')
    check(raw)


def test_runs_have_separate_folders(tmp_path):
    assert make_run_folder(tmp_path / "work") != make_run_folder(tmp_path / "work")


def test_unusable_work_dir_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"work: cannot be written \(Not a directory\); choose another --work-dir"):
        make_run_folder(tmp_path / "file" / "work")
