"""Nipype interfaces of the steps, from files to files: usable alone, in any workflow and with any plugin."""

from bids_dgmseg.interfaces.label_nuclei import AlignSessions, LocalizeNuclei, SegmentNuclei
from bids_dgmseg.interfaces.measure_nuclei import MeasureNuclei
from bids_dgmseg.interfaces.reconstruct_qsm import ImplausibleMapError, ReconstructQSM
from bids_dgmseg.interfaces.write_results import AnalyseGroup, PlotNuclei, SaveDerivatives

__all__ = [
    "AlignSessions",
    "AnalyseGroup",
    "ImplausibleMapError",
    "LocalizeNuclei",
    "MeasureNuclei",
    "PlotNuclei",
    "ReconstructQSM",
    "SaveDerivatives",
    "SegmentNuclei",
]
