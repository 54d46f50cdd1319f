from __future__ import annotations

import pytest

from bids_dgmseg.bids.entities import ORDER, join_entities


def test_entity_order_follows_the_bids_schema():
    schema = pytest.importorskip("bidsschematools.schema", reason="bidsschematools is not installed").load_schema()
    entities = [schema.objects.entities[key].name for key in schema.rules.entities]
    assert [key for key in ORDER if key in entities] == [key for key in entities if key in ORDER]


def test_unknown_entity_precedes_seg():
    assert join_entities({"seg": "m", "method": "x", "sub": "1", "run": "2"}) == "sub-1_run-2_method-x_seg-m"
