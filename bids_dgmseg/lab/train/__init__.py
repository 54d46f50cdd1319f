"""Training on simulated and labelled maps."""
