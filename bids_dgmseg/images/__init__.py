"""Images as arrays with an affine; pure numpy, scipy and nibabel."""
