"""Quantitative susceptibility mapping: from the echoes of a GRE acquisition to a chi map."""
