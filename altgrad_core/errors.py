"""The error for what a user gave and nobody could use, so that a command line can tell it from a defect."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """A value that cannot be used; the message names it, what was expected, and the nearest right one if there is."""


def check_choice(what: str, name: object, known: Sequence[str]) -> None:
    """Refuse what is not one of a few names.

    Args:
        what: what the name is of, for the message.
        name: what was given.
        known: what is allowed.

    Raises:
        InputError: naming the nearest one.

    >>> check_choice("colour", "rad", ("red", "green"))
    Traceback (most recent call last):
    altgrad_core.errors.InputError: unknown colour 'rad'; did you mean 'red'? Expected one of red, green
    """
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; {did_you_mean(name, known)}Expected one of {', '.join(known)}")


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """A question for what is spelt nearest to a name, with a space after it; empty where nothing is near.

    >>> did_you_mean("gren", ("red", "green")), did_you_mean("blue", ("red", "green"))
    ("did you mean 'green'? ", '')
    """
    near = difflib.get_close_matches(str(name).casefold(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say where the value is that an :class:`InputError` or ``TypeError`` raised inside complains of.

    >>> with naming("tensor 'w'"):
    ...     raise InputError("a scale is 0")
    Traceback (most recent call last):
    altgrad_core.errors.InputError: tensor 'w': a scale is 0
    """
    try:
        yield
    except (InputError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error
