"""Labelled susceptibility maps made from anatomy and physics."""
