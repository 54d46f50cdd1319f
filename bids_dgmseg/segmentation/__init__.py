"""Segmentation: localize, predict, postprocess."""
