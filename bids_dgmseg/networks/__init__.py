"""Networks as plain torch modules: one file a paper."""
