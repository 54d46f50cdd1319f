"""Registers the models of tests.oracle in the processes of parallel runs, and replaces figures by a pixel."""

import sys
from types import SimpleNamespace

from bids_dgmseg.models.registry import MODELS
from tests.oracle import oracle_model
from tests.pixel import write_pixel

for name in ("Oracle", "Blind", "Greedy", "Interrupted", "Deaf"):
    model = oracle_model("oracle" if name == "Oracle" else name, name)
    MODELS[model.name] = model

if "_pytest" not in sys.modules:  # in a process of a run; drawing takes longer than all else
    sys.modules["bids_dgmseg.report.mosaic"] = SimpleNamespace(draw_mosaic=write_pixel)  # type: ignore[assignment]
