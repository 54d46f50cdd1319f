"""How networks learn from simulated or labelled maps."""
