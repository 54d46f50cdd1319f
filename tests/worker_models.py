"""Registers the models of tests.oracle in the processes of parallel runs, which import this module."""

from bids_dgmseg.models.registry import MODELS
from tests.oracle import oracle_model

for name, predictor in {"oracle": "Oracle", **{one: one for one in ("Blind", "Greedy", "Interrupted", "Deaf")}}.items():
    MODELS[name] = oracle_model(name, predictor)
