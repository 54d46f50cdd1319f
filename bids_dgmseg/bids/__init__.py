"""BIDS datasets: find scans, segmentations and masks; name and write derivatives."""
