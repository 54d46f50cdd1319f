"""Rigid, affine and deformable alignment, on SimpleITK."""
