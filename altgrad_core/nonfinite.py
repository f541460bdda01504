"""What becomes of gradients that hold an infinity or NaN: the policies that both frameworks share."""

from __future__ import annotations

from typing import Literal

from altgrad_core.errors import check_choice

Nonfinite = Literal["propagate", "skip", "zero", "raise"]
"""``propagate``: nothing; a norm that is not finite then reaches every gradient. ``skip``: all gradients become zero.
``zero``: the elements that are not finite do. ``raise``: an error that names the first tensor with one.
"""

NONFINITE: tuple[Nonfinite, ...] = ("propagate", "skip", "zero", "raise")

NO_CULPRIT = -1
"""Index of the culprit where there is none, or nobody looked."""


def check_nonfinite(policy: str) -> None:
    """Refuse what is not one of :data:`NONFINITE`."""
    check_choice("policy for gradients that are not finite,", policy, NONFINITE)


def culprit_message(path: str, count: int, size: int, others: int) -> str:
    """What the error of ``raise`` says.

    >>> culprit_message("attn/kernel", 3, 1024, 1)
    'gradient attn/kernel holds 3 infinities or NaN among its 1024 elements, and 1 more gradient does'
    """
    beside = f", and {others} more gradient{'s do' if others > 1 else ' does'}" if others else ""
    return f"gradient {path} holds {count} infinities or NaN among its {size} elements{beside}"
