from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import get_model
from bids_dgmseg.segment.localize import localize


def test_what_is_too_small_for_a_brain_is_refused_before_any_network_looks():
    chi = np.zeros((30, 30, 30), np.float32)
    chi[5:25, 5:25, 5:25] = 0.05
    with pytest.raises(InputError, match=r"^no brain found \(64 mL\); check that the map shows a head, in ppm$"):
        localize(Volume(chi, np.diag([2.0, 2.0, 2.0, 1.0])), get_model("default"))  # 20³ voxels of 8 mm³
