"""Files: atomic writing, JSON, checksums, links, unfetched annex and LFS content."""
