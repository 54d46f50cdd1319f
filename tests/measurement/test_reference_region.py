import pytest

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.measurement.reference_region import check_reference
from bids_dgmseg.models.registry import MODELS


def test_nucleus_with_parts_can_be_the_reference():
    for name in ("GP", "SN_R", "GPe", "CN_L"):
        check_reference(ReferenceRegion(kind="structure", structure=name), MODELS["dgm24"])
    with pytest.raises(InputError, match="`reference_structure` GPe: not labelled by dgm16"):
        check_reference(ReferenceRegion(kind="structure", structure="GPe"), MODELS["dgm16"])
