"""BIDS datasets: find scans, name and write derivatives."""
