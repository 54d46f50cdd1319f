"""QSM reconstruction: unwrapping, background field removal, dipole inversion."""
