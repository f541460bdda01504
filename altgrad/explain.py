"""What becomes of one value when it is cast, and why: by our rules and by those of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from altgrad.libraries import Answer, Caster, gfloat_answer, ml_dtypes_answer, torch_answer
from altgrad.numbers import Number, Real, as_number
from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, STOCHASTIC_BITS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, check_stochastic_bits, round_to_format
from altgrad_core.scalars import is_integer
from altgrad_core.vector_inputs import beyond_max
from altgrad_core.vectors import float32_bits, package_result

THIRD_PARTIES: tuple[Caster, ...] = (ml_dtypes_answer, torch_answer, gfloat_answer)


@dataclass(frozen=True)
class Candidate:
    """A value that the number could round to.

    Attributes:
        value: signed, exact.
        code: None for the value that would come after max: it is no code of the format, to round there is to overflow.
        distance: from the number.
        share: the distance as a fraction of the gap between the candidates, so that 1/2 is a tie.
    """

    value: float
    code: int | None
    distance: Fraction
    share: Fraction


@dataclass(frozen=True)
class Outcome:
    """A result.

    Attributes:
        exact: what the reference gives.
        value: what both packages give: zero where the exact result is below 2^-126.
        code: of the value; 0 for NaN in a format without one.
    """

    exact: float
    value: float
    code: int

    @property
    def bits(self) -> int:
        """The result as float32."""
        return float32_bits(self.value)


@dataclass(frozen=True)
class Explanation:
    """What a cast makes of a number, and why.

    Attributes:
        number: what was typed, or given, and the float32 of it, which is what is cast.
        format: what it is cast to.
        rounding: how it is rounded.
        overflow: what becomes of it beyond max.
        stochastic_bits: how many random bits count; None unless rounding is stochastic.
        random_bits: what was drawn, if it was given.
        candidates: the values around it, towards zero first; one if it is a value of the format or beyond all, none
            for NaN, infinities, and what a format without a sign makes NaN.
        draws_up: with stochastic rounding, how many of the 2^stochastic_bits draws take the magnitude up.
        goes_up: whether it is rounded to the candidate further from zero; None where that depends on the draw.
        by_policy: the result under each overflow policy; None where it depends on the draw.
        others: what other libraries make of it.
    """

    number: Number
    format: Format
    rounding: Rounding
    overflow: Overflow
    stochastic_bits: int | None
    random_bits: int | None
    candidates: tuple[Candidate, ...]
    draws_up: int | None
    goes_up: bool | None
    by_policy: Mapping[Overflow, Outcome] | None
    others: tuple[Answer, ...]

    @property
    def is_tie(self) -> bool:
        """Whether the number lies exactly half way between two candidates."""
        return len(self.candidates) == 2 and self.candidates[0].distance == self.candidates[1].distance

    @property
    def result(self) -> Outcome | None:
        """The result under the overflow policy that was asked for; None where it depends on the draw."""
        return None if self.by_policy is None else self.by_policy[self.overflow]

    @property
    def winner(self) -> Candidate | None:
        """The candidate that the number rounds to; None without one, and where it depends on the draw."""
        if self.goes_up is None or not self.candidates or (self.overflows and len(self.candidates) == 1):
            return None
        return self.candidates[-1] if self.goes_up else self.candidates[0]

    @property
    def overflows(self) -> bool | None:
        """Whether it rounds beyond max, infinities included; None where that depends on the draw."""
        if not self.candidates:
            return math.isinf(self.number.value) and (self.format.is_signed or self.number.value > 0)
        if len(self.candidates) == 1:
            return self.candidates[0].distance > 0 and abs(self.number.value) > self.format.max_representable_value
        return False if self.candidates[1].code is not None else self.goes_up

    @property
    def reason(self) -> str:
        """Why, in plain sentences."""
        from altgrad.reasons import sentences

        return " ".join(sentences(self))


def explain(
    number: str | Real | Number,
    format: str | Format,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    random_bits: int | None = None,
    stochastic_bits: int | None = None,
    others: tuple[Caster, ...] = THIRD_PARTIES,
) -> Explanation:
    """Explain the cast of one number.

    Args:
        number: typed, as :func:`altgrad.numbers.read_number` takes it, or a number of Python's or NumPy's, which counts
            at its exact value.
        format: a name or a :class:`~altgrad_core.formats.Format`.
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: see :data:`altgrad_core.formats.Overflow`.
        random_bits: with stochastic rounding, what was drawn; without it both outcomes are explained.
        stochastic_bits: with stochastic rounding, how many of them count; 24 by default.
        others: which libraries to ask.

    Raises:
        ValueError: for what cannot be read, unknown formats and modes, and options without effect.
        TypeError: for a number that is neither a string nor a real number.

    >>> told = explain("1.5", "E7M0", others=())
    >>> told.is_tie, told.result.value, [candidate.value for candidate in told.candidates]
    (True, 2.0, [1.0, 2.0])
    >>> told.reason
    '1.5 lies exactly half way between 1 and 2. A tie goes to the even code, the one that ends in 0: 0 1000000.'
    >>> explain(1.5, "E7M0", others=()).result == told.result
    True
    """
    number = as_number(number)
    resolved = parse(format)
    check_modes(rounding, overflow)
    count, random_bits = _checked_draw(rounding, random_bits, stochastic_bits)
    candidates = _candidates(number.value, resolved)
    draws_up = None if count is None else _draws_up(candidates, count)
    decided = draws_up in (0, None) or random_bits is not None
    # Where no draw takes it up, any will do.
    draw = None if count is None else random_bits or 0
    return Explanation(
        number=number,
        format=resolved,
        rounding=rounding,
        overflow=overflow,
        stochastic_bits=count,
        random_bits=random_bits,
        candidates=candidates,
        draws_up=draws_up,
        goes_up=_goes_up(candidates, rounding, draws_up, draw, count) if decided else None,
        by_policy=_outcomes(number.value, resolved, rounding, draw, count) if decided else None,
        others=tuple(ask(np.uint32(number.bits).view(np.float32), resolved, rounding, overflow) for ask in others),
    )


def _checked_draw(
    rounding: Rounding, random_bits: int | None, stochastic_bits: int | None
) -> tuple[int | None, int | None]:
    """How many random bits count, None unless rounding is stochastic, and what was drawn, if it was given."""
    if rounding != "stochastic":
        for name, given in (("random_bits", random_bits), ("stochastic_bits", stochastic_bits)):
            if given is not None:
                raise InputError(f"{name} has no effect with rounding {rounding!r}; expected it with 'stochastic'")
        return None, None
    count = check_stochastic_bits(STOCHASTIC_BITS if stochastic_bits is None else stochastic_bits)
    if random_bits is None:
        return count, None
    if not is_integer(random_bits) or not 0 <= random_bits < 2**count:
        raise InputError(f"random_bits is {random_bits!r}; expected 0 to {2**count - 1}, an integer of {count} bits")
    return count, int(random_bits)


def _candidates(value: float, format: Format) -> tuple[Candidate, ...]:
    """The values of the format around a number, and the one that would follow max."""
    if not math.isfinite(value) or (not format.is_signed and (value == 0 or math.copysign(1, value) < 0)):
        return ()
    magnitude = abs(Fraction(value))
    lower = format.to_bits(abs(value), "toward_zero", "saturate")
    below = format.to_real(lower)
    above = beyond_max(format) if lower == format.max_code else format.to_real(lower + 1)
    if magnitude <= below or magnitude > above:
        around = [(below, lower)]
    else:
        around = [(below, lower), (above, None if lower == format.max_code else lower + 1)]
    gap = Fraction(above) - Fraction(below)
    sign, sign_bit = (-1.0, format.sign_mask) if math.copysign(1, value) < 0 else (1.0, 0)
    candidates: list[Candidate] = []
    for positive, code in around:
        is_plain_zero = positive == 0 and not format.has_negative_zero
        signed = positive if is_plain_zero else math.copysign(positive, sign)
        distance = abs(magnitude - Fraction(positive))
        signed_code = None if code is None else code | (0 if is_plain_zero else sign_bit)
        candidates.append(Candidate(signed, signed_code, distance, distance / gap))
    return tuple(candidates)


def _draws_up(candidates: tuple[Candidate, ...], count: int) -> int:
    return math.floor(candidates[0].share * 2**count) if len(candidates) == 2 and candidates[0].share < 1 else 0


def _goes_up(
    candidates: tuple[Candidate, ...], rounding: Rounding, draws_up: int | None, draw: int | None, count: int | None
) -> bool:
    """Whether the magnitude is rounded up: the definition of the roundings once more, in terms of the candidates."""
    if len(candidates) < 2:
        return False
    below = candidates[0]
    if below.share == 1:
        return True  # it is the value that would follow max
    if rounding == "toward_zero":
        return False
    if draws_up is not None and draw is not None and count is not None:
        return draws_up + draw >= 2**count
    is_odd = below.code is not None and below.code % 2 == 1
    return below.share > Fraction(1, 2) or (below.share == Fraction(1, 2) and (rounding == "nearest_away" or is_odd))


def _outcomes(
    value: float, format: Format, rounding: Rounding, draw: int | None, count: int | None
) -> Mapping[Overflow, Outcome]:
    outcomes: dict[Overflow, Outcome] = {}
    for policy in OVERFLOWS:
        exact = round_to_format(
            value,
            format,
            rounding=rounding,
            overflow=policy,
            random_bits=draw,
            stochastic_bits=STOCHASTIC_BITS if count is None else count,
        )
        result = package_result(exact, format)
        outcomes[policy] = Outcome(exact, result, format.to_bits(result, overflow="saturate_finite"))
    return outcomes
