"""3D images in RAS+ world space: volumes, grids, resampling, boxes, masks, units."""
