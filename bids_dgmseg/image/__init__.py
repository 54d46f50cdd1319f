"""Images as arrays with an affine (RAS+, mm): grids, resampling, boxes, masks, units."""
