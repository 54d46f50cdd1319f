"""Simulated susceptibility maps with known labels."""
