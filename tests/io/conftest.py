"""Grids of `tests/image` for NIfTI files."""

from tests.image.conftest import affine, store

__all__ = ["affine", "store"]
