"""Comparison of segmentations with references, between raters and between models."""
