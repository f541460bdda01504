"""Explanations: what is read, what is claimed, and that the claims are the reference's."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import altgrad.conventions as conventions
from altgrad.explain import explain
from altgrad.libraries import gfloat_answer, ml_dtypes_answer, torch_answer
from altgrad.numbers import Real, as_number, read_number, write_decimal, write_number
from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS, Overflow, Rounding, parse
from altgrad_core.reference import round_to_format
from altgrad_core.vector_inputs import input_bits

NAMES = ("E0M7", "E1M6", "E3M4", "E4M3", "E5M2", "E7M0", "float8_e4m3fnuz", "binary8p3se", "float8_e8m0fnu", "bf16")


@pytest.mark.parametrize(
    ("text", "kind", "bits"),
    [
        ("1.5", "decimal number", 0x3FC00000),
        ("-0", "decimal number", 0x80000000),
        ("-3e-5", "decimal number", 0xB7FBA882),
        (".5", "decimal number", 0x3F000000),
        ("1e39", "decimal number", 0x7F800000),
        ("-1e999999999", "decimal number", 0xFF800000),
        ("1e-999999999", "decimal number", 0),
        ("1e-45", "decimal number", 1),
        ("0x1.8p0", "hex float", 0x3FC00000),
        ("-0X1P-149", "hex float", 0x80000001),
        ("0x3fc00000", "float32 bit pattern", 0x3FC00000),
        ("0x7f800001", "float32 bit pattern", 0x7F800001),
        ("0x3fc00000p0", "hex float", 0x4E7F0000),
        ("2^-9", "power of two", 0x3B000000),
        ("-3·2^40", "power of two", 0xD4400000),
        ("nan", "special value", 0x7FC00000),
        ("-NaN", "special value", 0xFFC00000),
        ("-inf", "special value", 0xFF800000),
        ("Infinity", "special value", 0x7F800000),
        ("−2", "decimal number", 0xC0000000),
    ],
)
def test_numbers_read(text: str, kind: str, bits: int) -> None:
    number = read_number(text)
    assert (number.kind, number.bits) == (kind, bits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0x3fc", "has 8 digits (0x000003fc), a hex float has an exponent (0x3fcp0)"),
        ("-0x3fc00000", "8 digits"),
        ("0x1.8", "a hex float has an exponent (0x1.8p0)"),
        ("0x123456789", "8 digits and no sign"),
        ("0xp0", "expected a decimal"),
        ("1,5", "did you mean 1.5?"),
        ("1_000", "did you mean 1000?"),
        ("one", "cannot read the number 'one'; expected a decimal"),
        ("abc", "a power of two (2^-9, 3*2^40)"),
        ("", "expected a decimal"),
        ("1e", "expected a decimal"),
        ("²", "expected a decimal"),
        ("1.2.3*2^1", "expected a decimal"),
    ],
)
def test_numbers_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match="cannot read the number") as refused:
        read_number(text)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        *((1.5, 0x3FC00000), (-3, 0xC0400000), (Fraction(3, 2), 0x3FC00000), (-0.0, 0x80000000), (0, 0)),
        *((np.float16(-1.5), 0xBFC00000), (np.float32(0.1), 0x3DCCCCCD), (np.float64(0.1), 0x3DCCCCCD)),
        *((np.int8(-128), 0xC3000000), (2**24 + 1, 0x4B800000), (2**24 + 3, 0x4B800002), (10**400, 0x7F800000)),
        *((math.inf, 0x7F800000), (-math.inf, 0xFF800000), (math.nan, 0x7FC00000), (-math.nan, 0xFFC00000)),
        *((np.float32("-inf"), 0xFF800000), (1e-320, 0), (1 + 2.0**-24 + 2.0**-52, 0x3F800001)),
    ],
    ids=repr,
)
def test_numbers_given(value: Real, bits: int) -> None:
    """At the value that they have, not at that which they are shown as."""
    number = as_number(value)
    assert (number.kind, number.bits) == ("number", bits)
    plain = value.item() if isinstance(value, np.generic) else value
    assert number.exact == (Fraction(plain) if plain == plain and abs(plain) != math.inf else None)


def test_explanations_of_numbers_given() -> None:
    for given in (1.5, np.float32(1.5), Fraction(3, 2)):
        told = explain(given, "E7M0", others=())
        assert told.result == explain("1.5", "E7M0", others=()).result
    assert "half way between 2 and 4" in explain(3, "E7M0", others=()).reason
    assert "As float32 it is 0.1" not in explain(np.float32(0.1), "E5M2", others=()).reason
    assert explain("0.1", "E5M2", others=()).result == explain(0.1, "E5M2", others=()).result


@pytest.mark.parametrize("given", [None, True, np.True_, 1j, [1.5], np.array(1.5), b"1.5"], ids=repr)
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"the number is .*; expected a string, such as '1.5', or a real number"):
        explain(given, "E5M2", others=())


def test_a_decimal_is_rounded_once() -> None:
    """Just above the middle of two float32, by less than float64 can tell."""
    middle = Fraction(1) + Fraction(1, 2**24)
    text = "1." + str(int((middle - 1) * 10**30) + 1).zfill(30)
    assert read_number(text).bits == 0x3F800001
    assert read_number(write_decimal(middle)).bits == 0x3F800000
    assert read_number(text).is_rounded
    assert not read_number("0.5").is_rounded
    assert read_number("1e39").is_rounded


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "E7M0", "bf16", "float8_e8m0fnu"])
def test_numbers_written_can_be_read(name: str) -> None:
    for value in parse(name).code_book()[::7].tolist():
        for width in (5, 9, 20):
            number = read_number(write_number(value, width))
            assert number.bits == int(np.float32(value).view(np.uint32)) or math.isnan(value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if k % 2 == 0 else pytest.mark.exhaustive) for k, name in enumerate(NAMES)]
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_claimed_is_what_the_reference_does(name: str, rounding: Rounding) -> None:
    """The winner, the tie and the overflow are found without the reference's result, so they can contradict it."""
    known = parse(name)
    bits = np.random.default_rng(1).permutation(input_bits(known, random_inputs=50, seed=0))[:700]
    options = {"random_bits": 12345678} if rounding == "stochastic" else {}
    for word in bits.tolist():
        told = explain(f"0x{word:08x}", known, rounding=rounding, others=(), **options)
        value = told.number.value
        assert told.result is not None
        assert told.by_policy is not None
        exact = round_to_format(value, known, rounding=rounding, **options)
        assert told.result.exact == exact or (math.isnan(exact) and math.isnan(told.result.exact))
        if told.overflows:
            assert abs(told.by_policy["saturate"].exact) == known.max_representable_value
            assert told.winner is None or told.winner.code is None
        elif told.winner is not None:
            assert told.winner.value == exact
            assert math.copysign(1, told.winner.value) == math.copysign(1, exact)
            if told.result.exact == told.result.value:
                assert told.winner.code == told.result.code
        if known.has_inf or known.has_nan:
            became = not math.isfinite(exact) and not math.isnan(value)
            assert told.overflows == (became and (known.is_signed or value > 0))
        if len(told.candidates) == 2:
            below, above = told.candidates
            assert abs(below.value) < abs(value) <= abs(above.value)
            assert below.share + above.share == 1
            assert told.is_tie == (below.share == Fraction(1, 2))
        assert told.reason


@pytest.mark.parametrize(
    ("text", "name", "options", "expected"),
    [
        ("3", "E7M0", {}, "half way between 2 and 4. A tie goes to the even code, the one that ends in 0: 0 1000000."),
        ("3", "E7M0", {"rounding": "nearest_away"}, "A tie goes away from zero: to 4."),
        ("3", "E7M0", {"rounding": "toward_zero"}, "Rounding toward zero"),
        ("1.3", "E5M2", {}, "1.3 lies between 1.25 and 1.5, 20% of the way. The nearer one is 1.25."),
        ("1.125000000001", "E5M2", {}, "1.125 lies exactly half way"),
        ("1.250000000001", "E5M2", {}, "As float32 it is 1.25, a value of E5M2: nothing more is rounded."),
        ("0.1", "E5M2", {}, "0.1 lies between 0.09375 and 0.109375, 40% of the way."),
        ("1e-400", "E5M2", {}, "As float32 it is 0, a value"),
        ("0x3dcccccd", "E5M2", {}, "0.1 lies between"),
        ("1.5", "E5M2", {}, "1.5 is a value of E5M2: nothing is rounded."),
        ("464.1", "E4M3", {}, "480 is no value of E4M3, where its code 0 1111 111 means NaN."),
        ("126", "E3M4", {}, "0 111 1111 ends in 1, so it goes up. 128 has no code in E3M4"),
        ("1e30", "E4M3", {"overflow": "saturate"}, "It saturates at the largest value, 448."),
        ("inf", "E3M4", {"overflow": "saturate_finite"}, "With saturate_finite an infinity stays one."),
        ("nan", "E3M4", {}, "E3M4 has no code for NaN: it is encoded as 0, and the casts count it."),
        ("-0", "float8_e4m3fnuz", {}, "has no -0"),
        ("-1", "float8_e8m0fnu", {}, "neither a sign nor a zero"),
        ("1e-44", "float8_e8m0fnu", {}, "below 2^-127, the smallest value"),
        ("2^-130", "bf16", {}, "below 2^-126 is zero in both packages"),
        ("1.25", "E5M2", {"rounding": "stochastic"}, "nothing is rounded"),
        ("1.0625", "E5M2", {"rounding": "stochastic", "stochastic_bits": 4}, "of 4 random bits, 4 take it away"),
        ("1.0625", "E5M2", {"rounding": "stochastic", "random_bits": 2**24 - 1}, "is one of those"),
        ("1.0625", "E5M2", {"rounding": "stochastic", "random_bits": 0}, "is none of those"),
    ],
)
def test_reasons(text: str, name: str, options, expected: str) -> None:
    assert expected in explain(text, name, others=(), **options).reason


def test_an_open_draw_leaves_both_open() -> None:
    told = explain("1.3", "E5M2", rounding="stochastic", others=())
    assert told.result is None
    assert told.winner is None
    assert told.draws_up == math.floor(told.candidates[0].share * 2**24)
    assert explain("60000", "E5M2", rounding="stochastic", others=()).overflows is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"random_bits": 1}, "random_bits has no effect"),
        ({"stochastic_bits": 4}, "stochastic_bits has no effect"),
        ({"rounding": "stochastic", "stochastic_bits": 0}, "stochastic_bits is 0"),
        ({"rounding": "stochastic", "stochastic_bits": 4, "random_bits": 16}, "random_bits is 16; expected 0 to 15"),
        ({"rounding": "stochastic", "random_bits": 1.5}, "random_bits is 1.5; expected 0 to"),
        ({"rounding": "stochastic", "random_bits": True}, "random_bits is True; expected 0 to"),
        ({"rounding": "up"}, "unknown rounding"),
    ],
)
def test_options(options, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        explain("1.5", "E5M2", others=(), **options)


def test_draws_may_be_integers_of_numpy() -> None:
    """Also where NumPy's would be too narrow for what is computed with them."""
    plain = explain("1.0625", "E5M2", rounding="stochastic", stochastic_bits=24, random_bits=5, others=())
    numpy = explain(
        "1.0625", "E5M2", rounding="stochastic", stochastic_bits=np.int8(24), random_bits=np.uint8(5), others=()
    )
    assert repr(numpy) == repr(plain)


def test_what_others_do() -> None:
    for package in ("ml_dtypes", "torch", "gfloat"):
        pytest.importorskip(package)
    overflowed = {answer.library: answer.value for answer in explain("500", "E4M3").others}
    assert overflowed["torch"] == 448.0
    assert math.isnan(overflowed["ml_dtypes"] or 0)
    assert math.isnan(overflowed["gfloat"] or 0)
    assert [answer.value for answer in explain("1.5", "E3M4").others] == [None, None, 1.5]
    assert "nearest even only" in explain("1.5", "E5M2", rounding="toward_zero").others[0].how


@pytest.mark.parametrize("ask", [ml_dtypes_answer, torch_answer, gfloat_answer])
def test_what_is_not_installed_is_said(monkeypatch, ask) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("altgrad.libraries.import_module", missing)
    answer = ask(np.float32(1), parse("E5M2"), "nearest_even", "native")
    assert (answer.value, answer.how) == (None, "not installed")


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_others_take_any_format_and_value(overflow: Overflow) -> None:
    for package in ("ml_dtypes", "torch", "gfloat"):
        pytest.importorskip(package)
    for known in FORMAT_REGISTRY.values():
        for text in ("1.3", "-1e30", "nan", "inf", "-0", "1e-40", "0x7f800001"):
            assert len(explain(text, known, overflow=overflow).others) == 3


def test_the_page_of_conventions_is_up_to_date() -> None:
    """Written with other versions it may rightly differ; then it only has to be written anew."""
    for package in ("ml_dtypes", "jax", "torch", "gfloat"):
        pytest.importorskip(package)
    committed = conventions.PAGE.read_text(encoding="utf-8")
    if conventions.versions() not in committed:
        pytest.skip(f"the page was made with other versions than {conventions.versions()}")
    assert committed == conventions.page(), "run: python -m altgrad.conventions"
