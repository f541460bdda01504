"""Writes ``docs/conventions.md``: where libraries disagree, each cell by running the library.

``python -m altgrad.conventions`` writes the page, ``python -m altgrad.conventions --check`` says whether it is up to
date.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from altgrad.libraries import (
    Answer,
    Caster,
    dtype_names,
    gfloat_answer,
    installed_version,
    jax_answer,
    ml_dtypes_answer,
    torch_answer,
)
from altgrad.numbers import write_number
from altgrad.story import specials
from altgrad_core.formats import Format, Overflow, parse
from altgrad_core.reference import round_to_format
from altgrad_core.vectors import package_result

PAGE = Path(__file__).parents[1] / "docs" / "conventions.md"
LIBRARIES: tuple[tuple[str, Caster], ...] = (
    ("ml_dtypes", ml_dtypes_answer),
    ("JAX", jax_answer),
    ("torch", torch_answer),
    ("gfloat", gfloat_answer),
)
PACKAGES = ("ml_dtypes", "jax", "torch", "gfloat", "numpy")

_FLOAT8 = (
    *("float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3", "float8_e4m3fnuz", "float8_e4m3b11fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)
_FINITE = ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
_WITHOUT_MINUS_ZERO = ("float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz")

Row = list[str]


def versions() -> str:
    """What the page was made with, in a line.

    >>> "numpy" in versions()
    True
    """
    return ", ".join(f"{package} {installed_version(package) or 'not installed'}" for package in PACKAGES)


def page() -> str:
    """The whole page, in Markdown."""
    return "\n\n".join([_HEAD.format(versions=versions()), *_sections()]) + "\n"


def _sections() -> Iterator[str]:
    with _quiet_stderr():  # what XLA cannot compile it says at length
        for title, told, tables in (
            ("Overflow", _OVERFLOW, [_overflow(3e38, "3e38"), _overflow(np.inf, "+inf")]),
            ("NaN where there is no NaN", _NAN, [_values(_FINITE, (np.nan, -np.nan))]),
            ("Zero where there is no -0", _ZERO, [_values(_WITHOUT_MINUS_ZERO, (-0.0, -(2.0**-40)))]),
            ("float8_e8m0fnu: ties, zero, the sign", _E8M0, [_values(("float8_e8m0fnu",), _E8M0_VALUES)]),
            ("Below 2^-126", _BELOW, [_values(("bfloat16", "float32"), (2.0**-130, 2.0**-127)), _arithmetic()]),
            ("One name, two formats", _NAMES, [_namesakes()]),
            ("jax.lax.reduce_precision", _REDUCE, [_reduce_precision()]),
        ):
            yield "\n\n".join([f"## {title}", told, *tables])


def _overflow(value: float, written: str) -> str:
    header = ["format", "max", "`native`", "`saturate`", "`saturate_finite`", *(name for name, _ in LIBRARIES)]
    rows: list[Row] = []
    for name in (*_FLOAT8, *_FINITE):
        known = parse(name)
        ours = [_ours(value, known, policy) for policy in ("native", "saturate", "saturate_finite")]
        rows.append([f"`{name}`", write_number(known.max_representable_value), *ours, *_theirs(value, known)])
    return f"A cast of {written}:\n\n{_table(header, rows)}"


_E8M0_VALUES = (0.75, 1.5, 3.0, 6.0, 0.0, -0.0, -1.0, 2.0**-127, 2.0**-130, np.inf)


def _values(names: tuple[str, ...], values: tuple[float, ...]) -> str:
    header = ["format", "value", "AltGrad", "AltGrad's code", *(name for name, _ in LIBRARIES)]
    rows: list[Row] = []
    for name in names:
        known = parse(name)
        for value in values:
            ours = package_result(round_to_format(float(value), known), known)
            code = f"0x{known.to_bits(ours):02x}" if known.bits <= 16 else "-"
            rows.append([f"`{name}`", _signed(value), write_number(ours), code, *_theirs(value, known)])
    return _table(header, rows)


def _ours(value: float, format: Format, overflow: Overflow) -> str:
    return write_number(package_result(round_to_format(value, format, overflow=overflow), format))


def _theirs(value: float, format: Format) -> Row:
    x = np.copysign(np.float32(abs(value)), np.float32(np.copysign(1, value)))
    return [_cell(ask(x, format, "nearest_even", "native")) for _, ask in LIBRARIES]


def _cell(answer: Answer) -> str:
    if answer.value is not None:
        return write_number(answer.value)
    if "no such dtype" in answer.how:
        return "-"
    return "fails" if "fails" in answer.how else "refuses" if "refuses" in answer.how else answer.how


def _arithmetic() -> str:
    """What becomes of a subnormal float32 that is only multiplied by a one that the compiler does not know."""
    value, one = np.float32(2.0**-130), np.float32(1)
    header = ["2^-130 * 1 in", "gives"]
    ran: list[tuple[str, Callable[[], float]]] = [
        ("NumPy", lambda: float(value * one)),
        ("JAX under jit, on the CPU", lambda: _jax_product(value, one)),
        ("torch, on the CPU", lambda: _torch_product(value, one)),
    ]
    return _table(header, [[name, _tried(run)] for name, run in ran])


def _jax_product(value: np.float32, one: np.float32) -> float:
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        return float(jax.jit(lambda x, y: x * y)(value, one))


def _torch_product(value: np.float32, one: np.float32) -> float:
    import torch

    return float(torch.from_numpy(np.array([value])) * torch.tensor(one))


def _tried(run: Callable[[], float]) -> str:
    try:
        return write_number(run())
    except ModuleNotFoundError:
        return "not installed"


def _namesakes() -> str:
    rows: list[Row] = []
    for name, other in (("E3M4", "float8_e3m4"), ("E4M3", "float8_e4m3"), ("E5M2", "float8_e5m2")):
        for known in (parse(name), parse(other)):
            low, least = known.min_normal, known.smallest_subnormal
            rows.append(
                [
                    f"`{known}`",
                    str(known.bias),
                    specials(known),
                    write_number(known.max_representable_value),
                    "-" if low is None else write_number(low),
                    "-" if least is None else write_number(least),
                    ", ".join(f"`{dtype}`" for dtype in dtype_names(known)) or "none",
                ]
            )
    return _table(["name", "bias", "specials", "max", "min normal", "min subnormal", "dtype of the same format"], rows)


def _reduce_precision() -> str:
    header = ["format", "value", "AltGrad", "reduce_precision", "what it is in the format"]
    rows: list[Row] = []
    for name in ("E5M2", "float8_e4m3", "float8_e3m4"):
        known = parse(name)
        least, low = known.smallest_subnormal or 0.0, known.min_normal or 0.0
        for value, what in (
            (least, "smallest subnormal"),
            (low - least, "largest subnormal"),
            (low, "smallest normal"),
            (known.max_representable_value, "max"),
        ):
            reduced = _tried(lambda value=value, known=known: _reduced(value, known))
            rows.append([f"`{name}`", write_number(value), _ours(value, known, "native"), reduced, what])
    return _table(header, rows)


def _reduced(value: float, format: Format) -> float:
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        return float(jax.lax.reduce_precision(np.float32(value), format.exponent_bits, format.mantissa_bits))


def _signed(value: float) -> str:
    return "-NaN" if np.isnan(value) and np.signbit(value) else write_number(value)


def _table(header: Row, rows: list[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Standard error off, below Python's: compilers write to the file descriptor."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


_HEAD = """\
# Where libraries disagree

A cast to a small format leaves open what becomes of overflow, NaN, -0 and ties, and libraries fill the gaps in
different ways. Each cell below was computed by running the library named at its head on a CPU; `-` says that it has no
such format, `refuses` and `fails` that it raised. AltGrad's cells come from its exact reference, which its casts in JAX
and torch are tested against. For any value of your own: `altgrad explain VALUE --format NAME`.

This page is written by `python -m altgrad.conventions`; do not edit it. Made with:
{versions}."""

_OVERFLOW = """\
AltGrad does what `overflow` says: `native` (inf where the format has it, else NaN where it has that, else max),
`saturate` (max, for infinities too) or `saturate_finite` (max, but an infinity stays one in value space). The others
have one convention each, and not the same one: see torch's `float8_e4m3fn`. gfloat is told to saturate where a format
has neither inf nor NaN, since it refuses otherwise."""

_NAN = """\
A format of which every code is a number cannot say NaN. AltGrad keeps NaN in value space, because a number in its place
would hide a failure; its code is 0, and the casts count it. ml_dtypes makes a zero of it, with a sign."""

_ZERO = """\
These formats give the code of -0 to NaN. Whoever writes sign and magnitude separately turns a small negative number
into NaN: none of these does."""

_E8M0 = """\
Powers of two without sign or zero, the scales of MX blocks. 0.75, 1.5, 3 and 6 lie half way between two of them:
AltGrad sends such a tie to the even code, as in every format, ml_dtypes, JAX and torch send it away from zero. What is
not positive has no code but NaN; torch drops the sign of negative numbers."""

_BELOW = """\
A result below 2^-126, where float32 becomes subnormal, is zero in AltGrad in both frameworks, because XLA's CPU backend
treats subnormals as zero in arithmetic and torch does not. (2^-127 as a scale, above, is kept: that format has no
zero.) Inputs count at their value, and a cast to float32 itself changes nothing."""

_NAMES = """\
A bare name means AltGrad's registry: `E3M4` has bias 1 and no specials, `E4M3` is the `fn` variant. The dtype of the
same split may be another format."""

_REDUCE = """\
`reduce_precision` is cheap and nearly a cast to an IEEE-like format, but it has no subnormals: what lies below the
smallest normal value is lost."""


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` compare it; the exit status."""
    if arguments == ["--check"]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current == page():
            return 0
        print(f"{PAGE} is not what python -m altgrad.conventions writes with {versions()}", file=sys.stderr)
        return 1
    if arguments:
        print("usage: python -m altgrad.conventions [--check]", file=sys.stderr)
        return 2
    if not PAGE.parent.is_dir():
        print(f"{PAGE.parent} does not exist; expected to run in a checkout", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
