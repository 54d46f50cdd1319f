import json

import pytest

from bids_dgmseg.bids.description import is_own, linked_datasets, makers, read_description, source_datasets


@pytest.fixture
def describe(tmp_path):
    """Writes what a dataset says of itself."""

    def write(description):
        text = description if isinstance(description, str) else json.dumps(description)
        (tmp_path / "dataset_description.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_a_dataset_names_its_makers_links_and_sources(describe):
    dataset = describe(
        {
            "GeneratedBy": [{"Name": "QSMxT", "Version": "8"}, {"Name": "bids_dgmseg"}],
            "DatasetLinks": {"raw": "../ds"},
            "SourceDatasets": [{"URL": "../a"}, {"DOI": "10.1/2"}],
        }
    )
    assert [maker["Name"] for maker in makers(dataset)] == ["QSMxT", "bids_dgmseg"]
    assert is_own(dataset)
    assert linked_datasets(dataset) == {"raw": "../ds"}
    assert source_datasets(dataset) == ["../a"]


@pytest.mark.parametrize(
    "description",
    [
        "broken",
        [],
        {},
        {"GeneratedBy": "bids_dgmseg", "DatasetLinks": ["../ds"], "SourceDatasets": {"URL": "../a"}},
        {"GeneratedBy": [{"Name": None}], "DatasetLinks": {"raw": None}, "SourceDatasets": [{"URL": None}]},
        {"GeneratedBy": ["bids_dgmseg"], "DatasetLinks": None, "SourceDatasets": ["../a"]},
    ],
)
def test_a_description_that_is_none_says_nothing(describe, description):
    dataset = describe(description)
    assert not makers(dataset)
    assert not is_own(dataset)
    assert not linked_datasets(dataset)
    assert not source_datasets(dataset)


def test_a_dataset_need_not_describe_itself(tmp_path):
    assert read_description(tmp_path) == {}
