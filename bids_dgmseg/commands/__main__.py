"""Run a verb: ``python -m bids_dgmseg.commands``."""

from __future__ import annotations

import sys

from bids_dgmseg.commands import main

sys.exit(main())
