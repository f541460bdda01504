"""Golden vectors: inputs and right outputs of a cast in a file that any language can read, and the check against it.

The layout of the file is described in ``docs/vectors.md``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError
from altgrad_core.formats import OVERFLOWS, ROUNDINGS, STOCHASTIC_BITS, Format, Overflow, Rounding, parse
from altgrad_core.reference import check_modes, check_stochastic_bits, round_to_format
from altgrad_core.vector_inputs import fraction_of_quantum, input_bits

LAYOUT = "altgrad-vectors"
LAYOUT_VERSION = 1

_MOST_BITS = 16
_FIRST_MISMATCHES = 5
_MIN_NORMAL = 2.0**-126
_CANONICAL_NAN = 0x7FC0_0000
_FORMAT_FIELDS = (
    *("exponent_bits", "mantissa_bits", "bias"),
    *("has_inf", "has_nan", "has_negative_zero", "is_signed"),
)

_COLUMNS, _DRAWN_COLUMN = ("input", "output", "code"), "random_bits"

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Vectors:
    """Inputs of a cast with the right outputs.

    Attributes:
        format: what is cast to.
        rounding: how.
        overflow: what becomes of what rounds beyond max.
        stochastic_bits: how many random bits rounding uses; None unless it is stochastic.
        inputs: float32 bits, ``(n,)``.
        outputs: float32 bits, ``(n,)``; NaN is 0x7fc00000.
        codes: of the outputs, ``(n,)``; NaN is 0 where the format has none.
        random_bits: what stochastic rounding draws, ``(n,)``; of each the lowest ``stochastic_bits`` count.
    """

    format: Format
    rounding: Rounding
    overflow: Overflow
    stochastic_bits: int | None
    inputs: Words
    outputs: Words
    codes: Words
    random_bits: Words | None

    def __len__(self) -> int:
        return self.inputs.size


@dataclass(frozen=True)
class Mismatch:
    """One wrong output; all three are float32 bits."""

    input: int
    expected: int
    actual: int
    random_bits: int | None = None

    def __str__(self) -> str:
        drawn = "" if self.random_bits is None else f" with random bits 0x{self.random_bits:08x}"
        return f"{_shown(self.input)}{drawn} gives {_shown(self.actual)}, not {_shown(self.expected)}"


@dataclass(frozen=True)
class Report:
    """What :func:`check_vectors` found."""

    count: int
    mismatches: int
    first: tuple[Mismatch, ...]

    @property
    def passed(self) -> bool:
        """Whether every output was right."""
        return self.mismatches == 0

    def __str__(self) -> str:
        head = f"{self.mismatches} of {self.count} outputs differ" if self.mismatches else f"all {self.count} agree"
        return "\n  ".join([head, *map(str, self.first)])


def golden_vectors(
    format: str | Format,
    *,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "native",
    stochastic_bits: int | None = None,
    random_inputs: int = 1000,
    seed: int = 0,
) -> Vectors:
    """Inputs chosen by :func:`altgrad_core.vector_inputs.input_bits` and what the exact reference makes of them.

    With stochastic rounding, an input that lies between two values comes three times: with random bits that just do
    not take it up, with the least that do, and with any; and the bits that do not count are random too.

    Args:
        format: a name or a :class:`~altgrad_core.formats.Format` of at most 16 bits.
        rounding: see :data:`altgrad_core.formats.Rounding`.
        overflow: see :data:`altgrad_core.formats.Overflow`.
        stochastic_bits: 1 to 24, with stochastic rounding only; 24 by default.
        random_inputs: how many random bit patterns out of all, and how many in the format's range.
        seed: of all that is random.

    Raises:
        ValueError: for unknown formats or modes, formats of more than 16 bits, and options without effect.

    >>> vectors = golden_vectors("E7M0", random_inputs=0)
    >>> k = vectors.inputs.tolist().index(0x3FC00000)  # 1.5, a tie
    >>> hex(vectors.outputs[k]), hex(vectors.codes[k])
    ('0x40000000', '0x40')
    """
    resolved = _check_options(format, rounding, overflow, stochastic_bits, random_inputs, seed)
    inputs = input_bits(resolved, random_inputs=random_inputs, seed=seed)
    if rounding != "stochastic":
        rounded = [round_to_format(x, resolved, rounding=rounding, overflow=overflow) for x in _values(inputs)]
        return Vectors(resolved, rounding, overflow, None, inputs, *_as_words(rounded, resolved), None)
    count = STOCHASTIC_BITS if stochastic_bits is None else stochastic_bits
    inputs, drawn = _with_draws(inputs, resolved, count, seed)
    rounded = [
        round_to_format(x, resolved, rounding=rounding, overflow=overflow, random_bits=int(bits), stochastic_bits=count)
        for x, bits in zip(_values(inputs), drawn, strict=True)
    ]
    return Vectors(resolved, rounding, overflow, count, inputs, *_as_words(rounded, resolved), drawn)


def _check_options(
    format: str | Format, rounding: str, overflow: str, stochastic_bits: int | None, random_inputs: int, seed: int
) -> Format:
    resolved = parse(format)
    check_modes(rounding, overflow)
    if resolved.bits > _MOST_BITS:
        raise InputError(f"{resolved} has {resolved.bits} bits; vectors are made for formats of at most {_MOST_BITS}")
    if stochastic_bits is not None:
        if rounding != "stochastic":
            raise InputError(f"stochastic_bits has no effect with rounding {rounding!r}; expected it with 'stochastic'")
        check_stochastic_bits(stochastic_bits)
    if random_inputs < 0 or seed < 0:
        name, bad = ("random_inputs", random_inputs) if random_inputs < 0 else ("seed", seed)
        raise InputError(f"{name} is {bad}; expected 0 or more")
    return resolved


def _with_draws(inputs: Words, format: Format, count: int, seed: int) -> tuple[Words, Words]:
    """Each input with random bits; between two values also with the two draws between which the result changes."""
    generator = np.random.default_rng(seed + 1)
    rows: list[tuple[int, int]] = []
    for bits, value in zip(inputs.tolist(), _values(inputs), strict=True):
        rows.append((bits, int(generator.integers(0, 2**count))))
        cut_off = int(fraction_of_quantum(value, format) * 2**count) if math.isfinite(value) else 0
        if cut_off:
            least = 2**count - cut_off
            rows += [(bits, least - 1), (bits, least)]
    repeated, drawn = np.array(rows, np.uint32).T
    unused = generator.integers(0, 2 ** (32 - count), drawn.size, dtype=np.uint32) << np.uint32(count)
    return np.ascontiguousarray(repeated), drawn | unused


def _as_words(rounded: Sequence[float], format: Format) -> tuple[Words, Words]:
    """Outputs as float32 bits, and their codes."""

    @lru_cache(maxsize=1 << 17)
    def words(exact: float, sign: float) -> tuple[int, int]:
        del sign  # part of the key, since -0 and 0 are equal
        value = package_result(exact, format)
        return float32_bits(value), format.to_bits(value, overflow="saturate_finite")

    pairs = np.array([words(exact, math.copysign(1.0, exact)) for exact in rounded], np.uint32).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def package_result(exact: float, format: Format) -> float:
    """What both packages return where the reference gives ``exact``: the same, but zero for results below 2^-126.

    A format without a sign, which has no zero, keeps its 2^-127; and casting float32 to float32 changes nothing.

    >>> package_result(2.0**-130, parse("bf16")), package_result(2.0**-127, parse("float8_e8m0fnu")) == 2.0**-127
    (0.0, True)
    """
    if not abs(exact) < _MIN_NORMAL or not format.is_signed or format.is_float32:
        return exact
    return math.copysign(0.0, exact) if format.has_negative_zero else 0.0


def float32_bits(value: float) -> int:
    """The bits of a value that float32 holds; of NaN the canonical ones.

    >>> hex(float32_bits(-1.5))
    '0xbfc00000'
    """
    return _CANONICAL_NAN if math.isnan(value) else int(np.float32(value).view(np.uint32))


def write_vectors(path: str | os.PathLike[str], vectors: Vectors, *, overwrite: bool = False) -> Path:
    """Write vectors to a file, as ``docs/vectors.md`` describes it.

    Args:
        path: the file.
        vectors: from :func:`golden_vectors`.
        overwrite: whether a file that exists may be replaced.

    Returns:
        The file's path.

    Raises:
        ValueError: if the file exists and may not be replaced.
    """
    path = Path(path)
    try:
        with path.open("w" if overwrite else "x", encoding="ascii", newline="\n") as file:
            file.writelines(vector_lines(vectors))
    except FileExistsError:
        raise InputError(f"{path} exists; expected a new file, or --overwrite (overwrite=True)") from None
    return path


def vector_lines(vectors: Vectors) -> Iterator[str]:
    """The lines of a file of vectors, each with its end.

    >>> header, *rows = vector_lines(golden_vectors("E7M0", random_inputs=0))
    >>> rows[0].rstrip()
    '["00000000", "00000000", "00"]'
    """
    header: dict[str, Any] = {
        "layout": LAYOUT,
        "version": LAYOUT_VERSION,
        "format": {"name": str(vectors.format), **{name: getattr(vectors.format, name) for name in _FORMAT_FIELDS}},
        "rounding": vectors.rounding,
        "overflow": vectors.overflow,
    }
    if vectors.stochastic_bits is not None:
        header["stochastic_bits"] = vectors.stochastic_bits
    drawn = vectors.random_bits
    header["columns"] = _columns(is_stochastic=drawn is not None)
    header["count"] = len(vectors)
    yield json.dumps(header) + "\n"
    digits = -(-vectors.format.bits // 4)
    rows = zip(vectors.inputs.tolist(), vectors.outputs.tolist(), vectors.codes.tolist(), strict=True)
    for k, (given, right, code) in enumerate(rows):
        tail = "" if drawn is None else f', "{drawn[k]:08x}"'
        yield f'["{given:08x}", "{right:08x}", "{code:0{digits}x}"{tail}]\n'


def _columns(*, is_stochastic: bool) -> list[str]:
    return [*_COLUMNS, *([_DRAWN_COLUMN] if is_stochastic else [])]


def read_vectors(path: str | os.PathLike[str]) -> Vectors:
    """Read a file of vectors, its columns in any order.

    Raises:
        ValueError: for a file of another layout or with other columns, one that was cut off, and lines that cannot be
            read.
        OSError: if it cannot be opened.
    """
    lines: list[str] = []
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
        header = json.loads(lines[0]) if lines else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("layout") != LAYOUT:
        raise InputError(f"{path} is no file of vectors: its first line is no header with layout {LAYOUT!r}")
    if header.get("version") != LAYOUT_VERSION:
        raise InputError(f"{path} has version {header.get('version')!r} of the layout; expected {LAYOUT_VERSION}")
    try:
        return _from_lines(header, lines[1:])
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"cannot read {path}: {what}") from None


def _from_lines(header: dict[str, Any], lines: list[str]) -> Vectors:
    fields = header["format"]
    resolved = Format(str(fields["name"]), **{name: fields[name] for name in _FORMAT_FIELDS})
    rounding, overflow = header["rounding"], header["overflow"]
    check_modes(rounding, overflow)
    is_stochastic = rounding == "stochastic"
    count = header["stochastic_bits"] if is_stochastic else None
    if count is not None:
        check_stochastic_bits(count)
    if len(lines) != header["count"]:
        raise ValueError(f"{len(lines)} vectors where the header says {header['count']}; the file was cut or added to")
    expected, columns = _columns(is_stochastic=is_stochastic), header["columns"]
    if not isinstance(columns, list) or sorted(map(str, columns)) != sorted(expected):
        raise ValueError(f"the header's columns are {columns}; expected {expected}, in any order")
    width = len(columns)
    table = np.empty((len(lines), width), np.uint32)
    for k, line in enumerate(lines):
        try:
            row = json.loads(line)
            if len(row) != width:
                raise ValueError
            table[k] = [int(word, 16) for word in row]
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"line {k + 2} is {line[:60]!r}; expected {width} hexadecimal strings") from None
    inputs, outputs, codes, *drawn = (np.ascontiguousarray(table[:, columns.index(name)]) for name in expected)
    return Vectors(
        resolved,
        ROUNDINGS[ROUNDINGS.index(rounding)],
        OVERFLOWS[OVERFLOWS.index(overflow)],
        count,
        inputs,
        outputs,
        codes,
        drawn[0] if drawn else None,
    )


def check_vectors(
    vectors: Vectors | str | os.PathLike[str], cast: Callable[..., Any], *, first: int = _FIRST_MISMATCHES
) -> Report:
    """Run vectors through a cast and compare every bit; NaN, whose payload each is free to choose, as NaN.

    Args:
        vectors: vectors or the path of a file of them.
        cast: takes a float32 NumPy array and returns one; with stochastic rounding it takes the random bits, uint32,
            as a second argument.
        first: how many mismatches to keep.

    Returns:
        The number of mismatches and the first few.

    Raises:
        ValueError: for a file that cannot be read, or a cast that returns another shape or dtype.

    >>> truncating = lambda x: (x.view(np.uint32) & 0xFF800000).view(np.float32)
    >>> report = check_vectors(golden_vectors("E7M0"), truncating)
    >>> report.passed, report.mismatches > 100
    (False, True)
    """
    if not isinstance(vectors, Vectors):
        vectors = read_vectors(vectors)
    x = vectors.inputs.view(np.float32)
    result = np.asarray(cast(x.copy()) if vectors.random_bits is None else cast(x.copy(), vectors.random_bits.copy()))
    if result.dtype != np.float32 or result.shape != x.shape:
        raise InputError(f"the cast returned {result.dtype}{list(result.shape)}; expected float32{list(x.shape)}")
    actual, expected = np.ascontiguousarray(result).view(np.uint32), vectors.outputs
    both_nan = np.isnan(result) & np.isnan(expected.view(np.float32))
    wrong = np.flatnonzero((actual != expected) & ~both_nan)
    drawn = vectors.random_bits
    kept = tuple(
        Mismatch(int(vectors.inputs[k]), int(expected[k]), int(actual[k]), None if drawn is None else int(drawn[k]))
        for k in wrong[:first]
    )
    return Report(len(vectors), wrong.size, kept)


def _values(bits: Words) -> list[float]:
    with np.errstate(invalid="ignore"):  # signalling NaN are there on purpose
        return bits.view(np.float32).astype(np.float64).tolist()


def _shown(bits: int) -> str:
    return f"{_values(np.array([bits], np.uint32))[0]!r} (0x{bits:08x})"
