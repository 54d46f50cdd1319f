"""Group level: participants, joining of scans, analyses, tables."""
