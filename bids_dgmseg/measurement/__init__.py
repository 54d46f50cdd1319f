"""Measures per scan: ROI statistics, reference region, map quality, segmentation quality."""
