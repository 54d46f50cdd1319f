"""Run `dgmseg` with ``python -m bids_dgmseg.cli``."""

from __future__ import annotations

import sys

from bids_dgmseg.cli.main import main

sys.exit(main())
