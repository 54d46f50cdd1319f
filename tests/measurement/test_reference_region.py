import pytest

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.measurement.reference_region import check_reference
from bids_dgmseg.models.registry import MODELS


def test_nucleus_with_parts_can_be_the_reference():
    for name in ("GP", "SN_R", "GPe", "CN_L"):
        check_reference(ReferenceRegion(region=name), MODELS["dgm24"])
    with pytest.raises(InputError, match="`reference` GPe: unknown; choose from whole-brain, csf, DN"):
        check_reference(ReferenceRegion(region="GPe"), MODELS["dgm16"])
