"""Nipype interfaces of the steps, from files to files: usable alone, in any workflow and with any plugin."""

from bids_dgmseg.interfaces.analyse_group import AnalyseGroup
from bids_dgmseg.interfaces.corrections import CorrectLabels
from bids_dgmseg.interfaces.derivatives import SaveDerivatives
from bids_dgmseg.interfaces.labels import AlignSessions, LocalizeNuclei, SegmentNuclei
from bids_dgmseg.interfaces.maps import ConformChi, ImplausibleMapError, ReconstructQSM
from bids_dgmseg.interfaces.measures import MeasureNuclei, PlotNuclei
from bids_dgmseg.interfaces.normalization import NormalizeToMNI
from bids_dgmseg.interfaces.session_maps import SampleMaps

__all__ = [
    "AlignSessions",
    "AnalyseGroup",
    "ConformChi",
    "CorrectLabels",
    "ImplausibleMapError",
    "LocalizeNuclei",
    "MeasureNuclei",
    "NormalizeToMNI",
    "PlotNuclei",
    "ReconstructQSM",
    "SampleMaps",
    "SaveDerivatives",
    "SegmentNuclei",
]
