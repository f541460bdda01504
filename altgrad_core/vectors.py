"""Golden vectors: inputs and right outputs of a cast in a file that any language can read, and the check against it.

The layout of the file is described in ``docs/vectors.md``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError, check_choice
from altgrad_core.formats import (
    FORMAT_REGISTRY,
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_BITS,
    Format,
    Overflow,
    Rounding,
    UnknownFormatError,
    parse,
)
from altgrad_core.reference import check_modes, check_stochastic_bits, round_to_format
from altgrad_core.scalars import is_integer
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
_WORD = re.compile("[0-9a-fA-F]{1,8}")

Words = npt.NDArray[np.uint32]

Compared = Literal["output", "code"]
"""A column that :func:`check_vectors` compares with."""


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
    """One wrong output or code.

    Attributes:
        input: float32 bits.
        expected: float32 bits, or a code.
        actual: likewise.
        random_bits: what was drawn; None unless rounding is stochastic.
        format: of the codes; None for outputs.
    """

    input: int
    expected: int
    actual: int
    random_bits: int | None = None
    format: Format | None = None

    def __str__(self) -> str:
        drawn = "" if self.random_bits is None else f" with random bits 0x{self.random_bits:08x}"
        actual, expected = (
            _shown(word) if self.format is None else _shown_code(word, self.format)
            for word in (self.actual, self.expected)
        )
        return f"{_shown(self.input)}{drawn} gives {actual}, not {expected}"


@dataclass(frozen=True)
class Report:
    """What :func:`check_vectors` found."""

    count: int
    mismatches: int
    first: tuple[Mismatch, ...]
    column: Compared = "output"

    @property
    def passed(self) -> bool:
        """Whether every output, or code, was right."""
        return self.mismatches == 0

    def __str__(self) -> str:
        differing = f"{self.mismatches} of {self.count} {self.column}s differ"
        head = differing if self.mismatches else f"all {self.count} agree"
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
    resolved = _check_options(format, rounding, overflow, stochastic_bits)
    random_inputs, seed = _count("random_inputs", random_inputs), _count("seed", seed)
    inputs = input_bits(resolved, random_inputs=random_inputs, seed=seed)
    if rounding != "stochastic":
        rounded = [round_to_format(x, resolved, rounding=rounding, overflow=overflow) for x in _values(inputs)]
        return Vectors(resolved, rounding, overflow, None, inputs, *_as_words(rounded, resolved), None)
    count = STOCHASTIC_BITS if stochastic_bits is None else int(stochastic_bits)
    inputs, drawn = _with_draws(inputs, resolved, count, seed)
    rounded = [
        round_to_format(x, resolved, rounding=rounding, overflow=overflow, random_bits=int(bits), stochastic_bits=count)
        for x, bits in zip(_values(inputs), drawn, strict=True)
    ]
    return Vectors(resolved, rounding, overflow, count, inputs, *_as_words(rounded, resolved), drawn)


def _check_options(format: str | Format, rounding: str, overflow: str, stochastic_bits: int | None) -> Format:
    resolved = parse(format)
    check_modes(rounding, overflow)
    if resolved.bits > _MOST_BITS:
        raise InputError(f"{resolved} has {resolved.bits} bits; vectors are made for formats of at most {_MOST_BITS}")
    if stochastic_bits is not None:
        if rounding != "stochastic":
            raise _without_effect(rounding)
        check_stochastic_bits(stochastic_bits)
    return resolved


def _without_effect(rounding: str) -> InputError:
    return InputError(f"stochastic_bits has no effect with rounding {rounding!r}; expected it with 'stochastic'")


def _count(name: str, value: object) -> int:
    if not is_integer(value) or value < 0:
        raise InputError(f"{name} is {value!r}; expected an integer of 0 or more")
    return int(value)


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
        ValueError: for a file of another layout or with other columns, one that was cut off or contradicts itself, such
            as by codes that are not those of their outputs, and lines that cannot be read.
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
    resolved = _read_format(header["format"])
    rounding, overflow = header["rounding"], header["overflow"]
    check_modes(rounding, overflow)
    is_stochastic = rounding == "stochastic"
    count = check_stochastic_bits(header["stochastic_bits"]) if is_stochastic else None
    if not is_stochastic and header.get("stochastic_bits") is not None:
        raise _without_effect(rounding)
    if len(lines) != header["count"]:
        raise ValueError(f"{len(lines)} vectors where the header says {header['count']}; the file was cut or added to")
    expected, columns = _columns(is_stochastic=is_stochastic), header["columns"]
    if not isinstance(columns, list) or sorted(map(str, columns)) != sorted(expected):
        raise ValueError(f"the header's columns are {columns}; expected {expected}, in any order")
    table = _table(lines, len(columns))
    _check_widths(table[:, columns.index("code")], resolved)
    inputs, outputs, codes, *drawn = (np.ascontiguousarray(table[:, columns.index(name)]) for name in expected)
    _check_codes(outputs, codes, resolved)
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


def _read_format(fields: object) -> Format:
    """The format of a header; a name that means another format is refused."""
    if not isinstance(fields, dict):
        raise ValueError(f"the header's format is {fields!r}; expected an object")
    described = Format(fields["name"], **{name: fields[name] for name in _FORMAT_FIELDS})
    try:
        named = parse(described.name)
    except UnknownFormatError:
        return described  # a name of the writer's own
    for name in _FORMAT_FIELDS:
        found, expected = getattr(described, name), getattr(named, name)
        if found != expected:
            raise ValueError(f"format {described.name} is said to have {name} {found!r}; expected {expected!r}")
    return described


def _table(lines: list[str], width: int) -> Words:
    """The words of the rows."""
    table = np.empty((len(lines), width), np.uint32)
    for k, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        # int() by itself takes signs and prefixes, and a string in place of the list has letters that it takes.
        if not isinstance(row, list) or len(row) != width or not all(_is_word(word) for word in row):
            raise ValueError(f"line {k + 2} is {line[:60]!r}; expected {width} hexadecimal strings of at most 8 digits")
        table[k] = [int(word, 16) for word in row]
    return table


def _is_word(word: object) -> bool:
    return isinstance(word, str) and _WORD.fullmatch(word) is not None


def _check_widths(codes: Words, format: Format) -> None:
    last = (1 << format.bits) - 1
    wide = np.flatnonzero(codes > last)
    if wide.size:
        raise ValueError(
            f"line {wide[0] + 2} has the code {codes[wide[0]]:x}; expected one of the {format.bits} bits of {format}, "
            f"0 to {last:x}"
        )


def _check_codes(outputs: Words, codes: Words, format: Format) -> None:
    """Refuse codes that are not those of their outputs. Of NaN any code will do, and 0 in a format without NaN."""
    known, places = np.unique(codes, return_inverse=True)
    decoded = np.array([format.to_real(code) for code in known.tolist()], np.float64)[places]
    values = np.array(_values(outputs), np.float64)
    is_right = decoded.view(np.int64) == values.view(np.int64)  # in bits, since -0 equals 0
    is_right |= np.isnan(values) & (np.isnan(decoded) if format.has_nan else codes == 0)
    if not format.has_inf:
        is_right |= np.isinf(values) & (decoded == np.copysign(format.max_representable_value, values))
    wrong = np.flatnonzero(~is_right)
    if wrong.size:
        k = int(wrong[0])
        output, code = _shown(int(outputs[k])), _shown_code(int(codes[k]), format)
        raise ValueError(f"line {k + 2} has the output {output} and {code}; {_right_code(float(values[k]), format)}")


def _right_code(output: float, format: Format) -> str:
    """What the code of an output should be, in words."""
    code = format.to_bits(output, overflow="saturate_finite")
    value = format.to_real(code)
    is_one = value == output and math.copysign(1, value) == math.copysign(1, output)
    is_infinity_as_max = math.isinf(output) and not math.isnan(value)
    if is_one or is_infinity_as_max or math.isnan(output):
        return f"expected {_shown_code(code, format)}"
    return f"expected the output to be a value of {format}"


def check_vectors(
    vectors: Vectors | str | os.PathLike[str],
    cast: Callable[..., Any],
    *,
    column: Compared = "output",
    first: int = _FIRST_MISMATCHES,
) -> Report:
    """Run vectors through a cast, or an encoder, and compare every bit.

    NaN, whose payload each is free to choose, is compared as NaN: any code of NaN is right where one is expected.

    Args:
        vectors: vectors or the path of a file of them.
        cast: takes a float32 NumPy array; with stochastic rounding it takes the random bits, uint32, as a second
            argument. It returns float32, or codes where the column is that of codes.
        column: what it is compared with: ``"output"``, or ``"code"`` for an encoder, which returns integers of any
            dtype.
        first: how many mismatches to keep.

    Returns:
        The number of mismatches and the first few.

    Raises:
        ValueError: for a file that cannot be read, an unknown column, or a cast that returns another shape or dtype.

    >>> truncating = lambda x: (x.view(np.uint32) & 0xFF800000).view(np.float32)
    >>> report = check_vectors(golden_vectors("E7M0"), truncating)
    >>> report.passed, report.mismatches > 100
    (False, True)
    >>> encoder = lambda x: [parse("E3M4").to_bits(value) for value in x.tolist()]
    >>> print(check_vectors(golden_vectors("E3M4", random_inputs=0), encoder, column="code"))
    all 1588 agree
    """
    check_choice("column", column, get_args(Compared))
    first = _count("first", first)
    if not isinstance(vectors, Vectors):
        vectors = read_vectors(vectors)
    x = vectors.inputs.view(np.float32)
    drawn, is_code = vectors.random_bits, column == "code"
    result = np.asarray(cast(x.copy()) if drawn is None else cast(x.copy(), drawn.copy()))
    _check_returned(result, x.shape, is_code=is_code)
    actual = result if is_code else np.ascontiguousarray(result).view(np.uint32)
    expected, of_codes = (vectors.codes, vectors.format) if is_code else (vectors.outputs, None)
    pairs = ((k, int(expected[k]), int(actual[k])) for k in np.flatnonzero(actual != expected).tolist())
    wrong = [pair for pair in pairs if not all(_is_nan(word, of_codes) for word in pair[1:])]
    kept = tuple(
        Mismatch(int(vectors.inputs[k]), right, given, None if drawn is None else int(drawn[k]), of_codes)
        for k, right, given in wrong[:first]
    )
    return Report(len(vectors), len(wrong), kept, column)


def _check_returned(result: npt.NDArray[Any], shape: tuple[int, ...], *, is_code: bool) -> None:
    is_right = np.issubdtype(result.dtype, np.integer) if is_code else result.dtype == np.float32
    if not is_right or result.shape != shape:
        what, wanted = ("encoder", "integers ") if is_code else ("cast", "float32")
        hint = ", or column='code' for an encoder" if not is_code and np.issubdtype(result.dtype, np.integer) else ""
        raise InputError(
            f"the {what} returned {result.dtype}{list(result.shape)}; expected {wanted}{list(shape)}{hint}"
        )


def _is_nan(word: int, format: Format | None) -> bool:
    """Whether a code of a format, or without one float32's bits, is NaN."""
    known = FORMAT_REGISTRY["float32"] if format is None else format
    return 0 <= word < 1 << known.bits and math.isnan(known.to_real(word))


def _values(bits: Words) -> list[float]:
    with np.errstate(invalid="ignore"):  # signalling NaN are there on purpose
        return bits.view(np.float32).astype(np.float64).tolist()


def _shown_code(code: int, format: Format) -> str:
    is_one = 0 <= code < 1 << format.bits
    return f"code {code:#x}" + (f" ({format.to_real(code)!r})" if is_one else f", which is none of {format}")


def _shown(bits: int) -> str:
    return f"{_values(np.array([bits], np.uint32))[0]!r} (0x{bits:08x})"
