"""From phase and magnitude to susceptibility; the dipole physics."""
