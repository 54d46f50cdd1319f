"""Pure functions from arrays and a voxel size to tables."""
