"""Reading and writing files: atomic writes, JSON, TSV, NIfTI, checksums, unfetched annex and LFS content."""
