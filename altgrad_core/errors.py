"""The error for what a user gave and nobody could use, so that a command line can tell it from a defect."""


class InputError(ValueError):
    """A value that cannot be used; the message names it, what was expected, and the nearest right one if there is."""
