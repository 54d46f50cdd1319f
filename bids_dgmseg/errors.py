"""The error that is the user's to mend."""


class InputError(Exception):
    """Something in the user's files or options is wrong: one line, ``where: what is wrong; what to do``."""
