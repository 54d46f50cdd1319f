"""Spatial normalization: chi maps, labels and probabilities in a standard space."""
