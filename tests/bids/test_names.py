from __future__ import annotations

import pytest

from bids_dgmseg.bids.names import ORDER, join_entities
from bids_dgmseg.errors import list_some


def test_the_order_of_entities_is_that_of_bids():
    schema = pytest.importorskip("bidsschematools.schema", reason="bidsschematools is not installed").load_schema()
    entities = [schema.objects.entities[key].name for key in schema.rules.entities]
    assert [key for key in ORDER if key in entities] == [key for key in entities if key in ORDER]


def test_an_entity_that_bids_does_not_know_stands_before_seg():
    assert join_entities({"seg": "m", "method": "x", "sub": "1", "run": "2"}) == "sub-1_run-2_method-x_seg-m"


def test_few_names_are_all_listed():
    assert list_some(["b", "a"]) == "a, b"
