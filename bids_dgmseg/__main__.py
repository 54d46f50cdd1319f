"""Run the BIDS App with ``python -m bids_dgmseg``."""

from __future__ import annotations

import sys

from bids_dgmseg.cli.bids_app import main

sys.exit(main())
