"""Command lines: ``bids_dgmseg`` (BIDS App) and ``dgmseg`` (tools)."""
