"""Damaged or odd files end with one line, or with a result: headers, sidecars, tables and look-up tables."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import read_labels
from bids_dgmseg.io.files import read_json, read_sidecar
from bids_dgmseg.models.label_tables import read_label_table
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.study.participants import read_participant_tables

fuzzed = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SHAPE = (12, 10, 8)

CELLS = st.one_of(
    st.sampled_from(
        ["", "n/a", "nan", "sub-1", "1", "-0", "1e999", "89+", "12,5", '"', "a\tb", "\ufeffage", "M", "=1+1"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
)
TABLES = st.lists(st.lists(CELLS, max_size=4), max_size=5).map(lambda rows: "\n".join(map("\t".join, rows)).encode())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
KEYS = ["Units", "units", "ImageType", "ReferenceRegion", "EchoTime", "MagneticFieldStrength", "Sources"]
SIDECARS = st.one_of(
    st.binary(max_size=30),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3).map(lambda content: json.dumps(content).encode()),
)


def check(function: Callable[[], object]) -> object:
    """Run a function; its only error may be an `InputError` of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except InputError as error:
            message = str(error)
    assert len(message.splitlines()) == 1
    return None


@pytest.fixture
def chi(tmp_path: Path) -> Path:
    values = 0.05 * np.random.default_rng(0).standard_normal(SHAPE)
    nib.Nifti1Image(values.astype(np.float32), np.eye(4)).to_filename(tmp_path / "sub-1_Chimap.nii")
    return tmp_path / "sub-1_Chimap.nii"


@fuzzed
@given(edits=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_header_is_read_or_refused(chi, edits):
    content = bytearray(chi.read_bytes())
    for position, value in edits:
        content[position] = value
    path = chi.with_name("sub-2_Chimap.nii")
    path.write_bytes(content)
    check(lambda: check_chi(path, {}))
    check(lambda: read_labels(path))


@fuzzed
@given(size=st.integers(0, 4_500))
def test_any_truncated_image_is_read_or_refused(chi, size):
    path = chi.with_name("sub-2_Chimap.nii")
    path.write_bytes(chi.read_bytes()[:size])
    read = check(lambda: check_chi(path, {}))
    assert (read is not None) == (size >= 352 + 4 * np.prod(SHAPE))


@fuzzed
@given(content=SIDECARS)
def test_any_sidecar_is_read_or_refused(chi, content):
    chi.with_suffix(".json").write_bytes(content)
    check(lambda: check_chi(chi, read_sidecar(chi)))


@fuzzed
@given(content=st.one_of(st.binary(max_size=40), TABLES), header=st.booleans())
def test_any_participants_table_is_read_or_refused(tmp_path, content, header):
    (tmp_path / "participants.tsv").write_bytes(b"participant_id\tage\tsex\n" * header + content)
    check(lambda: read_participant_tables(tmp_path, [("1", None), ("2", "a")]))


@fuzzed
@given(content=st.one_of(st.binary(max_size=40), TABLES), header=st.booleans())
def test_any_table_of_labels_is_read_or_refused(tmp_path, content, header):
    path = tmp_path / "labels.tsv"
    path.write_bytes(b"index\tname\tlabel\tabbreviation\n" * header + content)
    assert isinstance(check(lambda: read_label_table(path)), list | None)


@fuzzed
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), SIDECARS))
def test_any_description_is_read_or_refused(tmp_path, content):
    (tmp_path / "model.toml").write_bytes(b"temperatures = " + content)
    check(lambda: read_model_folder(MODELS["dgm16"], tmp_path))
    (tmp_path / "dataset_description.json").write_bytes(content)
    check(lambda: read_json(tmp_path / "dataset_description.json"))
