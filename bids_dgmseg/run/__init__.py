"""Nipype workflows: participant level and group level."""
