"""Nipype interfaces of the steps, from files to files: usable alone, in any workflow and with any plugin."""

from bids_dgmseg.interfaces.analyse_group import AnalyseGroup
from bids_dgmseg.interfaces.localize_nuclei import AlignSessions, LocalizeNuclei
from bids_dgmseg.interfaces.measure_nuclei import MeasureNuclei
from bids_dgmseg.interfaces.plot_nuclei import PlotNuclei
from bids_dgmseg.interfaces.reconstruct_qsm import ImplausibleMapError, ReconstructQSM
from bids_dgmseg.interfaces.save_derivatives import SaveDerivatives
from bids_dgmseg.interfaces.segment_nuclei import SegmentNuclei

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
