"""Why a number became what it became, in sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from altgrad.numbers import Number, code_fields, write_number
from altgrad_core.formats import Format

if TYPE_CHECKING:
    from altgrad.explain import Candidate, Explanation


def sentences(told: Explanation) -> list[str]:
    """The reasons for a result, in the order in which they take effect."""
    if not told.candidates:
        said = [_of_special(told)]
    elif len(told.candidates) == 1:
        said = [_of_one(told)]
    else:
        said = [_between(told), *_decision(told)]
    if told.overflows:
        said += _of_overflow(told)
    if told.result is not None and told.result.exact != told.result.value and not math.isnan(told.result.exact):
        said.append("A result below 2^-126 is zero in both packages.")
    if told.result is not None and math.isnan(told.result.value) and not told.format.has_nan:
        said.append(f"{told.format} has no code for NaN: it is encoded as 0, and the casts count it.")
    return said


def name_of(number: Number) -> str:
    """A number for use in a sentence: as typed, or the float32 that took its place.

    >>> from altgrad.numbers import read_number
    >>> name_of(read_number("0x3fc00000")), name_of(read_number("0.1"))
    ('1.5', '0.1')
    """
    if number.kind in ("decimal number", "number") and not number.is_rounded:
        return number.text
    exact = write_number(number.value)
    return exact if len(exact) <= 9 else str(np.uint32(number.bits).view(np.float32))


def _of_special(told: Explanation) -> str:
    if math.isnan(told.number.value):
        return "NaN stays NaN, for a number in its place would hide a failure."
    if not told.format.is_signed and not told.overflows:
        return f"{told.format} has neither a sign nor a zero: what is not positive is NaN."
    return "An infinity lies beyond every finite value."


def _of_one(told: Explanation) -> str:
    candidate, name = told.candidates[0], name_of(told.number)
    value = write_number(candidate.value)
    if candidate.distance == 0:
        is_zero = candidate.value == 0 and math.copysign(1, told.number.value) < 0
        if is_zero and not told.format.has_negative_zero:
            return f"{told.format} has no -0: its code is the NaN, so -0 becomes 0."
        if told.number.is_rounded:
            return f"As float32 it is {name}, a value of {told.format}: nothing more is rounded."
        return f"{name} is a value of {told.format}: nothing is rounded."
    if told.overflows:
        return f"{name} lies beyond {value}, the largest value of {told.format}, by more than one step."
    return f"{name} lies below {value}, the smallest value of {told.format}, which has no zero to round to."


def _between(told: Explanation) -> str:
    below, above = told.candidates
    name, ends = name_of(told.number), f"{write_number(below.value)} and {write_number(above.value)}"
    if above.distance == 0:
        return f"{name} is what would follow {write_number(below.value)}, the largest value of {told.format}."
    if told.is_tie:
        return f"{name} lies exactly half way between {ends}."
    return f"{name} lies between {ends}, {_percent(below)} of the way."


def _decision(told: Explanation) -> list[str]:
    below, above = told.candidates
    if above.distance == 0:
        return []
    if told.rounding == "toward_zero":
        return ["Rounding toward zero takes the one nearer to zero, whatever the distance."]
    if told.draws_up is not None and told.stochastic_bits is not None:
        return [_of_draw(told, told.draws_up, told.stochastic_bits)]
    if not told.is_tie:
        nearer = below if below.distance < above.distance else above
        return [f"The nearer one is {write_number(nearer.value)}."]
    if told.rounding == "nearest_away":
        return [f"A tie goes away from zero: to {write_number(above.value)}."]
    if told.goes_up and above.code is None:
        odd = "" if below.code is None else f" {code_fields(below.code, told.format)} ends in 1,"
        return [f"A tie goes to the even code, the one that ends in 0:{odd} so it goes up."]
    winner = told.winner
    code = "" if winner is None or winner.code is None else f": {code_fields(winner.code, told.format)}"
    return [f"A tie goes to the even code, the one that ends in 0{code}."]


def _of_draw(told: Explanation, draws_up: int, count: int) -> str:
    rule = f"Of the 2^{count} draws of {count} random bits, {draws_up:,} take it away from zero"
    if told.random_bits is None:
        return f"{rule}: {draws_up / 2**count:.4%}."
    verdict = "is one of those" if told.goes_up else "is none of those"
    return f"{rule}: the largest ones. {told.random_bits:,} {verdict}."


def _of_overflow(told: Explanation) -> list[str]:
    maximum = write_number(told.format.max_representable_value)
    said = [] if len(told.candidates) < 2 else [_of_end(told.format, write_number(told.candidates[1].value))]
    if told.overflow == "native":
        return [*said, f"Natively an overflow becomes {_native(told.format, maximum)}."]
    if told.overflow == "saturate":
        return [*said, f"It saturates at the largest value, {maximum}."]
    if math.isinf(told.number.value):
        return [*said, "With saturate_finite an infinity stays one."]
    return [*said, f"A finite value saturates at the largest value, {maximum}."]


def _native(format: Format, maximum: str) -> str:
    if format.has_inf:
        return f"an infinity: {format} has infinities"
    if format.has_nan:
        return f"NaN: {format} has NaN but no infinities"
    return f"the largest value, {maximum}: {format} has neither inf nor NaN"


def _of_end(format: Format, beyond: str) -> str:
    following = format.max_code + 1
    if following > format.magnitude_mask:
        return f"{beyond} has no code in {format}, so that is an overflow."
    meaning = "NaN" if math.isnan(format.to_real(following)) else "infinity"
    return f"{beyond} is no value of {format}, where its code {code_fields(following, format)} means {meaning}."


def _percent(below: Candidate) -> str:
    """How far along the gap, never rounded to one of its ends or to its middle."""
    percent = f"{float(below.share) * 100:.4g}%"
    if percent == "50%":
        return "just over half" if below.share * 2 > 1 else "just under half"
    if float(percent[:-1]) in (0, 100) or "e" in percent:
        return "next to nothing" if below.share * 2 < 1 else "nearly all"
    return percent
