"""Find scans in BIDS datasets, name and write derivatives."""
