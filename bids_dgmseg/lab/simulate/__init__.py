"""Simulated chi maps with known labels, for training and for tests: anatomy, susceptibility, artefacts, datasets."""
