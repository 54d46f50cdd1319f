"""Training of nnU-Net v2 models."""
