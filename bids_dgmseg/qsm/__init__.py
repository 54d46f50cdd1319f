"""The dipole physics: from susceptibility to the field, from a field of several echoes back to susceptibility."""
