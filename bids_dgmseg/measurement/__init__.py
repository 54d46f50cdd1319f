"""Measures of one scan: nuclei, field of view, confidence, map quality, norms and QC ratings."""
