"""What encoding and decoding need to know of a format beside its grid: one rule for both frameworks."""

from __future__ import annotations

from typing import NamedTuple

from altgrad_core.errors import InputError
from altgrad_core.formats import Format, Overflow, parse

MOST_BITS = 16
"""Bits of the widest codes that are made."""


class SpecialCodes(NamedTuple):
    """Codes of a format, without their sign.

    Attributes:
        sign_mask: see :attr:`altgrad_core.formats.Format.sign_mask`.
        max_code: of the largest finite value.
        inf_code: of infinity; ``max_code`` without one.
        nan_code: of NaN; 0 without one.
        overflow_code: of what a value beyond max becomes.
    """

    sign_mask: int
    max_code: int
    inf_code: int
    nan_code: int
    overflow_code: int

    @classmethod
    def of(cls, format: Format, overflow: Overflow) -> SpecialCodes:
        """Those of one format under an overflow policy.

        >>> from altgrad_core.formats import parse
        >>> SpecialCodes.of(parse("E5M2"), "native")
        SpecialCodes(sign_mask=128, max_code=123, inf_code=124, nan_code=126, overflow_code=124)
        """
        beyond = format.overflow_value if overflow == "native" else format.max_representable_value
        inf_code, nan_code = format.inf_code or format.max_code, format.nan_code or 0
        return cls(format.sign_mask, format.max_code, inf_code, nan_code, format.to_bits(beyond))


def parse_codable(format: str | Format) -> Format:
    """The format of a name, if codes are made of it.

    Raises:
        UnknownFormatError: for an unknown name.
        InputError: for a format of more than 16 bits.

    >>> parse_codable("bf16").bits
    16
    """
    resolved = parse(format)
    if resolved.bits > MOST_BITS:
        raise InputError(f"{resolved} has {resolved.bits} bits; codes are made for formats of at most {MOST_BITS}")
    return resolved
